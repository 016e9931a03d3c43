"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from harness import listing
from harness.lanes import default_lanes, lanes
from harness.plan import require_match

MAX_GPU_WORKERS = 8
"""Workers that share one GPU: each holds a CUDA context of about half a GiB."""


BY_NAME_ALONE = frozenset({"sanitizer"})
"""Checks that take minutes a case: a glob does not mean them."""


def chosen_lanes(chosen: Sequence[str] | None) -> list[str]:
    if chosen:
        return [name for glob in chosen for name in require_match("lane", glob, lanes())]
    return default_lanes()


def chosen_checks(globs: Sequence[str]) -> tuple[str, ...]:
    names = listing.check_names()
    return tuple(
        name
        for glob in globs
        for name in require_match("check", glob, names)
        if name == glob or name not in BY_NAME_ALONE
    )


def default_workers(lane: str) -> int:
    processors = len(os.sched_getaffinity(0))
    return min(processors, MAX_GPU_WORKERS) if lane == "compiled" else processors
