"""Decode rows' queries packed, their outputs merged with prefill's: FastDeploy's O10, O11 and O12.

Row b is a decode row if seq_lens_encoder[b] = 0, seq_lens_decoder[b] > 0 and seq_lens_this_time[b] > 0. All
of its tokens, drafts too, are decode tokens. Packed, the decode tokens follow one another as they do in the
step, without what lies between them: decode token i is the token t of row b with

    i = cu_seqlens_q_decode[b] + t - cu_seqlens_q[b]

    cu_seqlens_q_decode[b]       = number of decode tokens of the slots before b
    batch_id_per_decode_token[i] = b, and -1 behind the last decode token
    packed_query[i]              = query[t], and 0 behind the last decode token
    cache_seqlens[b]             = seq_lens_decoder[b] + seq_lens_this_time[b] for decode rows, else 0
    merged[t]                    = decode_out[i] for decode tokens, prefill_out[t] for other real ones, 0 for
                                   padding

A bit-exact copy. What a branch left where it has nothing to say, NaN even, has no influence. A captured
graph has room for more decode tokens than one step has: axis `decode_tokens` is as long as if the step's
padding were decode tokens too.
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
    """Decode tokens' queries and one output of every real token read; every packed one and token written."""
    rows = case.steps[0]
    tokens = sum(row.new for row in rows)
    real = sum(row.seq_lens_this_time for row in rows)
    decoded = sum(row.new for row in rows if row.is_decode)
    room = decoded + tokens - real
    elements = (decoded + room) * layer.qk_head_dim + (real + tokens) * layer.v_head_dim
    copied = elements * layer.num_attention_heads * ITEM_BYTES[layer.dtype]
    return Work(bytes=copied + (tokens + room) * 4, flops=0)


_QUERY_WIDTHS = ("num_attention_heads", "qk_head_dim")
_OUTPUT_WIDTHS = ("num_attention_heads", "v_head_dim")

OPERATOR = Operator(
    name="decode_rows",
    summary="bit-exact packing of decode rows' queries and merge of their outputs with prefill's, drafts too",
    source="FastDeploy O10, O11, O12, REQUIRED forms",
    inputs=(
        TensorSpec(
            "query",
            ("tokens", *_QUERY_WIDTHS),
            "model",
            "unabsorbed queries of all rows; rows of padding tokens hold NaN",
            fill=Fill.HEAD_QUERY,
            strided=True,
        ),
        TensorSpec(
            "prefill_out",
            ("tokens", *_OUTPUT_WIDTHS),
            "model",
            "outputs of the prefill branch; tokens that are not prefill rows' hold poison",
            fill=Fill.PREFILL_OUTPUT,
            strided=True,
        ),
        TensorSpec(
            "decode_out",
            ("decode_tokens", *_OUTPUT_WIDTHS),
            "model",
            "outputs of the decode branch, packed; NaN behind the last decode token",
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
            "cu_seqlens_q_decode",
            ("slots_plus_one",),
            "int32",
            "exclusive prefix sum of decode rows' new tokens",
            judge=Judge.EXACT,
        ),
        TensorSpec(
            "batch_id_per_decode_token",
            ("decode_tokens",),
            "int32",
            "slot of each packed token",
            judge=Judge.EXACT,
            when_empty="-1",
        ),
        TensorSpec(
            "packed_query",
            ("decode_tokens", *_QUERY_WIDTHS),
            "model",
            "queries of decode tokens alone",
            judge=Judge.EXACT,
            strided=True,
            when_empty="0",
        ),
        TensorSpec(
            "merged",
            ("tokens", *_OUTPUT_WIDTHS),
            "model",
            "the output of the branch that computed the token",
            judge=Judge.EXACT,
            strided=True,
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
        "idle": "batch_id_per_decode_token names slots, and inserted slots shift them",
        "permute": "what is laid out by slot or packed moves with the slots",
    },
)
