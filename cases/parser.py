"""Text -> Case. Every refusal is a `CaseError`: one sentence and the offending part underlined.

    case    = operator "/" step *(".." step) ["/" option *("," option)]
    step    = "" | row *("," row)          ; row i is slot i; "" = zero slots
    row     = kind [":" len ["+" len]] ["x" count] ["@" tag] ["." "k" int]
    option  = key "=" value *("+" value)   ; a list: one value = all layers, else exactly `layers` values
    tag     = [a-z][a-z0-9]*

Where a row list begins with a digit or `q` it is a vLLM batch-spec string (`cases/batchspec.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cases.batchspec import parse_batchspec
from cases.case import MAX_SLOTS, Case
from cases.errors import CaseError, RuleError
from cases.models import model_names
from cases.options import Options, specs
from cases.rows import MAX_DIGITS, Kind, Row

KINDS = {kind.word: kind for kind in Kind}

_ROW = re.compile(
    r"(?P<kind>" + "|".join(KINDS) + r")"
    r"(?::(?P<first>[0-9]+)(?:\+(?P<second>[0-9]+))?)?"
    r"(?:x(?P<count>[0-9]+))?"
    r"(?:@(?P<tag>[a-z][a-z0-9]*))?"
    r"(?:\.k(?P<key>[0-9]+))?"
)


@dataclass(frozen=True)
class _Part:
    """A piece of the text and where it begins."""

    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def split(self, separator: str) -> list[_Part]:
        parts, start = [], self.start
        for text in self.text.split(separator):
            parts.append(_Part(text, start))
            start += len(text) + len(separator)
        return parts


def parse(text: str) -> Case:
    """The case that a text describes.

    Raises:
        CaseError: the text is not a valid case; nothing is guessed.
    """
    return _Parser(text).case()


class _Parser:
    """Reads one text, remembering where every row and option stands, to underline what is wrong."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.rows: list[list[_Part]] = []
        self.option_parts: dict[str, _Part] = {}

    def fail(self, message: str, part: _Part) -> CaseError:
        return CaseError(message, self.text, part.start, part.end)

    def case(self) -> Case:
        if number := re.search(rf"[0-9]{{{MAX_DIGITS + 1},}}", self.text):
            part = _Part(number[0], number.start())
            raise self.fail(f"a number has at most {MAX_DIGITS} digits, got {len(number[0])}", part)
        parts = _Part(self.text, 0).split("/")
        if len(parts) == 1:
            raise self.fail("a case is operator/rows/options, and here is no '/'", parts[0])
        if len(parts) > 3:
            raise self.fail("a case has at most two '/': operator/rows/options", parts[3])
        operator, steps_part = parts[0], parts[1]
        if not re.fullmatch(r"[a-z][a-z0-9_]*", operator.text):
            raise self.fail("an operator is a lower-case name like mla_decode", operator)
        steps = tuple(self.step(part) for part in steps_part.split(".."))
        options = self.options(parts[2]) if len(parts) == 3 else Options()
        try:
            return Case(operator.text, steps, options)
        except RuleError as error:
            raise self.locate(error, steps_part) from None

    def locate(self, error: RuleError, steps_part: _Part) -> CaseError:
        """A rule that the whole case breaks, underlined where the culprit stands."""
        if error.option is not None:
            return self.fail(error.message, self.option_parts[error.option])
        if error.step is not None and error.slot is not None:
            return self.fail(error.message, self.rows[error.step][error.slot])
        return self.fail(error.message, steps_part)

    def step(self, part: _Part) -> tuple[Row, ...]:
        is_batchspec = re.match(r"[0-9q]", part.text) is not None
        read = self.segment if is_batchspec else self.row
        rows: list[Row] = []
        parts: list[_Part] = []
        for row_part in part.split("_" if is_batchspec else ",") if part.text else []:
            equal = read(row_part, room=MAX_SLOTS - len(rows))
            rows += equal
            parts += [row_part] * len(equal)
        self.rows.append(parts)
        return tuple(rows)

    def segment(self, part: _Part, *, room: int) -> list[Row]:
        try:
            return parse_batchspec(part.text, room=room)
        except RuleError as error:
            raise self.fail(error.message, part) from None

    def row(self, part: _Part, *, room: int) -> list[Row]:
        match = _ROW.match(part.text)
        if match is None:
            raise self.fail("a row begins with a kind: one of " + ", ".join(KINDS), part)
        if match.end() < len(part.text):
            rest = _Part(part.text[match.end() :], part.start + match.end())
            raise self.fail(
                "a row is kind[:len[+len]][xcount][@tag][.kint], in that order, and this does not fit",
                rest,
            )
        kind = KINDS[match["kind"]]
        written = [int(match[name]) for name in ("first", "second") if match[name] is not None]
        if len(written) != len(kind.lengths):
            expected = len(kind.lengths)
            raise self.fail(
                f"{kind.word} is written {kind.form}: {expected} "
                f"length{'' if expected == 1 else 's'}, got {len(written)}",
                part,
            )
        count = int(match["count"] or 1)
        if not 1 <= count <= room:
            raise self.fail(
                f"a count is at least 1 and a step has at most {MAX_SLOTS:,} rows, got x{count}",
                part,
            )
        if kind is Kind.PAD and match["count"] is not None:
            raise self.fail("pad comes once in a step: write pad:N with all padding tokens", part)
        lengths = dict(zip(kind.lengths, written, strict=True))
        key = None if match["key"] is None else int(match["key"])
        try:
            return [Row(kind, tag=match["tag"], key=key, **lengths)] * count
        except RuleError as error:
            raise self.fail(error.message, part) from None

    def options(self, part: _Part) -> Options:
        values: dict[str, object] = {}
        for option in part.split(","):
            key, equals, text = option.text.partition("=")
            spec = specs().get(key)
            if spec is None or not equals:
                raise self.fail("an option is key=value with a key of " + ", ".join(specs()), option)
            if key in values:
                raise self.fail(f"{key} is given twice", option)
            self.option_parts[key] = option
            value_part = _Part(text, option.start + len(key) + 1)
            if not spec.per_layer:
                values[key] = self.value(key, value_part)
            else:
                values[key] = tuple(self.value(key, part) for part in value_part.split("+"))
        return Options(**values)  # type: ignore[arg-type]

    def value(self, key: str, part: _Part) -> str | int:
        try:
            value = specs()[key].read(part.text)
        except ValueError as error:
            raise self.fail(f"{key} takes {error}, got {part.text!r}", part) from None
        if key == "model" and value not in model_names():
            raise self.fail("model takes one of " + ", ".join(model_names()), part)
        return value
