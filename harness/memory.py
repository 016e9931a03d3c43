"""Memory of one lane, shared by its workers: what a case needs, what it may take, whose turn it is."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cases import Case
from cases.contract import contract_of
from harness.footprint import required_bytes
from harness.lanes import Lane

LARGE_SHARE = 0.5
"""A case that needs more than its worker's share may have half of the memory, one such case at a time."""

KEEP_BYTES = 1 << 30
"""What a worker's allocator may keep between cases; more is given back to the others."""


@contextmanager
def room_for(case: Case, lane: Lane, *, share: float, launches: int, lock: Path) -> Iterator[str | None]:
    """Yields None, or one sentence why the case does not fit.

    Args:
        share: fraction of the memory that any case may take: all workers run at once.
        launches: how many batches live at a time: two where checks launch a variant.
        lock: file that large cases of the lane lock while they run.
    """
    needed = required_bytes(case, contract_of(case), lane.device) * launches
    free, total = _memory(lane)
    if needed <= min(free, int(total * share)):
        yield None
        return
    if needed > int(total * LARGE_SHARE):
        yield (
            f"judging it takes about {needed / 2**30:,.1f} GiB and a case may take "
            f"{total * LARGE_SHARE / 2**30:,.1f} GiB here: use a larger machine"
        )
        return
    with lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        free, _ = _memory(lane)
        if needed <= free:
            yield None
        else:
            yield (
                f"judging it takes about {needed / 2**30:,.1f} GiB and {free / 2**30:,.1f} GiB are free: "
                "use fewer workers"
            )


def give_back(lane: Lane) -> None:
    """Returns what the last case's tensors took, where that is much."""
    if lane.device == "cuda" and torch.cuda.memory_reserved() > KEEP_BYTES:
        torch.cuda.empty_cache()


def _memory(lane: Lane) -> tuple[int, int]:
    """(free, total) bytes of the lane's device."""
    if lane.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated(), total
    return _host_memory("MemAvailable"), _host_memory("MemTotal")


def _host_memory(entry: str) -> int:
    """Bytes of an entry of /proc/meminfo; MemAvailable counts the page cache as available."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{entry}:"))
