"""Known failures: cases a user expects to fail, listed in the user's own file.

One a line, `#` before the reason, which ought to name an issue:

    CASE PATH [LANE] [kind=KIND] [until=YYYY-MM-DD] # why

CASE, PATH and LANE may be globs. A verdict that fails as the line says becomes xfailed. One that passes
becomes xpassed, and one that fails with another kind, or after the day in `until`, stays failed: the
list cannot outlive the bugs, nor hide new ones.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from harness.verdict import Kind, Status, Verdict

_KINDS = tuple(kind.value for kind in Kind)


class KnownFailuresError(ValueError):
    """A line that cannot be read; the message names file, line and what is expected."""


@dataclass(frozen=True)
class KnownFailure:
    """One line of the file. `kind` None is any kind, `until` None no end."""

    case: str
    path: str
    lane: str
    why: str
    kind: str | None = None
    until: dt.date | None = None

    def matches(self, verdict: Verdict) -> bool:
        """Whether it speaks of this verdict."""
        return (
            fnmatchcase(verdict.case, self.case)
            and fnmatchcase(verdict.path, self.path)
            and fnmatchcase(verdict.lane, self.lane)
        )

    def applied(self, verdict: Verdict, today: dt.date) -> Verdict:
        """The verdict in the light of this line; it must match."""
        if verdict.status is Status.FAILED:
            if self.until is not None and today > self.until:
                return verdict.with_note(f"known until {self.until}, which is past: {self.why}")
            if self.kind is not None and verdict.kind is not None and verdict.kind.value != self.kind:
                return verdict.with_note(f"known to fail as {self.kind}: {self.why}")
        return verdict.expected_to_fail(self.why)


def apply_known(known: Sequence[KnownFailure], verdict: Verdict) -> Verdict:
    """The verdict in the light of the first line that speaks of it, or as it is."""
    first = next((item for item in known if item.matches(verdict)), None)
    return verdict if first is None else first.applied(verdict, dt.datetime.now(dt.UTC).date())


def read_known_failures(file: Path) -> tuple[KnownFailure, ...]:
    """The lines of a file.

    Raises:
        KnownFailuresError: the file is missing, or a line is not of the form.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise KnownFailuresError(f"cannot read known failures from {file}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        entry, hash_sign, why = line.partition("#")
        if not entry.split():
            continue
        where = f"{file}:{number}"
        if not hash_sign or not why.strip():
            raise KnownFailuresError(f"{where} must be {_FORM}, got {line.strip()!r}")
        found.append(_known_failure(entry.split(), why.strip(), where))
    return tuple(found)


_FORM = "'CASE PATH [LANE] [kind=KIND] [until=YYYY-MM-DD] # why'"


def _known_failure(words: list[str], why: str, where: str) -> KnownFailure:
    settings = {}
    # A case has `=` too: settings come last.
    while len(words) > 2 and words[-1].startswith(("kind=", "until=")):
        key, _, value = words.pop().partition("=")
        settings[key] = value
    if len(words) not in (2, 3):
        raise KnownFailuresError(f"{where} must be {_FORM}, got {' '.join(words)!r}")
    kind, until = settings.get("kind"), settings.get("until")
    if kind is not None and kind not in _KINDS:
        raise KnownFailuresError(f"{where}: kind is one of {', '.join(_KINDS)}, got {kind!r}")
    try:
        day = None if until is None else dt.date.fromisoformat(until)
    except ValueError:
        raise KnownFailuresError(f"{where}: until is a day such as 2027-01-31, got {until!r}") from None
    return KnownFailure(words[0], words[1], (words[2:] or ["*"])[0], why, kind, day)
