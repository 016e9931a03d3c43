"""Tell decode rows' tokens and lengths, and merge their outputs with those of prefill rows, bit for bit.

Inputs
    prefill_out         [Tp, H, V]    model dtype, token and head strides free, last axis dense
    decode_out          [Tp, H, V]    model dtype, token and head strides free, last axis dense
    seq_lens_encoder    [B] int32     > 0: a prefill row
    seq_lens_decoder    [B] int32     tokens cached before this step
    seq_lens_this_time  [B] int32     new tokens
    batch_id_per_token  [Tp] int32    slot of each token, negative for padding
Outputs
    merged              [Tp, H, V]    model dtype, token and head strides free, last axis dense
    is_decode           [Tp] int32
    cache_seqlens       [B] int32

A row without prefill tokens and with cached ones is a decode row: its tokens, however many, have
is_decode 1 and come from decode_out. Tokens of prefill rows have 0 and come from prefill_out. Padding is
0 in both outputs. cache_seqlens is cached plus new tokens of decode rows with a token, 0 of all others.
Of the two outputs only the chosen one is read: what the other holds at a token, NaN even, is nothing.

Any H and V, any Tp (none: nothing to merge), any B. Tensors beyond 2^32 elements. No host
synchronisation; numbers of tokens, slots and heads do not recompile. `select_decode_rows` is the same for
all layers of a step.

Not: gathering of decode tokens into one row a slot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_LENGTHS = 128
"""Tokens and slots a program of the selection: one a thread."""

BLOCK_ELEMENTS = 4096
"""Elements a program of the merge, in whole heads: 8 KiB of bf16, four 16-byte accesses a thread each way."""


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _select_rows(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    batch_id_per_token,
    is_decode,
    cache_seqlens,
    num_tokens,
    num_slots,
    BLOCK: tl.constexpr,
):
    """Decides BLOCK successive tokens and as many slots. Grid: (ceil(max(tokens, slots) / BLOCK),)."""
    # 1. Tokens by the row they belong to; cached tokens alone make no decode row: a chunk may have some.
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = index < num_tokens
    rows = tl.load(batch_id_per_token + index, mask=is_token, other=-1)
    is_real = rows >= 0
    encoder = tl.load(seq_lens_encoder + rows, mask=is_real, other=0)
    decoder = tl.load(seq_lens_decoder + rows, mask=is_real, other=0)
    chosen = (encoder == 0) & (decoder > 0)
    tl.store(is_decode + index, chosen.to(tl.int32), mask=is_token)

    # 2. Slots: paused ones have cached tokens and nothing to decode.
    is_slot = index < num_slots
    encoder = tl.load(seq_lens_encoder + index, mask=is_slot, other=0)
    decoder = tl.load(seq_lens_decoder + index, mask=is_slot, other=0)
    this_time = tl.load(seq_lens_this_time + index, mask=is_slot, other=0)
    decodes = (encoder == 0) & (decoder > 0) & (this_time > 0)
    tl.store(cache_seqlens + index, tl.where(decodes, decoder + this_time, 0), mask=is_slot)


@triton.jit(do_not_specialize=["num_attention_heads"])
def _merge_tokens(
    prefill_out,
    prefill_stride_token,
    prefill_stride_head,
    decode_out,
    decode_stride_token,
    decode_stride_head,
    seq_lens_encoder,
    seq_lens_decoder,
    batch_id_per_token,
    merged,
    merged_stride_token,
    merged_stride_head,
    num_attention_heads,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Copies BLOCK_H heads of one token. Grid: (tokens, ceil(heads / BLOCK_H))."""
    # 1. The branch that computed the token.
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(batch_id_per_token + token)
    is_real = row >= 0
    encoder = tl.load(seq_lens_encoder + row, mask=is_real, other=0)
    decoder = tl.load(seq_lens_decoder + row, mask=is_real, other=0)
    from_decode = is_real & (encoder == 0) & (decoder > 0)
    from_prefill = is_real & (encoder > 0)

    # 2. Its output: one of the two loads is masked off whole. Nothing is added up: 0 x NaN is NaN.
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_V)[None, :]
    is_element = (heads < num_attention_heads) & (columns < V_HEAD_DIM)
    prefilled = tl.load(
        prefill_out + token * prefill_stride_token + heads * prefill_stride_head + columns,
        mask=is_element & from_prefill,
        other=0.0,
    )
    decoded = tl.load(
        decode_out + token * decode_stride_token + heads * decode_stride_head + columns,
        mask=is_element & from_decode,
        other=0.0,
    )

    # 3. Padding was loaded from neither and is 0.
    tl.store(
        merged + token * merged_stride_token + heads * merged_stride_head + columns,
        tl.where(from_decode, decoded, prefilled),
        mask=is_element,
    )


def select_decode_rows(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    batch_id_per_token,
    is_decode,
    cache_seqlens,
) -> None:
    """Launches the selection; shapes and dtypes as in the module's docstring."""
    num_tokens, num_slots = is_decode.shape[0], cache_seqlens.shape[0]
    count = max(num_tokens, num_slots)
    if count == 0:
        return
    _select_rows[(triton.cdiv(count, BLOCK_LENGTHS),)](
        seq_lens_encoder,
        seq_lens_decoder,
        seq_lens_this_time,
        batch_id_per_token,
        is_decode,
        cache_seqlens,
        num_tokens,
        num_slots,
        BLOCK=BLOCK_LENGTHS,
    )


def merge_decode_rows(
    prefill_out,
    decode_out,
    seq_lens_encoder,
    seq_lens_decoder,
    batch_id_per_token,
    merged,
) -> None:
    """Launches the merge; shapes and dtypes as in the module's docstring."""
    num_tokens, num_heads, width = merged.shape
    if num_tokens == 0:
        return
    block_v = triton.next_power_of_2(width)
    block_h = min(triton.next_power_of_2(num_heads), max(1, BLOCK_ELEMENTS // block_v))
    _merge_tokens[(num_tokens, triton.cdiv(num_heads, block_h))](
        prefill_out,
        prefill_out.stride(0),
        prefill_out.stride(1),
        decode_out,
        decode_out.stride(0),
        decode_out.stride(1),
        seq_lens_encoder,
        seq_lens_decoder,
        batch_id_per_token,
        merged,
        merged.stride(0),
        merged.stride(1),
        num_heads,
        V_HEAD_DIM=width,
        BLOCK_H=block_h,
        BLOCK_V=block_v,
    )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: both kernels on the harness's tensors."""
    select_decode_rows(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        inputs["batch_id_per_token"],
        outputs["is_decode"],
        outputs["cache_seqlens"],
    )
    merge_decode_rows(
        inputs["prefill_out"],
        inputs["decode_out"],
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["batch_id_per_token"],
        outputs["merged"],
    )


PATHS = (
    KernelPath(
        name="triton/decode_rows",
        operator="decode_rows",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
