"""Ends a worker whose path does not return. Time spent compiling does not count.

A kernel that never ends cannot be interrupted from within; a thread that watches the clock can end the
process. The parent sees the exit code and blames the one case that was running.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TIMEOUT_EXIT = 75
"""Exit code of a worker that ended itself because a path did not return in time."""

POLL_SECONDS = 0.05


class CompileClock:
    """Seconds this process has spent compiling kernels, and the Triton variants it compiled."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since: float | None = None
        self.variants: set[str] = set()

    def install(self) -> None:
        """Starts listening to Triton's compile hooks, where there is a Triton."""
        if importlib.util.find_spec("triton") is None:
            return
        from triton import knobs

        knobs.runtime.jit_cache_hook = self._begin
        knobs.runtime.jit_post_compile_hook = self._end

    @property
    def seconds(self) -> float:
        """Seconds so far, those of a compilation under way included."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._spent + running

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Counts what the block takes."""
        self._begin()
        try:
            yield
        finally:
            self._stop()

    def _begin(self, **_: Any) -> bool:
        self._since = time.perf_counter()
        return False

    def _stop(self) -> None:
        if self._since is not None:
            self._spent += time.perf_counter() - self._since
        self._since = None

    def _end(self, *, key: Any, fn: Any, **_: Any) -> None:
        self._stop()
        self.variants.add(f"{fn.name}:{key}")


CLOCK = CompileClock()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the process with TIMEOUT_EXIT if the block runs longer, compile time not counted."""
    done = threading.Event()
    started, compiled = time.perf_counter(), CLOCK.seconds

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            spent = time.perf_counter() - started - (CLOCK.seconds - compiled)
            if spent > seconds:
                os._exit(TIMEOUT_EXIT)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
