"""`mla-harness bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.plan import asked_cases, is_chosen, make_plan
from harness.pool import Pool
from harness.run import EXIT_FAILED, EXIT_NOTHING_JUDGED, EXIT_PASSED
from reports import bench as report


def bench(
    case: Annotated[list[str] | None, typer.Argument(help="Cases, as text; default suite bench.")] = None,
    path: Annotated[str, typer.Option(help="Glob of paths.")] = "*",
    jsonl: Annotated[Path | None, typer.Option(help="Where to write every figure.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write a plot (SVG).")] = None,
) -> None:
    """Time paths beside the copy bandwidth and the bf16 matrix rate of the same run."""
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
    # What another project's kernel does not claim is no failure.
    is_wrong |= any(item.reason and is_chosen(item.path, "") for item in measured)
    raise typer.Exit(EXIT_FAILED if is_wrong else EXIT_PASSED)


COMMAND = bench
