"""How many parts the keys of decode rows are divided into, from shapes alone: lengths stay on the device."""

from __future__ import annotations

import functools

import torch

MIN_TOKENS = 256
"""Fewest keys worth a split of their own: below, combining costs more than it wins."""

FULL_TOKENS = 2048
TOKENS_PER_QUERY = 64
"""Fewest keys of a split, in all and for each of a block's queries, where the rows alone fill the device:
what long rows have more is divided among the multiprocessors that short ones leave free. Rows of one length
pay for it, by partial results of every query: with these, less than a tenth of what the keys cost."""

MAX_SPLITS = 128

HOST_PROCESSORS = 8
"""Stands for the number of multiprocessors where there is no GPU."""


@functools.cache
def processors() -> int:
    """Multiprocessors of the current device."""
    if not torch.cuda.is_available():
        return HOST_PROCESSORS
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def fills(blocks: int, processors: int) -> bool:
    """Whether so many blocks, one a multiprocessor, leave less than half of the device free."""
    return 2 * blocks > processors


def fewest_tokens(blocks: int, queries: int, processors: int) -> int:
    """Fewest keys of a split, where a launch without splits has so many blocks of so many queries each."""
    return max(FULL_TOKENS, TOKENS_PER_QUERY * queries) if fills(blocks, processors) else MIN_TOKENS


def plan(blocks: int, queries: int, max_kv_tokens: int, processors: int) -> int:
    """The most splits of a row.

    Args:
        blocks: of a launch without splits. queries: of a block. max_kv_tokens: what the block table can hold
            of one row.
    """
    useful = -(-max_kv_tokens // fewest_tokens(blocks, queries, processors))
    wanted = useful if fills(blocks, processors) else processors // max(1, blocks)
    return max(1, min(wanted, useful, MAX_SPLITS))
