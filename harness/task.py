"""What the parent sends a worker, and what it learns of the paths there. Light: no torch, no triton."""

from __future__ import annotations

from dataclasses import dataclass, field

Environment = tuple[tuple[str, str | None], ...]
"""Variables that a path's process starts with, by name; None removes one."""


@dataclass(frozen=True)
class PathInfo:
    """One path of a lane, as a worker found it.

    `unavailable` is None, or why nothing can run on it here. `operator` is then the file's name. `libraries`
    are the versions of those that it calls, `environment` the variables that its process starts with.
    """

    name: str
    operator: str
    lanes: tuple[str, ...]
    unavailable: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    environment: Environment = ()


@dataclass(frozen=True)
class Task:
    """One judgement to be made.

    Attributes:
        case: canonical text. path, lane: names.
        checks: names of the checks to run beyond the default ones.
        both_oracles: whether the second derivation must agree before the path is judged.
        timeout: seconds the path may run, compilation not counted.
        memory_share: fraction of the memory that one case may take: 1 / workers.
        environment: the path's.
    """

    case: str
    operator: str
    path: str
    lane: str
    checks: tuple[str, ...] = ()
    both_oracles: bool = True
    timeout: float = 120.0
    memory_share: float = 1.0
    environment: Environment = ()


@dataclass(frozen=True)
class Measured:
    """How long a path took on a case, and the least that the case makes any path do.

    `reason` says why there is no time; otherwise it is empty.
    """

    case: str
    path: str
    seconds: float = 0.0
    bytes: int = 0
    flops: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Rates:
    """What a device reached: bytes a second copied (read and written) and read, operations a second."""

    device: str
    copy_bytes: float
    read_bytes: float
    matrix_flops: float
