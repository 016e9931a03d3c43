"""Gate report `html`: one page, nothing else needed to show it, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from harness.gate.verdict import FileVerdict, GateVerdict
from harness.verdict import ranges
from reports.gate_console import against_base, all_notes, last_line, mutation_line, survivors_of
from reports.gate_writer import GateWriter

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #d2302f; --good: #2d8a44; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; width: 100%; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
pre { border: 1px solid var(--line); border-radius: .4rem; overflow-x: auto; padding: .5rem 0; }
pre span { display: block; padding: 0 .6rem; border-left: .3rem solid transparent; }
pre .miss { border-color: var(--bad); background: color-mix(in srgb, var(--bad) 15%, transparent); }
pre .hit { border-color: var(--good); }
pre i { color: var(--bad); }
.bad { color: var(--bad); } .good { color: var(--good); }
"""

COLUMNS = ("file", "changed", "lines hit", "missing", "arms", "lanes", "surviving mutants", "whole file")


def text(verdict: GateVerdict) -> str:
    """The whole page."""
    word = "good" if verdict.exit_code == 0 else "bad"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Kernel coverage of a change</title><style>{STYLE}</style></head><body>",
        "<h1>Kernel coverage of a change</h1>",
        f'<p class="{word}">{escape(last_line(verdict))}</p>',
        f"<p>{verdict.changed:,} changed lines against {escape(verdict.against)}.</p>",
        _list(verdict.reasons(), "bad"),
        _table(verdict),
    ]
    if verdict.mutation is not None:
        parts.append(f"<p>{escape(mutation_line(verdict.mutation))}</p>")
    parts += [_list([f"{item.case} on {item.path}: {item.repro}" for item in verdict.failed], "bad")]
    parts += [part for item in verdict.files for part in _file(item, verdict)]
    notes = [*(f"Warning: {warning}" for warning in verdict.warnings), *all_notes(verdict)]
    parts += [_list(notes, ""), "</body></html>"]
    return "\n".join(part for part in parts if part) + "\n"


def _list(items: list[str], word: str) -> str:
    rows = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<ul class="{word}">{rows}</ul>' if rows else ""


def _table(verdict: GateVerdict) -> str:
    if not verdict.files:
        return "<p>No file of this change is judged.</p>"
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = []
    for number, item in enumerate(verdict.files):
        cells = (
            str(item.changed),
            str(item.lines),
            item.unmeasured or ranges(item.missing_lines) or "-",
            str(item.arms),
            str(item.lanes),
            survivors_of(item.file, verdict),
            against_base(item),
        )
        word = "bad" if item.complaints() else "good"
        first = f'<td><a class="{word}" href="#file{number}">{escape(item.file)}</a></td>'
        rows.append(f"<tr>{first}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _file(item: FileVerdict, verdict: GateVerdict) -> Iterator[str]:
    """The touched lines of a file, each with what is missing there."""
    number = verdict.files.index(item)
    yield f'<h2 id="file{number}">{escape(item.file)}</h2>'
    yield _list(item.complaints(), "bad")
    said: dict[int, list[str]] = {}
    for finding in verdict.findings():
        if finding.file == item.file and finding.kind != "line":
            # What begins above the touched lines is told at the first of them that it reaches.
            inside = (line for line in item.text if finding.first <= line <= finding.last)
            said.setdefault(min(inside, default=finding.first), []).append(finding.text)
    covered, missing = set(item.covered_lines), set(item.missing_lines)
    rows = []
    for line in sorted({*item.text, *said}):
        state = "miss" if line in missing else "hit" if line in covered else ""
        notes = "".join(f" <i>{escape(note)}</i>" for note in said.get(line, ()))
        rows.append(f'<span class="{state}">{line:>5}  {escape(item.text.get(line, ""))}{notes}</span>')
    yield f"<pre>{''.join(rows)}</pre>" if rows else ""


WRITER = GateWriter("html", "one page with the touched lines", text)
