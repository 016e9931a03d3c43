"""What the parent sends a worker, and what it learns of the paths there. Light: no torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PathInfo:
    """One path of a lane, as a worker found it.

    `unavailable` is None, or why nothing can run on it here. `operator` is then the file's name.
    """

    name: str
    operator: str
    lanes: tuple[str, ...]
    unavailable: str | None = None


@dataclass(frozen=True)
class Task:
    """One judgement to be made.

    Attributes:
        case: canonical text. path, lane: names.
        checks: names of the checks to run beyond the default ones.
        both_oracles: whether the second derivation must agree before the path is judged.
        timeout: seconds the path may run, compilation not counted.
        memory_share: fraction of the memory that one case may take: 1 / workers.
    """

    case: str
    operator: str
    path: str
    lane: str
    checks: tuple[str, ...] = ()
    both_oracles: bool = True
    timeout: float = 120.0
    memory_share: float = 1.0
