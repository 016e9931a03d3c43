"""Write new latents and rotated keys into the paged latent cache, bit for bit.

Inputs
    compressed_kv  [Tp, R]            model dtype, token stride free, last axis dense
    k_pe           [Tp, D]            model dtype, token stride free, last axis dense
    latent_cache   [nb, 1, bs, R+D]   model dtype, contiguous; written in place
    slot_mapping   [Tp] int64         block * bs + offset; negative: the token is not written

For every token t with 0 <= slot_mapping[t] < nb * bs, cache row slot_mapping[t] becomes
[compressed_kv[t] | k_pe[t]]. No other byte changes. Two tokens must not share a slot.

R and D are powers of two. Any number of tokens (none: no launch), any block size, caches beyond 2^32
elements. No host synchronisation; the number of tokens and the size of the cache do not recompile.

Not: quantised caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

BLOCK_TOKENS = 8
"""Tokens a program: 8 rows of 1,152 bytes keep 4 warps' 16-byte accesses in flight."""


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _write_rows(
    compressed_kv,
    compressed_kv_stride,
    k_pe,
    k_pe_stride,
    latent_cache,
    slot_mapping,
    num_tokens,
    num_slots,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Copies the rows of BLOCK_TOKENS successive tokens. Grid: (ceil(num_tokens / BLOCK_TOKENS),)."""
    # 1. Where the tokens go; int64 throughout, slots * width passes 2^32 in large caches.
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slots = tl.load(slot_mapping + tokens, mask=tokens < num_tokens, other=-1)
    # Compare before any division: -1 // block_size is 0 in C.
    written = (slots >= 0) & (slots < num_slots)
    source = tokens.to(tl.int64)
    target = latent_cache + slots[:, None] * (KV_LORA_RANK + QK_ROPE_HEAD_DIM)

    # 2. The latent part.
    latent_columns = tl.arange(0, KV_LORA_RANK)[None, :]
    latent = tl.load(
        compressed_kv + source[:, None] * compressed_kv_stride + latent_columns,
        mask=written[:, None],
        other=0.0,
    )
    tl.store(target + latent_columns, latent, mask=written[:, None])

    # 3. The rotated key part behind it.
    rope_columns = tl.arange(0, QK_ROPE_HEAD_DIM)[None, :]
    rope = tl.load(k_pe + source[:, None] * k_pe_stride + rope_columns, mask=written[:, None], other=0.0)
    tl.store(target + KV_LORA_RANK + rope_columns, rope, mask=written[:, None])


def latent_cache_write(compressed_kv, k_pe, latent_cache, slot_mapping) -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_tokens, rank = compressed_kv.shape
    if num_tokens == 0:
        return
    num_slots = latent_cache.shape[0] * latent_cache.shape[2]
    _write_rows[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        compressed_kv,
        compressed_kv.stride(0),
        k_pe,
        k_pe.stride(0),
        latent_cache,
        slot_mapping,
        num_tokens,
        num_slots,
        KV_LORA_RANK=rank,
        QK_ROPE_HEAD_DIM=k_pe.shape[1],
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take a case."""
    for layer in case.layers:
        for name in ("kv_lora_rank", "qk_rope_head_dim"):
            value = getattr(layer, name)
            if value & (value - 1):
                return f"{name} must be a power of two, got {value}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    latent_cache_write(
        inputs["compressed_kv"], inputs["k_pe"], outputs["latent_cache"], inputs["slot_mapping"]
    )


PATHS = (
    KernelPath(
        name="triton/latent_cache_write",
        operator="latent_cache_write",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
