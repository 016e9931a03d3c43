"""Which tokens are decode rows', and their outputs merged with prefill's: FastDeploy's O10, O11 and O12.

Row b is a decode row if seq_lens_encoder[b] = 0, seq_lens_decoder[b] > 0 and seq_lens_this_time[b] > 0. All
of its tokens, drafts too, are decode tokens:

    merged[t]        = decode_out[t] for decode tokens, prefill_out[t] for prefill rows', 0 for padding
    is_decode[t]     = 1 for decode tokens, else 0
    cache_seqlens[b] = seq_lens_decoder[b] + seq_lens_this_time[b] for decode rows, else 0

A bit-exact copy, in token layout: nothing is gathered into one row a slot. What the other branch left at
a token, NaN even, has no influence.
"""

from cases.case import Case
from cases.contract import ITEM_BYTES, Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
    SEQ_LENS_THIS_TIME,
)


def work(case: Case, layer: Layer) -> Work:
    """One of the two outputs of every real token read, every token written, padding too."""
    tokens = sum(row.new for row in case.steps[0])
    real = sum(row.seq_lens_this_time for row in case.steps[0])
    row_bytes = layer.num_attention_heads * layer.v_head_dim * ITEM_BYTES[layer.dtype]
    return Work(bytes=(real + tokens) * row_bytes + tokens * 8, flops=0)


_AXES = ("tokens", "num_attention_heads", "v_head_dim")

OPERATOR = Operator(
    name="decode_rows",
    summary="bit-exact merge of decode and prefill rows' outputs by token, drafts included",
    source="FastDeploy O10, O11, O12, REQUIRED forms",
    inputs=(
        TensorSpec(
            "prefill_out",
            _AXES,
            "model",
            "outputs of the prefill branch; tokens that are not prefill rows' hold poison",
            fill=Fill.PREFILL_OUTPUT,
            strided=True,
        ),
        TensorSpec(
            "decode_out",
            _AXES,
            "model",
            "outputs of the decode branch; tokens that are not decode rows' hold poison",
            fill=Fill.DECODE_OUTPUT,
            strided=True,
        ),
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
        CU_SEQLENS_Q,
        BATCH_ID_PER_TOKEN,
    ),
    outputs=(
        TensorSpec(
            "merged",
            _AXES,
            "model",
            "the output of the branch that computed the token",
            judge=Judge.EXACT,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "is_decode",
            ("tokens",),
            "int32",
            "1 for tokens of decode rows",
            judge=Judge.EXACT,
            when_empty="0",
        ),
        TensorSpec(
            "cache_seqlens",
            ("slots",),
            "int32",
            "keys that the decode branch reads: cached and new tokens of decode rows",
            judge=Judge.EXACT,
            when_empty="0",
        ),
    ),
    attributes=(),
    options=("model", "heads", "layers", "dtype", "data", "seed", "poison", "strided", "tp"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "pages": "the operator reads no cache: there are no blocks to move",
        "poison": "the operator reads no cache and no table: option poison fills its unselected tokens",
        "permute": "cache_seqlens is laid out by slot and moves with the slots",
    },
)
