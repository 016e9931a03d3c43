"""Pack decode rows' tokens and queries, and put their outputs among those of prefill rows, bit for bit.

Inputs
    query                      [Tp, H, W]     model dtype, token and head strides free, last axis dense
    prefill_out                [Tp, H, V]     the same
    decode_out                 [Td, H, V]     the same; packed
    seq_lens_encoder           [B] int32      > 0: a prefill row
    seq_lens_decoder           [B] int32      tokens cached before this step
    seq_lens_this_time         [B] int32      new tokens
    cu_seqlens_q               [B + 1] int32  exclusive prefix sum of the new tokens
    batch_id_per_token         [Tp] int32     slot of each token, negative for padding
Outputs
    cu_seqlens_q_decode        [B + 1] int32  exclusive prefix sum of decode rows' new tokens
    batch_id_per_decode_token  [Td] int32     slot of each packed token, -1 behind the last
    packed_query               [Td, H, W]     model dtype, token and head strides free; 0 behind the last
    merged                     [Tp, H, V]     model dtype, token and head strides free, last axis dense
    cache_seqlens              [B] int32      cached plus new tokens of decode rows, 0 of all others

A row without prefill tokens, with cached ones and with new ones is a decode row. All of its tokens are
decode tokens: packed, they follow one another as they do in the step. merged holds their decode_out, the
prefill_out of all other real tokens, and 0 at padding. Of the two branches only the one chosen is read: what
the other holds, NaN even, is nothing. Merged in place (prefill_out None), only decode tokens are written.

Td is room, from a shape. REQUIRED: no fewer than decode tokens. Were there more, nothing leaves its tensor:
those behind the Td-th are not packed, and their merged is 0 or, in place, stays as it was.

Any H, W and V, any Tp, Td and B, none included. The sum must fit into int32. Tensors beyond 2^32
elements. O(B) work for the sum, in one program. No host synchronisation; numbers of tokens, slots and
heads do not recompile. `select_decode_rows` is the same for all layers of a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_SLOTS = 1024
"""Slots that are summed at a time: engines rarely have more, so the loop has one turn."""

BLOCK_TOKENS = 128
"""Tokens a program of the list: one a thread."""

BLOCK_ELEMENTS = 4096
"""Elements a program that copies, in whole heads: 8 KiB of bf16, four 16-byte accesses a thread each way."""


@triton.jit(do_not_specialize=["num_slots"])
def _count_tokens(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    cu_seqlens_q_decode,
    cache_seqlens,
    num_slots,
    BLOCK_SLOTS: tl.constexpr,
):
    """Prefix sum of decode rows' tokens, and their lengths, BLOCK_SLOTS slots at a time. Grid: (1,)."""
    # 1. Entry 0: all there is to write where no slot is.
    before = 0
    tl.store(cu_seqlens_q_decode, before)

    for start in range(0, num_slots, BLOCK_SLOTS):
        # 2. Chunks have cached tokens too, and paused slots cached ones but nothing to decode.
        slots = start + tl.arange(0, BLOCK_SLOTS)
        is_slot = slots < num_slots
        encoder = tl.load(seq_lens_encoder + slots, mask=is_slot, other=0)
        decoder = tl.load(seq_lens_decoder + slots, mask=is_slot, other=0)
        this_time = tl.load(seq_lens_this_time + slots, mask=is_slot, other=0)
        decodes = (encoder == 0) & (decoder > 0) & (this_time > 0)
        tl.store(cache_seqlens + slots, tl.where(decodes, decoder + this_time, 0), mask=is_slot)

        # 3. The sum up to and with each slot is the entry behind it.
        decoded = tl.where(decodes, this_time, 0)
        tl.store(cu_seqlens_q_decode + 1 + slots, before + tl.cumsum(decoded, 0), mask=is_slot)
        before += tl.sum(decoded, 0)


