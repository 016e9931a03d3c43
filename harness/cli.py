"""The command line: arguments -> plan -> run -> reports -> exit code. No logic of its own."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from cases import CaseError, RuleError, parse
from cases.contract import contract_of
from cases.suite import SuiteError
from harness import listing
from harness.known_failures import KnownFailure, KnownFailuresError, read_known_failures
from harness.lanes import default_lanes, lanes
from harness.plan import Plan, UsageError, asked_cases, make_plan, require_match
from harness.pool import Pool, WorkerError
from harness.progress import RunProgress
from harness.run import (
    EXIT_FAILED,
    EXIT_HARNESS,
    EXIT_NOTHING_JUDGED,
    EXIT_PASSED,
    EXIT_USAGE,
    Summary,
    stale_entries,
    verdicts,
)
from harness.startup import harness_version, shadowed_package
from harness.verdict import Verdict
from reports.console import ConsoleReport, check_lines
from reports.writer import Report, writers

app = typer.Typer(
    name="mla-harness",
    help="Tells whether an MLA path computes the right numbers on any batch an engine can build.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

MAX_GPU_WORKERS = 8
"""Workers that share one GPU: each holds a CUDA context of about half a GiB."""


def main() -> None:
    """Runs the command line; every refusal is one sentence on stderr and an exit code."""
    shadowed = shadowed_package()
    if shadowed is not None:
        _refuse(shadowed, EXIT_HARNESS)
    try:
        app()
    except (UsageError, CaseError, RuleError, SuiteError, KnownFailuresError) as error:
        _refuse(str(error), EXIT_USAGE)
    except (WorkerError, ImportError) as error:
        _refuse(str(error), EXIT_HARNESS)


def _refuse(message: str, code: int) -> NoReturn:
    print(f"mla-harness: {message}", file=sys.stderr)
    raise SystemExit(code)


@app.command()
def run(
    case: Annotated[list[str] | None, typer.Argument(help="Cases, as text.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="A suite; smoke if nothing is named.")] = None,
    operator: Annotated[str, typer.Option(help="Glob of operators.")] = "*",
    path: Annotated[str, typer.Option(help="Glob of paths.")] = "*",
    lane: Annotated[
        list[str] | None,
        typer.Option(help="Lane; default compiled where a CUDA device answers, else the others."),
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="Glob of checks to run beyond the default ones.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a path may run on a case.")] = 120.0,
    known_failures: Annotated[
        Path | None, typer.Option(help="File of known failures, 'CASE PATH [LANE] # why' a line.")
    ] = None,
    report: Annotated[list[str] | None, typer.Option(help="FORMAT:FILE, repeatable.")] = None,
) -> None:
    """Judge cases on paths."""
    suites = suite or ([] if case else ["smoke"])
    asked = asked_cases(case or [], suites, operator, listing.check_names())
    known = read_known_failures(known_failures) if known_failures else ()
    opened = [_open_report(text) for text in report or []]
    extra = _checks(check or [])
    summary = Summary()
    with contextlib.ExitStack() as stack:
        plans = []
        for name in _lanes(lane):
            processes = workers or _default_workers(name)
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
        _judge(plans, known, reports, suites, summary)
    raise typer.Exit(summary.exit_code)


def _judge(
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


@app.command()
def repro(
    case: Annotated[str, typer.Argument(help="The case, as text.")],
    path: Annotated[str, typer.Option(help="Glob of paths.")] = "*",
    lane: Annotated[list[str] | None, typer.Option(help="Lane; default as in run.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Glob of further checks.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds the path may run.")] = 120.0,
) -> None:
    """Run one case again and say which rows, tokens, heads and dims fail."""
    asked = asked_cases([case], [], "*", ())
    extra = _checks(check or [])
    summary = Summary()
    for name in _lanes(lane):
        with Pool(name, 1) as pool:
            plan = make_plan(
                asked,
                pool.describe(),
                name,
                path_glob=path,
                extra_checks=extra,
                timeout=timeout,
                workers=1,
            )
            for verdict in verdicts(pool, plan, ()):
                summary.add(verdict)
                _print_verdict(verdict)
    if summary.total == 0:
        raise UsageError(f"no path of {asked[0].case.operator} matches {path!r} in this lane")
    raise typer.Exit(summary.exit_code)


@app.command()
def bench(
    case: Annotated[list[str] | None, typer.Argument(help="Cases, as text; default suite bench.")] = None,
    path: Annotated[str, typer.Option(help="Glob of paths.")] = "*",
    jsonl: Annotated[Path | None, typer.Option(help="Where to write every figure.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write a plot (SVG).")] = None,
) -> None:
    """Time paths beside the copy bandwidth and the bf16 matrix rate of the same run."""
    from reports import bench as report

    asked = asked_cases(case or [], [] if case else ["bench"], "*", ())
    with Pool("compiled", 1) as pool:
        plan = make_plan(
            asked, pool.describe(), "compiled", path_glob=path, extra_checks=(), timeout=600, workers=1
        )
        if not plan.tasks:
            reason = plan.unavailable[0][1] if plan.unavailable else "no path has the lane compiled"
            print(f"nothing was timed: {reason}")
            raise typer.Exit(EXIT_NOTHING_JUDGED)
        rates, measured = pool.bench(plan.tasks)
    print(report.table(measured, rates))
    if jsonl is not None:
        report.write_jsonl(jsonl, measured, rates)
    if plot is not None:
        report.write_svg(plot, measured, rates)
    is_wrong = any(ratio.is_impossible for ratio in report.ratios(measured, rates))
    is_wrong |= any(item.reason for item in measured)
    raise typer.Exit(EXIT_FAILED if is_wrong else EXIT_PASSED)


@app.command()
def show(case: Annotated[str, typer.Argument(help="The case, as text.")]) -> None:
    """Draw a batch: its rows, blocks and metadata."""
    from harness.picture import draw

    parsed = parse(case)
    contract_of(parsed, case)
    print(draw(parsed))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="|".join(listing.LISTINGS))],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    suite: Annotated[str, typer.Option(help="Which suite's cases.")] = "smoke",
) -> None:
    """List what there is."""
    require_match("listing", what, listing.LISTINGS)
    rows = listing.LISTINGS[what](suite)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    width = max((len(str(row["name"])) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['summary']}")


def _print_verdict(verdict: Verdict) -> None:
    print(f"{verdict.status.value}: {verdict.case} on {verdict.path} [{verdict.lane}]")
    if verdict.reason:
        print(f"  reason  {verdict.reason}")
    for check in verdict.checks:
        print("\n".join(check_lines(check, verdict.operator)))
    if verdict.inputs_digest:
        print(f"  inputs  {verdict.inputs_digest}")
    if verdict.outputs_digest:
        print(f"  outputs {verdict.outputs_digest}")
    versions = ", ".join(f"{name} {value}" for name, value in verdict.environment.items())
    if versions:
        print(f"  with    {versions}")


def _lanes(chosen: Sequence[str] | None) -> list[str]:
    if chosen:
        return [name for glob in chosen for name in require_match("lane", glob, lanes())]
    return default_lanes()


def _checks(globs: Sequence[str]) -> tuple[str, ...]:
    names = listing.check_names()
    return tuple(name for glob in globs for name in require_match("check", glob, names))


def _default_workers(lane: str) -> int:
    processors = len(os.sched_getaffinity(0))
    return min(processors, MAX_GPU_WORKERS) if lane == "compiled" else processors


def _open_report(text: str) -> Callable[[], Report]:
    name, colon, file = text.partition(":")
    if not colon or not file:
        raise UsageError(f"--report takes FORMAT:FILE, got {text!r}")
    if name not in writers():
        raise UsageError(f"no report format {name!r}; there are: {', '.join(writers())}")
    folder = Path(file).parent
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {text!r}: {folder} is not a folder")
    return lambda: writers()[name].open(Path(file))
