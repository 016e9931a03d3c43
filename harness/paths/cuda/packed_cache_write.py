"""Quantise new latents in tiles of 128 and write them, with their keys, into the packed fp8 cache.

Inputs
    compressed_kv  [Tp, R]               bf16, token stride free, last axis dense
    k_pe           [Tp, D]               bf16, token stride free, last axis dense
    packed_cache   [nb, 1, bs, width]    uint8, contiguous, aligned to 4 bytes; written in place
    slot_mapping   [Tp] int64            block * bs + offset; negative: the token is not written
    scale_fmt                            "fp32", or "ue8m0" for scales that are powers of two

For every token t with 0 <= slot_mapping[t] < nb * bs, cache row slot_mapping[t] becomes

    R bytes of e4m3fn | R / 128 float32 scales | D bf16, k_pe bit for bit

and no other byte changes. Of a tile, amax is the largest magnitude, NaN left out; the scale s is
max(amax / 448, 2^-126), or the least power of two not below max(amax, 1e-4) / 448; a code is x / s rounded to
the nearest e4m3fn, ties to even, and 0x7F for NaN. Divisions are IEEE's: approximate ones give other bytes.

R is a multiple of 128, D is even; width = R + R / 32 + 2 D. Any number of tokens (none: no launch), any block
size, caches beyond 2^32 bytes. Fastest where the cache's rows and the inputs' addresses and strides are
multiples of 16 bytes. No host synchronisation. Two tokens must not share a slot.

Any compute capability gives the same bytes; before 8.9 the conversion to e4m3 takes several instructions.
"""

from __future__ import annotations

from cases import Case
from harness.cuda.build import kernels_beside
from harness.kernel_path import KernelPath, Tensors

KERNELS = kernels_beside(__file__)

TILE = 128
"""Columns that share a scale."""


def supports(case: Case) -> str | None:
    """None, or why the kernel does not take a case."""
    for layer in case.layers:
        if layer.kv_lora_rank % TILE:
            return f"kv_lora_rank must be a multiple of {TILE}, got {layer.kv_lora_rank}"
        if layer.qk_rope_head_dim % 2:
            return f"qk_rope_head_dim must be even, got {layer.qk_rope_head_dim}"
    return None


def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
    """The path: the kernel on the harness's tensors."""
    KERNELS.packed_cache_write(
        inputs["compressed_kv"],
        inputs["k_pe"],
        outputs["packed_cache"],
        inputs["slot_mapping"],
        inputs["scale_fmt"] == "ue8m0",
    )


PATHS = (
    KernelPath(
        name="cuda/packed_cache_write",
        operator="packed_cache_write",
        lanes=("host", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
