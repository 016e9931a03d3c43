"""Slots of tokens by their definition: a gather from the block table, in int64."""

from __future__ import annotations

import torch

from references.oracle import Inputs, Oracle, Outputs, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """slot_mapping [Tp] int64; -1 for padding, places past the table and negative entries."""
    tables = tensor(inputs, "block_tables").long()
    batch_ids = tensor(inputs, "batch_id_per_token").long()
    positions = tensor(inputs, "position_ids").long()
    block_size = int(number(inputs, "block_size"))
    blocks = positions.div(block_size, rounding_mode="floor")
    in_table = (batch_ids >= 0) & (positions >= 0) & (blocks < tables.shape[1])
    entries = torch.full_like(positions, -1)
    entries[in_table] = tables[batch_ids[in_table], blocks[in_table]]
    slots = entries * block_size + positions.remainder(block_size)
    return {"slot_mapping": torch.where(entries >= 0, slots, -1)}


ORACLE = Oracle(
    name="slot_mapping",
    operator="slot_mapping",
    role="definition",
    source="FastDeploy compute_slot_mapping (O16), REQUIRED form",
    run=run,
)
