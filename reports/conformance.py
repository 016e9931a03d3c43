"""Report `conformance`: one page, libraries and operators by kinds of rows: what passes and what does not.

A case counts under every kind of row that it has, so columns do not add up. A known failure is a failure.
Below the table stand the failures of each path that fail alike, with the smallest case that does if the run
looked for it (`run --reduce`), each with its reason, a link to the finding that its known failure names, and
the line that runs it again and reduces it; and every limit that a library states, once. Nothing is loaded
from anywhere.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cases import CaseError, Kind, parse
from harness.run import Summary
from harness.verdict import Smallest, Verdict
from reports.outcomes import library_of, outcome_of
from reports.writer import Writer

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #b3301a; --good: #2c7a4b; --quiet: #7a7f85; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem .3rem 0; }
th, td { text-align: left; vertical-align: top; white-space: nowrap; }
.failed { color: var(--bad); font-weight: 600; } .passed { color: var(--good); }
.quiet { color: var(--quiet); } code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere; }
li { margin: .6rem 0; }
"""

ORDER = ("passed", "failed", "not claimed", "unavailable")
NO_ROW = "no row"


def kinds_of(case: str) -> list[str]:
    """The kinds of rows of a case, in the language's order; of none, and of a text that is none, `no row`."""
    try:
        rows = {row.kind for step in parse(case).steps for row in step}
    except CaseError:
        rows = set()
    return [kind.word for kind in Kind if kind in rows] or [NO_ROW]


class ConformanceReport:
    """Collects verdicts; the page is written at the end, whole."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._elsewhere: dict[str, dict[str, list[str]]] = {}
        self._verdicts: list[Verdict] = []

    def begin(self, run: dict[str, Any]) -> None:
        self._elsewhere = run["elsewhere"]

    def verdict(self, verdict: Verdict) -> None:
        self._verdicts.append(verdict)

    def end(self, summary: Summary) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("\n".join(self._page()), encoding="utf-8")

    def _page(self) -> Iterator[str]:
        verdicts = sorted(self._verdicts, key=lambda item: (item.path, item.lane))
        failed = [item for item in verdicts if outcome_of(item) == "failed"]
        yield "<!doctype html><html lang='en'><meta charset='utf-8'><title>Conformance</title>"
        yield f"<style>{STYLE}</style><h1>What kernels do with every kind of row</h1>"
        yield "<p class='quiet'>A case counts under every kind of row that it has.</p>"
        yield from _table(verdicts)
        yield from _failures(failed, self._file.parent)
        yield from _limits(
            (item for item in verdicts if outcome_of(item) not in {"passed", "failed"}), self._elsewhere
        )


def _table(verdicts: Sequence[Verdict]) -> Iterator[str]:
    cells: dict[tuple[str, str, str, str], dict[str, Counter[str]]] = {}
    # Of a case that was not reached, or ended its worker, no environment is known: its path's is.
    versions = {item.path: item.environment.get(library_of(item)) for item in verdicts}
    versions |= {item.path: found for item in verdicts if (found := item.environment.get(library_of(item)))}
    for item in verdicts:
        named = f"{library_of(item)} {versions[item.path] or ''}".strip()
        line = cells.setdefault((named or "ours", item.operator, item.path, item.lane), {})
        for kind in kinds_of(item.case):
            line.setdefault(kind, Counter())[outcome_of(item)] += 1
    columns = [*(kind.word for kind in Kind), NO_ROW]
    heads = "".join(f"<th>{escape(name)}</th>" for name in ("library", "operator", "path", "lane", *columns))
    yield f"<table><thead><tr>{heads}</tr></thead><tbody>"
    for names, line in cells.items():
        told = "".join(f"<td>{escape(name)}</td>" for name in names)
        counts = "".join(f"<td>{_counts(line.get(column, Counter()))}</td>" for column in columns)
        yield f"<tr>{told}{counts}</tr>"
    yield "</tbody></table>"


def _counts(counts: Counter[str]) -> str:
    outcomes = [*ORDER, *sorted(set(counts) - set(ORDER))]
    told = [
        f"<span class='{name if name in ORDER[:2] else 'quiet'}'>{counts[name]:,} {escape(name)}</span>"
        for name in outcomes
        if counts[name]
    ]
    return "<br>".join(told)


def _failures(failed: Sequence[Verdict], folder: Path) -> Iterator[str]:
    """Failures of one path that fail alike together, below the smallest case that was found of them."""
    alike: dict[tuple[str, str, str, Smallest | None], list[Verdict]] = {}
    for item in sorted(failed, key=lambda item: (item.path, item.lane, len(item.case))):
        kind = "" if item.kind is None else f" as {item.kind.value}"
        alike.setdefault((item.path, item.lane, kind, item.smallest), []).append(item)
    yield f"<h2>Failures: {len(failed):,}</h2><ul>"
    for (path, lane, kind, smallest), items in alike.items():
        yield (
            f"<li><span class='failed'>failed{escape(kind)}</span> on {escape(path)}, {escape(lane)}: "
            f"{len(items):,} of its cases<br>{_smallest(smallest, items[0])}<ul>"
        )
        for item in items:
            yield (
                f"<li><code>{escape(item.case)}</code><br>{_linked(item.reason, folder)}<br>"
                f"<code class='quiet'>{escape(item.repro)}</code></li>"
            )
        yield "</ul></li>"
    yield "</ul>"


def _smallest(found: Smallest | None, shortest: Verdict) -> str:
    """The smallest case and the line that runs it, or how to get it."""
    if found is None:
        return (
            "<span class='quiet'>Their smallest case was not looked for: <code>run --reduce 30</code> does "
            "for all of them, the last line of a case for that one.</span>"
        )
    ending = "" if found.is_complete else " <span class='quiet'>(as far as time allowed)</span>"
    return (
        f"smallest case: <code>{escape(found.case)}</code>{ending}<br>"
        f"<code>{escape(shortest.repro_of(found.case))}</code>"
    )


def _linked(text: str, folder: Path) -> str:
    """The text, findings that it names as links from a folder."""

    def link(found: re.Match[str]) -> str:
        return f"<a href='{os.path.relpath(found[0], folder)}'>{found[0]}</a>"

    return re.sub(r"docs/findings/[\w-]+\.md", link, escape(text))


def _limits(
    skipped: Iterable[Verdict], elsewhere: Mapping[str, Mapping[str, Sequence[str]]]
) -> Iterator[str]:
    reasons = Counter((item.path, outcome_of(item), item.reason) for item in skipped)
    yield "<h2>Not judged</h2><ul>"
    for (path, outcome, reason), count in sorted(reasons.items()):
        yield f"<li>{count:,} x {escape(outcome)}, {escape(path)}: {escape(reason)}</li>"
    nowhere = set.intersection(*map(set, elsewhere.values())) if elsewhere else set()
    # A path has the same lanes wherever it is told.
    lanes_of = {path: lanes for paths in elsewhere.values() for path, lanes in paths.items()}
    for path in sorted(nowhere):
        yield f"<li>{escape(path)}: in lane {escape(' and '.join(lanes_of[path]))} alone</li>"
    yield "</ul></html>"


WRITER = Writer("conformance", "one page: libraries, operators and kinds of rows", ConformanceReport)
