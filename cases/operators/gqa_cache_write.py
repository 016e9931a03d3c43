"""Rotating queries and keys of a packed projection, and writing keys and values: FastDeploy's O24.

A layer with H query heads and G heads of keys and values, of this rank, keeps

    k_cache [blocks, G, block_size, K]        v_cache [blocks, G, block_size, V]

with K and V of any width, the same or not. A token's row of qkv is [H heads of K | G heads of K | G heads
of V]: queries, keys, values. For every real token t of row b = batch_id_per_token[t], whatever the row's
kind, at

    p = seq_lens_decoder[b] + t - cu_seqlens_q[b]

the first D columns of every query and key are rotated by [cos | sin] = cos_sin_cache[p], as operator `rope`
does it: pairs (2i, 2i + 1) if is_neox is 0, (i, i + D / 2) if it is 1. The other K - D columns are copied.
With block = block_tables[b, p // block_size] and offset = p % block_size, afterwards

    query[t]                  = the rotated queries
    k_cache[block, :, offset] = the rotated keys
    v_cache[block, :, offset] = the values, bit for bit

and every other byte of both caches keeps its value. Padding tokens write neither; their queries are 0. A
model that rotates nothing passes no table: all columns are copied.

The position does not depend on the row's kind: seq_lens_encoder is handed over and changes nothing.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._gqa import key_cache, value_cache
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    BLOCK_TABLES,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
    SEQ_LENS_THIS_TIME,
)


def work(case: Case, layer: Layer) -> Work:
    """Every real token's row read and written once, its row of the table read; padding's queries written."""
    tokens = sum(row.new for row in case.steps[0])
    real = sum(row.seq_lens_this_time for row in case.steps[0])
    item, width = ITEM_BYTES[layer.dtype], layer.qk_rope_head_dim
    rotates = layer.model.rope != "none"
    padding = (tokens - real) * layer.num_attention_heads * layer.qk_head_dim
    moved = real * (2 * layer.qkv_width + rotates * width) + padding
    heads = layer.num_attention_heads + layer.num_key_value_heads
    return Work(bytes=moved * item + 4 * tokens, flops=3 * real * heads * width * rotates)


OPERATOR = Operator(
    name="gqa_cache_write",
    summary="rotation of a packed projection's queries and keys, and its scatter into paged K and V caches",
    source="arXiv:2305.13245 (heads in groups), arXiv:2104.09864 section 3.4; FastDeploy O24, section 3.5",
    inputs=(
        TensorSpec(
            "qkv",
            ("tokens", "qkv_width"),
            "model",
            "[queries | keys | values] of each token before rotation; rows of padding hold NaN",
            fill=Fill.QKV,
            strided=True,
        ),
        TensorSpec(
            "cos_sin_cache",
            ("table_positions", "qk_rope_head_dim"),
            "model",
            "[cos | sin] of the angles of every position; None where nothing is rotated",
            fill=Fill.ROPE_TABLE,
            strided=True,
        ),
        key_cache(fill=Fill.KEYS_BEFORE),
        value_cache(fill=Fill.VALUES_BEFORE),
        BLOCK_TABLES,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
        CU_SEQLENS_Q,
        BATCH_ID_PER_TOKEN,
    ),
    outputs=(
        TensorSpec(
            "query",
            ("tokens", "num_attention_heads", "qk_head_dim"),
            "model",
            "queries, rotated",
            judge=Judge.ROTATION,
            strided=True,
            when_empty="0",
        ),
        key_cache(judge=Judge.ROTATION),
        value_cache(judge=Judge.BITS),
    ),
    attributes=("is_neox",),
    options=(
        "model",
        "heads",
        "kv_heads",
        "v_dim",
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
        "tp",
    ),
    checks=("inputs", "guard", "values"),
    work=work,
)
