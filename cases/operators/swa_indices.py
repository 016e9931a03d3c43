"""Indices of the keys that each token sees through a sliding window: FastDeploy's O21, REQUIRED form.

Token t of slot b = batch_id_per_token[t] stands at position p = seq_lens_decoder[b] + t - cu_seqlens_q[b],
whatever its row's kind. It sees the positions from max(0, p - window + 1) to p, itself included, of the whole
sequence: cached before this step or new in it. A window of 0 hides nothing. With j counting these positions k
from the oldest, j = 0, on:

    swa_indices[t, 0, j] = block_tables[b, k // block_size] * block_size + k % block_size

a physical row of the cache, for prefill rows too: an index into the step's own tokens could not name what
they have cached. The order is ascending in the position; what attends to them does not depend on it, but a
comparison does. Every entry behind the newest visible position is -1, and so are all entries of padding.

The last axis has `window_indices` entries, a multiple of 128 known from shapes alone: room for the window, or
for all that a block table can hold where that is less. Caches have fewer than 2^31 rows.
"""

from cases.case import Case
from cases.contract import Judge, Operator, TensorSpec, Work
from cases.layers import Layer
from cases.operators._metadata import (
    BATCH_ID_PER_TOKEN,
    BLOCK_TABLES,
    CU_SEQLENS_Q,
    SEQ_LENS_DECODER,
    SEQ_LENS_ENCODER,
)


def work(case: Case, layer: Layer) -> Work:
    """Batch id of every token, and a table entry a block and an index a key that it sees."""
    number = 0
    for row in case.steps[0]:
        for position in range(row.cached, row.cached + row.seq_lens_this_time):
            seen = min(position + 1, layer.window or position + 1)
            blocks = position // layer.block_size - (position + 1 - seen) // layer.block_size + 1
            number += 1 + seen + blocks
    return Work(bytes=4 * number, flops=0)


OPERATOR = Operator(
    name="swa_indices",
    summary="physical cache rows of the keys that each token sees through a sliding window, -1 behind them",
    source="FastDeploy O21 (get_swa_indexer_top_k), REQUIRED form",
    inputs=(
        BLOCK_TABLES,
        CU_SEQLENS_Q,
        SEQ_LENS_ENCODER,
        SEQ_LENS_DECODER,
        BATCH_ID_PER_TOKEN,
    ),
    outputs=(
        TensorSpec(
            "swa_indices",
            ("tokens", "one", "window_indices"),
            "int32",
            "physical rows of the visible keys, oldest first, then -1",
            judge=Judge.EXACT,
            when_empty="-1",
        ),
    ),
    attributes=("block_size", "window"),
    # `poison` alone changes nothing here; check `poison` sets it together with the tables' tails.
    options=("layers", "block", "window", "seed", "pool", "pages", "tail", "poison", "strided"),
    checks=("inputs", "guard", "values"),
    work=work,
    exempt={
        "pages": "indices are places of blocks: other blocks, other indices",
        "permute": "rows in another order get other blocks, and indices are places of blocks",
    },
)
