"""Collecting in a process: what ran since the last time it was asked, case by case.

coverage.py tells the lines and branches of Python, interpreted kernels' among them; what it cannot see comes
from sources of sites, such as the probes of compiled kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from harness.coverage import cuda
from harness.coverage.python_sites import PythonFile, python_file
from harness.coverage.sites import Site, text_of
from harness.plan import UsageError

Arc = tuple[int, int]
Sources = Mapping[str, Iterable[Site]]

IGNORED_FOLDERS = frozenset({"__pycache__", "node_modules", "out"})


class MissingCoverage(ImportError):
    """coverage.py is not installed."""


@dataclass(frozen=True)
class Measure:
    """What is to be measured: absolute paths of files, all under a root."""

    root: Path
    files: tuple[str, ...]


@dataclass
class Collected:
    """What ran in a process since it was asked before.

    Attributes:
        arcs: of each Python file the pairs of lines run one after the other, as coverage.py numbers them.
        sites: of each file the sites hit that no arc tells.
        imported: files imported before collecting began.
    """

    arcs: dict[str, tuple[Arc, ...]] = field(default_factory=dict)
    sites: dict[str, tuple[Site, ...]] = field(default_factory=dict)
    imported: tuple[str, ...] = ()


def chosen_files(root: Path, globs: Sequence[str]) -> Measure:
    """The Python and CUDA files under a root whose posix path matches a glob; `*` matches `/` too.

    Raises:
        UsageError: a glob matches no file.
    """
    files = [file for file in _source_files(root) if file.suffix in SUFFIXES]
    names = {file: file.relative_to(root).as_posix() for file in files}
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names.values()):
            raise UsageError(
                f"--source {glob!r} matches no file of {root} that ends in {', '.join(sorted(SUFFIXES))}"
            )
    chosen = (file for file, name in names.items() if any(fnmatchcase(name, glob) for glob in globs))
    return Measure(root, tuple(sorted(str(file) for file in chosen if _is_measured(file))))


SUFFIXES = {".py"} | cuda.SUFFIXES | cuda.HEADER_SUFFIXES


def _is_measured(file: Path) -> bool:
    """Whether it is Python or CUDA: a header without functions of the device is neither."""
    return file.suffix == ".py" or cuda.is_cuda(file.name, text_of(file))


def _source_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in IGNORED_FOLDERS and not name.startswith(".")]
        yield from (Path(place) / name for name in names)


class Collector:
    """Collects in this process, from `start` on."""

    def __init__(self, measure: Measure) -> None:
        self.files = frozenset(measure.files)
        self._sources: list[Callable[[], Sources]] = []
        self._imported: tuple[str, ...] = ()
        self._coverage: Any = None

    def start(self) -> None:
        """Begins; as early as possible, for what is imported before tells only that it was.

        Raises:
            MissingCoverage: coverage.py is not installed.
        """
        coverage = import_coverage()
        loaded = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        self._imported = tuple(sorted({file for file in loaded if file in self.files}))
        self._coverage = coverage.Coverage(
            data_file=None, config_file=False, branch=True, include=sorted(self.files), messages=False
        )
        # A test, or a worker, may run nothing of the files.
        self._coverage.set_option("run:disable_warnings", ["no-data-collected"])
        self._coverage.start()

    def add_source(self, source: Callable[[], Sources]) -> None:
        """Asks a source too: () -> the sites hit since the last call, by file."""
        self._sources.append(source)

    def watch_interpreter(self) -> None:
        """Notes lanes and empty loops of the kernels that Triton's interpreter runs."""
        from harness.coverage import interpreted

        interpreted.install(self.files)
        self.add_source(lambda: interpreted.take(self._source_of))

    def take(self) -> Collected:
        """What ran since the last call."""
        data = self._coverage.get_data()
        arcs = {file: tuple(data.arcs(file) or ()) for file in data.measured_files()}
        data.erase()
        found: dict[str, set[Site]] = {}
        for source in self._sources:
            for file, sites in source().items():
                found.setdefault(file, set()).update(sites)
        imported, self._imported = self._imported, ()
        hits = {file: tuple(sorted(hit)) for file, hit in found.items() if file in self.files}
        return Collected({file: pairs for file, pairs in arcs.items() if pairs}, hits, imported)

    def stop(self) -> Collected:
        """The last of it."""
        self._coverage.stop()
        return self.take()

    def _source_of(self, file: str) -> PythonFile | None:
        return parsed(file) if file in self.files else None


@cache
def parsed(file: str) -> PythonFile:
    """The sites of a Python file."""
    return python_file(text_of(Path(file)))


def import_libraries() -> None:
    """Imports what takes long to import, twice as long where it is traced. Call it before `start`."""
    for name in ("torch", "triton"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def import_coverage() -> Any:
    """coverage.py.

    Raises:
        MissingCoverage: it is not installed.
    """
    try:
        import coverage
    except ImportError as error:
        raise MissingCoverage(
            f"measuring needs coverage.py ({error}): pip install 'mla-harness[coverage]'"
        ) from None
    return coverage
