"""`mla-harness budgets`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.commands._options import chosen_lanes, default_workers
from harness.listing import check_names
from harness.margins import cells, in_every_dtype
from harness.mutation.mutant import records_of
from harness.plan import UsageError, asked_cases, make_plan
from harness.pool import Pool
from harness.progress import RunProgress
from harness.run import EXIT_FAILED, EXIT_PASSED
from harness.verdict import Verdict
from reports import budgets as report


def budgets(
    path: Annotated[str, typer.Option(help="Glob of paths.")] = "triton/*",
    suite: Annotated[list[str] | None, typer.Option(help="Suites; default clean.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the clean kernel.")] = 3,
    lane: Annotated[list[str] | None, typer.Option(help="Lane; default as in run, the first.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a path may run on a case.")] = 120.0,
    jsonl: Annotated[Path | None, typer.Option(help="Where to write every figure.")] = None,
) -> None:
    """Derive the budgets' table again: worst clean errors, budgets, weakest mutants. Fails if margins do."""
    names, suites = check_names(), suite or ["clean"]
    name = chosen_lanes(lane)[0]
    processes = workers or default_workers(name)
    with Pool(name, processes) as pool:
        paths = pool.describe()
        plans = [
            make_plan(
                in_every_dtype(asked_cases([], suites, "*", names, seeds=count)),
                paths,
                name,
                path_glob=path,
                extra_checks=(),
                timeout=timeout,
                workers=processes,
            )
            for count in (seeds, 1)
        ]
        clean, once = (plan.tasks for plan in plans)
        if not clean:
            raise UsageError(f"no case of {', '.join(suites)} has a path {path!r} in lane {name}")
        trials = [
            (mutant, [task for task in once if task.path == one_path])
            for one_path in dict.fromkeys(task.path for task in once)
            for mutant in records_of(one_path).mutants
            if mutant.shows
        ]
        verdicts: list[Verdict] = []
        with RunProgress(len(clean) + len(trials)) as progress:
            for verdict in pool.judge(clean):
                verdicts.append(verdict)
                progress.advance(is_bad=verdict.is_bad)
            broken = {}
            for mutant, one_path, found in pool.judge_mutants(trials):
                broken[mutant, one_path] = found
                progress.advance(is_bad=False)
    table = [
        cell
        for one_path in dict.fromkeys(task.path for task in clean)
        for cell in cells(
            one_path,
            [verdict for verdict in verdicts if verdict.path == one_path],
            {mutant: broken[mutant, one_path] for mutant, tasks in trials if tasks[0].path == one_path},
        )
    ]
    print(report.text(table))
    if jsonl is not None:
        report.write_jsonl(jsonl, table)
    holds = not any(cell.complaints() for cell in table)
    raise typer.Exit(EXIT_PASSED if holds else EXIT_FAILED)


COMMAND = budgets
