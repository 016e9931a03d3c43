"""Gate report `console`: what a person reads. A table of files, what is missing, why it fails."""

from __future__ import annotations

from pathlib import PurePosixPath

from harness.gate.verdict import FileVerdict, GateVerdict, MutationVerdict
from harness.verdict import ranges
from reports.gate_writer import GateWriter

MAX_FINDINGS = 60
"""Findings printed; the other formats have all of them."""


def text(verdict: GateVerdict) -> str:
    """The whole report; its last line says whether the gate is passed, and the exit code."""
    what = "every kernel as a whole" if verdict.whole else f"{verdict.changed:,} changed lines"
    parts = [f"gate: {what} against {verdict.against}"]
    if verdict.files:
        parts.append(_table(verdict))
    findings = [
        f"  {item.file}:{item.first}: {item.kind}: {item.text}{'' if item.is_failure else ' (told only)'}"
        for item in verdict.findings()
    ]
    parts += findings[:MAX_FINDINGS]
    if len(findings) > MAX_FINDINGS:
        parts.append(f"... and {len(findings) - MAX_FINDINGS:,} more: see the other reports")
    parts += [
        f"  failed: {item.case} on {item.path} [{item.lane}]\n    {item.repro}" for item in verdict.failed
    ]
    if verdict.mutation is not None:
        parts.append(mutation_line(verdict.mutation))
    parts += [str(item) for item in verdict.whole if not item.is_below]
    parts += [f"warning: {warning}" for warning in verdict.warnings]
    parts += [f"note: {note}" for note in all_notes(verdict)]
    parts += [f"FAIL {reason}" for reason in verdict.reasons()]
    parts.append(last_line(verdict))
    return "\n".join(parts)


def last_line(verdict: GateVerdict) -> str:
    """Whether the gate is passed."""
    lines = verdict.lines
    word = "passed" if verdict.exit_code == 0 else f"not passed, exit code {verdict.exit_code}"
    which = "lines that are not exempt" if verdict.whole else "changed lines with statements"
    return f"{lines.hit:,} of {lines.total:,} {which} are hit ({lines.percent} %): {word}"


def mutation_line(item: MutationVerdict) -> str:
    """What became of mutants, one line; a sample says so, and of what seed it is."""
    if not item.eligible:
        return "mutants: none on changed kernel lines could be tried"
    drawn = f", a sample of {item.eligible:,} of seed {item.seed}" if item.tried < item.eligible else ""
    line = f"mutants: {item.score} caught{drawn}, {item.seconds:.0f} s"
    if item.accepted:
        line += f"; {item.accepted} accepted in the records are not counted"
    if item.stillborn:
        line += f"; {item.stillborn} cannot be imported"
    return line


def all_notes(verdict: GateVerdict) -> tuple[str, ...]:
    """What was left out, and why, mutants included."""
    return (*verdict.notes, *(verdict.mutation.notes if verdict.mutation else ()))


def survivors_of(file: str, verdict: GateVerdict) -> str:
    """How many mutants of a file survived; `-` where none of it could be tried."""
    if verdict.mutation is None or file not in verdict.mutation.files:
        return "-"
    return str(sum(item.file == file for item in verdict.mutation.survivors))


def against_base(item: FileVerdict) -> str:
    """What became of the file as a whole: percent of its statements hit, where known."""
    if item.whole is None:
        return "-"
    now = f"{item.whole.percent} %"
    return now if item.base is None else f"{item.base.percent} % to {now}"


def _table(verdict: GateVerdict) -> str:
    rows = [("changed", "lines hit", "arms", "lanes", "surviving", "whole file", "missing lines", "file")]
    for item in verdict.files:
        missing = "unmeasured" if item.unmeasured else ranges(item.missing_lines) or "-"
        rows.append(
            (
                str(item.changed),
                str(item.lines),
                str(item.arms),
                str(item.lanes),
                survivors_of(item.file, verdict),
                against_base(item),
                missing,
                str(PurePosixPath(item.file)) + ("" if not item.complaints() else "  FAIL"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


WRITER = GateWriter("console", "what a person reads: files, what is missing, why it fails", text)
