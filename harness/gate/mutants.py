"""Mutants on the changed lines of kernels, tried on the cases that hit those lines.

A generated mutant belongs to a change if the lines that it rewrites are among the changed ones. Accepted
mutants of the records do not count. If there are more than the policy tries, a sample is drawn: which ones
depends on the seed and on the mutants themselves, not on their order, so that it is the same everywhere.

Every case first runs on the kernel as it is: one that does not pass could not tell a mutant from it. How
long it takes decides the order of cases and nothing else: a slow machine comes to the same score.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path

from cases import CaseError, RuleError, parse
from harness.coverage.sites import MAX_CASES, FileCoverage, SiteKind
from harness.gate.diff import ChangedFile
from harness.gate.mutators import Mutator, mutators
from harness.gate.policy import Policy
from harness.gate.verdict import MutationVerdict, Survivor
from harness.mutation.mutant import ROOT, Mutant, path_file, rank, records_of, source_of
from harness.mutation.trial import Trial
from harness.plan import asked_cases, make_plan
from harness.pool import Pool
from harness.task import PathInfo, Task
from harness.verdict import Status

TIMEOUT = 20.0
"""Seconds a mutant may run on a case."""


@dataclass(frozen=True)
class Candidate:
    """One mutant on changed lines: where it is, and the cases that hit its lines, MAX_CASES at most.

    Attributes:
        cost: for how many mutants it counts.
    """

    mutant: Mutant
    line: int
    cases: tuple[str, ...]
    cost: int = 1


def rewritten(mutant: Mutant, text: str) -> range:
    """Numbers of the lines of a text that a mutant rewrites."""
    old, new = mutant.old.split("\n"), mutant.new.split("\n")
    same_above = same_below = 0
    while same_above < min(len(old), len(new)) and old[same_above] == new[same_above]:
        same_above += 1
    shortest = min(len(old), len(new)) - same_above
    while same_below < shortest and old[-1 - same_below] == new[-1 - same_below]:
        same_below += 1
    first = text.count("\n", 0, text.index(mutant.old)) + 1 + same_above
    return range(first, first + max(1, len(old) - same_above - same_below))


def candidates_of(
    mutator: Mutator, changed: ChangedFile, text: str, coverage: FileCoverage
) -> list[Candidate]:
    """Every generated mutant that rewrites a changed line, with the cases that hit the lines it rewrites."""
    found = []
    for mutant in mutator.generate(changed.file, text):
        lines = rewritten(mutant, text)
        if changed.lines.isdisjoint(lines):
            continue
        cases = {
            case: None
            for site, hits in sorted(coverage.sites.items())
            if site.kind is SiteKind.STATEMENT and site.first < lines.stop and site.last >= lines.start
            for case in hits.cases
        }
        found.append(Candidate(mutant, lines.start, tuple(islice(cases, MAX_CASES)), mutator.cost))
    return found


def sample(candidates: Sequence[Candidate], size: int, seed: int) -> list[Candidate]:
    """Candidates that cost so much at most, in their order, drawn by a hash of seed and mutant."""
    ranked = sorted(candidates, key=lambda item: rank(item.mutant, seed))
    spent = accumulate(item.cost for item in ranked)
    drawn = {id(item) for item, cost in zip(ranked, spent, strict=True) if cost <= size}
    return [item for item in candidates if id(item) in drawn]


def try_mutants(
    changed: Sequence[tuple[ChangedFile, FileCoverage]],
    root: Path,
    policy: Policy,
    seed: int,
    workers: Callable[[str], int],
    told: Callable[[int], None],
) -> MutationVerdict:
    """What becomes of mutants on changed lines of measured kernels.

    Args:
        root: where the files are; only files of the harness's own paths can be tried.
        workers: lane -> how many processes.
        told: is told of every mutant that is done, and how many there are.

    Raises:
        WorkerError: workers cannot start, or a mutant's case could not be judged and it is not why.
        MutantError: a record cannot be read.
    """
    started = time.perf_counter()
    notes: list[str] = []
    by_lane: dict[str, list[Candidate]] = {}
    for item, coverage in changed:
        lane, why_not = _lane_of(item, coverage, root)
        if why_not:
            notes.append(f"no mutants of {item.file} are tried: {why_not}")
        else:
            mutator, text = mutators()[coverage.language], source_of(item.file)
            by_lane.setdefault(lane, []).extend(candidates_of(mutator, item, text, coverage))
    with contextlib.ExitStack() as stack:
        benches = {
            lane: Bench(stack.enter_context(Pool(lane, workers(lane))), workers(lane), found, notes)
            for lane, found in by_lane.items()
            if found
        }
        found = [one for bench in benches.values() for one in bench.candidates]
        eligible = [one for one in found if _acceptance(one.mutant) is None]
        drawn = sample(eligible, policy.max_mutants, seed)
        trials: dict[Candidate, Trial] = {}
        for bench in benches.values():
            for one, trial in bench.tried([one for one in drawn if one in bench.candidates]):
                trials[one] = trial
                told(len(drawn))
    born = [(one, trials[one]) for one in drawn if not trials[one].stillborn]
    missed = [(one, trial) for one, trial in born if not trial.caught]
    return MutationVerdict(
        eligible=len(eligible),
        accepted=len(found) - len(eligible),
        caught=len(born) - len(missed),
        survivors=tuple(_survivor(one, trial) for one, trial in missed),
        stillborn=len(drawn) - len(born),
        seed=seed,
        limit=policy.mutants,
        seconds=time.perf_counter() - started,
        files=tuple(dict.fromkeys(one.mutant.file for one in eligible)),
        notes=tuple(notes),
    )


def _lane_of(changed: ChangedFile, coverage: FileCoverage, root: Path) -> tuple[str, str]:
    """The lane that tries the mutants of a file, or why none does."""
    mutator = mutators().get(coverage.language)
    if mutator is None:
        return "", f"none are generated in {coverage.language}"
    if root.resolve() != ROOT.resolve() or not changed.file.startswith("harness/paths/"):
        return "", "no path of the harness runs it"
    hit_by = {lane for hits in coverage.sites.values() for lane in hits.lanes}
    lane = next((name for name in mutator.lanes if name in hit_by), None)
    return (lane, "") if lane else ("", f"none of the lanes {', '.join(mutator.lanes)} hit it")


def _acceptance(mutant: Mutant) -> str | None:
    """Why a mutant need not be noticed, or None; `harness/paths/triton/rope.py` is `triton/rope`'s file."""
    path = Path(mutant.file).relative_to("harness/paths").with_suffix("")
    return records_of(str(path)).acceptance(mutant)


