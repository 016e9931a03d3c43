"""Cases drawn from the whole language, judged until time runs out; a failing one is reduced at once.

Hypothesis draws them (`cases.strategies.batches`); the judging is the workers', many cases at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from cases import Case
from harness.reduction import Failure, Reduction, reduce_verdict
from harness.task import Task
from harness.verdict import Status, Verdict

Judge = Callable[[Sequence[Task]], Iterable[Verdict]]


def drawn_at_once(workers: int) -> int:
    """Cases drawn and judged together: enough to keep workers busy, few enough to ask every operator soon."""
    return max(32, 8 * workers)


@dataclass(frozen=True)
class Found:
    """A failure: the verdict of the case that was drawn, what is left of the case, and when it was found."""

    verdict: Verdict
    reduction: Reduction
    seconds: float

    @property
    def entry(self) -> str:
        """The smallest case as an entry of a suite."""
        kind = self.verdict.kind.value if self.verdict.kind else self.verdict.status.value
        why = f"found by fuzz: {kind} on {self.verdict.path} [{self.verdict.lane}]"
        return f'[[entry]]\nwhy = "{why}"\ncases = ["{self.reduction.case}"]\n'


@dataclass
class Tally:
    """What was judged so far."""

    counts: dict[Status, int] = field(default_factory=lambda: dict.fromkeys(Status, 0))
    cases: set[str] = field(default_factory=set)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.started

    def add(self, verdict: Verdict) -> None:
        """Counts a verdict."""
        self.counts[verdict.status] += 1
        self.cases.add(verdict.case)


def drawn_cases(operator: str, lane: str, count: int, seed: int) -> list[Case]:
    """So many cases of an operator, no larger than a lane judges in a moment; the same for the same seed.

    Raises:
        ImportError: hypothesis is not installed.
    """
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings

    from cases.strategies import Scale, batches

    # On the processor a kernel is a thousand times slower: small batches, and so more of them.
    scale = Scale(slots=12, length=9000, heads=130, keys=700) if lane == "compiled" else Scale()
    found: list[Case] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        phases=(Phase.generate,),
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(batches(operator, scale))
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return list(dict.fromkeys(found))


def fuzz(
    tasks_of: Callable[[int], Sequence[Task]],
    judge: Judge,
    *,
    seconds: float,
    width: int,
    tally: Tally,
    reduction_seconds: float = 30.0,
) -> Iterator[Found]:
    """Every failure of its own kind, as it is found; one path's failures of one kind are told once.

    When time runs out, what is being judged is left behind: the workers are not waited for.

    Args:
        tasks_of: what is judged together, by a number that counts from 0. No task ends the search.
        width: as in `reduce`.
        tally: is kept up to date.
    """
    started = time.perf_counter()
    told: set[tuple[str, Failure]] = set()
    round_number = 0
    while time.perf_counter() - started < seconds:
        tasks = tasks_of(round_number)
        round_number += 1
        if not tasks:
            return
        asked = {(task.case, task.path): task for task in tasks}
        for verdict in judge(tasks):
            tally.add(verdict)

            if time.perf_counter() - started > seconds:
                return
            failure = Failure.of(verdict)
            if failure is None or (verdict.path, failure) in told:
                continue
            told.add((verdict.path, failure))
            task = asked[verdict.case, verdict.path]
            reduction = reduce_verdict(verdict, judge, task, width=width, seconds=reduction_seconds)
            if reduction is not None:
                yield Found(verdict, reduction, tally.seconds)
