"""What a change is held to: `[tool.mla-harness.gate]` of the changed repository's pyproject.toml.

    [tool.mla-harness.gate]
    exclude = ["tests/*"]                        # changed files that are not judged
    must_be_measured = ["csrc/host/*.py"]        # as kernels always must
    exemptions = "gate/exemptions.toml"          # the form is in harness/gate/exemptions.py
    measured_elsewhere = ["gate/gpu.json"]       # checked-in coverage; counts while the text is the same
    mutants = 70                                 # percent of mutants on changed kernel lines to be caught
    max_mutants = 60                             # one of a .cu file, which is compiled, counts for four

    [[tool.mla-harness.gate.thresholds]]         # the first whose glob matches a file holds for it
    files = ["csrc/*"]
    lines = 95                                   # percent of changed lines, arms and lanes to be hit;
    arms = 90                                    # what is not given is as for every file of its kind
    lanes = 80

    [tool.mla-harness.gate.whole]                # with --whole: percent of all statements, arms and lanes
    lines = 95                                   # of the kernels, exempted ones too
    arms = 90

All of it is optional. Globs are those of fnmatch, on the whole path from the repository's top: `*` matches
`/` too. Files are relative to that folder.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harness.plan import UsageError

TABLE = "tool.mla-harness.gate"
EXCLUDED = ("tests/*", "*/tests/*", "test_*.py", "*/test_*.py", "*conftest.py", "setup.py", "noxfile.py")


@dataclass(frozen=True)
class Limits:
    """Percent of what a change touches in a file that cases must hit."""

    lines: float
    arms: float
    lanes: float


HOST = Limits(lines=80, arms=0, lanes=0)
KERNEL = Limits(lines=90, arms=80, lanes=80)
"""A mask that was never off is the case nobody tried: so lanes count, as arms do."""


@dataclass(frozen=True)
class Threshold:
    """One entry of `thresholds`: what is given, for files that match one of the globs."""

    files: tuple[str, ...]
    given: Mapping[str, float]


@dataclass(frozen=True)
class Policy:
    """What a change is held to; the attributes are the keys of the table."""

    exclude: tuple[str, ...] = EXCLUDED
    must_be_measured: tuple[str, ...] = ()
    exemptions: str = ""
    measured_elsewhere: tuple[str, ...] = ()
    mutants: float = 70.0
    max_mutants: int = 60
    thresholds: tuple[Threshold, ...] = field(default=())
    whole: Limits = KERNEL

    def is_excluded(self, file: str) -> bool:
        """Whether a file is not judged."""
        return _matches(file, self.exclude)

    def is_required(self, file: str, *, is_kernel: bool) -> bool:
        """Whether a file that nothing measured fails the gate."""
        return is_kernel or _matches(file, self.must_be_measured)

    def limits(self, file: str, *, is_kernel: bool) -> Limits:
        """What a file is held to."""
        default = KERNEL if is_kernel else HOST
        first = next((item for item in self.thresholds if _matches(file, item.files)), None)
        given = {} if first is None else first.given
        return Limits(
            given.get("lines", default.lines),
            given.get("arms", default.arms),
            given.get("lanes", default.lanes),
        )


def read_policy(pyproject: Path) -> Policy:
    """The policy of a pyproject.toml; the defaults where there is none.

    Raises:
        UsageError: it is not TOML, or a key is unknown or of another type.
    """
    try:
        data: Any = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Policy()
    except OSError as error:
        raise UsageError(f"cannot read {pyproject}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{pyproject} is not TOML: {error}") from None
    for key in TABLE.split("."):
        data = data.get(key, {}) if isinstance(data, dict) else {}
    return _policy(data, f"{pyproject}, [{TABLE}]")


def _policy(data: Any, where: str) -> Policy:
    readers = {
        "exclude": _texts,
        "must_be_measured": _texts,
        "exemptions": _text,
        "measured_elsewhere": _texts,
        "mutants": _percent,
        "max_mutants": _count,
        "thresholds": _thresholds,
        "whole": _whole,
    }
    return Policy(**_read(data, readers, where))


def _thresholds(value: Any, where: str) -> tuple[Threshold, ...]:
    if not isinstance(value, list):
        raise UsageError(f"{where} must be tables, [[{TABLE}.thresholds]], got {value!r}")
    readers = {"files": _texts, **PERCENTS}
    found = []
    for number, entry in enumerate(value, start=1):
        read = _read(entry, readers, f"{where}, entry {number}")
        if "files" not in read:
            raise UsageError(f"{where}, entry {number}: files is missing")
        found.append(Threshold(read.pop("files"), read))
    return tuple(found)


def _whole(value: Any, where: str) -> Limits:
    return replace(KERNEL, **_read(value, PERCENTS, where))


def _read(data: Any, readers: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Every key of a table by its reader."""
    if not isinstance(data, dict):
        raise UsageError(f"{where} must be a table, got {data!r}")
    unknown = data.keys() - readers.keys()
    if unknown:
        raise UsageError(f"{where} takes {', '.join(readers)}, got {min(unknown)!r}")
    return {key: readers[key](value, f"{where}: {key}") for key, value in data.items()}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where} must be a text, got {value!r}")
    return value


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{where} must be a list of texts, got {value!r}")
    return tuple(value)


def _percent(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise UsageError(f"{where} must be a number of percent, 0 to 100, got {value!r}")
    return float(value)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{where} must be a whole number from 0, got {value!r}")
    return value


PERCENTS = {"lines": _percent, "arms": _percent, "lanes": _percent}


def _matches(file: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(file, glob) for glob in globs)
