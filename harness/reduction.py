"""A failing case reduced to a smallest one that fails for the same reason.

The search is greedy: it goes through the ways in which a case gets smaller (`cases.smaller`), takes the first
smaller case that still fails, and goes on from there until none does. What it ends with is smallest in that
sense: nothing that a way knows can be taken away from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from cases import Case, parse
from cases.contract import contract_of
from cases.errors import CaseError
from cases.smaller import WAYS, without_slots
from harness.task import Task
from harness.verdict import Kind, Status, Verdict

Fails = Callable[[Sequence[Case]], Sequence[bool]]
"""Whether each of some cases fails for the reason that is looked for."""


@dataclass(frozen=True)
class Failure:
    """What two verdicts have in common that fail for the same reason.

    Attributes:
        kind: wrong, guard, crash ...
        checks: (check, output) that failed; of a crash or a timeout, which say nothing of outputs, none.
    """

    kind: Kind
    checks: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, verdict: Verdict) -> Failure | None:
        """The failure of a verdict, known or not; None where it did not fail, or the harness itself did."""
        if verdict.status not in (Status.FAILED, Status.ERROR, Status.XFAILED) or verdict.kind is None:
            return None
        if verdict.kind is Kind.ORACLE_CONFLICT:
            return None
        failed = (check for check in verdict.checks if check.status is Status.FAILED)
        return cls(verdict.kind, frozenset((check.name, check.tensor.partition("[")[0]) for check in failed))

    def is_like(self, other: Failure | None) -> bool:
        """Whether another is of the same kind, and of the same check of the same output."""
        if other is None or self.kind is not other.kind:
            return False
        return bool(self.checks & other.checks) or not self.checks | other.checks


@dataclass(frozen=True)
class Reduction:
    """What a search ended with.

    Attributes:
        case: the smallest failing case found. tried: how many others were judged.
        is_complete: False where time ran out before nothing could be taken away any more.
    """

    case: Case
    tried: int
    seconds: float
    is_complete: bool


def reduce(
    case: Case, fails: Fails, *, slots: Sequence[int] = (), width: int = 1, seconds: float = 60.0
) -> Reduction:
    """The smallest case found that fails like `case`, which is known to.

    Args:
        fails: is asked of at most `width` cases at a time.
        slots: those that the failure lies in, where that is known: tried alone first.
        seconds: no case is judged after so long.
    """
    started = time.perf_counter()
    search = _Search(case, fails, width, started + seconds)
    if slots:
        search.go(lambda found: _only(found, slots))
    before = None
    while before != search.case and not search.is_late:
        before = search.case
        for way in WAYS:
            while search.go(way):
                pass
    return Reduction(search.case, search.tried, time.perf_counter() - started, not search.is_late)


def reduce_verdict(
    verdict: Verdict,
    judge: Callable[[Sequence[Task]], Iterable[Verdict]],
    task: Task,
    *,
    width: int = 1,
    seconds: float = 60.0,
) -> Reduction | None:
    """Reduces the case of a failing verdict; None where it did not fail, or the harness did.

    Args:
        judge: the verdicts of some tasks, in any order.
        task: what led to the verdict.
        width, seconds: as in `reduce`.
    """
    failure = Failure.of(verdict)
    if failure is None:
        return None
    names = {name for name, _ in failure.checks}
    asked = replace(task, checks=tuple(name for name in task.checks if name in names), both_oracles=False)

    def fails(cases: Sequence[Case]) -> list[bool]:
        tasks = [replace(asked, case=str(case)) for case in cases]
        found = {item.case: Failure.of(item) for item in judge(tasks)}
        return [failure.is_like(found.get(item.case)) for item in tasks]

    return reduce(parse(verdict.case), fails, slots=_slots(verdict), width=width, seconds=seconds)


class _Search:
    """The smallest case so far, and what was asked already."""

    def __init__(self, case: Case, fails: Fails, width: int, deadline: float) -> None:
        self.case = case
        self.tried = 0
        self.is_late = False
        self._fails, self._width, self._deadline = fails, width, deadline
        self._known = {case}

    def go(self, way: Callable[[Case], Iterator[Case]]) -> bool:
        """Takes the first case of a way that fails; False if none does."""
        candidates = way(self.case)
        while batch := list(islice(self._new(candidates), self._width)):
            if time.perf_counter() > self._deadline:
                self.is_late = True
                return False
            self._known.update(batch)
            self.tried += len(batch)
            for candidate, does_fail in zip(batch, self._fails(batch), strict=True):
                if does_fail:
                    self.case = candidate
                    return True
        return False

    def _new(self, candidates: Iterator[Case]) -> Iterator[Case]:
        met: set[Case] = set()
        for candidate in candidates:
            if candidate not in self._known and candidate not in met and _is_legal(candidate):
                met.add(candidate)
                yield candidate


def _is_legal(case: Case) -> bool:
    """Whether its operator can be asked the case."""
    try:
        contract_of(case)
    except CaseError:
        return False
    return True


def _only(case: Case, slots: Sequence[int]) -> Iterator[Case]:
    """The case with the first of some slots alone, then with all of them."""
    every = range(max(len(step) for step in case.steps))
    for kept in (slots[:1], slots):
        yield from without_slots(case, [slot for slot in every if slot not in kept])


def _slots(verdict: Verdict) -> list[int]:
    """The slots that a verdict's first failing check names."""
    failed = (check for check in verdict.checks if check.status is Status.FAILED)
    named = next((check.where.rows for check in failed if check.where.rows), "")
    slots: list[int] = []
    for part in named.split(",") if named else []:
        first, _, last = part.partition("-")
        slots += range(int(first), int(last or first) + 1)
    return slots
