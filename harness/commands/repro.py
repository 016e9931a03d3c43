"""`mla-harness repro`."""

from __future__ import annotations

from typing import Annotated

import typer

from harness.commands._options import chosen_checks, chosen_lanes
from harness.plan import UsageError, asked_cases, make_plan
from harness.pool import Pool
from harness.run import Summary, verdicts
from harness.verdict import Verdict
from reports.console import check_lines


def repro(
    case: Annotated[str, typer.Argument(help="The case, as text.")],
    path: Annotated[str, typer.Option(help="Glob of paths.")] = "*",
    lane: Annotated[list[str] | None, typer.Option(help="Lane; default as in run.")] = None,
    check: Annotated[list[str] | None, typer.Option(help="Glob of further checks.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds the path may run.")] = 120.0,
) -> None:
    """Run one case again and say which rows, tokens, heads and dims fail."""
    asked = asked_cases([case], [], "*", ())
    extra = chosen_checks(check or [])
    summary = Summary()
    for name in chosen_lanes(lane):
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
