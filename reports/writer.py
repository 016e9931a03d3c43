"""`Writer`: a report format. One file of this folder holds one and ends in `WRITER`.

Verdicts are written as they come, so that an interrupted run leaves a complete report of what ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from cases.discovery import discover
from harness.run import Summary
from harness.verdict import Verdict


class Report(Protocol):
    """A report being written."""

    def begin(self, run: dict[str, Any]) -> None:
        """Called once, first, with what the run was asked for.

        `elsewhere` has, of each lane, the chosen paths that do not have it, and the lanes that they have.
        """

    def verdict(self, verdict: Verdict) -> None:
        """Called for every verdict, in order of completion."""

    def end(self, summary: Summary) -> None:
        """Called once, last, also when the run is interrupted."""


@dataclass(frozen=True)
class Writer:
    """A report format, as in `--report FORMAT:FILE`."""

    name: str
    summary: str
    open: Callable[[Path], Report]


@cache
def writers() -> dict[str, Writer]:
    """Every report format by name."""
    found = discover("reports", Path(__file__).parent, "WRITER")
    return {item.value.name: item.value for item in found if isinstance(item.value, Writer)}
