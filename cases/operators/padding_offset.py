"""Prefix sums of the step's lengths and the slot of every token: FastDeploy's O02 without its gather of ids.

    cu_seqlens_q[b]         = sum of seq_lens_this_time of the slots before b
    cu_seqlens_k[b]         = the same of seq_lens_this_time + seq_lens_decoder, every slot counted
    cu_seqlens_k_prefill[b] = the same of rows with seq_lens_encoder > 0 alone
    batch_id_per_token[t]   = the slot b with cu_seqlens_q[b] <= t < cu_seqlens_q[b + 1], else -1

A resident slot without a token (`paused`) counts in cu_seqlens_k and has no token. With no token, or no
slot at all, the prefix sums are written all the same.
"""

from cases.case import Case
from cases.contract import Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import SEQ_LENS_DECODER, SEQ_LENS_ENCODER, SEQ_LENS_THIS_TIME


def work(case: Case, layer: Layer) -> Work:
    """Three lengths of every slot read, three sums and every token's slot written."""
    tokens = sum(row.new for row in case.steps[0])
    slots = sum(row.is_slot for row in case.steps[0])
    return Work(bytes=4 * tokens + 12 * slots + 12 * (slots + 1), flops=0)


def _prefix_sum(name: str, doc: str) -> TensorSpec:
    return TensorSpec(name, ("slots_plus_one",), "int32", doc, judge=Judge.EXACT)


OPERATOR = Operator(
    name="padding_offset",
    summary="exclusive prefix sums of query and key lengths, and the slot of every token",
    source="FastDeploy O02, REQUIRED form; cu_seqlens_k as since #7727",
    inputs=(
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
    ),
    outputs=(
        _prefix_sum("cu_seqlens_q", "exclusive prefix sum of seq_lens_this_time"),
        _prefix_sum("cu_seqlens_k", "exclusive prefix sum of cached and new tokens of every slot"),
        _prefix_sum("cu_seqlens_k_prefill", "exclusive prefix sum of cached and new tokens of prefill rows"),
        TensorSpec(
            "batch_id_per_token",
            ("tokens",),
            "int32",
            "slot of each token",
            judge=Judge.EXACT,
            when_empty="-1",
        ),
    ),
    attributes=("num_tokens",),
    options=("layers",),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "idle": "the outputs name slots, and inserted slots shift them",
        "permute": "the outputs name slots, and the order of the slots is what they say",
        "pages": "no block table is read",
        "poison": "neither a cache nor a block table is read",
    },
)
