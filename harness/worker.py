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
from harness.task import Environment, Measured, PathInfo, Rates, Task
from harness.verdict import Kind, Seconds, Status, Verdict

if TYPE_CHECKING:
    from cases.discovery import Found
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


def start(lane: str, spool: str, measure: Measure | None = None, environment: Environment = ()) -> None:
    """Makes this process a worker of a lane, for paths of one environment. Called once, first.

    It measures coverage if told what of.
    """
    # Ctrl-C is the parent's to handle: workers finish or are ended by it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _Worker.lane = lanes()[lane]
    _Worker.spool = Path(spool)
    for name, value in (*_Worker.lane.environment.items(), *environment):
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
    """Ours first, by listing the folder; then those that other packages name."""
    from cases.discovery import discover, registered
    from harness.kernel_path import ENTRY_POINTS

    for item in discover("harness.paths", Path(__file__).parent / "paths", "PATHS"):
        if item.reason is None:
            _add_paths(item)
        else:
            _add_unavailable(item.module.removeprefix("harness.paths.").replace(".", "/"), item.reason)
    for item in registered(ENTRY_POINTS):
        try:
            if item.reason is None:
                _add_paths(item)
        except TypeError as error:
            # What others registered is theirs to mend, and costs only itself.
            item = replace(item, reason=str(error))
        if item.reason is not None:
            _add_unavailable(item.module, item.reason)


def _add_unavailable(file: str, reason: str) -> None:
    """A file that cannot be imported: the names inside are unknown.

    By convention a file is called as its path is, a variant's <operator>_<variant>.
    """
    from cases.contract import operators

    folder_of, _, stem = file.rpartition("/")
    begins = (name for name in operators() if f"{stem}_".startswith(f"{name}_"))
    operator = max(begins, key=len, default=stem)
    variant = stem[len(operator) + 1 :]
    name = f"{operator}@{variant}" if variant else operator
    name = f"{folder_of}/{name}" if folder_of else name
    _Worker.found.append(PathInfo(name, operator, (_Worker.lane.name,), reason))


def _add_paths(item: Found) -> None:
    """The paths of a file.

    Raises:
        TypeError: its constant is no tuple of paths, or one has a name that is taken.
    """
    from harness.kernel_path import KernelPath

    paths = item.value
    if not isinstance(paths, tuple):
        raise TypeError(f"PATHS of {item.module} must be a tuple of KernelPath")
    for path in paths:
        if not isinstance(path, KernelPath):
            raise TypeError(f"PATHS of {item.module} must be a tuple of KernelPath, got {path!r}")
        if path.name in _Worker.paths:
            raise TypeError(f"PATHS of {item.module}: there is a path {path.name} already, name it otherwise")
        reason = path.unavailable or (_Worker.unavailable if _Worker.lane.name in path.lanes else None)
        environment = tuple(sorted(path.environment.items()))
        info = PathInfo(path.name, path.operator, path.lanes, reason, dict(path.libraries), environment)
        _Worker.found.append(info)
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


def measure(tasks: Sequence[Task]) -> list[Measured]:
    """How long each path takes on a case, that of all tasks."""
    from harness import bench

    return bench.measure(tasks, _Worker.paths, _Worker.lane)


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
