"""Putting together what processes collected: their arcs and sites become the coverage of every file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.coverage.collect import Arc, Collected, Measure, import_coverage, parsed
from harness.coverage.python_sites import ENDS, FALSE, NO_TRIP, TRIPS, TRUE, PythonFile
from harness.coverage.sites import PROCESS, Coverage, FileCoverage, Hits, Site, SiteKind, digest_of, text_of

NEVER_IMPORTED = "nothing that ran imported it"
NEVER_BUILT = "no lane that ran built it with probes"


class Recording:
    """Grows as processes hand over what they collected."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._files: dict[str, _File | FileCoverage] = {}
        self.arcs: dict[str, dict[str, set[Arc]]] = {}
        self.seen: set[str] = set()

    def add(self, collected: Collected, lane: str, case: str = "") -> None:
        """Adds what a process of a lane collected in a case, or outside of any."""
        for name, arcs in collected.arcs.items():
            file = self._file(name)
            if isinstance(file, _File):
                self.seen.add(name)
                # One context a case is what tests are chosen by; for host code it would be all of them.
                context = case if file.source.kernels else ""
                self.arcs.setdefault(name, {}).setdefault(context, set()).update(arcs)
                file.hit_by_arcs(arcs, lane, case)
        for name, sites in collected.sites.items():
            file = self._file(name)
            self.seen.add(name)
            hits = file.hits if isinstance(file, _File) else file.sites
            for site in sites:
                hits[site].add(lane, case)
            if isinstance(file, _File):
                self.arcs.setdefault(name, {}).setdefault(case, set()).update(file.arcs_of(sites))
        for name in collected.imported:
            file = self._file(name)
            if isinstance(file, _File):
                self.seen.add(name)
                for site in file.source.straight:
                    file.hits[site].add(PROCESS)
                self.arcs.setdefault(name, {}).setdefault("", set()).update(file.arcs_of_import())

    def coverage(self) -> Coverage:
        """Every file that was to be measured, those that nothing is known of with the reason."""
        found = Coverage()
        for name in self.measure.files:
            file = self._file(name)
            relative = Path(name).relative_to(self.measure.root).as_posix()
            if isinstance(file, _File):
                reason = "" if name in self.seen else NEVER_IMPORTED
                found.files[relative] = file.source.coverage(relative, reason)
                found.files[relative].sites = {site: file.hits[site] for site in sorted(file.hits)}
            else:
                file.file = relative
                if not file.unmeasured and name not in self.seen:
                    file.unmeasured = NEVER_BUILT
                found.files[relative] = file
        return found

    def write_data_file(self, path: Path, *, append: bool = False) -> None:
        """Writes coverage.py's own data file, or adds to it; contexts are the cases that ran a kernel."""
        coverage = import_coverage()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not append:
            path.unlink(missing_ok=True)
        data = coverage.CoverageData(str(path))
        contexts: dict[str, dict[str, set[Arc]]] = {}
        for name, by_context in self.arcs.items():
            for context, arcs in by_context.items():
                contexts.setdefault(context, {})[name] = arcs
        for context in sorted(contexts):
            data.set_context(context)
            data.add_arcs(contexts[context])
        data.write()
        data.close()

    def _file(self, name: str) -> _File | FileCoverage:
        if name not in self._files:
            self._files[name] = _static(name)
        return self._files[name]


def _static(name: str) -> _File | FileCoverage:
    """A Python file, ready to be hit; any other, and one that cannot be read, as its coverage."""
    if not name.endswith(".py"):
        from harness.coverage.cuda import cuda_coverage

        return cuda_coverage(Path(name))
    try:
        return _File(name, parsed(name))
    except (SyntaxError, ValueError, OSError) as error:
        text = text_of(Path(name))
        language = "triton" if "@triton.jit" in text else "python"
        return FileCoverage(name, language, digest_of(text), {}, f"it cannot be parsed: {error}")


@dataclass
class _File:
    """A Python file being hit."""

    name: str
    source: PythonFile
    hits: dict[Site, Hits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from coverage.parser import PythonParser

        self.hits = {site: Hits() for site in self.source.sites}
        self._parser: Any = PythonParser(text=self.source.text, filename=self.name)
        self._parser.parse_source()
        self._statements: dict[int, list[Site]] = {}
        for site in self.source.sites:
            if site.kind is SiteKind.STATEMENT:
                for line in range(site.first, site.last + 1):
                    self._statements.setdefault(line, []).append(site)
        self._arms = dict(self._arms_by_arc())

    def hit_by_arcs(self, arcs: Iterable[Arc], lane: str, case: str) -> None:
        """Counts the statements and arms that arcs tell."""
        hit: set[Site] = set()
        for line in {line for arc in arcs for line in arc if line > 0}:
            hit.update(self._statements.get(line, ()))
        for arc in self._parser.translate_arcs(arcs):
            if arc in self._arms:
                hit.add(self._arms[arc])
        for site in hit:
            # A kernel's lines run in the interpreter only: of that lane its launcher is the process.
            self.hits[site].add(lane if site.function in self.source.kernels else PROCESS, case)

    def arcs_of(self, sites: Iterable[Site]) -> set[Arc]:
        """The arcs that must have been run for sites to be hit."""
        hit = set(sites)
        lines = {site.first for site in hit if site.kind is SiteKind.STATEMENT}
        branching = {start for start, _ in self._arms}
        found = {arc for arc, site in self._arms.items() if site in hit}
        for start, end in self._parser.arcs():
            if start in lines and start not in branching:
                found.add((start, end))
        return found

    def arcs_of_import(self) -> set[Arc]:
        """The arcs of a module's straight lines: those of definitions and decorators too."""
        lines = {site.first for site in self.source.straight}
        starts = lines | self._definitions()
        return {(start, end) for start, end in self._parser.arcs() if start in starts and end > 0}

    def _definitions(self) -> set[int]:
        """Lines of decorators and signatures of functions and classes that are no function's own."""
        import ast

        found: set[int] = set()
        waiting: list[ast.stmt] = list(ast.parse(self.source.text).body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found |= {node.lineno, *(item.lineno for item in node.decorator_list)}
            if isinstance(node, ast.ClassDef):
                waiting += node.body
        return found

    def _arms_by_arc(self) -> Iterator[tuple[Arc, Site]]:
        """What each arc that can leave a branch is an outcome of."""
        possible: dict[int, list[Arc]] = {}
        for start, end in self._parser.arcs():
            possible.setdefault(start, []).append((start, end))
        for node, place in self.source.branches:
            sites = {site.label: site for label in _LABELS if (site := place.arm(node, label)) in self.hits}
            inside = sites.get(TRUE) or sites.get(TRIPS)
            # A kernel's loop without a trip leaves no arc of its own: it is noted where it runs.
            outside = sites.get(FALSE) or sites.get(ENDS)
            last = node.body[-1].end_lineno or node.body[-1].lineno
            for arc in possible.get(self._parser.first_line(node.lineno), ()):
                reached = inside if node.lineno < arc[1] <= last else outside
                if reached is not None:
                    yield arc, reached


_LABELS = (TRUE, FALSE, TRIPS, NO_TRIP, ENDS)
