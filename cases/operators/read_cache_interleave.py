"""Cached latents of every prefill row followed by its new ones, as dense tensors: FastDeploy's O09.

For key j of prefill row b (`seq_lens_encoder` > 0: a first chunk, a continued chunk or a prefix hit) with
C = seq_lens_decoder[b] cached tokens:

    t                      = cu_seqlens_k_prefill[b] + j
    full[t]                = the cache row of position j, read through block_tables        for j < C
    full[t]                = the new row cu_seqlens_q[b] + j - C                           for j >= C
    [full_compressed_kv[t] | full_k_pe[t]] = full[t]

A bit-exact copy. Decode, idle and paused rows have no key here, whatever they have in the cache. The
cache does not hold the new tokens yet.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import CU_SEQLENS_K_PREFILL, CU_SEQLENS_Q, SEQ_LENS_DECODER, SEQ_LENS_ENCODER


def work(case: Case, layer: Layer) -> Work:
    """Every key of a prefill row read once and written once."""
    keys = sum(row.length for row in case.steps[0] if row.seq_lens_encoder)
    return Work(bytes=keys * 2 * layer.latent_width * ITEM_BYTES[layer.dtype], flops=0)


OPERATOR = Operator(
    name="read_cache_interleave",
    summary="bit-exact gather of prefill rows' cached and new latents into dense keys",
    source="FastDeploy O09, prefill rows alone",
    inputs=(
        TensorSpec(
            "latent_cache",
            ("num_blocks", "one", "block_size", "cache_width"),
            "cache",
            "paged cache of [latent | k_pe] rows; the new tokens are not written yet; read only",
            fill=Fill.CACHE_BEFORE,
        ),
        TensorSpec(
            "block_tables",
            ("slots", "max_blocks"),
            "int32",
            "physical block of each block of a row; None where no row has cached tokens",
            fill=Fill.METADATA,
            strided=True,
        ),
        TensorSpec(
            "compressed_kv",
            ("tokens", "kv_lora_rank"),
            "model",
            "normalised latent of each new token; rows of padding hold NaN",
            fill=Fill.LATENT,
            strided=True,
        ),
        TensorSpec(
            "k_pe",
            ("tokens", "qk_rope_head_dim"),
            "model",
            "rotated key part of each new token; rows of padding hold NaN",
            fill=Fill.ROPE_KEY,
            strided=True,
        ),
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        CU_SEQLENS_Q,
        CU_SEQLENS_K_PREFILL,
    ),
    outputs=(
        TensorSpec(
            "full_compressed_kv",
            ("prefill_keys", "kv_lora_rank"),
            "model",
            "latents of the prefill rows, cached ones first",
            judge=Judge.EXACT,
            strided=True,
        ),
        TensorSpec(
            "full_k_pe",
            ("prefill_keys", "qk_rope_head_dim"),
            "model",
            "rotated key parts of the same tokens",
            judge=Judge.EXACT,
            strided=True,
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
        "table",
    ),
    checks=("inputs", "guard", "values"),
    work=work,
)
