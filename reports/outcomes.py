"""Report `outcomes`: of each library whose kernels ran, one line a verdict, made to be kept and compared.

`--report outcomes:FOLDER` writes `<lane>/<library>-<version>.txt` for every lane and library whose adapters
were judged, on a GPU `<lane>-<architecture>/...`, as `compiled-sm_90`: no lane's file is another's. Below a
head of lines that begin with `#` stand path, lane, case and what became of it, sorted. Numbers, times and
bits are left out: what changes a line is a case that passes, fails otherwise or is refused for another
reason. The head says with which torch and Triton, and which paths of the library have other lanes alone. What
is not installed gets no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import unified_diff
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
    """Collects verdicts; the files are written at the end, whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._elsewhere: dict[str, dict[str, list[str]]] = {}
        self._verdicts: dict[tuple[str, str], list[Verdict]] = {}

    def begin(self, run: dict[str, Any]) -> None:
        self._elsewhere = run["elsewhere"]

    def verdict(self, verdict: Verdict) -> None:
        if library := library_of(verdict):
            self._verdicts.setdefault((verdict.lane, library), []).append(verdict)

    def end(self, summary: Summary) -> None:
        for (lane, library), found in self._verdicts.items():
            # A case that ended its worker knows no environment: it had that of the others.
            about = next((item.environment for item in found if library in item.environment), None)
            if about is not None:
                self._write(lane, library, about, sorted(map(line_of, found)))

    def _write(self, lane: str, library: str, about: Mapping[str, str], lines: Sequence[str]) -> None:
        # What follows a comma is what the harness says of the version.
        version = about[library].partition(",")[0]
        place = [lane, *filter(None, [about.get("architecture")])]
        # Behind a plus stands what a build of torch has.
        versions = [f"{name} {about.get(name, 'unknown').partition('+')[0]}" for name in ("torch", "triton")]
        head = [", ".join([f"{library} {version}", f"lane {' on '.join(place)}", *versions])]
        for path, lanes in sorted(self._elsewhere.get(lane, {}).items()):
            if path.startswith(f"adapters/{library}/"):
                head.append(f"{path}: in lane {' and '.join(lanes)} alone")
        file = self._folder / "-".join(place) / re.sub(r"[^\w.+-]", "_", f"{library}-{version}.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in [*(f"# {line}" for line in head), *lines])
        file.write_text(text, encoding="utf-8")


def differences(before: Path, after: Path) -> Iterator[str]:
    """The lines by which outcomes changed, as `diff` has them, of every lane that `after` has.

    A library is compared with itself: with the same version where `before` has it, else with the last one.
    Where heads alone differ nothing has changed.

    Args:
        before, after: folders that this report wrote.

    Raises:
        ValueError: `after` has no lane.
    """
    lanes = sorted(folder.name for folder in after.iterdir() if folder.is_dir())
    if not lanes:
        raise ValueError(f"{after} has no folder of a lane, as `run --report outcomes:FOLDER` writes them")
    for lane in lanes:
        old, new = sorted((before / lane).glob("*.txt")), sorted((after / lane).glob("*.txt"))
        # The last of a library's files stands for it, unless there is the very same.
        kept = {_library(file): file for file in old} | {
            _library(file): file for file in old if (after / lane / file.name).exists()
        }
        found = {_library(file): file for file in new}
        for library in sorted(kept | found):
            yield from _difference(kept.get(library), found.get(library))


def _library(file: Path) -> str:
    """Whose outcomes a file holds."""
    return file.name.rpartition("-")[0]


def _difference(before: Path | None, after: Path | None) -> Iterator[str]:
    old, new = _lines(before), _lines(after)
    if _without_head(old) != _without_head(new):
        yield from unified_diff(old, new, str(before or "nothing"), str(after or "nothing"), n=0, lineterm="")


def _lines(file: Path | None) -> list[str]:
    return [] if file is None else file.read_text(encoding="utf-8").splitlines()


def _without_head(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if not line.startswith("#")]


WRITER = Writer("outcomes", "what became of every case of a library, as text to compare", OutcomesReport)
