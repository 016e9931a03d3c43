"""The processes of one lane. A worker that crashes or hangs costs the one case it was running.

pebble's pool starts another worker in its place; what is known of the end becomes the verdict.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from pebble import ProcessExpired, ProcessPool

from harness import worker
from harness.coverage.collect import Collected
from harness.coverage.recording import Recording
from harness.mutation.mutant import Mutant
from harness.mutation.trial import ChildEnded, Trial
from harness.task import Environment, Measured, PathInfo, Rates, Task
from harness.verdict import Kind, Status, Verdict
from harness.watchdog import TIMEOUT_EXIT

DESCRIBE_SECONDS = 300.0
COMPILE_SECONDS = 1800.0
"""Beyond its own limit a task may take this long before the parent gives the worker up."""

WAIT_SECONDS = 0.2

T = TypeVar("T")
Judged = tuple[Verdict, frozenset[str], Collected | None]


class WorkerError(RuntimeError):
    """The lane's workers cannot even start: the harness's own failure."""


class Pool:
    """Workers of one lane, to be used as a context manager; they measure coverage for a recording.

    Paths that ask for variables of their own have workers of their own, which start when first needed: what
    a library has read once, another value of a variable does not change.
    """

    def __init__(self, lane: str, workers: int, recording: Recording | None = None) -> None:
        self.lane = lane
        self.workers = workers
        self.variants: set[str] = set()
        self._workers = workers
        self._recording = recording
        self._spool = tempfile.TemporaryDirectory(prefix="mla-harness-")
        self._pool = self._started(())
        self._others: dict[Environment, ProcessPool] = {}

    def _started(self, environment: Environment) -> ProcessPool:
        measure = None if self._recording is None else self._recording.measure
        return ProcessPool(
            max_workers=self._workers,
            # fork would inherit a CUDA context that no longer works.
            context=multiprocessing.get_context("spawn"),
            initializer=worker.start,
            initargs=[self.lane, self._spool.name, measure, environment],
        )

    def _of(self, environment: Environment) -> ProcessPool:
        """The workers that run paths of an environment, and no others."""
        if not environment:
            return self._pool
        if environment not in self._others:
            self._others[environment] = self._started(environment)
        return self._others[environment]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        # pebble unlinks its locks before it ends its workers, and one that is still starting, because it
        # replaces one that died, would complain that they are gone: end them first.
        for process in multiprocessing.active_children():
            process.terminate()
            process.join()
        for pool in (self._pool, *self._others.values()):
            pool.join()
        self._spool.cleanup()

    def stop(self) -> None:
        """Ends every worker now, whatever it is doing."""
        for pool in (self._pool, *self._others.values()):
            pool.stop()  # type: ignore[no-untyped-call]

    def describe(self) -> list[PathInfo]:
        """The paths a worker of this lane can see.

        Raises:
            WorkerError: no worker could start.
        """
        try:
            found: list[PathInfo] = self._pool.schedule(worker.describe, timeout=DESCRIBE_SECONDS).result()
        except Exception as error:
            raise WorkerError(f"no worker of lane {self.lane} could start: {error}") from error
        return found

    def bench(self, tasks: Sequence[Task]) -> tuple[Rates, list[Measured]]:
        """The device's ceilings, and every task timed, those of one case and environment together.

        Where one path ends the worker, or breaks the device, the case's paths are timed one by one.

        Raises:
            WorkerError: the ceilings could not be measured.
        """
        try:
            rates: Rates = self._pool.schedule(worker.ceilings, timeout=DESCRIBE_SECONDS).result()
        except Exception as error:
            raise WorkerError(f"the device could not be measured: {error}") from error
        measured = []
        for _, together in groupby(tasks, key=lambda task: task.case):
            of_case = tuple(together)
            for environment in dict.fromkeys(task.environment for task in of_case):
                measured += self._measured(tuple(t for t in of_case if t.environment == environment))
        return rates, measured

    def _measured(self, tasks: tuple[Task, ...]) -> list[Measured]:
        """Tasks of one case, timed together if that goes well."""
        limit = sum(task.timeout for task in tasks) + COMPILE_SECONDS
        try:
            pool = self._of(tasks[0].environment)
            found: list[Measured] = pool.schedule(worker.measure, args=[tasks], timeout=limit).result()
        except Exception as error:
            if len(tasks) > 1:
                return [item for task in tasks for item in self._measured((task,))]
            reason = f"{type(error).__name__}: {error}"
            return [Measured(tasks[0].case, tasks[0].path, reason=reason)]
        return found

    def judge(self, tasks: Sequence[Task]) -> Iterator[Verdict]:
        """A verdict for every task, in order of completion; environment after environment."""
        # Not all at once: a task's share of the memory is that of one environment's workers.
        for environment in dict.fromkeys(task.environment for task in tasks):
            running: dict[Future[Judged], tuple[int, Task]] = {}
            for number, task in enumerate(tasks):
                if task.environment == environment:
                    limit = task.timeout * 20 + COMPILE_SECONDS
                    scheduled = self._of(environment).schedule(
                        worker.judge, args=[task, number], timeout=limit
                    )
                    running[scheduled] = (number, task)
            for future in _as_completed(running):
                yield self._verdict(future, *running[future])

    def try_mutants(self, trials: Sequence[tuple[Mutant, Sequence[Task]]]) -> Iterator[Trial]:
        """What became of every mutant, in order of completion.

        Raises:
            WorkerError: a mutant's case could not be judged, and the mutant is not why.
        """
        running: dict[Future[Trial], tuple[int, Mutant, str]] = {}
        for number, (mutant, tasks) in enumerate(trials):
            limit = sum(task.timeout for task in tasks) + COMPILE_SECONDS
            pool = self._of(tasks[0].environment)
            scheduled = pool.schedule(worker.try_mutant, args=[mutant, tasks, number], timeout=limit)
            running[scheduled] = (number, mutant, tasks[0].path)
        for future in _as_completed(running):
            number, mutant, path = running[future]
            try:
                yield future.result()
            except TimeoutError:
                yield Trial(mutant, path, caught=True, check=Kind.TIMEOUT.value, reason="no answer")
            except ProcessExpired as expired:
                spooled = self._spooled(f"trial-{number}", expired.exitcode)
                ending = Kind.TIMEOUT if expired.exitcode == TIMEOUT_EXIT else Kind.CRASH
                reason = f"the worker died: {_ending(expired.exitcode)}"
                lost = Trial(mutant, path, caught=True, check=ending.value, reason=reason)
                yield spooled if isinstance(spooled, Trial) else lost
            except Exception as error:
                raise WorkerError(str(error)) from error

    def judge_mutants(
        self, trials: Sequence[tuple[Mutant, Sequence[Task]]]
    ) -> Iterator[tuple[Mutant, str, tuple[Verdict, ...]]]:
        """Every mutant with its path and the verdicts of all its tasks; none where it ended its worker.

        Raises:
            WorkerError: a mutant cannot be imported, or its case not be judged for another reason.
        """
        running: dict[Future[tuple[Verdict, ...]], tuple[Mutant, str]] = {}
        for mutant, tasks in trials:
            limit = sum(task.timeout for task in tasks) + COMPILE_SECONDS
            pool = self._of(tasks[0].environment)
            scheduled = pool.schedule(worker.judge_mutant, args=[mutant, tasks], timeout=limit)
            running[scheduled] = (mutant, tasks[0].path)
        for future in _as_completed(running):
            mutant, path = running[future]
            try:
                yield mutant, path, future.result()
            except (TimeoutError, ProcessExpired, ChildEnded):
                yield mutant, path, ()
            except Exception as error:
                raise WorkerError(f"mutant {mutant.id}: {type(error).__name__}: {error}") from error

    def _verdict(self, future: Future[Judged], number: int, task: Task) -> Verdict:
        try:
            verdict, variants, collected = future.result()
        except TimeoutError:
            return _lost(task, Kind.TIMEOUT, f"no answer within {task.timeout * 20:g} s")
        except ProcessExpired as expired:
            return self._expired(task, number, expired.exitcode)
        except Exception as error:
            return _lost(task, Kind.CRASH, f"the worker failed: {type(error).__name__}: {error}")
        self.variants |= variants
        if self._recording is not None and collected is not None:
            self._recording.add(collected, self.lane, task.case)
        return verdict

    def _spooled(self, name: str, exit_code: int) -> object:
        """What a worker left behind that ended itself because its device was broken, or None."""
        file = worker.spool_file(Path(self._spool.name), name)
        if exit_code != worker.BROKEN_EXIT or not file.exists():
            return None
        found: object = pickle.loads(file.read_bytes())  # noqa: S301 written by our own worker
        return found

    def _expired(self, task: Task, number: int, exit_code: int) -> Verdict:
        if exit_code == TIMEOUT_EXIT:
            reason = f"the path did not return within {task.timeout:g} s (compilation not counted)"
            return _lost(task, Kind.TIMEOUT, reason)
        spooled = self._spooled(f"verdict-{number}", exit_code)
        if isinstance(spooled, Verdict):
            return spooled
        return _lost(task, Kind.CRASH, f"the worker died while running it: {_ending(exit_code)}")


def _as_completed(running: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """Each future once it is done."""
    pending = set(running)
    while pending:
        # A wait without limit would not notice Ctrl-C on every platform.
        done, pending = wait(pending, WAIT_SECONDS, FIRST_COMPLETED)
        yield from done


def _ending(exit_code: int) -> str:
    if exit_code < 0:
        return f"signal {-exit_code} ({signal.Signals(-exit_code).name})"
    return f"exit code {exit_code}"


def _lost(task: Task, kind: Kind, reason: str) -> Verdict:
    return Verdict(task.case, task.operator, task.path, task.lane, Status.ERROR, kind, reason)
