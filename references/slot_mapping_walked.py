"""Slots of tokens again, token by token: the offset-th of the rows of cache that the block holds.

A table that is too short has no block to look into, and a negative entry holds no rows. Python's integers
do not overflow.
"""

from __future__ import annotations

from itertools import islice

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """slot_mapping [Tp] int64."""
    batch_ids = tensor(inputs, "batch_id_per_token")
    tables = tensor(inputs, "block_tables").tolist()
    block_size = int(number(inputs, "block_size"))
    slots: list[int] = []
    positions = tensor(inputs, "position_ids").tolist()
    for slot, position in zip(batch_ids.tolist(), positions, strict=True):
        slots.append(-1)
        if slot < 0 or position < 0:
            continue
        skipped, offset = divmod(position, block_size)
        for block in islice(tables[slot], skipped, skipped + 1):
            if block >= 0:
                slots[-1] = range(block * block_size, (block + 1) * block_size)[offset]
    return {"slot_mapping": torch.tensor(slots, dtype=torch.int64, device=batch_ids.device)}


ORACLE = Oracle(
    name="slot_mapping_walked",
    operator="slot_mapping",
    role="derivation",
    source="FastDeploy compute_slot_mapping (O16), token by token",
    run=run,
)
