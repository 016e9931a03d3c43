"""`mla-harness cover`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from harness import listing
from harness.commands._options import chosen_checks, chosen_lanes, default_workers
from harness.commands.run import judge_plans, open_report
from harness.coverage.collect import Collector, chosen_files
from harness.coverage.recording import Recording
from harness.coverage.sites import PROCESS, Coverage
from harness.plan import UsageError, asked_cases, make_plan
from harness.pool import Pool
from harness.run import Summary
from reports import coverage_html, coverage_table, coverage_xml
from reports.console import ConsoleReport

PACKAGES = ("cases", "harness", "references", "reports")


def cover(
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
    source: Annotated[
        list[str] | None,
        typer.Option(help="Glob of .py, .cu and .cuh files under this folder; default the harness's own."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a path may run on a case.")] = 300.0,
    report: Annotated[
        list[str] | None, typer.Option(help="FORMAT:FILE of the verdicts, as run writes them; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("out/coverage"),
    append: Annotated[
        bool, typer.Option("--append", help="Add to the coverage that is in the folder already.")
    ] = False,
) -> None:
    """Judge cases on paths and say what of the kernels and of host code they ran."""
    suites = suite or ([] if case else ["smoke"])
    if mark and not suites:
        raise UsageError(f"--mark {mark} chooses cases of suites: name one with --suite")
    house = Path(__file__).resolve().parents[2]
    root = Path.cwd().resolve() if source else house
    measure = chosen_files(root, source or [f"{package}/*" for package in PACKAGES])
    earlier = Coverage.read(out / "coverage.json") if append else Coverage()
    asked = asked_cases(case or [], suites, operator, listing.check_names(), mark=mark)
    extra = chosen_checks(check or [])
    opened = [open_report(text) for text in report or []]
    recording, collector = Recording(measure), Collector(measure)
    if append:
        _require_same_texts(recording.coverage(), earlier, out)
    collector.start()
    summary = Summary()
    with contextlib.ExitStack() as stack:
        plans = []
        for name in chosen_lanes(lane):
            processes = workers or default_workers(name)
            pool = stack.enter_context(Pool(name, processes, recording))
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
        judge_plans(plans, (), [ConsoleReport(), *(make() for make in opened)], suites, summary)
    recording.add(collector.stop(), PROCESS)
    coverage = recording.coverage()
    coverage.merge(earlier)
    recording.write_data_file(out / ".coverage", append=append)
    write_coverage(coverage, root, out)
    print(coverage_table.text(coverage, with_hosts=bool(source)))
    print(f"written: {out}/coverage.json, coverage.xml, .coverage, index.html")
    raise typer.Exit(summary.exit_code)


def _require_same_texts(now: Coverage, earlier: Coverage, out: Path) -> None:
    """Refuses before anything runs what could not be merged afterwards."""
    for name, file in now.files.items():
        if name in earlier.files and earlier.files[name].digest != file.digest:
            raise UsageError(
                f"--append: {name} is not the text that {out}/coverage.json was measured on: "
                "leave --append out"
            )


def write_coverage(coverage: Coverage, root: Path, out: Path) -> None:
    """Writes a coverage in every form but coverage.py's own.

    Args:
        root: the folder that its files are relative to.
    """
    coverage.write(out / "coverage.json")
    coverage_xml.write(coverage, root, out / "coverage.xml")
    coverage_html.write(coverage, root, out)


COMMAND = cover
