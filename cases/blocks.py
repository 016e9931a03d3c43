"""Which cache blocks the rows of each step need, and which of them are shared.

Two rows with the same tag share block j if and only if both have at least (j + 1) * block tokens cached
(rule V4: a shared block is full and nobody writes it this step), and these are tokens that the tag names:
what the two generate later differs, and no engine could share it.
"""

from __future__ import annotations

from collections.abc import Hashable

from cases.rows import Row
from cases.schedule import Sequence, sequences

Block = tuple[Hashable, ...]
"""Identity of a logical block: equal identities are one physical block, in one step and from step to step."""

Steps = tuple[tuple[Row, ...], ...]


def row_blocks(row: Row, slot: int, sequence: Sequence | None, block_size: int) -> list[Block]:
    """The blocks of one row in order, enough for the tokens it holds after the step."""
    if sequence is None:
        return []
    shared = _shared(row, sequence, block_size)
    count = -(-row.length // block_size)
    return [("tag", sequence.tag, j) if j < shared else own_block(slot, sequence, j) for j in range(count)]


def own_block(slot: int, sequence: Sequence, j: int) -> Block:
    """Block j of a sequence as long as nobody shares it."""
    return ("own", sequence.began, slot, j)


def step_blocks(steps: Steps, block_size: int) -> list[list[list[Block]]]:
    """The blocks of every slot of every step."""
    return [
        [
            row_blocks(row, slot, sequence, block_size)
            for slot, (row, sequence) in enumerate(zip(step, held, strict=True))
            if row.is_slot
        ]
        for step, held in zip(steps, sequences(steps), strict=True)
    ]


def blocks_needed(steps: Steps, block_size: int) -> int:
    """How many physical blocks the neediest step needs, shared ones counted once."""
    return max(_needed(step, held, block_size) for step, held in zip(steps, sequences(steps), strict=True))


def _needed(step: tuple[Row, ...], held: tuple[Sequence | None, ...], block_size: int) -> int:
    """The same of one step, without listing them."""
    needed = 0
    of_tags: dict[str | None, int] = {}
    for row, sequence in zip(step, held, strict=True):
        if sequence is None:
            continue
        shared = _shared(row, sequence, block_size)
        needed += -(-row.length // block_size) - shared
        of_tags[sequence.tag] = max(shared, of_tags.get(sequence.tag, 0))
    return needed + sum(of_tags.values())


def _shared(row: Row, sequence: Sequence, block_size: int) -> int:
    """How many of a row's first blocks are its tag's."""
    return min(row.cached, sequence.tagged_tokens) // block_size


def unknown_history(steps: Steps, block_size: int) -> tuple[int, int] | None:
    """(step, slot) of the first row that begins with cached tokens which no earlier row has left, or None."""
    before: set[Block] = set()
    of_steps = zip(steps, sequences(steps), step_blocks(steps, block_size), strict=True)
    for index, (step, held, rows) in enumerate(of_steps):
        known = set(before)
        for slot, blocks in enumerate(rows):
            sequence = held[slot]
            if sequence is not None and sequence.began < index:
                # A continued row hands its full blocks over to its tag.
                known |= {block for j, block in enumerate(blocks) if own_block(slot, sequence, j) in before}
        for slot, (row, sequence) in enumerate(zip(step, held, strict=True)):
            begins = sequence is not None and sequence.began == index
            if begins and not known.issuperset(rows[slot][: -(-row.cached // block_size)]):
                return index, slot
        before = {block for blocks in rows for block in blocks}
    return None
