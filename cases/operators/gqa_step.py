"""Paged attention of query heads in groups over a mixed batch, every row kind at once: section 3.5 and P7.

H query heads share G heads of keys and values, of this rank: head h reads KV head h // (H / G). Keys are K
wide, values V, the same or not. The new tokens' keys and values are read from the caches, where
`gqa_cache_write` has put them: there is no other place that they come from. For every real token t of any row
b, at position p = seq_lens_decoder[b] + t - cu_seqlens_q[b], and head h:

    first = max(0, p - window + 1) if window else 0         window counts visible keys, the token's included
    s_j   = softmax_scale * query[t, h] . K_j               over first <= j <= p
    lse   = ln (exp(sinks[h]) + sum_j exp(s_j))
    out   = sum_j exp(s_j - lse) V_j

with K_j and V_j those of KV head h // (H / G) at position j of the row, found through block_tables. A sink is
a logit, already scaled, that belongs to no key and has no value; a layer without sinks passes none, and their
term is left out.

Padding tokens see nothing, not even a sink: out 0, lse -inf. Positions that no token of the step sees, cached
or not, may hold anything: what lies behind the window of a row's first token is poison here.
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
    """Every key and value that a row sees read once, queries read, outputs written; q K^T and P V."""
    heads, widths = layer.num_attention_heads, layer.qk_head_dim + layer.v_head_dim
    tokens = sum(row.new for row in case.steps[0])
    window, keys, pairs = layer.window, 0, 0
    for row in case.steps[0]:
        if not row.seq_lens_this_time:
            continue
        keys += row.length if not window else min(row.length, window + row.new - 1)
        positions = range(row.cached, row.length)
        pairs += sum(position + 1 if not window else min(position + 1, window) for position in positions)
    elements = (keys * layer.num_key_value_heads + tokens * heads) * widths
    return Work(
        bytes=elements * ITEM_BYTES[layer.dtype] + tokens * heads * 4, flops=2 * pairs * heads * widths
    )


OPERATOR = Operator(
    name="gqa_step",
    summary="paged attention of query heads in groups over a mixed batch: windows, sinks, V of another width",
    source="arXiv:2305.13245; arXiv:2309.17453 and gpt-oss (a learned logit of no key); FastDeploy P7, #8037",
    inputs=(
        TensorSpec(
            "query",
            ("tokens", "num_attention_heads", "qk_head_dim"),
            "model",
            "queries, rotated; rows of padding tokens hold NaN",
            fill=Fill.GROUP_QUERY,
            strided=True,
        ),
        key_cache(fill=Fill.KEYS_SEEN),
        value_cache(fill=Fill.VALUES_SEEN),
        TensorSpec(
            "sinks",
            ("num_attention_heads",),
            "float32",
            "logit of each head that belongs to no key, scaled; None where the layer has none",
            fill=Fill.SINK,
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
            ("tokens", "num_attention_heads", "v_head_dim"),
            "model",
            "attention over the values",
            judge=Judge.ATTENTION,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "lse",
            ("tokens", "num_attention_heads"),
            "float32",
            "log-sum-exp of the scaled logits, the sink's included, natural log",
            judge=Judge.LSE,
            when_empty="-inf",
        ),
    ),
    attributes=("softmax_scale", "window", "splits"),
    options=(
        "model",
        "heads",
        "kv_heads",
        "v_dim",
        "layers",
        "block",
        "window",
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
        "sink",
    ),
    checks=("inputs", "guard", "values", "lse"),
    work=work,
)
