"""Physical blocks for the rows of a step: shuffled over a pool larger than needed, shared by tag."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cases import Case, Row
from cases.blocks import Block, blocks_needed, step_blocks
from cases.layers import Layer
from harness.hashing import hash_host
from harness.metadata import Int32, Int64

HUGE_BLOCK_ID = 0x3FFF_FFFF
"""A table entry that, followed, lands far outside any allocation."""

STRIDE = 7


@dataclass(frozen=True)
class Pages:
    """Where one layer's blocks are.

    Attributes:
        num_blocks: size of the pool.
        block_tables: [B, max_blocks] int32; every row has at least one entry past its length.
        blocks: the physical blocks of each slot, in order of position.
    """

    num_blocks: int
    block_tables: Int32
    blocks: tuple[Int64, ...]

    @property
    def used(self) -> Int64:
        """Every physical block that some row holds, sorted."""
        return np.unique(np.concatenate([*self.blocks, np.empty(0, np.int64)]))


def lay_out(case: Case, step: tuple[Row, ...], layer: Layer) -> Pages:
    """Assigns physical blocks to the rows of a step, deterministically from the case."""
    options = case.options
    logical = step_blocks(step, layer.block_size)
    needed = blocks_needed(step, layer.block_size)
    # Half as many again: enough strangers' blocks to go wrong in, cheap enough to poison.
    num_blocks = options.pool or needed + needed // 2 + 3
    order = _order(options.pages, num_blocks, options.seed, layer.index)
    physical: dict[Block, int] = {}
    blocks: list[Int64] = []
    for row in logical:
        for block in row:
            if block not in physical:
                physical[block] = int(order[len(physical)])
        blocks.append(np.array([physical[block] for block in row], np.int64))
    width = max((len(row) for row in blocks), default=0) + 1
    tail = {"huge": HUGE_BLOCK_ID, "nb+7": num_blocks + 7}.get(options.tail)
    tables = np.full((len(blocks), width), int(options.tail) if tail is None else tail, np.int32)
    for table, own in zip(tables, blocks, strict=True):
        table[: len(own)] = own
    return Pages(num_blocks, tables, tuple(blocks))


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
