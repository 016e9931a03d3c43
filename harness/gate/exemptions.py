"""Exemptions: what need not be hit, in a checked-in file, each with a reason, an owner and a last day.

    [[exemption]]
    file = "csrc/cache.cu"
    function = "write_rows"          # or lines = "12-14,20", or text = "what stands on its first line"
    kind = "statement"               # statement, arm, lane, any of these; or unmeasured, for the whole file
    reason = "what keeps a case from hitting it"
    owner = "who is asked about it"
    expires = 2027-06-30             # the last day on which it holds

An expired exemption fails the gate, whatever the change touches, and what it named counts again: the list
cannot outlive its reasons. One that names nothing, or only what is hit by now, is told.
"""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.coverage.sites import FileCoverage, Site, SiteKind
from harness.gate.source import Source
from harness.plan import UsageError

UNMEASURED = "unmeasured"
ANY = "any"
KINDS = (*(kind.value for kind in SiteKind), ANY, UNMEASURED)
PLACES = ("lines", "function", "text")
RANGE = re.compile(r"([1-9][0-9]*)(?:-([1-9][0-9]*))?")


@dataclass(frozen=True)
class Exemption:
    """One entry of the file.

    Attributes:
        number: its place in the file, from 1.
        lines, function, text: what places it in the source; one of them, or none if it is for a whole file
            that is unmeasured.
        expires: the last day on which it holds.
    """

    number: int
    file: str
    kind: str
    reason: str
    owner: str
    expires: dt.date
    lines: tuple[tuple[int, int], ...] = ()
    function: str = ""
    text: str = ""

    def __str__(self) -> str:
        place = (
            self.function or self.text or ",".join(f"{a}-{b}" if a != b else str(a) for a, b in self.lines)
        )
        what = f"{self.kind} {place}".strip()
        return f"exemption {self.number} ({self.file}, {what}; {self.owner}: {self.reason})"

    def covers(self, site: Site, source: Source) -> bool:
        """Whether it speaks of a site of its file."""
        if self.kind not in (ANY, site.kind.value):
            return False
        if self.function:
            return site.function == self.function or site.function.endswith(f".{self.function}")
        if self.text:
            line = source.lines[site.first - 1] if site.first <= len(source.lines) else ""
            return self.text.strip() in line
        return any(first <= site.first <= last for first, last in self.lines)


def read_exemptions(file: Path) -> tuple[Exemption, ...]:
    """The entries of a file.

    Raises:
        UsageError: it is missing or not of the form; the message names the entry.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read exemptions from {file}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{file} is not TOML: {error}") from None
    entries = data.pop("exemption", [])
    if data or not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{file} takes [[exemption]] entries and nothing else")
    return tuple(
        _exemption(entry, number, f"{file}, exemption {number}") for number, entry in enumerate(entries, 1)
    )


def expired(exemptions: Sequence[Exemption], today: dt.date) -> tuple[Exemption, ...]:
    """Those whose last day is past."""
    return tuple(item for item in exemptions if today > item.expires)


def complaint(item: Exemption, source: Source | None, found: FileCoverage | None) -> str:
    """Why an exemption of a file is not needed, one sentence; empty if it is, or if nobody can know.

    Args:
        source: its file, None if there is none. found: coverage of that text, None if nothing measured it.
    """
    if source is None:
        return f"{item} names a file that is not there; remove it"
    is_unmeasured = found is None or bool(found.unmeasured)
    if item.kind == UNMEASURED:
        return "" if is_unmeasured else f"{item} is not needed: the file is measured; remove it"
    if found is None or found.unmeasured:
        return ""
    named = [hits for site, hits in found.sites.items() if item.covers(site, source)]
    if not named:
        return f"{item} names nothing that can be hit; remove it or correct its place"
    return (
        "" if any(not hits.count for hits in named) else f"{item} is not needed: all of it is hit; remove it"
    )


def _exemption(entry: dict[str, Any], number: int, where: str) -> Exemption:
    needed = {"file", "kind", "reason", "owner", "expires"}
    missing, unknown = needed - entry.keys(), entry.keys() - needed - set(PLACES)
    if missing or unknown:
        raise UsageError(
            f"{where} takes file, kind, reason, owner, expires and one of {', '.join(PLACES)}; "
            + (f"{min(missing)} is missing" if missing else f"got {min(unknown)!r}")
        )
    day = entry.pop("expires")
    if not isinstance(day, dt.date) or isinstance(day, dt.datetime):
        raise UsageError(f"{where}: expires is a day such as 2027-06-30, without quotes, got {day!r}")
    wrong = [key for key, value in entry.items() if not isinstance(value, str) or not value.strip()]
    if wrong:
        raise UsageError(f"{where}: {wrong[0]} must be a text, not empty")
    if entry["kind"] not in KINDS:
        raise UsageError(f"{where}: kind is one of {', '.join(KINDS)}, got {entry['kind']!r}")
    places = [key for key in PLACES if key in entry]
    if len(places) != (entry["kind"] != UNMEASURED):
        rule = (
            "none, it is of the whole file" if entry["kind"] == UNMEASURED else f"one of {', '.join(PLACES)}"
        )
        raise UsageError(
            f"{where}: the place of kind {entry['kind']} is {rule}, got {', '.join(places) or 'none'}"
        )
    lines = _ranges(entry.pop("lines"), where) if "lines" in entry else ()
    return Exemption(number, expires=day, lines=lines, **entry)


def _ranges(text: str, where: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{where}: lines are such as '12-14,20', got {text!r}")
        first = int(match[1])
        found.append((first, int(match[2] or first)))
    return tuple(found)
