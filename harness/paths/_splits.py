"""How many parts the keys of decode rows are divided into, from shapes alone: lengths stay on the device."""

from __future__ import annotations

import functools

import torch

MIN_TOKENS = 256
"""Fewest keys worth a split of their own: below, combining costs more than it wins."""

FULL_TOKENS = 4096
"""Fewest keys of a split where the rows alone fill the device: what long rows have more is divided among
the multiprocessors that short ones leave free, and rows of one length hardly pay for it."""

MAX_SPLITS = 128

HOST_PROCESSORS = 8
"""Stands for the number of multiprocessors where there is no GPU."""


@functools.cache
def processors() -> int:
    """Multiprocessors of the current device."""
    if not torch.cuda.is_available():
        return HOST_PROCESSORS
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def fewest_tokens(blocks: int, processors: int) -> int:
    """Fewest keys of a split, where a launch without splits has so many blocks, one a multiprocessor."""
    return FULL_TOKENS if 2 * blocks > processors else MIN_TOKENS


def plan(blocks: int, max_kv_tokens: int, processors: int) -> int:
    """The most splits of a row.

    Args:
        blocks: of a launch without splits. max_kv_tokens: what the block table can hold of one row.
    """
    fewest = fewest_tokens(blocks, processors)
    useful = -(-max_kv_tokens // fewest)
    wanted = useful if fewest == FULL_TOKENS else processors // max(1, blocks)
    return max(1, min(wanted, useful, MAX_SPLITS))
