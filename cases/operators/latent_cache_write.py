"""Writing the new tokens' latents into the paged cache: FastDeploy's O03, O04 and O15, slots as in O16.

    latent_cache.view(-1, latent_width)[slot_mapping[t]] = [compressed_kv[t] | k_pe[t]]

for every token t whose slot is not negative, a bit-exact copy; every other byte of the cache keeps
its value. Every row kind is written, padding never: its slots are negative numbers of several sizes.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
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
    """Every new row read once and written once, its slot read."""
    tokens = sum(row.seq_lens_this_time for row in case.steps[0])
    return Work(bytes=tokens * (2 * layer.latent_width * ITEM_BYTES[layer.dtype] + 8), flops=0)


_CACHE = ("num_blocks", "one", "block_size", "cache_width")

OPERATOR = Operator(
    name="latent_cache_write",
    summary="bit-exact scatter of new latents and rotated keys into the paged latent cache",
    source="FastDeploy O03, O04, O15, O16",
    inputs=(
        TensorSpec(
            "compressed_kv",
            ("tokens", "kv_lora_rank"),
            "model",
            "normalised latent of each token; rows of padding hold NaN",
            fill=Fill.LATENT,
            strided=True,
        ),
        TensorSpec(
            "k_pe",
            ("tokens", "qk_rope_head_dim"),
            "model",
            "rotated key part of each token; rows of padding hold NaN",
            fill=Fill.ROPE_KEY,
            strided=True,
        ),
        TensorSpec(
            "latent_cache",
            _CACHE,
            "cache",
            "paged cache of [latent | k_pe] rows, written in place",
            fill=Fill.CACHE_BEFORE,
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
            "latent_cache",
            _CACHE,
            "cache",
            "the cache with the new tokens' rows written",
            judge=Judge.BITS,
        ),
    ),
    attributes=(),
    options=(
        "model",
        "layers",
        "block",
        "dtype",
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
