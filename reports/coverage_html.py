"""Coverage as HTML: an index, and of every file its source with hits, arms, lanes and the cases of each line.

Pages stand alone: no network, and a script of a few lines that shows the cases of the line clicked on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from harness.coverage.sites import Coverage, FileCoverage, Hits, Site, SiteKind, digest_of, text_of
from reports.coverage_table import lines_of, share

STYLE = """
:root { color-scheme: light dark; --hit: #d9f2d9; --miss: #ffd9d9; --part: #fff2c4; --dim: #777; }
@media (prefers-color-scheme: dark) {
  :root { --hit: #15351a; --miss: #4a1a1a; --part: #453a10; --dim: #999; }
}
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5em; }
table { border-collapse: collapse; } th, td { padding: .15em .7em; text-align: right; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 1px solid var(--dim); }
.source td { padding: 0 .6em; font: 12.5px/1.5 ui-monospace, monospace; }
.source td { white-space: pre; vertical-align: top; }
.source td.code { text-align: left; } .source td.n, .source td.c { color: var(--dim); }
tr.hit td.code { background: var(--hit); } tr.miss td.code { background: var(--miss); }
tr.part td.code { background: var(--part); } td.c[data-cases] { cursor: pointer; text-decoration: underline; }
.site { border-radius: .3em; padding: 0 .3em; margin-left: .5em; } .site.hit { background: var(--hit); }
.site.miss { background: var(--miss); } .note, .unmeasured { color: var(--dim); }
li { white-space: pre-wrap; } tr.total td { font-weight: 600; }
"""
SCRIPT = """
const cases = JSON.parse(document.getElementById("cases").textContent);
document.querySelector("table").addEventListener("click", event => {
  const cell = event.target.closest("td[data-cases]");
  if (!cell) return;
  const row = cell.parentElement, next = row.nextElementSibling;
  if (next && next.className === "list") { next.remove(); return; }
  const list = document.createElement("ul");
  for (const number of cell.dataset.cases.split(" ")) {
    const item = document.createElement("li");
    item.textContent = cases[number];
    list.append(item);
  }
  const below = document.createElement("tr"), wide = document.createElement("td");
  below.className = "list"; wide.colSpan = 4; wide.className = "code"; wide.append(list); below.append(wide);
  row.after(below);
});
"""


def write(coverage: Coverage, root: Path, folder: Path) -> None:
    """Writes `index.html` and a page a file.

    Args:
        root: the folder that the files are relative to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(coverage.files.values(), key=lambda file: (not file.is_kernel, file.file))
    for file in files:
        if file.sites or file.unmeasured:
            (folder / page_name(file.file)).write_text(_page(file, root), encoding="utf-8")
    (folder / "index.html").write_text(_index(files), encoding="utf-8")


def page_name(file: str) -> str:
    """The page of a file: its path, flat, and unlike that of any other."""
    return file.replace("_", "__").replace("/", "_-") + ".html"


def _index(files: Sequence[FileCoverage]) -> str:
    known = [file for file in files if file.sites or file.unmeasured]
    rows = []
    for title, is_kernel in (("all kernels", True), ("all host code", False)):
        group = [file for file in known if file.is_kernel == is_kernel]
        if group:
            shares = "".join(f"<td>{share(group, kind)}</td>" for kind in SiteKind)
            rows.append(f'<tr class="total"><td>{title}</td>{shares}</tr>')
    for file in known:
        cells = [f'<td><a href="{escape(page_name(file.file))}">{escape(file.file)}</a></td>']
        if file.unmeasured:
            cells.append(f'<td colspan="3" class="unmeasured">unmeasured: {escape(file.unmeasured)}</td>')
        else:
            cells += [f"<td>{share([file], kind)}</td>" for kind in SiteKind]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f"<th>{title}</th>" for title in ("file", "statements", "arms", "lanes"))
    return _document(
        "Coverage", f"<table><thead><tr>{head}</tr></thead>\n<tbody>{chr(10).join(rows)}</tbody></table>"
    )


def _page(file: FileCoverage, root: Path) -> str:
    head = ", ".join(f"{kind.value}s {share([file], kind)}" for kind in SiteKind)
    note = f"unmeasured: {file.unmeasured}" if file.unmeasured else head
    parts = [f'<p><a href="index.html">all files</a></p><p class="note">{escape(note)}</p>']
    parts.append(_missed(file))
    try:
        text = text_of(root / file.file)
    except OSError as error:
        parts.append(f"<p>its source cannot be read: {escape(str(error))}</p>")
        return _document(file.file, "".join(parts))
    if digest_of(text) != file.digest:
        parts.append("<p><b>This source is not the one that was measured.</b></p>")
    cases = sorted({case for hits in file.sites.values() for case in hits.cases})
    place = {case: number for number, case in enumerate(cases)}
    by_line: dict[int, list[tuple[Site, Hits]]] = {}
    for site in sorted(file.sites):
        last = site.last if site.kind is SiteKind.STATEMENT else site.first
        for line in range(site.first, last + 1):
            by_line.setdefault(line, []).append((site, file.sites[site]))
    text = text.encode("utf-8", "replace").decode("utf-8")
    rows = [
        _line(number, line, by_line.get(number, ()), place)
        for number, line in enumerate(text.splitlines(), start=1)
    ]
    # The end of a script element would end it inside of a string too.
    data = json.dumps(cases).replace("<", "\\u003c")
    parts.append(f'<table class="source">{chr(10).join(rows)}</table>')
    parts.append(f'<script type="application/json" id="cases">{data}</script><script>{SCRIPT}</script>')
    return _document(file.file, "".join(parts))


def _missed(file: FileCoverage) -> str:
    """Links to the places of a page where something was missed."""
    links = []
    for kind in SiteKind:
        if missed := file.missed(kind):
            runs = lines_of(missed).split(", ")
            shown = ", ".join(f'<a href="#L{run.partition("-")[0]}">{run}</a>' for run in runs)
            links.append(f"{kind.value}s missed: {shown}")
    return f'<p class="note">{"; ".join(links)}</p>' if links else ""


def _line(number: int, code: str, sites: Sequence[tuple[Site, Hits]], place: dict[str, int]) -> str:
    statements = [hits.count for site, hits in sites if site.kind is SiteKind.STATEMENT]
    others = [(site, hits) for site, hits in sites if site.kind is not SiteKind.STATEMENT]
    state = ""
    if statements:
        is_part = any(not hits.count for _, hits in others)
        state = "miss" if min(statements) == 0 else "part" if is_part else "hit"
    labels = "".join(
        f'<span class="site {"hit" if hits.count else "miss"}" title="column {site.column + 1}, '
        f'hit {hits.count:,} times">{escape(site.label)}</span>'
        for site, hits in others
    )
    numbers = sorted({place[case] for _, hits in sites for case in hits.cases})
    count = f"{min(statements):,}" if statements else ""
    cases = f' data-cases="{" ".join(map(str, numbers))}" title="cases"' if numbers else ""
    return (
        f'<tr class="{state}" id="L{number}"><td class="n">{number}</td><td class="c"{cases}>{count}</td>'
        f'<td class="code">{escape(code)}</td><td>{labels}</td></tr>'
    )


def _document(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