class Bench:
    """The workers of one lane, and which of the cases of its candidates can tell a mutant there.

    Attributes:
        candidates: those whose file has a path that can run here; of the others a note is made.
    """

    def __init__(self, pool: Pool, processes: int, candidates: Sequence[Candidate], notes: list[str]) -> None:
        self._pool = pool
        self._processes = processes
        self._notes = notes
        self._paths = pool.describe()
        files = dict.fromkeys(one.mutant.file for one in candidates)
        self._paths_of = {file: self._own_paths(file) for file in files}
        notes += [
            f"no mutants of {file} are tried: no path of lane {pool.lane} is called as it is"
            for file in files
            if not self._paths_of[file]
        ]
        self.candidates = [one for one in candidates if self._paths_of[one.mutant.file]]

    def tried(self, candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Trial]]:
        """What became of every candidate; one that no case can be run on survives.

        A file with several paths is tried on one after another, until a case notices.
        """
        seconds = self._seconds_of_clean(candidates)
        left = {one: Trial(one.mutant, "") for one in candidates}
        for turn in range(max((len(self._paths_of[one.mutant.file]) for one in candidates), default=0)):
            chosen = {}
            for one in left:
                usable = [task for task in self._tasks(one, turn) if task in seconds]
                if usable:
                    # The fastest first: most mutants are noticed at once.
                    chosen[one.mutant] = (one, sorted(usable, key=seconds.__getitem__))
            for trial in self._pool.try_mutants([(mutant, tasks) for mutant, (_, tasks) in chosen.items()]):
                one = chosen[trial.mutant][0]
                cases = left[one].cases + trial.cases
                left[one] = replace(trial, cases=cases)
                if trial.caught or trial.stillborn:
                    yield one, left.pop(one)
        yield from left.items()

    def _own_paths(self, file: str) -> list[PathInfo]:
        """The paths of this lane whose file it is and that can run."""
        return [
            path
            for path in self._paths
            if self._pool.lane in path.lanes and path.unavailable is None and path_file(path.name) == file
        ]

    def _tasks(self, one: Candidate, turn: int) -> list[Task]:
        """The candidate's cases on its file's path of that number."""
        paths = self._paths_of[one.mutant.file][turn : turn + 1]
        usable = [case for path in paths for case in one.cases if _operator_of(case) == path.operator]
        if not usable:
            return []
        plan = make_plan(
            asked_cases(usable, [], "*", ()),
            paths,
            self._pool.lane,
            path_glob="*",
            extra_checks=(),
            timeout=TIMEOUT,
            workers=self._processes,
        )
        return list(plan.tasks)

    def _seconds_of_clean(self, candidates: Sequence[Candidate]) -> dict[Task, float]:
        """How long the kernel as it is takes on each case, oracle included; only where it passes."""
        turns = range(max((len(paths) for paths in self._paths_of.values()), default=0))
        tasks = dict.fromkeys(task for turn in turns for one in candidates for task in self._tasks(one, turn))
        by_name = {(task.case, task.path): task for task in tasks}
        found = {}
        for verdict in self._pool.judge(list(tasks)):
            if verdict.status is Status.PASSED:
                spent = verdict.seconds
                found[by_name[verdict.case, verdict.path]] = spent.compile + spent.run + spent.oracle
            elif verdict.status is not Status.SKIPPED:
                self._notes.append(f"no mutant is tried on {verdict.case}: {verdict.path} fails it as it is")
        return found


def _operator_of(case: str) -> str:
    """The operator of a case; empty for what is no case, such as the name of an engine's own test."""
    try:
        return parse(case).operator
    except (CaseError, RuleError):
        return ""


def _survivor(one: Candidate, trial: Trial) -> Survivor:
    """A survivor with the lines that differ, each side joined and stripped."""
    old, new = one.mutant.old.split("\n"), one.mutant.new.split("\n")
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    before, after = (" ".join(line.strip() for line in side) for side in (old, new))
    return Survivor(one.mutant.file, one.line, one.mutant.why, before, after, trial.cases)
