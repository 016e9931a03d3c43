"""Known failures: cases a user expects to fail, listed in the user's own file.

One a line: `CASE PATH [LANE] # why`, where CASE, PATH and LANE may be globs. Such a verdict becomes
xfailed; if it passes, xpassed, which fails the run, so that the list cannot outlive the bugs.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from harness.verdict import Verdict


class KnownFailuresError(ValueError):
    """A line that cannot be read; the message names file, line and what is expected."""


@dataclass(frozen=True)
class KnownFailure:
    """One line of the file."""

    case: str
    path: str
    lane: str
    why: str

    def matches(self, verdict: Verdict) -> bool:
        """Whether it speaks of this verdict."""
        return (
            fnmatchcase(verdict.case, self.case)
            and fnmatchcase(verdict.path, self.path)
            and fnmatchcase(verdict.lane, self.lane)
        )


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
        words = entry.split()
        if not words:
            continue
        if len(words) not in (2, 3) or not hash_sign or not why.strip():
            raise KnownFailuresError(
                f"{file}:{number} must be 'CASE PATH [LANE] # why', got {line.strip()!r}"
            )
        found.append(KnownFailure(words[0], words[1], (words[2:] or ["*"])[0], why.strip()))
    return tuple(found)
