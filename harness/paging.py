"""Physical blocks for the rows of each step: shuffled over a pool larger than needed, shared by tag.

From step to step a sequence keeps its blocks. Blocks that nobody holds any more go back to the pool and
are the first to be given out again, so that what a stranger left in them would show.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from cases import Case
from cases.blocks import Block, blocks_needed, own_block, step_blocks
from cases.layers import Layer
from cases.schedule import Sequence, sequences
from harness.hashing import hash_host
from harness.metadata import Int32, Int64

HUGE_BLOCK_ID = 0x3FFF_FFFF
"""A table entry that, followed, lands far outside any allocation."""

STRIDE = 7


@dataclass(frozen=True)
class Pages:
    """Where one layer's blocks are in one step.

    Attributes:
        num_blocks: size of the pool.
        block_tables: [B, max_blocks] int32; every row has at least one entry past its length.
        blocks: the physical blocks of each slot, in order of position.
        kept: the physical blocks whose contents come from the step before, sorted.
    """

    num_blocks: int
    block_tables: Int32
    blocks: tuple[Int64, ...]
    kept: Int64

    @property
    def used(self) -> Int64:
        """Every physical block that some row holds, sorted."""
        return np.unique(np.concatenate([*self.blocks, np.empty(0, np.int64)]))


@lru_cache(maxsize=16)
def lay_out(case: Case, layer: Layer) -> tuple[Pages, ...]:
    """Assigns physical blocks to the rows of every step, deterministically from the case."""
    options = case.options
    needed = blocks_needed(case.steps, layer.block_size)
    # Half as many again: enough strangers' blocks to go wrong in, cheap enough to poison.
    num_blocks = options.pool or needed + needed // 2 + 3
    # Taken from the end.
    free = _order(options.pages, num_blocks, options.seed, layer.index)[::-1].tolist()
    tail = {"huge": HUGE_BLOCK_ID, "nb+7": num_blocks + 7}.get(options.tail)
    laid_out = []
    physical: dict[Block, int] = {}
    logical = step_blocks(case.steps, layer.block_size)
    for held, rows in zip(sequences(case.steps), logical, strict=True):
        for slot, row in enumerate(rows):
            _hand_over(physical, slot, held[slot], row)
        wanted = {block for row in rows for block in row}
        free += [physical.pop(block) for block in list(physical) if block not in wanted]
        kept = np.array(sorted(physical.values()), np.int64)
        for row in rows:
            for block in row:
                if block not in physical:
                    physical[block] = free.pop()
        blocks = tuple(np.array([physical[block] for block in row], np.int64) for row in rows)
        width = max((len(row) for row in rows), default=0) + 1
        tables = np.full((len(rows), width), int(options.tail) if tail is None else tail, np.int32)
        for table, own in zip(tables, blocks, strict=True):
            table[: len(own)] = own
        laid_out.append(Pages(num_blocks, tables, blocks, kept))
    return tuple(laid_out)


def _hand_over(physical: dict[Block, int], slot: int, sequence: Sequence | None, row: list[Block]) -> None:
    """Gives a sequence's own blocks to its tag once they are full, unless the tag has them already."""
    for j, block in enumerate(row):
        if sequence is not None and block[0] == "tag" and block not in physical:
            computed = physical.pop(own_block(slot, sequence, j), None)
            if computed is not None:
                physical[block] = computed


def _order(pages: str, num_blocks: int, seed: int, layer: int) -> Int64:
    ids = np.arange(num_blocks, dtype=np.int64)
    if pages == "reversed":
        return ids[::-1]
    if pages == "strided":
        # Walk every residue class in turn, so that all blocks are reached whatever the pool's size.
        return np.concatenate([ids[start::STRIDE] for start in range(STRIDE)])
    if pages == "sequential":
        return ids
    return np.argsort(hash_host(ids, seed, f"pages.{layer}"), kind="stable")
