"""One mutant tried: the changed file becomes a path of its own, and cases run until one notices.

In the lanes of the processor every mutant gets a process forked from a worker that has everything
imported: what a mutant breaks, or never ends, is gone with it. A CUDA context does not survive a fork, so
in lane `compiled` the worker itself runs it and the pool replaces the worker if that was its end.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from harness.mutation.mutant import Mutant, source_of
from harness.task import Task
from harness.verdict import Kind, Status, Verdict
from harness.watchdog import TIMEOUT_EXIT

if TYPE_CHECKING:
    from harness.kernel_path import KernelPath

PR_SET_PDEATHSIG = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Trial:
    """What became of one mutant.

    Attributes:
        caught: whether a case noticed. `reason` says how, or what kept the mutant from being tried.
        stillborn: the changed file cannot even be imported, so there was nothing to catch.
        case, check: the first case that noticed, and its first failing check, or the kind of its end.
        cases: how many ran. seconds: how long it all took.
    """

    mutant: Mutant
    path: str
    caught: bool = False
    stillborn: bool = False
    case: str = ""
    check: str = ""
    reason: str = ""
    cases: int = 0
    seconds: float = 0.0


class HarnessFailure(RuntimeError):
    """A mutant's case could not be judged for a reason that is not the mutant's."""


def try_here(
    mutant: Mutant, tasks: Sequence[Task], folder: Path, judge: Callable[[Task, KernelPath], Verdict]
) -> Trial:
    """Runs tasks, in order, on a mutant until one notices it.

    Args:
        tasks: judgements of one path. folder: where the changed file may be written.
        judge: the verdict of a task on a path.

    Raises:
        HarnessFailure: a verdict says that the harness failed.
    """
    started = time.perf_counter()
    name = tasks[0].path
    try:
        path = load_mutant(mutant, name, folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Trial(mutant, name, stillborn=True, reason=reason)
    for number, task in enumerate(tasks, start=1):
        verdict = judge(task, path)
        if verdict.status in (Status.PASSED, Status.SKIPPED):
            continue
        if verdict.status is Status.ERROR and verdict.kind in (None, Kind.ORACLE_CONFLICT):
            raise HarnessFailure(f"{mutant.id} on {task.case}: {verdict.reason}")
        return Trial(
            mutant,
            name,
            caught=True,
            case=task.case,
            check=_caught_by(verdict),
            reason=verdict.reason,
            cases=number,
            seconds=time.perf_counter() - started,
        )
    return Trial(mutant, name, cases=len(tasks), seconds=time.perf_counter() - started)


def judge_all(
    mutant: Mutant, tasks: Sequence[Task], folder: Path, judge: Callable[[Task, KernelPath], Verdict]
) -> tuple[Verdict, ...]:
    """The verdict of every task on a mutant. Raises whatever importing the changed file raises."""
    path = load_mutant(mutant, tasks[0].path, folder)
    return tuple(judge(task, path) for task in tasks)


def try_in_child(
    mutant: Mutant, tasks: Sequence[Task], folder: Path, judge: Callable[[Task, KernelPath], Verdict]
) -> Trial:
    """As `try_here`, in a forked process; its crash or its endlessness is how the mutant was caught."""
    started = time.perf_counter()
    progress = folder / f"{mutant.id}.task"

    def judge_and_say(task: Task, path: KernelPath) -> Verdict:
        progress.write_text(task.case, encoding="utf-8")
        return judge(task, path)

    try:
        return in_child(lambda: try_here(mutant, tasks, folder, judge_and_say), folder / f"{mutant.id}.trial")
    except ChildEnded as ended:
        kind = Kind.TIMEOUT if ended.exit_code == TIMEOUT_EXIT else Kind.CRASH
        return Trial(
            mutant,
            tasks[0].path,
            caught=True,
            case=progress.read_text(encoding="utf-8") if progress.exists() else "",
            check=kind.value,
            reason=str(ended),
            seconds=time.perf_counter() - started,
        )


class ChildEnded(RuntimeError):
    """A forked process ended before it had an answer."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"the process ended with code {exit_code}")
        self.exit_code = exit_code


def in_child(work: Callable[[], T], answer: Path) -> T:
    """What `work` returns, run in a fork of this process and handed over in the file `answer`.

    Raises:
        ChildEnded: the process ended without an answer.
        Exception: what `work` raised.
    """
    child = os.fork()
    if child == 0:
        # Nothing of the worker's may run in its copy: neither its queues nor its exit handlers.
        status = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                outcome: tuple[bool, object] = (True, work())
            except Exception as error:
                outcome = (False, error)
            answer.write_bytes(pickle.dumps(outcome))
            status = 0
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    if code != 0:
        raise ChildEnded(code)
    is_value, found = pickle.loads(answer.read_bytes())  # noqa: S301 written by our own child
    if not is_value:
        raise found
    return found  # type: ignore[no-any-return]


def load_mutant(mutant: Mutant, path: str, folder: Path) -> KernelPath:
    """The path of that name from the changed copy of its file.

    Raises:
        Exception: whatever importing the changed file raises.
    """
    changed = mutant.applied(source_of(mutant.file))
    stem = Path(mutant.file).stem
    scratch = folder / f"{stem}-{mutant.id}" / f"{stem}.py"
    scratch.parent.mkdir(exist_ok=True)
    scratch.write_text(changed, encoding="utf-8")
    name = f"mutant_{stem}_{mutant.id.replace('-', '_')}"
    spec = importlib.util.spec_from_file_location(name, scratch)
    if spec is None or spec.loader is None:
        raise ImportError(f"{scratch} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and Triton look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    found: KernelPath = next(item for item in module.PATHS if item.name == path)
    return found


def _caught_by(verdict: Verdict) -> str:
    failed = (check.name for check in verdict.checks if check.status is Status.FAILED)
    kind = verdict.kind.value if verdict.kind else ""
    return next(failed, kind)
