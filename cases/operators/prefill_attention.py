"""Unabsorbed causal attention of prefill rows over cached and new keys: FastDeploy's O06 and O07.

For token t of a prefill row b (`seq_lens_encoder` > 0: a first chunk, a continued chunk or a prefix hit)
and head h, with K and V the rows of key and value from cu_seqlens_k_prefill[b] on:

    visible = seq_lens_decoder[b] + (t - cu_seqlens_q[b]) + 1
    s_j     = softmax_scale * query[t, h] . K_j[h]              over j < visible: bottom-right causal
    lse     = ln sum_j exp(s_j)
    out     = sum_j exp(s_j - lse) V_j[h]

Queries and keys are N + D wide, values V: no width is padded to another. Tokens of decode rows and of
padding see no key here: out 0, lse -inf.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import CU_SEQLENS_K_PREFILL, CU_SEQLENS_Q, SEQ_LENS_DECODER, SEQ_LENS_ENCODER


def work(case: Case, layer: Layer) -> Work:
    """Queries, keys and values read once, outputs written; q K^T and P V over the visible pairs."""
    heads, width, values = layer.num_attention_heads, layer.qk_head_dim, layer.v_head_dim
    rows = [row for row in case.steps[0] if row.seq_lens_encoder]
    tokens = sum(row.new for row in case.steps[0])
    keys = sum(row.length for row in rows)
    pairs = sum(row.new * row.cached + row.new * (row.new + 1) // 2 for row in rows)
    elements = (tokens + keys) * heads * (width + values)
    return Work(
        bytes=elements * ITEM_BYTES[layer.dtype] + tokens * heads * 4,
        flops=2 * pairs * heads * (width + values),
    )


def scratch(case: Case, layer: Layer) -> int:
    """Values and outputs as wide as keys, for a kernel that demands it; nothing where they are so already."""
    width = layer.qk_head_dim
    if layer.v_head_dim == width:
        return 0
    tokens = sum(row.new for row in case.steps[0])
    keys = sum(row.length for row in case.steps[0] if row.seq_lens_encoder)
    return (tokens + keys) * layer.num_attention_heads * width * ITEM_BYTES[layer.dtype]


OPERATOR = Operator(
    name="prefill_attention",
    summary="unabsorbed causal attention of prefill rows over cached and new keys, with LSE",
    source="arXiv:2405.04434 section 2.1.2; FastDeploy O06, O07",
    inputs=(
        TensorSpec(
            "query",
            ("tokens", "num_attention_heads", "qk_head_dim"),
            "model",
            "queries [q_nope | q_pe], rotated; rows of padding tokens hold NaN",
            fill=Fill.HEAD_QUERY,
            strided=True,
        ),
        TensorSpec(
            "key",
            ("prefill_keys", "num_attention_heads", "qk_head_dim"),
            "model",
            "keys [k_nope | k_pe] of the prefill rows, cached ones first",
            fill=Fill.HEAD_KEY,
            strided=True,
        ),
        TensorSpec(
            "value",
            ("prefill_keys", "num_attention_heads", "v_head_dim"),
            "model",
            "values of the prefill rows, cached ones first",
            fill=Fill.HEAD_VALUE,
            strided=True,
        ),
        CU_SEQLENS_Q,
        CU_SEQLENS_K_PREFILL,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
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
            "log-sum-exp of the scaled logits, natural log",
            judge=Judge.LSE,
            when_empty="-inf",
        ),
    ),
    attributes=("softmax_scale", "qk_nope_head_dim"),
    options=("model", "heads", "layers", "dtype", "data", "seed", "strided", "tp"),
    checks=("inputs", "guard", "values", "lse"),
    work=work,
    scratch=scratch,
)
