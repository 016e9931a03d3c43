"""`mla-harness fuzz`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from cases.contract import operators
from harness.commands._options import chosen_checks, chosen_lanes, default_workers
from harness.fuzzing import Found, Tally, drawn_at_once, drawn_cases
from harness.fuzzing import fuzz as search
from harness.plan import Asked, UsageError, is_chosen, make_plan, require_match
from harness.pool import Pool
from harness.progress import RunProgress
from harness.run import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_NOTHING_JUDGED, EXIT_PASSED
from harness.task import PathInfo, Task
from harness.verdict import Status, Verdict
from reports.console import failure_block


def fuzz(
    path: Annotated[str, typer.Option(help="Glob of paths; default all but adapters.")] = "",
    operator: Annotated[str, typer.Option(help="Glob of operators.")] = "*",
    lane: Annotated[list[str] | None, typer.Option(help="Lane; default as in run.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Glob of further checks.")] = None,
    minutes: Annotated[float, typer.Option(min=0.0, help="How long to look in each lane.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Where the draws begin.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a path may run on a case.")] = 60.0,
    entries: Annotated[
        Path | None, typer.Option(help="Where to write failures as entries of a suite.")
    ] = None,
) -> None:
    """Draw cases until time runs out, and reduce every new failure to a smallest case."""
    require_match("operator", operator, operators())
    extra = chosen_checks(check or [])
    found: list[Found] = []
    tally = Tally()
    interrupted, lanes_with_paths = False, 0
    for name in chosen_lanes(lane):
        processes = workers or default_workers(name)
        with Pool(name, processes) as pool:
            infos = [
                info
                for info in pool.describe()
                if name in info.lanes and is_chosen(info.name, path) and fnmatchcase(info.operator, operator)
            ]
            lanes_with_paths += bool(infos)
            tasks_of = _tasks_of(infos, name, extra, seed, timeout, processes)
            try:
                for failure in _found(pool, tasks_of, 60 * minutes, processes, tally):
                    found.append(failure)
                    _tell(failure)
            except KeyboardInterrupt:
                interrupted = True
                pool.stop()
                break
    if not lanes_with_paths and not interrupted:
        raise UsageError(f"no path matches {path!r} whose operator matches {operator!r}")
    if entries is not None:
        entries.parent.mkdir(parents=True, exist_ok=True)
        entries.write_text("\n".join(failure.entry for failure in found), encoding="utf-8")
    print(_counts(tally, found, seed))
    judged = tally.counts[Status.PASSED] + tally.counts[Status.FAILED] + tally.counts[Status.ERROR]
    code = EXIT_FAILED if found else EXIT_PASSED if judged else EXIT_NOTHING_JUDGED
    raise typer.Exit(EXIT_INTERRUPTED if interrupted else code)


def _tasks_of(
    infos: Sequence[PathInfo],
    lane: str,
    checks: tuple[str, ...],
    seed: int,
    timeout: float,
    workers: int,
) -> Callable[[int], tuple[Task, ...]]:
    """What is judged together, by a number: cases of one operator after another."""
    available = [info for info in infos if info.unavailable is None]
    asked_of = sorted({info.operator for info in available})

    def tasks_of(number: int) -> tuple[Task, ...]:
        if not asked_of:
            return ()
        drawn = drawn_cases(asked_of[number % len(asked_of)], lane, drawn_at_once(workers), seed + number)
        asked = [Asked(case, (), both_oracles=False) for case in drawn]
        plan = make_plan(
            asked,
            available,
            lane,
            path_glob="*",
            extra_checks=checks,
            timeout=timeout,
            workers=workers,
        )
        return plan.tasks

    return tasks_of


def _found(
    pool: Pool, tasks_of: Callable[[int], Sequence[Task]], seconds: float, workers: int, tally: Tally
) -> Iterator[Found]:
    with RunProgress(None) as progress:

        def judge(tasks: Sequence[Task]) -> Iterator[Verdict]:
            for verdict in pool.judge(tasks):
                progress.advance(is_bad=verdict.is_bad)
                yield verdict

        yield from search(tasks_of, judge, seconds=seconds, width=workers, tally=tally)


def _tell(failure: Found) -> None:
    print(f"after {failure.seconds:.1f} s:")
    print(failure_block(failure.verdict))
    reduction = failure.reduction
    ending = "" if reduction.is_complete else " (time ran out)"
    print(f"  smallest  {reduction.case}{ending}, {reduction.tried} cases tried in {reduction.seconds:.1f} s")
    print("  an entry for cases/suites/regress.toml:\n")
    print(failure.entry, flush=True)


def _counts(tally: Tally, found: list[Found], seed: int) -> str:
    counts = ", ".join(f"{count:,} {status.value}" for status, count in tally.counts.items() if count)
    return (
        f"{len(tally.cases):,} cases drawn from seed {seed}: {counts or 'nothing judged'}; "
        f"{len(found)} failures of their own kind, {tally.seconds:.1f} s"
    )


COMMAND = fuzz
