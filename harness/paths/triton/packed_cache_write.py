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
size, caches beyond 2^32 bytes. No host synchronisation; the number of tokens and the size of the cache do not
recompile. Two tokens must not share a slot.

Compiled, it needs compute capability 8.9 or later, for the conversion to e4m3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cases import Case
from harness.kernel_path import KernelPath, Tensors

TILE = 128
"""Columns that share a scale."""

BLOCK_TOKENS = 4
"""Tokens a program: 16 tiles of DeepSeek's rank, 16 numbers for each thread of 4 warps."""


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _pack_rows(
    compressed_kv,
    compressed_kv_stride,
    k_pe,
    k_pe_stride,
    packed_cache,
    slot_mapping,
    num_tokens,
    num_slots,
    KV_LORA_RANK: tl.constexpr,
    QK_ROPE_HEAD_DIM: tl.constexpr,
    IS_UE8M0: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Packs the rows of BLOCK_TOKENS successive tokens. Grid: (ceil(num_tokens / BLOCK_TOKENS),)."""
    # 1. Where the tokens go; int64 throughout, slots * width passes 2^32 in large caches.
    NUM_TILES: tl.constexpr = KV_LORA_RANK // TILE
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slots = tl.load(slot_mapping + tokens, mask=tokens < num_tokens, other=-1)
    # Compare before any division: -1 // block_size is 0 in C.
    written = (slots >= 0) & (slots < num_slots)
    source = tokens.to(tl.int64)
    target = packed_cache + slots[:, None] * (KV_LORA_RANK + 4 * NUM_TILES + 2 * QK_ROPE_HEAD_DIM)

    # 2. The tiles and their largest magnitudes, 0 where a tile holds nothing but NaN.
    tiles = tl.arange(0, BLOCK_TILES)[None, :]
    is_tile = written[:, None] & (tiles < NUM_TILES)
    columns = tiles[:, :, None] * TILE + tl.arange(0, TILE)[None, None, :]
    latent = tl.load(
        compressed_kv + source[:, None, None] * compressed_kv_stride + columns,
        mask=is_tile[:, :, None],
        other=0.0,
    ).to(tl.float32)
    is_nan = latent != latent  # noqa: PLR0124
    amax = tl.max(tl.where(is_nan, 0.0, tl.abs(latent)), 2)

    # 3. The scales. `/` is approximate.
    if IS_UE8M0:
        least = tl.div_rn(tl.maximum(amax, 1e-4), tl.full(amax.shape, 448.0, tl.float32))
        # Up to the next power of two, which is a mantissa of zeros; infinity stays what it is.
        raised = (least.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scales = raised.to(tl.float32, bitcast=True)
    else:
        scales = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
        scales = tl.maximum(scales, 1.1754943508222875e-38)
    tl.store((target + KV_LORA_RANK).to(tl.pointer_type(tl.float32)) + tiles, scales, mask=is_tile)

    # 4. The codes. No finite quotient is beyond 448 by more than its rounding: there is nothing to clamp.
    quotients = tl.div_rn(latent, tl.broadcast_to(scales[:, :, None], latent.shape))
    codes = quotients.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    # Not every cast gives one NaN; infinity over infinity is one more.
    codes = tl.where(quotients != quotients, 0x7F, codes)  # noqa: PLR0124
    tl.store(target[:, :, None] + columns, codes, mask=is_tile[:, :, None])

    # 5. The rotated key part, as bits.
    rope_columns = tl.arange(0, BLOCK_D)[None, :]
    is_rope = written[:, None] & (rope_columns < QK_ROPE_HEAD_DIM)
    rope = tl.load(k_pe + source[:, None] * k_pe_stride + rope_columns, mask=is_rope, other=0.0)
    rope_target = (target + KV_LORA_RANK + 4 * NUM_TILES).to(tl.pointer_type(k_pe.dtype.element_ty))
    tl.store(rope_target + rope_columns, rope, mask=is_rope)


def packed_cache_write(compressed_kv, k_pe, packed_cache, slot_mapping, scale_fmt="fp32") -> None:
    """Launches the kernel; shapes and dtypes as in the module's docstring."""
    num_tokens, rank = compressed_kv.shape
    if num_tokens == 0:
        return
    rope = k_pe.shape[1]
    num_slots = packed_cache.shape[0] * packed_cache.shape[2]
    _pack_rows[(triton.cdiv(num_tokens, BLOCK_TOKENS),)](
        compressed_kv,
        compressed_kv.stride(0),
        k_pe,
        k_pe.stride(0),
        packed_cache,
        slot_mapping,
        num_tokens,
        num_slots,
        KV_LORA_RANK=rank,
        QK_ROPE_HEAD_DIM=rope,
        IS_UE8M0=scale_fmt == "ue8m0",
        TILE=TILE,
        BLOCK_TILES=triton.next_power_of_2(rank // TILE),
        BLOCK_D=triton.next_power_of_2(rope),
        BLOCK_TOKENS=BLOCK_TOKENS,
    )


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
    packed_cache_write(
        inputs["compressed_kv"],
        inputs["k_pe"],
        outputs["packed_cache"],
        inputs["slot_mapping"],
        inputs["scale_fmt"],
    )


PATHS = (
    KernelPath(
        name="triton/packed_cache_write",
        operator="packed_cache_write",
        lanes=("interpreted", "compiled"),
        supports=supports,
        run=run,
        batch_invariant=True,
    ),
)
