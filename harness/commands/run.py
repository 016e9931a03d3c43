"""`mla-harness run`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from harness import listing
from harness.commands._options import chosen_checks, chosen_lanes, default_workers
from harness.known_failures import KnownFailure, read_known_failures
from harness.plan import Plan, UsageError, asked_cases, make_plan
from harness.pool import Pool
from harness.progress import RunProgress
from harness.run import Summary, stale_entries, uninterrupted, verdicts
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
        judge_plans(plans, known, reports, suites, summary)
    raise typer.Exit(summary.exit_code)


def judge_plans(
    plans: Sequence[tuple[Pool, Plan]],
    known: Sequence[KnownFailure],
    reports: Sequence[Report],
    suites: Sequence[str],
    summary: Summary,
) -> None:
    """Carries the plans out, telling summary and reports; Ctrl-C keeps what ran."""
    seen: list[Verdict] = []
    tasks = sum(plan.size for _, plan in plans)
    lane = "+".join(pool.lane for pool, _ in plans)
    for item in reports:
        item.begin({"version": harness_version(), "lane": lane, "tasks": tasks, "suites": list(suites)})
    try:
        with RunProgress(tasks) as progress:
            for verdict in chain.from_iterable(verdicts(pool, plan, known) for pool, plan in plans):
                with uninterrupted():
                    summary.add(verdict)
                    seen.append(verdict)
                    for item in reports:
                        item.verdict(verdict)
                progress.advance(is_bad=verdict.is_bad)
        summary.stale = stale_entries(known, seen)
    except KeyboardInterrupt:
        summary.interrupted = True
        for pool, _ in plans:
            pool.stop()
    summary.finish()
    summary.compile_variants = len(set().union(*(pool.variants for pool, _ in plans)))
    for item in reports:
        item.end(summary)


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