@triton.jit
def _packed_place(token, row, is_real, cu_seqlens_q, cu_seqlens_q_decode):
    """(place of tokens among the packed, whether their rows are decode rows), of rows that exist."""
    begin = tl.load(cu_seqlens_q + row, mask=is_real, other=0)
    first = tl.load(cu_seqlens_q_decode + row, mask=is_real, other=0)
    behind = tl.load(cu_seqlens_q_decode + row + 1, mask=is_real, other=0)
    return first + token - begin, behind > first


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "num_decode_tokens"])
def _list_tokens(
    batch_id_per_token,
    cu_seqlens_q,
    cu_seqlens_q_decode,
    batch_id_per_decode_token,
    num_tokens,
    num_slots,
    num_decode_tokens,
    BLOCK_TOKENS: tl.constexpr,
):
    """Lists BLOCK_TOKENS successive tokens where they are packed, and as many places behind the last.

    Grid: (ceil(max(tokens, packed tokens) / BLOCK_TOKENS),).
    """
    # 1. A decode token says its slot at its place, if there is room for it.
    index = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = tl.load(batch_id_per_token + index, mask=index < num_tokens, other=-1)
    is_real = rows >= 0
    place, decodes = _packed_place(index, rows, is_real, cu_seqlens_q, cu_seqlens_q_decode)
    is_listed = is_real & decodes & (place < num_decode_tokens)
    tl.store(batch_id_per_decode_token + place, rows, mask=is_listed)

    # 2. Places behind the last decode token are nobody's.
    is_unused = (index >= tl.load(cu_seqlens_q_decode + num_slots)) & (index < num_decode_tokens)
    tl.store(batch_id_per_decode_token + index, -1, mask=is_unused)


