"""A worker: one process of one lane, which judges one task after another.

`start` runs before anything heavy is imported, because a lane's environment must be set first.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.lanes import Lane, lanes
from harness.task import Measured, PathInfo, Rates, Task
from harness.verdict import Kind, Seconds, Status, Verdict

if TYPE_CHECKING:
    from harness.coverage.collect import Collected, Collector, Measure
    from harness.kernel_path import KernelPath
    from harness.mutation.mutant import Mutant
    from harness.mutation.trial import Trial

BROKEN_EXIT = 76
"""Exit code of a worker whose device reported an error: the verdict waits in the spool folder."""


def spool_file(spool: Path, name: str) -> Path:
    """Where a worker leaves its answer before it ends itself, for the parent to read."""
    return spool / f"{name}.pickle"


class _Worker:
    """State of this process."""

    lane: Lane
    spool: Path
    unavailable: str | None
    found: list[PathInfo]
    paths: dict[str, KernelPath]
    collector: Collector | None = None


def start(lane: str, spool: str, measure: Measure | None = None) -> None:
    """Makes this process a worker of a lane, that measures coverage if told what of. Called once, first."""
    # Ctrl-C is the parent's to handle: workers finish or are ended by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.lane = lanes()[lane]
    _Worker.spool = Path(spool)
    for name, value in _Worker.lane.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _Worker.paths, _Worker.found = {}, []
    if measure is not None:
        from harness.coverage.collect import Collector, import_libraries

        import_libraries()
        _Worker.collector = Collector(measure)
        _Worker.collector.start()
    try:
        _Worker.unavailable = _Worker.lane.unavailable()
        if _Worker.unavailable is None:
            _Worker.lane.start()
            if _Worker.collector is not None:
                _Worker.lane.measure(_Worker.collector)
            from harness.watchdog import CLOCK

            CLOCK.install()
    except ImportError as error:
        _Worker.unavailable = f"{type(error).__name__}: {error}"
    _find_paths()


def _find_paths() -> None:
    from cases.contract import operators
    from cases.discovery import discover
    from harness.kernel_path import KernelPath

    folder = Path(__file__).parent / "paths"
    for item in discover("harness.paths", folder, "PATHS"):
        if item.reason is not None:
            # The names inside are unknown: by convention a file is called as its path is, a variant's
            # <operator>_<variant>.
            folder_of, _, stem = item.module.removeprefix("harness.paths.").replace(".", "/").rpartition("/")
            begins = (name for name in operators() if f"{stem}_".startswith(f"{name}_"))
            operator = max(begins, key=len, default=stem)
            variant = stem[len(operator) + 1 :]
            name = f"{folder_of}/{operator}@{variant}" if variant else f"{folder_of}/{operator}"
            _Worker.found.append(PathInfo(name, operator, (_Worker.lane.name,), item.reason))
            continue
        if not isinstance(item.value, tuple):
            raise TypeError(f"PATHS of {item.module} must be a tuple of KernelPath")
        for path in item.value:
            if not isinstance(path, KernelPath):
                raise TypeError(f"PATHS of {item.module} must be a tuple of KernelPath, got {path!r}")
            reason = _Worker.unavailable if _Worker.lane.name in path.lanes else None
            _Worker.found.append(PathInfo(path.name, path.operator, path.lanes, reason))
            _Worker.paths[path.name] = path


def describe() -> list[PathInfo]:
    """The paths this worker can see, in order of their files."""
    return _Worker.found


def judge(task: Task, number: int) -> tuple[Verdict, frozenset[str], Collected | None]:
    """The verdict of one task, the Triton variants compiled so far, and what ran since the last task.

    What ran goes along with the verdict: a worker is ended by a signal, and could not tell it later.

    A broken device ends the process with BROKEN_EXIT after the verdict is spooled under `number`.
    """
    from harness.watchdog import CLOCK

    compiled = CLOCK.seconds
    verdict = _verdict(task, _Worker.paths[task.path])
    spent = Seconds(CLOCK.seconds - compiled, verdict.seconds.run, verdict.seconds.oracle)
    verdict = replace(verdict, seconds=spent)
    if verdict.status is Status.ERROR and not _device_answers():
        spool_file(_Worker.spool, f"verdict-{number}").write_bytes(pickle.dumps(verdict))
        os._exit(BROKEN_EXIT)
    collected = None if _Worker.collector is None else _Worker.collector.take()
    return verdict, frozenset(CLOCK.variants), collected


def try_mutant(mutant: Mutant, tasks: Sequence[Task], number: int) -> Trial:
    """What becomes of a mutant of a path when the tasks run on it.

    A mutant that broke the device ends the process with BROKEN_EXIT after the trial is spooled.
    """
    from harness.mutation.trial import try_here, try_in_child

    if _Worker.lane.device != "cuda":
        return try_in_child(mutant, tasks, _Worker.spool, _verdict)
    trial = try_here(mutant, tasks, _Worker.spool, _verdict)
    if not _device_answers():
        spool_file(_Worker.spool, f"trial-{number}").write_bytes(pickle.dumps(trial))
        os._exit(BROKEN_EXIT)
    return trial


def judge_mutant(mutant: Mutant, tasks: Sequence[Task]) -> tuple[Verdict, ...]:
    """The verdict of every task on a mutant of their path."""
    from harness.mutation.trial import judge_all, judge_all_in_child

    attempt = judge_all if _Worker.lane.device == "cuda" else judge_all_in_child
    return attempt(mutant, tasks, _Worker.spool, _verdict)


def ceilings() -> Rates:
    """What the device of this lane can do."""
    from harness import bench

    return bench.ceilings()


def measure(task: Task) -> Measured:
    """How long a path takes on a case."""
    from harness import bench

    return bench.measure(task, _Worker.paths[task.path], _Worker.lane)


def _verdict(task: Task, path: KernelPath) -> Verdict:
    from harness.judge import judge_case

    try:
        return judge_case(task, path, _Worker.lane, _Worker.spool / "large.lock")
    except Exception as error:
        return _error(task, error)


def _device_answers() -> bool:
    try:
        _Worker.lane.synchronize()
    except Exception:
        return False
    return True


def _error(task: Task, error: Exception) -> Verdict:
    """An exception nobody expected is the harness's, unless the path left a device that answers no more."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    what = f"at {place}: {type(error).__name__}: {error}"
    kind, reason = None, f"the harness failed {what}"
    if not _device_answers():
        kind, reason = Kind.CRASH, f"the path left the device broken, which showed {what}"
    return Verdict(task.case, task.operator, task.path, task.lane, Status.ERROR, kind, reason)
