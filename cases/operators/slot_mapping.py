"""Physical cache row of every token: FastDeploy's O16.

For token t with b = batch_id_per_token[t], p = position_ids[t] and entry = block_tables[b, p // block_size]:

    slot_mapping[t] = entry * block_size + p % block_size        in int64

and -1 where b is negative (padding, whose position is a stale one), where p // block_size is no column of
the table, and where the entry is negative.
"""

from cases.case import Case
from cases.contract import Fill, Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import BATCH_ID_PER_TOKEN, BLOCK_TABLES


def work(case: Case, layer: Layer) -> Work:
    """Batch id, position, table entry and slot of every token."""
    tokens = sum(row.new for row in case.steps[0])
    return Work(bytes=tokens * (4 + 4 + 4 + 8), flops=0)


OPERATOR = Operator(
    name="slot_mapping",
    summary="physical cache row of every token, -1 where it has none",
    source="FastDeploy O16, REQUIRED form",
    inputs=(
        BLOCK_TABLES,
        BATCH_ID_PER_TOKEN,
        TensorSpec(
            "position_ids",
            ("tokens",),
            "int32",
            "absolute position of each token; of padding a stale one",
            fill=Fill.METADATA,
        ),
    ),
    outputs=(
        TensorSpec(
            "slot_mapping",
            ("tokens",),
            "int64",
            "physical row of each token: block * block_size + offset",
            judge=Judge.EXACT,
            when_empty="-1",
        ),
    ),
    attributes=("block_size",),
    # `poison` alone changes nothing here; check `poison` sets it together with the tables' tails.
    options=("layers", "block", "seed", "pool", "pages", "tail", "poison", "strided"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "pages": "slots are places of blocks: other blocks, other slots",
        "permute": "rows in another order get other blocks, and slots are places of blocks",
    },
)