@triton.jit(do_not_specialize=["num_attention_heads"])
def _gather_tokens(
    query,
    query_stride_token,
    query_stride_head,
    cu_seqlens_q,
    cu_seqlens_q_decode,
    batch_id_per_decode_token,
    packed_query,
    packed_stride_token,
    packed_stride_head,
    num_attention_heads,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Copies BLOCK_H heads of one packed token. Grid: (packed tokens, ceil(heads / BLOCK_H))."""
    # 1. Where the step has the token; nowhere behind the last decode token.
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(batch_id_per_decode_token + place)
    is_packed = row >= 0
    begin = tl.load(cu_seqlens_q + row, mask=is_packed, other=0)
    first = tl.load(cu_seqlens_q_decode + row, mask=is_packed, other=0)
    token = begin + place - first

    # 2. Its heads.
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_W)[None, :]
    is_element = (heads < num_attention_heads) & (columns < WIDTH)
    values = tl.load(
        query + token * query_stride_token + heads * query_stride_head + columns,
        mask=is_element & is_packed,
        other=0.0,
    )
    tl.store(
        packed_query + place * packed_stride_token + heads * packed_stride_head + columns,
        values,
        mask=is_element,
    )


@triton.jit(do_not_specialize=["num_attention_heads", "num_decode_tokens"])
def _merge_tokens(
    prefill_out,
    prefill_stride_token,
    prefill_stride_head,
    decode_out,
    decode_stride_token,
    decode_stride_head,
    cu_seqlens_q,
    cu_seqlens_q_decode,
    batch_id_per_token,
    merged,
    merged_stride_token,
    merged_stride_head,
    num_attention_heads,
    num_decode_tokens,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_V: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    """Copies BLOCK_H heads of one token. Grid: (tokens, ceil(heads / BLOCK_H))."""
    # 1. The branch that computed the token, and its place there.
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(batch_id_per_token + token)
    is_token = row >= 0
    place, decodes = _packed_place(token, row, is_token, cu_seqlens_q, cu_seqlens_q_decode)
    from_decode = is_token & decodes & (place < num_decode_tokens)
    from_prefill = is_token & (decodes == 0)

    # 2. The decode branch's output, not read where it has none.
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK_V)[None, :]
    is_element = (heads < num_attention_heads) & (columns < V_HEAD_DIM)
    values = tl.load(
        decode_out + place * decode_stride_token + heads * decode_stride_head + columns,
        mask=is_element & from_decode,
        other=0.0,
    )
    is_written = is_element & from_decode

    # 3. Or prefill's, unless it is in its place already. Nothing is added up: 0 x NaN is NaN. Padding was
    # loaded from neither and is 0.
    if not IN_PLACE:
        prefilled = tl.load(
            prefill_out + token * prefill_stride_token + heads * prefill_stride_head + columns,
            mask=is_element & from_prefill,
            other=0.0,
        )
        values = tl.where(from_decode, values, prefilled)
        is_written = is_element
    tl.store(
        merged + token * merged_stride_token + heads * merged_stride_head + columns,
        values,
        mask=is_written,
    )


def _tile(num_heads: int, width: int) -> tuple[int, int]:
    """Heads and columns of a program of the copies, powers of two."""
    columns = triton.next_power_of_2(width)
    return min(triton.next_power_of_2(num_heads), max(1, BLOCK_ELEMENTS // columns)), columns


def select_decode_rows(
    seq_lens_encoder,
    seq_lens_decoder,
    seq_lens_this_time,
    cu_seqlens_q,
    batch_id_per_token,
    cu_seqlens_q_decode,
    batch_id_per_decode_token,
    cache_seqlens,
) -> None:
    """Launches the sums and the list; shapes and dtypes as in the module's docstring."""
    num_slots = cache_seqlens.shape[0]
    num_tokens, num_decode_tokens = batch_id_per_token.shape[0], batch_id_per_decode_token.shape[0]
    _count_tokens[(1,)](
        seq_lens_encoder,
        seq_lens_decoder,
        seq_lens_this_time,
        cu_seqlens_q_decode,
        cache_seqlens,
        num_slots,
        BLOCK_SLOTS=BLOCK_SLOTS,
    )
    if num_decode_tokens == 0:
        return
    _list_tokens[(triton.cdiv(max(num_tokens, num_decode_tokens), BLOCK_TOKENS),)](
        batch_id_per_token,
        cu_seqlens_q,
        cu_seqlens_q_decode,
        batch_id_per_decode_token,
        num_tokens,
        num_slots,
        num_decode_tokens,
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


def gather_decode_rows(
    query, cu_seqlens_q, cu_seqlens_q_decode, batch_id_per_decode_token, packed_query
) -> None:
    """Launches the gather; shapes and dtypes as in the module's docstring."""
    num_decode_tokens, num_heads, width = packed_query.shape
    if num_decode_tokens == 0:
        return
    block_h, block_w = _tile(num_heads, width)
    _gather_tokens[(num_decode_tokens, triton.cdiv(num_heads, block_h))](
        query,
        query.stride(0),
        query.stride(1),
        cu_seqlens_q,
        cu_seqlens_q_decode,
        batch_id_per_decode_token,
        packed_query,
        packed_query.stride(0),
        packed_query.stride(1),
        num_heads,
        WIDTH=width,
        BLOCK_H=block_h,
        BLOCK_W=block_w,
    )


def merge_decode_rows(
    prefill_out, decode_out, cu_seqlens_q, cu_seqlens_q_decode, batch_id_per_token, merged
) -> None:
    """Launches the merge; shapes and dtypes as in the module's docstring.

    Args:
        prefill_out: None merges in place: merged holds the prefill branch's outputs already, and only
            decode tokens are written.
    """
    num_tokens, num_heads, width = merged.shape
    if num_tokens == 0:
        return
    block_h, block_v = _tile(num_heads, width)
    prefilled = merged if prefill_out is None else prefill_out
    _merge_tokens[(num_tokens, triton.cdiv(num_heads, block_h))](
        prefilled,
        prefilled.stride(0),
        prefilled.stride(1),
        decode_out,
        decode_out.stride(0),
        decode_out.stride(1),
        cu_seqlens_q,
        cu_seqlens_q_decode,
        batch_id_per_token,
        merged,
        merged.stride(0),
        merged.stride(1),
        num_heads,
        decode_out.shape[0],
        V_HEAD_DIM=width,
        BLOCK_H=block_h,
        BLOCK_V=block_v,
        IN_PLACE=prefill_out is None,
    )


def supports(case: Case) -> str | None:
    """None: every case is taken."""
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: selection, gather and merge on the harness's tensors."""
    select_decode_rows(
        inputs["seq_lens_encoder"],
        inputs["seq_lens_decoder"],
        inputs["seq_lens_this_time"],
        inputs["cu_seqlens_q"],
        inputs["batch_id_per_token"],
        outputs["cu_seqlens_q_decode"],
        outputs["batch_id_per_decode_token"],
        outputs["cache_seqlens"],
    )
    gather_decode_rows(
        inputs["query"],
        inputs["cu_seqlens_q"],
        outputs["cu_seqlens_q_decode"],
        outputs["batch_id_per_decode_token"],
        outputs["packed_query"],
    )
    merge_decode_rows(
        inputs["prefill_out"],
        inputs["decode_out"],
        inputs["cu_seqlens_q"],
        outputs["cu_seqlens_q_decode"],
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
