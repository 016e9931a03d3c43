"""`mla-harness run`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from harness import listing
from harness.commands._options import chosen_checks, chosen_lanes, default_workers
from harness.known_failures import KnownFailure, read_known_failures
from harness.plan import Plan, UsageError, asked_cases, make_plan
from harness.pool import Pool
from harness.progress import RunProgress
from harness.reduction import Failure
from harness.run import Summary, stale_entries, uninterrupted, verdicts, with_smallest
from harness.startup import harness_version
from harness.verdict import Verdict
from reports.console import ConsoleReport
from reports.writer import Report, writers


def run(
    case: Annotated[list[str] | None, typer.Argument(help="Cases, as text.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="A suite; smoke if nothing is named.")] = None,
    mark: Annotated[str, typer.Option(help="Only the cases of suites that are marked so.")] = "",
    operator: Annotated[str, typer.Option(help="Glob of operators.")] = "*",
    path: Annotated[str, typer.Option(help="Glob of paths; default all but adapters.")] = "",
    lane: Annotated[
        list[str] | None,
        typer.Option(help="Lane; default compiled where a CUDA device answers, else the others."),
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="Glob of checks to run beyond the default ones.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Data seeds of every case, from its own upwards.")] = 1,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a path may run on a case.")] = 120.0,
    known_failures: Annotated[
        Path | None, typer.Option(help="File of known failures; the form is in harness/known_failures.py.")
    ] = None,
    reduce: Annotated[
        float,
        typer.Option(min=0.0, help="Seconds to reduce failures that look alike; 0: none is."),
    ] = 0.0,
    report: Annotated[list[str] | None, typer.Option(help="FORMAT:FILE, repeatable.")] = None,
) -> None:
    """Judge cases on paths."""
    suites = suite or ([] if case else ["smoke"])
    if mark and not suites:
        raise UsageError(f"--mark {mark} chooses cases of suites: name one with --suite")
    asked = asked_cases(case or [], suites, operator, listing.check_names(), mark=mark, seeds=seeds)
    known = read_known_failures(known_failures) if known_failures else ()
    opened = [open_report(text) for text in report or []]
    extra = chosen_checks(check or [])
    summary = Summary()
    with contextlib.ExitStack() as stack:
        plans = []
        for name in chosen_lanes(lane):
            processes = workers or default_workers(name)
            pool = stack.enter_context(Pool(name, processes))
            plan = make_plan(
                asked,
                pool.describe(),
                name,
                path_glob=path,
                extra_checks=extra,
                timeout=timeout,
                workers=processes,
            )
            plans.append((pool, plan))
        reports: list[Report] = [ConsoleReport(), *(make() for make in opened)]
        judge_plans(plans, known, reports, suites, summary, reduce_seconds=reduce)
    raise typer.Exit(summary.exit_code)


def judge_plans(
    plans: Sequence[tuple[Pool, Plan]],
    known: Sequence[KnownFailure],
    reports: Sequence[Report],
    suites: Sequence[str],
    summary: Summary,
    *,
    reduce_seconds: float = 0.0,
) -> None:
    """Carries the plans out, telling summary and reports; Ctrl-C keeps what ran.

    With `reduce_seconds` failures are told once a plan has been carried out, and their smallest cases with
    them.
    """
    seen: list[Verdict] = []
    waiting: dict[tuple[str, str, str], Verdict] = {}
    tasks = sum(plan.size for _, plan in plans)
    elsewhere = {pool.lane: {path.name: list(path.lanes) for path in plan.elsewhere} for pool, plan in plans}
    about = {"version": harness_version(), "lane": "+".join(pool.lane for pool, _ in plans), "tasks": tasks}
    for item in reports:
        item.begin({**about, "suites": list(suites), "elsewhere": elsewhere})

    def tell(verdict: Verdict) -> None:
        with uninterrupted():
            waiting.pop((verdict.case, verdict.path, verdict.lane), None)
            summary.add(verdict)
            seen.append(verdict)
            for item in reports:
                item.verdict(verdict)

    try:
        with RunProgress(tasks) as progress:
            for pool, plan in plans:
                for verdict in _failures_last(pool, plan, known, reduce_seconds, waiting):
                    tell(verdict)
                    progress.advance(is_bad=verdict.is_bad)
        summary.stale = stale_entries(known, seen)
    except KeyboardInterrupt:
        summary.interrupted = True
        for pool, _ in plans:
            pool.stop()
        for verdict in tuple(waiting.values()):
            tell(verdict)
    summary.finish()
    summary.compile_variants = len(set().union(*(pool.variants for pool, _ in plans)))
    for item in reports:
        item.end(summary)


def _failures_last(
    pool: Pool,
    plan: Plan,
    known: Sequence[KnownFailure],
    seconds: float,
    waiting: dict[tuple[str, str, str], Verdict],
) -> Iterator[Verdict]:
    """The verdicts of a plan, as they come without `seconds`; else failures last, with their smallest cases.

    Failures stand in `waiting`, by case, path and lane, until they are taken out.
    """
    for verdict in verdicts(pool, plan, known):
        if seconds and Failure.of(verdict) is not None:
            waiting[verdict.case, verdict.path, verdict.lane] = verdict
        else:
            yield verdict
    yield from with_smallest(pool, plan, tuple(waiting.values()), known, seconds)


def open_report(text: str) -> Callable[[], Report]:
    """What opens the report that FORMAT:FILE names.

    Raises:
        UsageError: it names none.
    """
    name, colon, file = text.partition(":")
    if not colon or not file:
        raise UsageError(f"--report takes FORMAT:FILE, got {text!r}")
    if name not in writers():
        raise UsageError(f"no report format {name!r}; there are: {', '.join(writers())}")
    folder = Path(file).parent
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {text!r}: {folder} is not a folder")
    return lambda: writers()[name].open(Path(file))


COMMAND = run
