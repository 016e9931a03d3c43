"""How far a run is, on stderr: a bar on a terminal, a line every quarter of a minute elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_SECONDS = 15.0


class RunProgress:
    """Counts verdicts; a context manager. `total` is None where nobody knows how many there will be."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._done = self._bad = 0
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("judging", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, *, is_bad: bool) -> None:
        """One verdict more."""
        self._done += 1
        self._bad += is_bad
        if self._bar is not None:
            text = f"judging ({self._bad} bad)" if self._bad else "judging"
            self._bar.update(self._task, advance=1, description=text)
        elif time.monotonic() - self._last > LINE_SECONDS:
            self._last = time.monotonic()
            bad = f", {self._bad:,} bad" if self._bad else ""
            total = "" if self._total is None else f" of {self._total:,}"
            print(f"{self._done:,}{total}{bad}", file=sys.stderr, flush=True)
