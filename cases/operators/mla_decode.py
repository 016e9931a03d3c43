"""Absorbed paged split-KV decode attention with LSE: FastDeploy's O08, O13 and O14 in one.

For token t of a decode or draft row b (`seq_lens_encoder` = 0, `seq_lens_decoder` > 0) and head h:

    visible = seq_lens_decoder[b] + (t - cu_seqlens_q[b]) + 1
    K       = the cache rows of b's first `visible` positions, read through block_tables
    s_j     = softmax_scale * q[t, h] . K_j
    lse     = ln sum_j exp(s_j)
    out     = sum_j exp(s_j - lse) K_j[:kv_lora_rank]

Tokens of padding and of prefill rows see no key here: out 0, lse -inf. Slots without a token this
step (`idle`, `paused`) have no influence.
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
    """Every cache row of a decode row read once, queries read, outputs written; q K^T and P V."""
    heads, width, rank = layer.num_attention_heads, layer.latent_width, layer.kv_lora_rank
    rows = [row for row in case.steps[0] if row.is_decode]
    tokens = sum(row.new for row in case.steps[0])
    # Query i of a row with C cached tokens sees C + i + 1 keys.
    pairs = sum(row.new * row.cached + row.new * (row.new + 1) // 2 for row in rows)
    cache = sum(row.length for row in rows) * width
    queries = tokens * heads * (width + rank)
    return Work(
        bytes=(cache + queries) * ITEM_BYTES[layer.dtype] + tokens * heads * 4,
        flops=2 * pairs * heads * (width + rank),
    )


OPERATOR = Operator(
    name="mla_decode",
    summary="absorbed paged decode attention with LSE, one or several new tokens a row",
    source="arXiv:2405.04434 section 2.1.3 (absorbed form); FastDeploy O08, O13, O14",
    inputs=(
        TensorSpec(
            "q",
            ("tokens", "num_attention_heads", "latent_width"),
            "model",
            "absorbed query; rows of padding tokens hold NaN",
            fill=Fill.QUERY,
            strided=True,
        ),
        TensorSpec(
            "latent_cache",
            ("num_blocks", "one", "block_size", "cache_width"),
            "cache",
            "paged cache of [latent | k_pe] rows; new tokens already written; read only",
            fill=Fill.CACHE_AFTER,
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
            "out",
            ("tokens", "num_attention_heads", "kv_lora_rank"),
            "model",
            "attention over the latents",
            judge=Judge.ATTENTION,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "lse",
            ("tokens", "num_attention_heads"),
            "float32",
            "log-sum-exp of the scaled logits, natural log",
            judge=Judge.LSE,
            when_empty="-inf",
        ),
    ),
    attributes=("softmax_scale", "kv_lora_rank", "splits"),
    options=(
        "model",
        "heads",
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
        "splits",
        "tp",
    ),
    checks=("inputs", "guard", "values", "lse"),
    work=work,
)
