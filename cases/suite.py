"""Suites: lists of cases as data. One TOML file each in `cases/suites/`, named after the suite.

    summary = "one sentence"
    second_oracle_every = 10          # the second derivation on every tenth case; default 1
    marks = ["mutants"]               # words to choose cases by, of every entry; default none

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

    [[entry]]
    why = "..."
    marks = ["ci"]                    # of this entry alone
    operator = "mla_step"             # or schedules of an engine, drawn by chance from a seed:
    schedules = { count = 10, steps = 6, slots = 4, tokens = 60 }
    # and `seed`, default 1; `computed = 16`: what is found in the cache are blocks that a row has computed
    options = { block = [16, 64] }    # each schedule takes the next value

    [[entry]]
    why = "..."
    operator = "mla_step"             # or one prompt in chunks of each of these sizes, and some steps after:
    chunked = { tokens = 300, sizes = [1, 64], decodes = 5 }

`--mark WORD` runs the cases marked so. What `mla-harness mutants` runs unless told otherwise is marked
`mutants`, what continuous integration runs of a suite that takes long is marked `ci`, and what it runs on
other projects' kernels `adapters`.

An entry without `why` is refused, and so is one without a case. A case that several entries list
keeps the first `why` and has the checks and marks of all.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, product
from pathlib import Path
from typing import Any

from cases.case import Case
from cases.engine import chunked_prompt, seeded_schedules
from cases.errors import CaseError
from cases.parser import parse

_FOLDER = Path(__file__).parent / "suites"
_SUITE_KEYS = {"summary": str, "second_oracle_every": int, "marks": list, "entry": list}
_ENTRY_KEYS = {
    "why": str,
    "cases": list,
    "checks": list,
    "operator": str,
    "rows": list,
    "options": dict,
    "every": int,
    "marks": list,
    "schedules": dict,
    "chunked": dict,
}
_CHUNKED_KEYS = {"tokens": int, "sizes": list, "decodes": int}
_SCHEDULE_KEYS: dict[str, type] = {"count": int, "steps": int, "slots": int, "tokens": int}


@dataclass(frozen=True)
class SuiteCase:
    """One case of a suite.

    Attributes:
        why: what it can show that others cannot.
        checks: those it asks for beyond the default ones.
        marks: words to choose it by.
    """

    case: Case
    why: str
    checks: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


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
    _check_table(data, _SUITE_KEYS, ("summary", "entry"), f"suite {name}")
    _check_texts(data, ("marks",), f"suite {name}")
    found: dict[Case, SuiteCase] = {}
    for number, entry in enumerate(data["entry"], start=1):
        where = f"suite {name}, entry {number}"
        _check_entry(entry, where)
        for line in _texts(entry):
            try:
                case = parse(line)
            except CaseError as error:
                raise SuiteError(f"{where}: {error}") from None
            item = found.setdefault(case, SuiteCase(case, entry["why"]))
            found[case] = replace(
                item,
                checks=_together(item.checks, entry.get("checks", ())),
                marks=_together(item.marks, data.get("marks", ()), entry.get("marks", ())),
            )
    return Suite(
        name,
        data["summary"],
        data.get("second_oracle_every", 1),
        tuple(found.values()),
    )


def _together(*words: Iterable[str]) -> tuple[str, ...]:
    """Every word once, in order."""
    return tuple(dict.fromkeys(chain.from_iterable(words)))


def _check_entry(entry: object, where: str) -> None:
    if not isinstance(entry, dict) or not entry.get("why"):
        raise SuiteError(f"{where} does not say why it is there")
    needed: tuple[str, ...] = ("cases",)
    if "schedules" in entry:
        needed = ("operator", "schedules")
        sizes = entry["schedules"]
        _check_table(
            sizes,
            {**_SCHEDULE_KEYS, "seed": int, "computed": int},
            tuple(_SCHEDULE_KEYS),
            f"{where}, schedules",
        )
    elif "chunked" in entry:
        needed = ("operator", "chunked")
        _check_table(entry["chunked"], _CHUNKED_KEYS, tuple(_CHUNKED_KEYS), f"{where}, chunked")
    elif not entry.keys().isdisjoint(("operator", "rows", "options", "every")):
        needed = ("operator", "rows")
    _check_table(entry, _ENTRY_KEYS, needed, where)
    for key, values in entry.get("options", {}).items():
        if not isinstance(values, list) or not values:
            raise SuiteError(f"{where}: option {key} takes a list of values, got {values!r}")
    _check_texts(entry, ("cases", "rows", "checks", "marks"), where)


def _check_texts(table: dict[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in keys:
        for text in table.get(key, ()):
            if not isinstance(text, str):
                raise SuiteError(f"{where}: {key} are texts, got {text!r}")


def _check_table(table: dict[str, Any], keys: dict[str, type], needed: tuple[str, ...], where: str) -> None:
    for key, value in table.items():
        if key not in keys:
            raise SuiteError(f"{where} has no key {key!r}: it takes {', '.join(keys)}")
        if not isinstance(value, keys[key]):
            raise SuiteError(f"{where}: {key} is a {keys[key].__name__}, got {value!r}")
        if type(value) is int and value < 1:
            raise SuiteError(f"{where}: {key} is at least 1, got {value}")
    for key in needed:
        if not table.get(key):
            raise SuiteError(f"{where} has no {key}")


def _texts(entry: dict[str, Any]) -> Iterator[str]:
    yield from entry.get("cases", ())
    options = entry.get("options", {})
    if "schedules" in entry:
        sizes = dict(entry["schedules"])
        drawn = seeded_schedules(sizes.pop("seed", 1), sizes.pop("count"), **sizes)
        for number, steps in enumerate(drawn):
            chosen = {key: values[number % len(values)] for key, values in options.items()}
            yield _with_options(str(Case(entry["operator"], steps)), chosen)
    if "chunked" in entry:
        tokens, sizes, decodes = (entry["chunked"][key] for key in _CHUNKED_KEYS)
        for size, values in product(sizes, product(*options.values())):
            chosen = dict(zip(options, values, strict=True))
            steps = chunked_prompt(tokens, size, decodes)
            yield _with_options(str(Case(entry["operator"], steps)), chosen)
    if "rows" not in entry:
        return
    combinations = product(entry["rows"], *options.values())
    for number, (rows, *values) in enumerate(combinations):
        if number % entry.get("every", 1) == 0:
            yield _with_options(f"{entry['operator']}/{rows}", dict(zip(options, values, strict=True)))


def _with_options(text: str, options: dict[str, Any]) -> str:
    pairs = ",".join(f"{key}={value}" for key, value in options.items())
    return f"{text}/{pairs}" if pairs else text
