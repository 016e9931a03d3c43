"""`mla-harness repro`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from harness.commands._options import chosen_checks, chosen_lanes, default_workers
from harness.diagnosis import diagnose_crash
from harness.plan import UsageError, asked_cases, make_plan
from harness.pool import Pool
from harness.reduction import Reduction, reduce_verdict
from harness.run import Summary, verdicts
from harness.task import Task
from harness.verdict import Kind, Verdict
from reports.console import check_lines

DIAGNOSIS = "diagnosis"
"""The check that names the mistake."""


def repro(
    case: Annotated[str, typer.Argument(help="The case, as text.")],
    path: Annotated[str, typer.Option(help="Glob of paths; default all but adapters.")] = "",
    lane: Annotated[list[str] | None, typer.Option(help="Lane; default as in run.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Glob of further checks.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds the path may run.")] = 120.0,
    reduce: Annotated[bool, typer.Option(help="Look for a smallest case that fails alike.")] = True,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to look for it.")] = 60.0,
) -> None:
    """Run one case again, say what of it fails, reduce it to what still does, and name the mistake."""
    asked = asked_cases([case], [], "*", ())
    extra = chosen_checks(check or [])
    # What is reduced is diagnosed once it is smallest.
    extra = extra if reduce else (*extra, DIAGNOSIS)
    summary = Summary()
    for name in chosen_lanes(lane):
        workers = default_workers(name) if reduce else 1
        with Pool(name, workers) as pool:
            plan = make_plan(
                asked,
                pool.describe(),
                name,
                path_glob=path,
                extra_checks=extra,
                timeout=timeout,
                workers=workers,
            )
            tasks = {task.path: task for task in plan.tasks}
            for verdict in verdicts(pool, plan, ()):
                summary.add(verdict)
                _print_verdict(verdict)
                if reduce and verdict.is_bad:
                    _reduce(pool, verdict, tasks[verdict.path], workers, seconds)
                elif verdict.kind is Kind.CRASH:
                    _explain_crash(pool, tasks[verdict.path])
    if summary.total == 0:
        raise UsageError(f"no path of {asked[0].case.operator} matches {path!r} in this lane")
    raise typer.Exit(summary.exit_code)


def _reduce(pool: Pool, verdict: Verdict, task: Task, workers: int, seconds: float) -> None:
    """Prints the smallest case that fails alike, and what is said of it."""
    found = reduce_verdict(verdict, pool.judge, task, width=workers, seconds=seconds)
    if found is None:
        return
    print(f"  {_sentence(found, verdict)}")
    smallest = replace(task, case=str(found.case), checks=(*task.checks, DIAGNOSIS))
    for again in pool.judge([smallest]):
        _print_verdict(again)
        if again.kind is Kind.CRASH:
            _explain_crash(pool, replace(smallest, checks=task.checks))
        print(f"  rerun   {again.repro}")


def _explain_crash(pool: Pool, task: Task) -> None:
    """Prints what the end of a path is likely to come from, which no check of its launch can say."""
    print(f"  cause   {diagnose_crash(task, pool.judge).sentence}")


def _sentence(found: Reduction, verdict: Verdict) -> str:
    spent = f"{found.tried} cases tried in {found.seconds:.1f} s"
    ending = "" if found.is_complete else "; time ran out, --seconds gives more"
    if str(found.case) == verdict.case:
        return f"nothing can be taken away from it: {spent}{ending}"
    return f"reduced to a smallest case that fails alike: {spent}{ending}"


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


COMMAND = repro
