"""`pytest --mla-suite smoke -n 2`: one test item a (case, path, lane), judged by the harness's own workers.

The items replace normal collection. Generated items cannot be named on the command line again, so a
failure prints the `--mla-case` that selects it. pytest's exit codes hold here, not the harness's.

`pytest --mla-cover out/coverage --mla-cover-source 'kernels/*.py'` measures the Triton and Python files of
any project in its own tests, its kernels interpreted, and writes what `mla-harness cover` writes; the tests
that hit a line stand in the place of cases.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cases import CaseError
from cases.suite import SuiteError
from harness.coverage.collect import (
    Collector,
    MissingCoverage,
    chosen_files,
    import_coverage,
    import_libraries,
)
from harness.coverage.recording import Recording
from harness.coverage.sites import PROCESS, Coverage
from harness.known_failures import (
    KnownFailure,
    KnownFailuresError,
    apply_known,
    read_known_failures,
)
from harness.lanes import default_lanes
from harness.lanes.interpreted import LANE
from harness.plan import UsageError, asked_cases, make_plan, require_match
from harness.pool import Pool
from harness.task import Task
from harness.verdict import Kind, Status, Verdict, skipped

_REFUSALS = (UsageError, CaseError, SuiteError, KnownFailuresError)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options, all beginning with --mla-."""
    group = parser.getgroup("mla-harness")
    group.addoption("--mla-suite", action="append", default=[], help="judge the cases of a suite")
    group.addoption("--mla-mark", default="", help="only the cases of suites that are marked so")
    group.addoption("--mla-case", action="append", default=[], help="judge a case")
    group.addoption("--mla-path", default="", help="glob of paths; default all but adapters")
    group.addoption("--mla-lane", action="append", default=[], help="lane; default as in mla-harness run")
    group.addoption("--mla-check", action="append", default=[], help="glob of checks beyond the default ones")
    group.addoption("--mla-timeout", type=float, default=120.0, help="seconds a path may run on a case")
    group.addoption("--mla-known-failures", type=Path, help="file of cases that are expected to fail")
    group.addoption("--mla-cover", type=Path, metavar="DIR", help="measure coverage and write it there")
    group.addoption("--mla-cover-source", action="append", default=[], help="glob of files to be measured")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begins to measure before anything of the tests is imported, where that is asked for."""
    option = early_config.known_args_namespace
    if option.mla_cover is None:
        return
    if not option.mla_cover_source:
        raise pytest.UsageError("--mla-cover needs files to measure: name them with --mla-cover-source GLOB")
    if sys.gettrace() is not None:
        raise pytest.UsageError("--mla-cover cannot measure where another tool traces: leave out --cov")
    # Triton reads it when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        measure = chosen_files(early_config.rootpath.resolve(), option.mla_cover_source)
        collector = Collector(measure)
        import_libraries()
        collector.start()
    except (UsageError, MissingCoverage) as error:
        raise pytest.UsageError(str(error)) from None
    if LANE.unavailable() is None:
        from harness import interpreter

        interpreter.repair()
        collector.watch_interpreter()
    early_config.stash[_COVER] = _Cover(collector, Recording(measure), measure.root, option.mla_cover)


@dataclass
class _Cover:
    """Coverage being measured: what was, and from workers of pytest-xdist what they found."""

    collector: Collector
    recording: Recording
    root: Path
    out: Path
    found: Coverage | None = None


_COVER = pytest.StashKey[_Cover]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Notes what a test ran as the test's."""
    yield
    cover = item.config.stash.get(_COVER, None)
    if cover is not None:
        cover.recording.add(cover.collector.take(), LANE.name, item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes over what a worker of pytest-xdist measured."""
    cover = node.config.stash.get(_COVER, None)
    file = getattr(node, "workeroutput", {}).get(WORKER_OUTPUT)
    if cover is not None and file is not None:
        cover.found = cover.found or Coverage()
        cover.found.merge(Coverage.read(Path(file)))


def _finish_cover(config: pytest.Config, cover: _Cover) -> None:
    """Writes what was measured; a worker of pytest-xdist leaves it for its controller."""
    cover.recording.add(cover.collector.stop(), PROCESS)
    worker = getattr(config, "workerinput", {}).get("workerid")
    coverage = cover.recording.coverage()
    if worker is not None:
        file = cover.out / f"coverage.{worker}.json"
        coverage.write(file)
        cover.recording.write_data_file(cover.out / f".coverage.{worker}")
        config.workeroutput[WORKER_OUTPUT] = str(file.resolve())  # type: ignore[attr-defined]
        return
    from harness.commands.cover import write_coverage

    data = cover.out / ".coverage"
    cover.recording.write_data_file(data)
    for part in sorted(cover.out.glob(".coverage.gw*")):
        _join(data, part)
    if cover.found is not None:
        coverage.merge(cover.found)
        for part in cover.out.glob("coverage.gw*.json"):
            part.unlink()
    write_coverage(coverage, cover.root, cover.out)
    cover.found = coverage


def _join(data: Path, part: Path) -> None:
    """Adds a data file of coverage.py to another, and removes it."""
    library = import_coverage()
    whole, more = library.CoverageData(str(data)), library.CoverageData(str(part))
    whole.read()
    more.read()
    whole.update(more)
    whole.close()
    more.close()
    part.unlink()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of what was measured."""
    cover = config.stash.get(_COVER, None)
    if cover is not None and cover.found is not None:
        from reports import coverage_table

        terminalreporter.section("coverage")
        terminalreporter.write_line(coverage_table.text(cover.found))


WORKER_OUTPUT = "mla_cover"
"""Under which a worker of pytest-xdist says where its coverage is."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> list[pytest.Item] | None:
    """Collects verdicts instead of files where a suite or a case is named."""
    config = session.config
    if not config.option.mla_suite and not config.option.mla_case:
        return None
    is_controller = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    if is_controller:
        # pytest-xdist's controller collects nothing itself; its workers come here too.
        return None
    try:
        items = list(VerdictCollector.from_parent(session, name="mla").collect())
    except _REFUSALS as error:
        raise pytest.UsageError(str(error)) from None
    session.items = items
    config.hook.pytest_collection_modifyitems(session=session, config=config, items=items)
    session.testscollected = len(items)
    config.hook.pytest_collection_finish(session=session)
    return items


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Ends the workers, and writes coverage."""
    cover = session.config.stash.get(_COVER, None)
    if cover is not None:
        _finish_cover(session.config, cover)
    for pool in session.config.stash.get(_POOLS, {}).values():
        pool.stop()
        pool.__exit__(None, None, None)


_POOLS = pytest.StashKey[dict[str, Pool]]()


class VerdictCollector(pytest.Collector):
    """Makes an item of every judgement that the options ask for."""

    def collect(self) -> Iterator[pytest.Item]:
        from harness.listing import check_names

        option = self.config.option
        checks = check_names()
        asked = asked_cases(option.mla_case, option.mla_suite, "*", checks, mark=option.mla_mark)
        known = read_known_failures(option.mla_known_failures) if option.mla_known_failures else ()
        extra = tuple(n for glob in option.mla_check for n in require_match("check", glob, checks))
        pools = self.config.stash.setdefault(_POOLS, {})
        cover = self.config.stash.get(_COVER, None)
        recording = None if cover is None else cover.recording
        for lane in option.mla_lane or default_lanes():
            if lane not in pools:
                pools[lane] = Pool(lane, 1, recording)
            pool = pools[lane]
            plan = make_plan(
                asked,
                pool.describe(),
                lane,
                path_glob=option.mla_path,
                extra_checks=extra,
                timeout=option.mla_timeout,
                workers=int(getattr(option, "numprocesses", None) or 1),
            )
            for task in plan.tasks:
                yield self.item(task, known, None)
            for task, reason in plan.unavailable:
                yield self.item(task, known, reason)

    def item(self, task: Task, known: tuple[KnownFailure, ...], unavailable: str | None) -> VerdictItem:
        """The item of one judgement."""
        item: VerdictItem = VerdictItem.from_parent(self, name=f"{task.case}[{task.path}-{task.lane}]")
        item.task, item.known, item.unavailable = task, known, unavailable
        return item


class VerdictItem(pytest.Item):
    """One (case, path, lane)."""

    task: Task
    known: tuple[KnownFailure, ...]
    unavailable: str | None

    def runtest(self) -> None:
        """Judges the case in the lane's worker; a crash or a hang there fails this item only."""
        if self.unavailable is not None:
            pytest.skip(skipped(self.task, Kind.UNAVAILABLE, self.unavailable).reason)
        pool = self.config.stash[_POOLS][self.task.lane]
        (verdict,) = pool.judge([self.task])
        verdict = apply_known(self.known, verdict)
        if verdict.status is Status.SKIPPED:
            pytest.skip(verdict.reason)
        if verdict.status is Status.XFAILED:
            pytest.xfail(verdict.reason)
        if verdict.is_bad:
            raise VerdictFailure(verdict)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The failing verdict as the console report prints it."""
        if not isinstance(excinfo.value, VerdictFailure):
            return super().repr_failure(excinfo, style)
        from reports.console import failure_block

        verdict = excinfo.value.verdict
        rerun = f"pytest -p harness.pytest_plugin --mla-case '{verdict.case}' --mla-path {verdict.path}"
        return f"{failure_block(verdict)}\n  pytest  {rerun} --mla-lane {verdict.lane}"

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the item is said to come from: the checkout, and its own name."""
        return self.config.rootpath, None, self.name


class VerdictFailure(Exception):
    """A verdict that makes its item fail."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.reason)
        self.verdict = verdict
