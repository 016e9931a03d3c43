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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from harness.mutation.mutant import ROOT, Mutant, MutantError, path_file, source_of
from harness.task import Task
from harness.verdict import Kind, Status, Verdict
from harness.watchdog import TIMEOUT_EXIT

if TYPE_CHECKING:
    from harness.kernel_path import KernelPath, Tensors

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
        verdict = _judged(mutant, task, path, judge)
        if verdict.status in (Status.PASSED, Status.SKIPPED):
            continue
        stage = _first_stage(verdict)
        if mutant.stage and stage != mutant.stage:
            reason = f"{task.case} says that {stage or 'nothing'} departs first, expected {mutant.stage}"
            return Trial(mutant, name, case=task.case, reason=reason, cases=number)
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
    """The verdict of every task on a mutant.

    Raises:
        HarnessFailure: a verdict says that the harness failed.
        Exception: whatever importing the changed file raises.
    """
    path = load_mutant(mutant, tasks[0].path, folder)
    return tuple(_judged(mutant, task, path, judge) for task in tasks)


def try_in_child(
    mutant: Mutant, tasks: Sequence[Task], folder: Path, judge: Callable[[Task, KernelPath], Verdict]
) -> Trial:
    """As `try_here`, in a forked process; its crash or its endlessness is how the mutant was caught."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        progress = own / "task"

        def judge_and_say(task: Task, path: KernelPath) -> Verdict:
            progress.write_text(task.case, encoding="utf-8")
            return judge(task, path)

        try:
            return in_child(lambda: try_here(mutant, tasks, own, judge_and_say), own / "trial")
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


def judge_all_in_child(
    mutant: Mutant, tasks: Sequence[Task], folder: Path, judge: Callable[[Task, KernelPath], Verdict]
) -> tuple[Verdict, ...]:
    """As `judge_all`, in a forked process.

    Raises:
        ChildEnded: the mutant ended it.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        return in_child(lambda: judge_all(mutant, tasks, own, judge), own / "verdicts")


class ChildEnded(RuntimeError):
    """A forked process ended before it had an answer."""

    def __init__(self, exit_code: int) -> None:
        # A copy is made of what the exception is told: to be pickled it must be told the code itself.
        super().__init__(exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"the process ended with code {self.exit_code}"


def in_child(work: Callable[[], T], answer: Path) -> T:
    """What `work` returns, run in a fork of this process and handed over in the file `answer`.

    Raises:
        ChildEnded: the process ended without an answer.
        Exception: what `work` raised, or a RuntimeError of its type and message where it cannot be pickled
            or is of a class that only the child has.
    """
    # What an earlier process left there is not this one's answer.
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        # Nothing of the worker's may run in its copy: neither its queues nor its exit handlers.
        status = 1
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            try:
                outcome = pickle.dumps((True, work()))
            except Exception as error:
                outcome = pickle.dumps((False, (_pickled(error), f"{type(error).__name__}: {error}")))
            answer.write_bytes(outcome)
            status = 0
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(wait_status)
    # A mutant may end the process as if all were well.
    if code != 0 or not answer.exists():
        raise ChildEnded(code)
    is_value, found = pickle.loads(answer.read_bytes())  # noqa: S301 written by our own child
    if not is_value:
        raise _unpickled(*found)
    return found  # type: ignore[no-any-return]


def _pickled(error: Exception) -> bytes:
    """Nothing where it cannot be pickled."""
    try:
        return pickle.dumps(error)
    except Exception:
        return b""


def _unpickled(error: bytes, message: str) -> Exception:
    """The exception, or another with its message."""
    try:
        found = pickle.loads(error)  # noqa: S301 written by our own child
    except Exception:
        return RuntimeError(message)
    return found if isinstance(found, Exception) else RuntimeError(message)


def load_mutant(mutant: Mutant, path: str, folder: Path) -> KernelPath:
    """The path of that name from the changed copy of its file.

    Raises:
        Exception: whatever importing the changed file raises.
    """
    file, changed = mutant.file, mutant.applied(source_of(mutant.file))
    if file.endswith(".h"):
        file = path_file(path)
        changed = _in_place_of_its_inclusion(mutant.file, changed, file)
    # A folder of its own, and a module named after it: mutants of other paths may share file name and id.
    scratch = Path(tempfile.mkdtemp(prefix="mutant_", dir=folder)) / Path(file).name
    scratch.write_text(changed, encoding="utf-8")
    if scratch.suffix == ".cu":
        return _with_kernels(path, ROOT / file, scratch)
    module = _imported(scratch, scratch.parent.name)
    if scratch.name.startswith("_"):
        module = _composed(path, mutant.file, module)
    found: KernelPath | None = next((item for item in module.PATHS if item.name == path), None)
    if found is None:
        raise ImportError(f"the changed {mutant.file} has no path {path}")
    return found


def _in_place_of_its_inclusion(header: str, changed: str, source: str) -> str:
    """The text of a .cu file with a changed header's where it includes the header: one file, as any mutant.

    Raises:
        MutantError: it does not include the header by itself.
    """
    text, inclusion = source_of(source), f'#include "mla/{Path(header).name}"\n'
    if text.count(inclusion) != 1:
        raise MutantError(f"{source} must include {header} once, by itself, for a mutant of it to be tried")
    return text.replace(inclusion, changed.replace("#pragma once\n", ""))


def _imported(file: Path, name: str) -> ModuleType:
    """A file as a module of a name that no other has."""
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and Triton look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _composed(path: str, file: str, changed: ModuleType) -> ModuleType:
    """The module of a path, imported anew: for the composition `file` that it uses it finds a changed one."""
    family, name = path.partition("/")[0], ".".join(Path(file).with_suffix("").parts)
    own = ROOT / "harness/paths" / family / Path(file).name.removeprefix("_")
    original = sys.modules.get(name)
    sys.modules[name] = changed
    try:
        return _imported(own, f"{changed.__name__}_path")
    finally:
        del sys.modules[name]
        if original is not None:
            sys.modules[name] = original


def _with_kernels(path: str, source: Path, changed: Path) -> KernelPath:
    """A path whose launchers come from a changed source.

    Raises:
        BuildError: it does not compile.
    """
    from harness.cuda import build
    from harness.kernel_path import path_named

    build.require_build(changed)
    original = path_named(path)

    def run(inputs: Tensors, outputs: Tensors, workspace: Tensors) -> None:
        with build.substituted(source, changed):
            original.run(inputs, outputs, workspace)

    return replace(original, run=run)


def _judged(
    mutant: Mutant, task: Task, path: KernelPath, judge: Callable[[Task, KernelPath], Verdict]
) -> Verdict:
    """The verdict, if it is one of the mutant."""
    verdict = judge(task, path)
    if verdict.status is Status.ERROR and verdict.kind in (None, Kind.ORACLE_CONFLICT):
        raise HarnessFailure(f"{mutant.id} on {task.case}: {verdict.reason}")
    return verdict


def _first_stage(verdict: Verdict) -> str:
    """The output that the first failing check is about, whatever its layer."""
    failed = (check.tensor for check in verdict.checks if check.status is Status.FAILED)
    return next(failed, "").partition("[")[0]


def _caught_by(verdict: Verdict) -> str:
    failed = (check.name for check in verdict.checks if check.status is Status.FAILED)
    kind = verdict.kind.value if verdict.kind else ""
    return next(failed, kind)
