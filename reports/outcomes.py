"""Report `outcomes`: of each library whose kernels ran, one line a verdict, made to be kept and compared.

`--report outcomes:FOLDER` writes `<library>-<version>.txt` for every library whose adapters were judged:
path, lane, case and what became of it, sorted. Numbers, times and bits are left out: what changes a line is a
case that passes, fails otherwise or is refused for another reason. What is not installed gets no file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from harness.run import Summary
from harness.verdict import Kind, Status, Verdict
from reports.writer import Writer

_FAILED = (Status.FAILED, Status.ERROR, Status.XFAILED)


def library_of(verdict: Verdict) -> str:
    """The library whose kernels a verdict is about; empty for one of ours."""
    family, _, rest = verdict.path.partition("/")
    return rest.partition("/")[0] if family == "adapters" else ""


def outcome_of(verdict: Verdict) -> str:
    """`passed`, `failed`, `not claimed`, `unavailable`, or what else kept it from being judged.

    A failure that is known has failed, and what passed though it was known to fail has passed.
    """
    if verdict.status in _FAILED:
        return "failed"
    if verdict.kind is Kind.UNSUPPORTED:
        return "not claimed"
    if verdict.status is Status.SKIPPED and verdict.kind is not None:
        return str(verdict.kind.value)
    return "passed"


def line_of(verdict: Verdict) -> str:
    """One line, without what differs from machine to machine."""
    outcome = outcome_of(verdict)
    if outcome == "failed" and verdict.kind is not None:
        outcome = f"failed as {verdict.kind.value}"
    elif outcome == "not claimed":
        outcome = f"not claimed: {verdict.reason}"
    return f"{verdict.path} {verdict.lane} {verdict.case} {outcome}"


class OutcomesReport:
    """Collects lines; the files are written at the end, whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: dict[str, list[str]] = {}

    def begin(self, run: dict[str, Any]) -> None:
        pass

    def verdict(self, verdict: Verdict) -> None:
        library = library_of(verdict)
        version = verdict.environment.get(library)
        if version is not None:
            # What follows a comma is what the harness says of the version.
            name = re.sub(r"[^\w.+-]", "_", f"{library}-{version.partition(',')[0]}")
            self._lines.setdefault(name, []).append(line_of(verdict))

    def end(self, summary: Summary) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, lines in self._lines.items():
            text = "".join(f"{line}\n" for line in sorted(lines))
            (self._folder / f"{name}.txt").write_text(text, encoding="utf-8")


WRITER = Writer("outcomes", "what became of every case of a library, as text to compare", OutcomesReport)
