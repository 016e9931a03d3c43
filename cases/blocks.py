"""Which cache blocks the rows of a step need, and which of them are shared.

Two rows with the same tag share block j if and only if both have at least (j + 1) * block tokens cached
(rule V4: a shared block is full and nobody writes it this step).
"""

from __future__ import annotations

from collections.abc import Hashable

from cases.rows import Row

Block = tuple[Hashable, ...]
"""Identity of a logical block: equal identities are one physical block."""


def row_blocks(row: Row, slot: int, block_size: int) -> list[Block]:
    """The blocks of one row in order, enough for the tokens it holds after the step."""
    count = -(-row.length // block_size) if row.is_slot else 0
    full = row.cached // block_size if row.tag is not None else 0
    return [("tag", row.tag, j) if j < full else ("slot", slot, j) for j in range(count)]


def step_blocks(step: tuple[Row, ...], block_size: int) -> list[list[Block]]:
    """The blocks of every slot of a step."""
    return [row_blocks(row, slot, block_size) for slot, row in enumerate(step) if row.is_slot]


def blocks_needed(step: tuple[Row, ...], block_size: int) -> int:
    """How many physical blocks a step needs, shared ones counted once."""
    needed = 0
    shared: dict[str, int] = {}
    for row in step:
        if not row.is_slot:
            continue
        full = row.cached // block_size if row.tag is not None else 0
        needed += -(-row.length // block_size) - full
        if row.tag is not None:
            shared[row.tag] = max(full, shared.get(row.tag, 0))
    return needed + sum(shared.values())
