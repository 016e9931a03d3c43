"""Absorbed MLA attention over listed tokens of the step, with LSE.

Inputs
    q              [Tp, H, R+D]      model dtype, token and head strides free, last axis dense
    compressed_kv  [Tp, R]           model dtype, token stride free, last axis dense
    k_pe           [Tp, D]           model dtype, token stride free, last axis dense
    indices        [Tp, 1, K] int32  token stride free, last axis dense: tokens of the step
Outputs
    out            [Tp, H, R]        model dtype, token and head strides free
    lse            [Tp, H]           fp32, contiguous, natural log

Token t attends to the tokens that indices[t, 0] names. Entries outside 0 to Tp - 1 name none, wherever they
stand, and nothing is read for them; a token named twice counts twice. A list that names none: out 0, lse
-inf. Nothing is rounded but weights and outputs; sums are fp32.

R and D are powers of two from 16 on. Any H, any K, any Tp (none: no launch). bf16, fp16, fp32. No host
synchronisation, and the launch depends on nothing on the device. Numbers of tokens, entries and heads
within a tile do not recompile.

Not: splits. A prefill has tokens enough to fill the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors
from harness.paths.triton.sparse_decode import BLOCK_ENTRIES, attend_keys, list_end


@triton.jit(do_not_specialize=["num_tokens", "num_entries", "num_attention_heads"])
def _attend_step(
    q,
    q_stride_token,
    q_stride_head,
    compressed_kv,
    compressed_kv_stride,
    k_pe,
    k_pe_stride,
    indices,
    indices_stride,
    out,
    out_stride_token,
    out_stride_head,
    lse,
    softmax_scale,
    num_tokens,
    num_entries,
    num_attention_heads,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Attention of one token's BLOCK_H heads. Grid: (tokens * ceil(heads / BLOCK_H),), head tiles fastest."""
    # 1. Locate the token's list, without what names no token behind it.
    head_tiles = tl.cdiv(num_attention_heads, BLOCK_H)
    row = (tl.program_id(0) // head_tiles).to(tl.int64)
    head_tile = tl.program_id(0) % head_tiles
    entries = indices + row * indices_stride
    end = list_end(entries, 0, num_entries, num_tokens, BLOCK_ENTRIES)

    # 2. Load the queries of the head tile, latent and rope part apart.
    heads = head_tile * BLOCK_H + tl.arange(0, BLOCK_H)
    is_head = heads < num_attention_heads
    latent_columns = tl.arange(0, KV_LORA_RANK)
    rope_columns = tl.arange(0, QK_ROPE_HEAD_DIM)
    q_rows = q + row * q_stride_token + heads.to(tl.int64)[:, None] * q_stride_head
    q_latent = tl.load(q_rows + latent_columns[None, :], mask=is_head[:, None], other=0.0)
    q_rope = tl.load(q_rows + KV_LORA_RANK + rope_columns[None, :], mask=is_head[:, None], other=0.0)

    # 3. Online softmax over tiles of BLOCK_N entries.
    maximum = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    accumulator = tl.zeros([BLOCK_H, KV_LORA_RANK], tl.float32)
    for start in range(0, end, BLOCK_N):
        places = start + tl.arange(0, BLOCK_N)
        listed = tl.load(entries + places, mask=places < end, other=-1)
        # Whoever wrote the list may have meant rows of the cache.
        is_key = (listed >= 0) & (listed < num_tokens)
        # What is no key reads 0.
        keys = listed.to(tl.int64)[:, None]
        latent = tl.load(
            compressed_kv + keys * compressed_kv_stride + latent_columns[None, :],
            mask=is_key[:, None],
            other=0.0,
        )
        rope = tl.load(k_pe + keys * k_pe_stride + rope_columns[None, :], mask=is_key[:, None], other=0.0)
        maximum, total, accumulator = attend_keys(
            q_latent, q_rope, latent, rope, is_key, maximum, total, accumulator, softmax_scale
        )

    # 4. Normalise and store. Without a key the maximum is -inf and all sums are 0: out 0, lse -inf.
    divisor = tl.where(total == 0.0, 1.0, total)
    out_rows = out + row * out_stride_token + heads.to(tl.int64)[:, None] * out_stride_head
    tl.store(
        out_rows + latent_columns[None, :],
        (accumulator / divisor[:, None]).to(out.dtype.element_ty),
        mask=is_head[:, None],
    )
    log_sum = maximum * softmax_scale + tl.log(divisor)
    tl.store(lse + row * num_attention_heads + heads, log_sum, mask=is_head)


@dataclass(frozen=True)
class Tile:
    """Shape of a program: heads and keys it works on at a time, warps and pipeline stages."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int


def tile_for(heads: int, latent_width: int, itemsize: int) -> Tile:
    """The tile for a head count and row width, within the 227 KiB of shared memory of an SM."""
    if itemsize == 4:
        return Tile(16, 16, 4, 1)
    if latent_width > 576:
        return Tile(16, 32, 8, 1)
    if heads <= 16:
        return Tile(16, 32, 4, 2)
    return Tile(64, 32, 8, 3)


def sparse_prefill(q, compressed_kv, k_pe, indices, out, lse, *, softmax_scale: float) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    tokens, heads, latent_width = q.shape
    if tokens == 0:
        return
    rank = out.shape[2]
    tile = tile_for(heads, latent_width, q.element_size())
    _attend_step[(tokens * triton.cdiv(heads, tile.heads),)](
        q,
        q.stride(0),
        q.stride(1),
        compressed_kv,
        compressed_kv.stride(0),
        k_pe,
        k_pe.stride(0),
        indices,
        indices.stride(0),
        out,
        out.stride(0),
        out.stride(1),
        lse,
        softmax_scale,
        tokens,
        indices.shape[2],
        heads,
        KV_LORA_RANK=rank,
        QK_ROPE_HEAD_DIM=latent_width - rank,
        BLOCK_H=tile.heads,
        BLOCK_N=tile.keys,
        BLOCK_ENTRIES=BLOCK_ENTRIES,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take a case."""
    for layer in case.layers:
        sizes = {"kv_lora_rank": layer.kv_lora_rank, "qk_rope_head_dim": layer.qk_rope_head_dim}
        for name, value in sizes.items():
            if value < 16 or value & (value - 1):
                return f"{name} must be a power of two from 16 on, got {value}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    sparse_prefill(
        inputs["q"],
        inputs["compressed_kv"],
        inputs["k_pe"],
        inputs["indices"],
        outputs["out"],
        outputs["lse"],
        softmax_scale=inputs["softmax_scale"],
    )


PATHS = (
    KernelPath(
        name="triton/sparse_prefill",
        operator="sparse_prefill",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
