"""`Verdict`: what is said of one (case, path, lane), and the checks it rests on."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness.task import Task

SCHEMA = 1


class Status(enum.Enum):
    """What became of a verdict or a check (`xfailed` and `xpassed` are of verdicts only)."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    XFAILED = "xfailed"
    XPASSED = "xpassed"
    ERROR = "error"


class Kind(enum.Enum):
    """Why a verdict is not a plain pass; the worst first."""

    CRASH = "crash"
    TIMEOUT = "timeout"
    ORACLE_CONFLICT = "oracle_conflict"
    BOUNDS = "bounds"
    GUARD = "guard"
    INPUT_CHANGED = "input_changed"
    WRONG = "wrong"
    NONDETERMINISTIC = "nondeterministic"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    TOO_LARGE = "too_large"


SEVERITY = {kind: rank for rank, kind in enumerate(Kind)}


@dataclass(frozen=True)
class Worst:
    """The element farthest from what was expected."""

    index: tuple[int, ...]
    got: float
    expected: float


@dataclass(frozen=True)
class Where:
    """Where the failing elements lie: each axis as ranges, such as `0-3,7`; empty if it does not apply.

    Attributes:
        rows: slots of the batch. tokens: indices on the token axis. heads: query heads.
        dims: columns. splits: splits of the keys. blocks: physical cache blocks.
            Of what is read, those of failing rows that no passing row has.
        steps: steps of the case, where it has several.
        pattern: the rule that failing rows follow and passing ones do not; empty if none is found.
    """

    rows: str = ""
    tokens: str = ""
    heads: str = ""
    dims: str = ""
    splits: str = ""
    blocks: str = ""
    steps: str = ""
    pattern: str = ""


@dataclass(frozen=True)
class CheckResult:
    """One check of one tensor.

    Attributes:
        name: the check. tensor: which output, with `[layer]` where there are several layers.
        kind: what a failure of it means; None unless it failed.
        reason: why it failed or was skipped, one sentence; empty for a pass.
        worst, error, budget, budget_source: the worst element, the error there, what was allowed and
            where that comes from; None or empty for checks that compare no numbers.
    """

    name: str
    status: Status
    tensor: str = ""
    kind: Kind | None = None
    reason: str = ""
    worst: Worst | None = None
    error: float | None = None
    budget: float | None = None
    budget_source: str = ""
    where: Where = field(default_factory=Where)

    def __post_init__(self) -> None:
        if self.status not in (Status.PASSED, Status.FAILED, Status.SKIPPED):
            raise ValueError(f"a check passes, fails or is skipped, got {self.status.value}")
        if self.status is Status.FAILED and self.kind is None:
            raise ValueError(f"a failed check names its kind, and {self.name} does not")
        if self.status is not Status.PASSED and not self.reason:
            raise ValueError(f"a check that does not pass has a reason, and {self.name} has none")


@dataclass(frozen=True)
class Seconds:
    """Where the time went."""

    compile: float = 0.0
    run: float = 0.0
    oracle: float = 0.0


@dataclass(frozen=True)
class Smallest:
    """The smallest case that was found to fail as another does.

    Attributes:
        case: canonical text. is_complete: False where time ran out before nothing could be taken away.
    """

    case: str
    is_complete: bool = True


@dataclass(frozen=True)
class Verdict:
    """What is said of one (case, path, lane). An error without a kind is the harness's own failure.

    `smallest` is None where nobody looked for it.

    Raises:
        ValueError: a verdict that does not pass without kind and reason, or a pass with one.
    """

    case: str
    operator: str
    path: str
    lane: str
    status: Status
    kind: Kind | None = None
    reason: str = ""
    checks: tuple[CheckResult, ...] = ()
    inputs_digest: str = ""
    outputs_digest: str = ""
    seconds: Seconds = field(default_factory=Seconds)
    environment: dict[str, str] = field(default_factory=dict)
    smallest: Smallest | None = None

    def __post_init__(self) -> None:
        is_pass = self.status is Status.PASSED
        if is_pass and (self.kind is not None or self.reason):
            raise ValueError("a pass has neither kind nor reason")
        if not is_pass and not self.reason:
            raise ValueError(f"a verdict that is {self.status.value} has a reason")
        if self.status in (Status.FAILED, Status.SKIPPED) and self.kind is None:
            raise ValueError(f"a verdict that is {self.status.value} has a kind")

    @property
    def repro(self) -> str:
        """The one line that runs it again."""
        return self.repro_of(self.case)

    def repro_of(self, case: str) -> str:
        """The one line that runs a case on its path and lane."""
        return f"python3 -m harness repro '{case}' --path {self.path} --lane {self.lane}"

    @property
    def is_bad(self) -> bool:
        """Whether it makes the run fail."""
        return self.status in (Status.FAILED, Status.ERROR, Status.XPASSED)

    def with_note(self, note: str) -> Verdict:
        """The verdict with something added to its reason."""
        return replace(self, reason=f"{self.reason} ({note})")

    def expected_to_fail(self, why: str) -> Verdict:
        """The verdict of a case listed as a known failure: xfailed where it failed, else xpassed."""
        if self.status is Status.PASSED:
            return replace(self, status=Status.XPASSED, reason=f"listed as a known failure: {why}")
        if self.status is Status.FAILED:
            reason = f"{self.reason} (known: {why})"
            return replace(self, status=Status.XFAILED, reason=reason)
        return self

    def to_json(self) -> dict[str, Any]:
        """The verdict as the jsonl report has it; NaN and infinities as strings."""
        return plain({**asdict(self), "repro": self.repro})  # type: ignore[no-any-return]


def skipped(task: Task, kind: Kind, reason: str) -> Verdict:
    """The verdict of a task that was not judged."""
    return Verdict(task.case, task.operator, task.path, task.lane, Status.SKIPPED, kind, reason)


def judged(verdict_parts: dict[str, Any], checks: Iterable[CheckResult]) -> Verdict:
    """The verdict that follows from its checks: the worst failure decides kind and reason."""
    results = tuple(checks)
    failures = [check for check in results if check.status is Status.FAILED]
    if not failures:
        return Verdict(status=Status.PASSED, checks=results, **verdict_parts)
    worst = min(failures, key=lambda check: SEVERITY[check.kind] if check.kind else len(SEVERITY))
    return Verdict(
        status=Status.FAILED, kind=worst.kind, reason=worst.reason, checks=results, **verdict_parts
    )


def ranges(indices: Iterable[int]) -> str:
    """Distinct indices as ranges: [0, 1, 2, 7] -> `0-2,7`."""
    parts: list[list[int]] = []
    for index in sorted(set(indices)):
        if parts and parts[-1][1] == index - 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def plain(value: Any) -> Any:
    """The value as JSON has it: enumerations by value, NaN and infinities as strings."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
