"""Gate report `markdown`: a comment on a pull request. One table of files; the rest is folded away.

Its first line is a comment by which a later run finds the comment that it has to replace.
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.gate.verdict import FileVerdict, Finding, GateVerdict
from harness.verdict import ranges
from reports.gate_console import against_base, all_notes, last_line, mutation_line, survivors_of
from reports.gate_writer import GateWriter

MARKER = "<!-- mla-harness gate -->"
MAX_TEXT = 200
"""Characters of a foreign text that are quoted, but for the line that reruns a case."""

ROOM = {
    "reasons": 8_000,
    "files": 20_000,
    "failed": 10_000,
    "missing": 12_000,
    "survivors": 6_000,
    "notes": 4_000,
}
"""Characters that each part may take: GitHub takes 65,536 of a comment. The other reports have everything."""

SPECIAL = frozenset("&<>\"'`*_[]|\\~#@$")
"""Characters that mean something in Markdown or HTML, or that GitHub turns into links."""

COLUMNS = ("changed", "hit", "missing lines", "arms", "lanes", "surviving mutants", "whole file")


def text(verdict: GateVerdict) -> str:
    """The whole comment."""
    sign = "\N{WHITE HEAVY CHECK MARK}" if verdict.exit_code == 0 else "\N{CROSS MARK}"
    parts = [MARKER, f"### {sign} Kernel coverage of this change", ""]
    parts += [f"{prose(last_line(verdict))}, against {prose(verdict.against)}.", ""]
    parts += _within("reasons", [f"- {prose(reason)}" for reason in verdict.reasons()])
    parts += _files(verdict)
    parts += _failed(verdict)
    parts += _missing(verdict)
    parts += _survivors(verdict)
    said = [*(f"Warning: {warning}" for warning in verdict.warnings), *all_notes(verdict)]
    parts += _folded("notes", f"Notes ({len(said)})", [f"- {prose(note)}" for note in said])
    return "\n".join(parts).rstrip("\n") + "\n"


def prose(text: str) -> str:
    """Foreign text in a sentence: one line, without meaning, and nobody is mentioned."""
    # A space of no width keeps `@name` and `#7` from being looked up.
    return _plain(text).replace("&#64;", "&#64;&#8203;").replace("&#35;", "&#35;&#8203;")


def code(text: str) -> str:
    """Foreign text as code: `<code>` instead of backticks, which it could contain."""
    return f"<code>{_plain(text)}</code>"


def _plain(text: str) -> str:
    line = " ".join(text.split())
    clipped = line if len(line) <= MAX_TEXT else f"{line[:MAX_TEXT]} ..."
    return _escaped(clipped)


def _escaped(text: str) -> str:
    return "".join(f"&#{ord(one)};" if one in SPECIAL else one for one in text)


def _files(verdict: GateVerdict) -> list[str]:
    if not verdict.files:
        return ["", "No file of this change is judged."]
    rows = ["", f"| file | {' | '.join(COLUMNS)} |", f"|---|{'--:|' * len(COLUMNS)}"]
    worst_first = sorted(verdict.files, key=lambda item: (not item.complaints(), item.file))
    rows += _within("files", [_row(item, verdict) for item in worst_first])
    if verdict.mutation is not None:
        rows += ["", prose(mutation_line(verdict.mutation))]
    return rows


def _row(item: FileVerdict, verdict: GateVerdict) -> str:
    sign = "\N{CROSS MARK} " if item.complaints() else ""
    missing = f"**{prose(item.unmeasured)}**" if item.unmeasured else prose(ranges(item.missing_lines) or "-")
    cells = (
        str(item.changed),
        str(item.lines),
        missing,
        str(item.arms),
        str(item.lanes),
        survivors_of(item.file, verdict),
        against_base(item),
    )
    return f"| {sign}{code(item.file)} | {' | '.join(cells)} |"


def _failed(verdict: GateVerdict) -> list[str]:
    lines = []
    for item in verdict.failed:
        said = f"{code(item.case)} on {code(item.path)}, lane {prose(item.lane)}: {prose(item.reason)}"
        # What reruns it is whole, however long: it is there to be copied.
        lines.append(f"- {said}<br><code>{_escaped(' '.join(item.repro.split()))}</code>")
    return _folded("failed", f"Failing cases ({len(verdict.failed)})", lines)


def _missing(verdict: GateVerdict) -> list[str]:
    findings = [item for item in verdict.findings() if item.kind != "mutant"]
    texts = {item.file: item.text for item in verdict.files}
    lines = [_finding(item, texts.get(item.file, {})) for item in findings]
    return _folded("missing", f"What is missing ({len(findings)})", lines)


def _finding(item: Finding, text: dict[int, str]) -> str:
    told = "" if item.is_failure else " (told only)"
    line = f"- {code(f'{item.file}:{item.first}')} {item.kind}: {prose(item.text)}{told}"
    quoted = text.get(item.first, "").strip()
    return f"{line} {code(quoted)}" if quoted else line


def _survivors(verdict: GateVerdict) -> list[str]:
    if verdict.mutation is None:
        return []
    found = verdict.mutation.survivors
    lines = [
        f"- {code(f'{item.file}:{item.line}')} {prose(item.why)}: {code(item.old)} as {code(item.new)}, "
        f"{item.cases} cases did not notice"
        for item in found
    ]
    return _folded("survivors", f"Surviving mutants ({len(found)})", lines)


def _folded(part: str, title: str, lines: Sequence[str]) -> list[str]:
    """Nothing where there is nothing to fold; the blank lines make GitHub read Markdown inside."""
    if not lines:
        return []
    return ["", f"<details><summary>{title}</summary>", "", *_within(part, lines), "", "</details>"]


def _within(part: str, lines: Sequence[str]) -> list[str]:
    """As many of the lines as there is room for, and how many more there are."""
    found: list[str] = []
    room = ROOM[part]
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            return [*found, "", f"... and {len(lines) - len(found):,} more."]
        found.append(line)
    return found


WRITER = GateWriter("markdown", "a comment on a pull request", text)
