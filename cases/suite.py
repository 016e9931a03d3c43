"""Suites: lists of cases as data. One TOML file each in `cases/suites/`, named after the suite.

    summary = "one sentence"
    second_oracle_every = 10          # the second derivation on every tenth case; default 1

    [[entry]]
    why = "what these cases can show that others cannot"
    cases = ["mla_decode/decode:1/heads=4", ...]
    checks = ["pages", "permute"]     # beyond the default ones; default none

    [[entry]]
    why = "..."
    operator = "mla_decode"           # a product instead of a list:
    rows = ["decode:1", "decode:63x2"]
    options = { heads = [4, 16], block = [16, 64] }
    every = 7                         # every seventh of the product, default all

An entry without `why` is refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from cases.case import Case
from cases.errors import CaseError
from cases.parser import parse

_FOLDER = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class SuiteCase:
    """One case of a suite, why it is there, and the checks it asks for beyond the default ones."""

    case: Case
    why: str
    checks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A named list of distinct cases, in the order of their entries."""

    name: str
    summary: str
    second_oracle_every: int
    cases: tuple[SuiteCase, ...]


class SuiteError(ValueError):
    """A suite file that cannot be read; the message names file and entry."""


@cache
def suite_names() -> tuple[str, ...]:
    """Every suite there is a file for, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@cache
def load_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        SuiteError: there is no such suite, or its file is wrong.
    """
    if name not in suite_names():
        raise SuiteError(f"the suites are {', '.join(suite_names())}, got {name!r}")
    return read_suite(name, (_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))


def read_suite(name: str, text: str) -> Suite:
    """The suite in the text of a file.

    Raises:
        SuiteError: the file is wrong.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SuiteError(f"suite {name} is not TOML: {error}") from None
    found: dict[Case, SuiteCase] = {}
    for number, entry in enumerate(data.get("entry", []), start=1):
        if not entry.get("why"):
            raise SuiteError(f"suite {name}, entry {number} does not say why it is there")
        for line in _texts(entry):
            try:
                case = parse(line)
            except CaseError as error:
                raise SuiteError(f"suite {name}, entry {number}: {error}") from None
            found.setdefault(case, SuiteCase(case, entry["why"], tuple(entry.get("checks", ()))))
    return Suite(name, data["summary"], data.get("second_oracle_every", 1), tuple(found.values()))


def _texts(entry: dict[str, Any]) -> Iterator[str]:
    yield from entry.get("cases", ())
    if "rows" not in entry:
        return
    options = entry.get("options", {})
    combinations = product(entry["rows"], *options.values())
    for number, (rows, *values) in enumerate(combinations):
        if number % entry.get("every", 1) == 0:
            pairs = ",".join(f"{key}={value}" for key, value in zip(options, values, strict=True))
            yield f"{entry['operator']}/{rows}" + (f"/{pairs}" if pairs else "")
