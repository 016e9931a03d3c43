"""A run: plan -> verdicts -> known failures -> reports -> exit code."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from harness.known_failures import KnownFailure, apply_known
from harness.lanes import lanes
from harness.plan import Plan
from harness.pool import Pool
from harness.reduction import Failure, reduce_verdict
from harness.verdict import Kind, Smallest, Status, Verdict, skipped

EXIT_PASSED = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HARNESS = 3
EXIT_NOTHING_JUDGED = 4
EXIT_INTERRUPTED = 130


@dataclass
class Summary:
    """What a run came to; grows as verdicts come in."""

    counts: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))
    harness_failures: int = 0
    stale: tuple[KnownFailure, ...] = ()
    interrupted: bool = False
    seconds: float = 0.0
    compile_variants: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, verdict: Verdict) -> None:
        """Counts a verdict."""
        self.counts[verdict.status] += 1
        is_ours = verdict.status is Status.ERROR and verdict.kind in (None, Kind.ORACLE_CONFLICT)
        self.harness_failures += is_ours

    def finish(self) -> None:
        """Stops the clock, which runs since the summary was made: the workers' start is counted."""
        self.seconds = time.perf_counter() - self.started

    @property
    def total(self) -> int:
        """Verdicts so far."""
        return sum(self.counts.values())

    @property
    def exit_code(self) -> int:
        """The exit code, by the precedence 130 > 3 > 1 > 4 > 0."""
        if self.interrupted:
            return EXIT_INTERRUPTED
        if self.harness_failures:
            return EXIT_HARNESS
        bad = (Status.FAILED, Status.ERROR, Status.XPASSED)
        if any(self.counts[status] for status in bad) or self.stale:
            return EXIT_FAILED
        if self.counts[Status.PASSED] or self.counts[Status.XFAILED]:
            return EXIT_PASSED
        return EXIT_NOTHING_JUDGED


def verdicts(pool: Pool, plan: Plan, known: Sequence[KnownFailure]) -> Iterator[Verdict]:
    """Every verdict of a plan; those that cannot be reached first."""
    for task, reason in plan.unavailable:
        yield skipped(task, Kind.UNAVAILABLE, reason)
    for verdict in pool.judge(plan.tasks):
        yield apply_known(known, verdict)


def with_smallest(
    pool: Pool, plan: Plan, failed: Iterable[Verdict], known: Sequence[KnownFailure], seconds: float
) -> Iterator[Verdict]:
    """Failing verdicts of a plan, each with the smallest case found that fails alike.

    It is looked for once, from the shortest case, where failures look alike: of the same path, the same kind
    and the same check of the same output, and of the same known failure, or else of the same rule.

    Args:
        seconds: how long it is looked for, each time.
    """
    tasks = {(task.case, task.path): task for task in plan.tasks}
    groups: dict[Hashable, list[Verdict]] = defaultdict(list)
    for verdict in failed:
        first = next((item for item in known if item.matches(verdict)), None)
        groups[verdict.path, Failure.of(verdict), first or _rule(verdict)].append(verdict)
    for alike in groups.values():
        short = min(alike, key=lambda item: len(item.case))
        task = tasks[short.case, short.path]
        found = reduce_verdict(short, pool.judge, task, width=pool.workers, seconds=seconds)
        smallest = None if found is None else Smallest(str(found.case), found.is_complete)
        yield from (replace(item, smallest=smallest) for item in alike)


def _rule(verdict: Verdict) -> str:
    """The rule that the first failing check's rows follow; empty if none is known."""
    failed = (check for check in verdict.checks if check.status is Status.FAILED)
    return next((check.where.pattern for check in failed), "")


def stale_entries(known: Sequence[KnownFailure], seen: Iterable[Verdict]) -> tuple[KnownFailure, ...]:
    """Known failures that match no verdict of a run; not those of a lane that it did not have."""
    seen = list(seen)
    had = {verdict.lane for verdict in seen}

    def is_elsewhere(item: KnownFailure) -> bool:
        named = {name for name in (*lanes(), *had) if fnmatchcase(name, item.lane)}
        return bool(named) and not named & had

    def is_stale(item: KnownFailure) -> bool:
        return not is_elsewhere(item) and not any(item.matches(verdict) for verdict in seen)

    return tuple(item for item in known if is_stale(item))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C within the block is raised at its end: what belongs together is done or not begun."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
