"""What can be hit in a source file, and what was: statements, arms of branches, lanes of masks.

One model for Python, Triton and CUDA. Front ends say which sites a text has, back ends count hits, and
reports and the gate read the result. Two coverages merge by union: a site hit by either is hit.
"""

from __future__ import annotations

import contextlib
import io
import json
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path
from typing import Any

SCHEMA = 1
MAX_CASES = 20
"""Cases kept of each site: enough to choose from, few enough to read."""

PROCESS = "process"
"""What stands for a lane where plain Python ran."""


class CoverageError(ValueError):
    """A file of coverage cannot be read, or two of them do not belong together."""


class SiteKind(StrEnum):
    """What a site is: a statement, one outcome of a condition or loop, one state of a mask."""

    STATEMENT = "statement"
    ARM = "arm"
    LANE = "lane"


@dataclass(frozen=True, order=True)
class Site:
    """One thing that can be hit.

    Attributes:
        first, last: lines, from 1, both inclusive.
        label: of an arm its outcome (true, false, trips, no trip, ends), or why it cannot be measured; of a
            lane `on`, some lane of the mask was on, or `off`; of a statement empty.
        column: tells apart two sites of one line.
        function: the kernel or function it lies in, qualified; empty at a module's level.
    """

    first: int
    last: int
    kind: SiteKind
    label: str = ""
    column: int = 0
    function: str = ""

    @property
    def lines(self) -> str:
        """`7`, or `7-9` where it has several."""
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass
class Hits:
    """How a site was hit.

    Attributes:
        count: how often, where a back end counts; else in how many cases; 0 for never.
        lanes: by which lanes, or `process`.
        cases: texts of cases, the first MAX_CASES that were seen.
    """

    count: int = 0
    lanes: set[str] = field(default_factory=set)
    cases: set[str] = field(default_factory=set)

    def add(self, lane: str, case: str = "", count: int = 1) -> None:
        """Counts a hit by a lane, in a case or outside of any."""
        self.count += count
        self.lanes.add(lane)
        self._keep((case,) if case else ())

    def merge(self, other: Hits) -> None:
        """Adds the hits of another coverage."""
        self.count += other.count
        self.lanes |= other.lanes
        self._keep(sorted(other.cases))

    def _keep(self, cases: Iterable[str]) -> None:
        for case in cases:
            if len(self.cases) < MAX_CASES:
                self.cases.add(case)


@dataclass
class FileCoverage:
    """What is known of one file.

    Attributes:
        file: posix path relative to the source root.
        language: python, triton or cuda. digest: `digest_of` the text that was measured.
        unmeasured: empty, or one sentence why nothing is known.
    """

    file: str
    language: str
    digest: str
    sites: dict[Site, Hits] = field(default_factory=dict)
    unmeasured: str = ""

    @property
    def is_kernel(self) -> bool:
        """Whether it is judged as a kernel."""
        return self.language in ("triton", "cuda")

    def of_kind(self, kind: SiteKind) -> dict[Site, Hits]:
        """Its sites of one kind, in order."""
        return {site: self.sites[site] for site in sorted(self.sites) if site.kind is kind}

    def missed(self, kind: SiteKind) -> list[Site]:
        """Its sites of one kind that were never hit, in order."""
        return [site for site, hits in self.of_kind(kind).items() if not hits.count]

    def merge(self, other: FileCoverage) -> None:
        """Adds what another coverage knows of the same text.

        Raises:
            CoverageError: it was measured on another text.
        """
        if self.digest != other.digest:
            raise CoverageError(
                f"coverage of {self.file} cannot be merged: it was measured on two texts, of digest "
                f"{self.digest} and {other.digest}; measure both anew on one"
            )
        if self.unmeasured or other.unmeasured:
            # What was measured speaks; a reason is left only where nobody measured.
            self.unmeasured = self.unmeasured if other.unmeasured else ""
        for site, hits in other.sites.items():
            self.sites.setdefault(site, Hits()).merge(hits)


@dataclass
class Coverage:
    """What is known of several files, by their path."""

    files: dict[str, FileCoverage] = field(default_factory=dict)

    def merge(self, other: Coverage) -> None:
        """Adds another coverage: of every site the union of its hits.

        Raises:
            CoverageError: a file was measured on two texts.
        """
        for name, file in other.files.items():
            self.files.setdefault(name, FileCoverage(name, file.language, file.digest, {}, file.unmeasured))
            self.files[name].merge(file)

    def write(self, path: Path) -> None:
        """Writes it as JSON: {"schema": 1, "files": {file: {..., "cases": [...], "sites": [...]}}}."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files = {name: _file_to_json(self.files[name]) for name in sorted(self.files)}
        text = json.dumps({"schema": SCHEMA, "files": files}, separators=(",", ":"), allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Coverage:
        """The coverage that `write` wrote.

        Raises:
            CoverageError: there is none, or it is of another schema.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CoverageError(f"{path} cannot be read as coverage: {error}") from error
        found = value.get("schema") if isinstance(value, dict) else None
        if found != SCHEMA:
            raise CoverageError(f"{path} is no coverage of schema {SCHEMA}, got {found!r}: run cover again")
        try:
            return cls({name: _file_from_json(name, item) for name, item in value["files"].items()})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"{type(error).__name__}: {error}"
            raise CoverageError(f"{path} is damaged ({what}): run cover again") from error


def text_of(file: Path) -> str:
    """The text of a source: of Python in the encoding it declares, else UTF-8; what is not so is escaped."""
    data, encoding = file.read_bytes(), "utf-8"
    if file.suffix == ".py":
        with contextlib.suppress(SyntaxError):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode("utf-8", "surrogateescape")
    return text.replace("\r\n", "\n")


def digest_of(text: str) -> str:
    """32 hex digits that depend on every character of a source text."""
    return blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()


def _file_to_json(file: FileCoverage) -> dict[str, Any]:
    """Cases are written once and named by their place in the list."""
    cases = sorted({case for hits in file.sites.values() for case in hits.cases})
    place = {case: number for number, case in enumerate(cases)}
    return {
        "language": file.language,
        "digest": file.digest,
        "unmeasured": file.unmeasured,
        "cases": cases,
        "sites": list(_sites_to_json(file, place)),
    }


def _sites_to_json(file: FileCoverage, place: dict[str, int]) -> Iterator[list[Any]]:
    for site in sorted(file.sites):
        hits = file.sites[site]
        key = [site.first, site.last, site.kind.value, site.label, site.column, site.function]
        yield [*key, hits.count, sorted(hits.lanes), sorted(place[case] for case in hits.cases)]


def _file_from_json(name: str, value: dict[str, Any]) -> FileCoverage:
    sites = {}
    for first, last, kind, label, column, function, count, lanes, cases in value["sites"]:
        site = Site(int(first), int(last), SiteKind(kind), str(label), int(column), str(function))
        texts = {str(value["cases"][number]) for number in cases}
        sites[site] = Hits(int(count), set(lanes), texts)
    return FileCoverage(name, str(value["language"]), str(value["digest"]), sites, str(value["unmeasured"]))
