"""`mla-harness mutants`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cases.suite import load_suite, suite_names
from harness.commands._options import chosen_lanes, default_workers
from harness.listing import check_names
from harness.mutation.chosen import choose
from harness.plan import UsageError, asked_cases, make_plan, marks_of
from harness.pool import Pool
from harness.progress import RunProgress
from harness.run import EXIT_FAILED, EXIT_PASSED
from reports import mutants as report

MARK = "mutants"
"""How suites mark the cases that must notice."""


def mutants(
    path: Annotated[
        str, typer.Option(help="Glob of paths whose kernels are broken; default all but adapters.")
    ] = "",
    suite: Annotated[
        list[str] | None, typer.Option(help="Suites that must notice; default all cases marked so.")
    ] = None,
    only: Annotated[str, typer.Option(help="Glob of mutants.")] = "*",
    generated: Annotated[
        bool, typer.Option("--generated", help="Generated mutants instead of recorded bugs.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(min=1, help="The most mutants of a path; default all.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which sample.")] = 0,
    lane: Annotated[str, typer.Option(help="Lane.")] = "interpreted",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a mutant may run on a case.")] = 20.0,
    jsonl: Annotated[Path | None, typer.Option(help="Where to write every trial.")] = None,
    survivors: Annotated[
        Path | None, typer.Option(help="Where to write survivors as records to be accepted.")
    ] = None,
) -> None:
    """Break kernels on purpose and say which case notices; fails if a mutant survives."""
    mark = "" if suite else MARK
    asked = asked_cases([], suite or default_suites(), "*", check_names(), mark=mark)
    name, *others = chosen_lanes([lane])
    if others:
        raise UsageError(f"mutants takes one lane, {lane!r} matches {', '.join([name, *others])}")
    processes = workers or default_workers(name)
    with Pool(name, processes) as pool:
        plan = make_plan(
            asked,
            pool.describe(),
            name,
            path_glob=path,
            extra_checks=(),
            timeout=timeout,
            workers=processes,
        )
        chosen = choose(plan.tasks, only, generated=generated, sample=sample, seed=seed)
        if not chosen.attempts:
            raise UsageError(f"no mutant of a path {path!r} matches {only!r} in lane {name}")
        trials = []
        with RunProgress(len(chosen.attempts)) as progress:
            for trial in pool.try_mutants(chosen.attempts):
                trials.append(trial)
                progress.advance(is_bad=not trial.caught and trial.mutant not in chosen.accepted)
    order = {(mutant, tasks[0].path): number for number, (mutant, tasks) in enumerate(chosen.attempts)}
    trials.sort(key=lambda trial: order[trial.mutant, trial.path])
    print(report.text(trials, chosen))
    if jsonl is not None:
        report.write_jsonl(jsonl, trials, chosen)
    if survivors is not None:
        survivors.parent.mkdir(parents=True, exist_ok=True)
        survivors.write_text(report.survivor_records(trials, chosen), encoding="utf-8")
    raise typer.Exit(EXIT_FAILED if report.has_failed(trials, chosen) else EXIT_PASSED)


def default_suites() -> list[str]:
    """The suites with cases that must notice mutants."""
    return [name for name in suite_names() if MARK in marks_of(load_suite(name))]


COMMAND = mutants
