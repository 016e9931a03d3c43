"""Quantising the new tokens' latents into the packed cache: FastDeploy's O17, "fp8_ds_mla".

For every token t with 0 <= slot_mapping[t] < blocks * block_size, physical row slot_mapping[t] becomes,
with R = kv_lora_rank and D = qk_rope_head_dim,

    | bytes                     | content                                               |
    |---------------------------|-------------------------------------------------------|
    | 0 to R - 1                | latents as e4m3fn, quantised in tiles of 128          |
    | R to R + R / 32 - 1       | R / 128 float32 scales, little-endian                 |
    | R + R / 32 and 2 D more   | k_pe in bf16, bit for bit                             |

and every other byte keeps its value. R is a multiple of 128: 656 bytes for 512 and 64.

All arithmetic is float32, nothing fused, subnormal numbers kept, every operation rounded once to nearest
even. Of a tile x[128]:

    amax = the largest |x|, NaN left out; 0 if nothing is left
    s    = max(amax / 448, 2^-126)                                       where scale_fmt is fp32
    s    = the least power of two that is not below max(amax, 1e-4f) / 448   where scale_fmt is ue8m0
    q    = e4m3fn(min(max(x / s, -448), 448))          a division, then one rounding to nearest even

The division by 448 is no multiplication by 1 / 448: these give other bytes. The clamp says what an e4m3 cast
need not do; no finite number reaches it, for |x / s| <= 448 (1 + 2^-23). It follows that

    zeros        q = 0 with the sign of x, s = 2^-126 or 2^-22
    small tiles  under fp32, amax below 448 * 2^-126 keeps s = 2^-126; under ue8m0, below 1e-4 s = 2^-22
    outliers     what is less than 2^-10 s becomes 0 with its sign; 2^-10 s itself, a tie, too
    NaN          q = 0x7F whatever its sign and payload; the rest of its tile is quantised as without it
    infinities   s = inf, finite numbers become 0 with their sign, infinities 0x7F; read back, 0 * inf makes
                 the whole tile NaN, and no other tile

A reader multiplies: x' = e4m3(q) * s. Every row kind is written, padding never: its slots are negative.
"""

from cases.cache_layout import packed_row_bytes
from cases.case import Case
from cases.contract import Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    BLOCK_TABLES,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
    SEQ_LENS_THIS_TIME,
)


def work(case: Case, layer: Layer) -> Work:
    """Every new row read once in bf16 and written once packed, its slot read; no product worth counting."""
    tokens = sum(row.seq_lens_this_time for row in case.steps[0])
    packed = packed_row_bytes(layer.kv_lora_rank, layer.qk_rope_head_dim)
    return Work(bytes=tokens * (2 * layer.latent_width + packed + 8), flops=0)


_CACHE = ("num_blocks", "one", "block_size", "packed_width")

OPERATOR = Operator(
    name="packed_cache_write",
    summary="byte-exact quantisation of new latents in tiles, with their keys, into the packed fp8 cache",
    source="FastDeploy O17 and section 3.3; DeepSeek-V3.2 and FlashMLA, rows of 656 bytes",
    inputs=(
        TensorSpec(
            "compressed_kv",
            ("tokens", "kv_lora_rank"),
            "model",
            "normalised latent of each token, bf16; rows of padding hold NaN",
            fill=Fill.TILED_LATENT,
            strided=True,
        ),
        TensorSpec(
            "k_pe",
            ("tokens", "qk_rope_head_dim"),
            "model",
            "rotated key part of each token, bf16; rows of padding hold NaN",
            fill=Fill.HARD_ROPE_KEY,
            strided=True,
        ),
        TensorSpec(
            "packed_cache",
            _CACHE,
            "uint8",
            "paged cache of packed rows, written in place",
            fill=Fill.PACKED_BEFORE,
        ),
        TensorSpec(
            "slot_mapping",
            ("tokens",),
            "int64",
            "physical row of each token: block * block_size + offset; negative: not written",
            fill=Fill.METADATA,
        ),
        BLOCK_TABLES,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
        CU_SEQLENS_Q,
        BATCH_ID_PER_TOKEN,
    ),
    outputs=(
        TensorSpec(
            "packed_cache",
            _CACHE,
            "uint8",
            "the cache with the new tokens' rows written",
            judge=Judge.BITS,
        ),
    ),
    attributes=("scale_fmt",),
    options=(
        "model",
        "layers",
        "block",
        "scale_fmt",
        "data",
        "seed",
        "pool",
        "pages",
        "tail",
        "poison",
        "strided",
    ),
    checks=("inputs", "guard", "values"),
    work=work,
)
