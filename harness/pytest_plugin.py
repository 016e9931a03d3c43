"""`pytest --mla-suite smoke -n 2`: one test item a (case, path, lane), judged by the harness's own workers.

The items replace normal collection. Generated items cannot be named on the command line again, so a
failure prints the `--mla-case` that selects it. pytest's exit codes hold here, not the harness's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cases import CaseError
from cases.suite import SuiteError
from harness.known_failures import (
    KnownFailure,
    KnownFailuresError,
    apply_known,
    read_known_failures,
)
from harness.lanes import default_lanes
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
    group.addoption("--mla-path", default="*", help="glob of paths")
    group.addoption("--mla-lane", action="append", default=[], help="lane; default as in mla-harness run")
    group.addoption("--mla-check", action="append", default=[], help="glob of checks beyond the default ones")
    group.addoption("--mla-timeout", type=float, default=120.0, help="seconds a path may run on a case")
    group.addoption("--mla-known-failures", type=Path, help="file of cases that are expected to fail")


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
    """Ends the workers."""
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
        for lane in option.mla_lane or default_lanes():
            pool = pools.setdefault(lane, Pool(lane, 1))
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
