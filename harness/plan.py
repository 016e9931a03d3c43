"""What is to be run: cases x paths x lane, chosen by names and globs. Nothing is launched here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from cases import Case, parse
from cases.contract import contract_of, operators
from cases.suite import Suite, load_suite
from harness.task import PathInfo, Task


class UsageError(ValueError):
    """What was asked for does not exist or contradicts itself: exit code 2, nothing launched."""


@dataclass(frozen=True)
class Asked:
    """One case that was asked for, with the checks its suite wants."""

    case: Case
    checks: tuple[str, ...]
    both_oracles: bool


@dataclass(frozen=True)
class Plan:
    """What a run consists of.

    Attributes:
        tasks: judgements to be made, in order.
        unavailable: those that cannot be, each with the reason.
        elsewhere: chosen paths of the asked operators that have other lanes and not this one.
    """

    tasks: tuple[Task, ...]
    unavailable: tuple[tuple[Task, str], ...]
    elsewhere: tuple[PathInfo, ...] = ()

    @property
    def size(self) -> int:
        """How many verdicts it leads to."""
        return len(self.tasks) + len(self.unavailable)


def asked_cases(
    texts: Sequence[str],
    suites: Sequence[str],
    operator: str,
    known_checks: Sequence[str],
    *,
    mark: str = "",
    seeds: int = 1,
) -> list[Asked]:
    """The distinct cases of texts and suites whose operator matches a glob.

    Args:
        known_checks: the checks that a suite may ask for.
        mark: only those cases of suites that are marked so; empty for all.
        seeds: how many times each case is asked for, from its own data seed upwards.

    Raises:
        CaseError: a text is not a valid case of a known operator.
        SuiteError: there is no such suite.
        UsageError: the glob matches no operator, a suite asks for a check that is not known, or no case of
            a suite has the mark.
    """
    require_match("operator", operator, operators())
    found: list[Asked] = []
    for text in texts:
        case = parse(text)
        contract_of(case, text)
        found.append(Asked(case, (), both_oracles=True))
    for name in suites:
        suite = load_suite(name)
        if mark:
            require_match(f"mark of suite {name}", mark, marks_of(suite))
        for number, item in enumerate(suite.cases):
            if mark and mark not in item.marks:
                continue
            contract_of(item.case)
            for check in item.checks:
                require_match("check", check, known_checks)
            found.append(Asked(item.case, item.checks, number % suite.second_oracle_every == 0))
    return distinct(
        replace(item, case=_reseeded(item.case, step))
        for step in range(seeds)
        for item in found
        if fnmatchcase(item.case.operator, operator)
    )


def marks_of(suite: Suite) -> set[str]:
    """The words by which cases of a suite can be chosen."""
    return {mark for item in suite.cases for mark in item.marks}


def distinct(asked: Iterable[Asked]) -> list[Asked]:
    """Every case once, in order, with what all who ask for it want."""
    found: dict[Case, Asked] = {}
    for item in asked:
        before = found.get(item.case, item)
        checks = tuple(dict.fromkeys((*before.checks, *item.checks)))
        found[item.case] = Asked(item.case, checks, before.both_oracles or item.both_oracles)
    return list(found.values())


def _reseeded(case: Case, step: int) -> Case:
    """The case with other data: its seed moved up."""
    return replace(case, options=replace(case.options, seed=case.options.seed + step)) if step else case


def require_match(what: str, glob: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob.

    Raises:
        UsageError: none does.
    """
    names = list(names)
    matching = [name for name in names if fnmatchcase(name, glob)]
    if not matching:
        known = ", ".join(sorted(set(names))) or "none here"
        raise UsageError(f"no {what} matches {glob!r}; there are: {known}")
    return matching


def is_chosen(path: str, glob: str) -> bool:
    """Whether a glob names a path. An empty one names all but adapters: others' kernels are asked for."""
    return fnmatchcase(path, glob) if glob else not path.startswith("adapters/")


def make_plan(
    asked: Sequence[Asked],
    paths: Sequence[PathInfo],
    lane: str,
    *,
    path_glob: str,
    extra_checks: tuple[str, ...],
    timeout: float,
    workers: int,
) -> Plan:
    """Every asked case on every chosen path of its operator that has the lane.

    Raises:
        UsageError: the glob matches no path.
    """
    if path_glob:
        require_match("path", path_glob, (path.name for path in paths))
    tasks, unavailable = [], []
    operators_asked = {item.case.operator for item in asked}
    chosen = [path for path in paths if path.operator in operators_asked and is_chosen(path.name, path_glob)]
    for item in asked:
        for path in chosen:
            if path.operator != item.case.operator or lane not in path.lanes:
                continue
            task = Task(
                case=str(item.case),
                operator=item.case.operator,
                path=path.name,
                lane=lane,
                checks=tuple(dict.fromkeys((*item.checks, *extra_checks))),
                both_oracles=item.both_oracles,
                timeout=timeout,
                memory_share=1 / workers,
                environment=path.environment,
            )
            if path.unavailable is None:
                tasks.append(task)
            else:
                unavailable.append((task, path.unavailable))
    return Plan(tuple(tasks), tuple(unavailable), tuple(path for path in chosen if lane not in path.lanes))
