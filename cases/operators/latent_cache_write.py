"""Writing the new tokens' latents into the paged cache: FastDeploy's O03, O04 and O15, slots as in O16.

    latent_cache.view(-1, latent_width)[slot_mapping[t]] = [compressed_kv[t] | k_pe[t]]

for every token t whose slot is not negative, a bit-exact copy; every other byte of the cache keeps
its value. Every row kind is written, padding never: its slots are negative numbers of several sizes.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer


def work(case: Case, layer: Layer) -> Work:
    """Every new row read once and written once, its slot read."""
    tokens = sum(row.seq_lens_this_time for row in case.steps[0])
    return Work(bytes=tokens * (2 * layer.latent_width * ITEM_BYTES[layer.dtype] + 8), flops=0)


_CACHE = ("num_blocks", "one", "block_size", "latent_width")

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
        TensorSpec(
            "block_tables",
            ("slots", "max_blocks"),
            "int32",
            "physical block of each block of a row",
            fill=Fill.METADATA,
            strided=True,
        ),
        TensorSpec("seq_lens_encoder", ("slots",), "int32", "new prefill tokens", fill=Fill.METADATA),
        TensorSpec("seq_lens_decoder", ("slots",), "int32", "cached tokens", fill=Fill.METADATA),
        TensorSpec("seq_lens_this_time", ("slots",), "int32", "new tokens", fill=Fill.METADATA),
        TensorSpec(
            "cu_seqlens_q",
            ("slots_plus_one",),
            "int32",
            "exclusive prefix sum of seq_lens_this_time",
            fill=Fill.METADATA,
        ),
        TensorSpec(
            "batch_id_per_token",
            ("tokens",),
            "int32",
            "slot of each token, -1 for padding",
            fill=Fill.METADATA,
        ),
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
