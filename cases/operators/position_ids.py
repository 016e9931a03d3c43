"""Absolute positions of the step's tokens: FastDeploy's O01.

For token t of slot b = batch_id_per_token[t]:

    position_ids[t] = seq_lens_decoder[b] + (t - cu_seqlens_q[b])

whatever the row's kind: a continued chunk or prefix hit begins behind its cached tokens, as decode rows
do. Padding (batch id -1) gets -1.
"""

from cases.case import Case
from cases.contract import Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
    SEQ_LENS_THIS_TIME,
)


def work(case: Case, layer: Layer) -> Work:
    """Batch id and position of every token, length and start of every slot."""
    tokens = sum(row.new for row in case.steps[0])
    slots = sum(row.is_slot for row in case.steps[0])
    return Work(bytes=8 * tokens + 8 * slots, flops=0)


OPERATOR = Operator(
    name="position_ids",
    summary="absolute position of every token of the step, whatever its row's kind",
    source="FastDeploy O01, REQUIRED form",
    inputs=(
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        SEQ_LENS_THIS_TIME,
        CU_SEQLENS_Q,
        BATCH_ID_PER_TOKEN,
    ),
    outputs=(
        TensorSpec(
            "position_ids",
            ("tokens",),
            "int32",
            "absolute position of each token in its sequence",
            judge=Judge.EXACT,
            when_empty="-1",
        ),
    ),
    attributes=(),
    options=("layers",),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "pages": "no block table is read",
        "poison": "neither a cache nor a block table is read",
    },
)
