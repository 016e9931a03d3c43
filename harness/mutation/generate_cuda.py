"""Mutants of any .cu file, from its tokens: small changes that compile, mostly, and mean something else.

The bodies of kernels, of device functions and of what launches them are mutated; argument checks are not. The
files are formatted as this repository's are: an operator between two operands has a space on either side, a
template's bracket and a pointer's star have not. What does not compile is stillborn and costs a compilation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from harness.mutation.generate import Edit, record
from harness.mutation.mutant import Mutant

TOKEN = re.compile(
    r"""
    (?P<blank>\s+|//[^\n]*|/\*.*?\*/|^\#(?:[^\n\\]|\\.)*)
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>\.?\d(?:[\w.']|(?<=[eEpP])[+-])*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<sign><<=|>>=|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|::|.)
    """,
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)

BETWEEN_OPERANDS = {
    "<": ("<=", ">="),
    "<=": ("<", ">"),
    ">": (">=", "<="),
    ">=": (">", "<"),
    "==": ("!=",),
    "!=": ("==",),
    "&&": ("||",),
    "||": ("&&",),
    "+": ("-",),
    "-": ("+",),
    "*": ("+",),
    "/": ("*",),
    "%": ("/",),
    "<<": (">>",),
    ">>": ("<<",),
    "&": ("|",),
    "|": ("&",),
    "+=": ("=",),
    "-=": ("+=",),
    "*=": ("=",),
}
NAMES = {
    "min": "max",
    "max": "min",
    "fmaxf": "fminf",
    "fminf": "fmaxf",
    "exp2f": "expf",
    "expf": "exp2f",
    "log2f": "logf",
    "logf": "log2f",
    "warp_sum": "warp_max",
    "warp_max": "warp_sum",
    "__any_sync": "__all_sync",
    "__all_sync": "__any_sync",
    "kAllLanes": "0xffffu",
    "true": "false",
    "false": "true",
}
SYMMETRIC = frozenset({"min", "max", "fmaxf", "fminf"})
"""Functions whose two arguments may trade places."""
KEYWORDS = frozenset(
    {"if", "for", "while", "switch", "return", "else", "case", "default", "break", "continue"}
)
CHECKS = frozenset({"MLA_CHECK", "TVM_FFI_THROW", "static_assert", "MLA_HERE", "MLA_WHERE", "MLA_PASS"})
PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Token:
    """A name, number, text or sign of the source; `start` and `end` are offsets."""

    kind: str
    text: str
    start: int
    end: int


def generate_cuda(file: str, text: str) -> tuple[Mutant, ...]:
    """Every mutant of a file's kernels, device functions and launchers, in the order of the text.

    Args:
        file: what the records name it. text: its contents.
    """
    edits: dict[tuple[int, int, str], Edit] = {}
    for body in _mutated_bodies(tokens_of(text)):
        source = _Body(text, body)
        for operator in OPERATORS:
            for edit in operator(source):
                edits.setdefault((edit.start, edit.end, edit.text), edit)
    ordered = sorted(edits.values(), key=lambda edit: (edit.start, edit.end, edit.text))
    return tuple(record(file, text, edit, number) for number, edit in enumerate(ordered, start=1))


def tokens_of(text: str) -> list[Token]:
    """The tokens of a source, without comments, layout and the preprocessor's lines."""
    return [
        Token(match.lastgroup or "", match[0], match.start(), match.end())
        for match in TOKEN.finditer(text)
        if match.lastgroup != "blank"
    ]


def _closing(tokens: Sequence[Token], opening: int) -> int:
    """The index of the bracket that closes the one at `opening`; the last token's where none does."""
    depth, pair = 0, (tokens[opening].text, PAIRS[tokens[opening].text])
    for number in range(opening, len(tokens)):
        depth += (tokens[number].text == pair[0]) - (tokens[number].text == pair[1])
        if depth == 0:
            return number
    return len(tokens) - 1


def _mutated_bodies(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """What stands in the braces of functions that are mutated, without argument checks."""
    number = header = 0
    while number < len(tokens):
        text = tokens[number].text
        if text in (";", "}"):
            header = number + 1
        elif text == "{":
            words = {token.text for token in tokens[header:number]}
            if words & {"namespace", "extern"}:
                header = number + 1
            else:
                end = _closing(tokens, number)
                body = tokens[number + 1 : end]
                is_kernel = bool(words & {"__global__", "__device__"})
                is_launcher = any(token.text == "launch" for token in body)
                if tokens[number - 1].text == ")" and (is_kernel or is_launcher):
                    yield _without_checks(body)
                number, header = end, end + 1
        number += 1


def _without_checks(body: Sequence[Token]) -> list[Token]:
    """The body without the statements that check arguments, and the conditions of those."""
    kept: list[Token] = []
    number = 0
    while number < len(body):
        if body[number].text == "if" and number + 1 < len(body) and body[number + 1].text == "(":
            block = _closing(body, number + 1) + 1
            if [token.text for token in body[block : block + 1]] == ["{"] and body[block + 1].text in CHECKS:
                number = _closing(body, block) + 1
                continue
        if body[number].text in CHECKS:
            while number < len(body) and body[number].text != ";":
                number += 1
        kept.append(body[number])
        number += 1
    return kept


class _Body:
    """The tokens of a function's body, and the text they are of."""

    def __init__(self, text: str, tokens: Sequence[Token]) -> None:
        self.text = text
        self.tokens = tokens

    def is_between_operands(self, number: int) -> bool:
        token = self.tokens[number]
        return self.text[token.start - 1].isspace() and self.text[token.end : token.end + 1].isspace()

    def calls(self) -> Iterator[tuple[Token, int, int]]:
        """The name of every call, and where its parentheses are."""
        for number, token in enumerate(self.tokens[1:], start=1):
            before = self.tokens[number - 1]
            if token.text == "(" and before.kind == "name" and before.text not in KEYWORDS:
                yield before, number, _closing(self.tokens, number)

    def arguments(self, opening: int, closing: int) -> list[tuple[int, int]]:
        """Where every argument between two parentheses begins and ends in the text."""
        found, depth, first = [], 0, opening + 1
        for number in range(opening + 1, closing + 1):
            text = self.tokens[number].text
            if depth == 0 and (text == "," or number == closing):
                if number > first:
                    found.append((self.tokens[first].start, self.tokens[number - 1].end))
                first = number + 1
            depth += (text in PAIRS) - (text in PAIRS.values())
        return found

    def statements(self) -> Iterator[tuple[int, int]]:
        """The first token and the semicolon of every simple statement."""
        depth, first = 0, 0
        for number, token in enumerate(self.tokens):
            depth += (token.text in "([") - (token.text in ")]")
            if depth == 0 and token.text == ";":
                if number > first:
                    yield first, number
                first = number + 1
            elif depth == 0 and (
                token.text in "{}:" or (token.text == ")" and self._closes_a_condition(number))
            ):
                first = number + 1

    def _closes_a_condition(self, closing: int) -> bool:
        depth = 0
        for number in range(closing, -1, -1):
            text = self.tokens[number].text
            depth += (text == ")") - (text == "(")
            if depth == 0:
                return number > 0 and self.tokens[number - 1].text in ("if", "for", "while", "switch")
        return False


def _operators(body: _Body) -> Iterator[Edit]:
    for number, token in enumerate(body.tokens):
        if token.text in BETWEEN_OPERANDS and body.is_between_operands(number):
            for new in BETWEEN_OPERANDS[token.text]:
                yield Edit(token.start, token.end, new, f"{token.text} becomes {new}")


def _numbers(body: _Body) -> Iterator[Edit]:
    for token in body.tokens:
        new = _other_number(token.text) if token.kind == "number" else None
        if new is not None:
            yield Edit(token.start, token.end, new, f"{token.text} becomes {new}")


def _other_number(text: str) -> str | None:
    """A number of the same type: one more, 0 for 1, and of a mask half as many bits."""
    found = re.fullmatch(r"(0[xX][0-9a-fA-F]+|\d+)([uUlL]*)", text)
    if found is not None:
        value = int(found[1], 0)
        if found[1][:2].lower() == "0x":
            return f"{value >> max(1, value.bit_length() // 2):#x}{found[2]}"
        return f"{0 if value == 1 else value + 1}{found[2]}"
    found = re.fullmatch(r"(\d*\.\d*(?:[eE][+-]?\d+)?)([fF]?)", text)
    if found is None:
        return None
    return f"{0.0 if float(found[1]) == 1 else float(found[1]) + 1}{found[2]}"


def _names(body: _Body) -> Iterator[Edit]:
    for token in body.tokens:
        if token.kind == "name" and token.text in NAMES:
            new = NAMES[token.text]
            yield Edit(token.start, token.end, new, f"{token.text} becomes {new}")


def _widths(body: _Body) -> Iterator[Edit]:
    """What has 64 bits has 32."""
    for token in body.tokens:
        if token.text == "int64_t":
            yield Edit(token.start, token.end, "int", "int64_t becomes int")


def _conditions(body: _Body) -> Iterator[Edit]:
    for number, token in enumerate(body.tokens[:-1]):
        if token.text == "if" and body.tokens[number + 1].text == "(":
            closing = _closing(body.tokens, number + 1)
            start, end = body.tokens[number + 1].end, body.tokens[closing].start
            for new in ("true", "false"):
                yield Edit(start, end, new, f"condition becomes {new}")


def _arguments(body: _Body) -> Iterator[Edit]:
    """Neighbouring arguments of a call trade places."""
    for name, opening, closing in body.calls():
        if name.text in SYMMETRIC:
            continue
        places = body.arguments(opening, closing)
        for (start, middle), (resume, end) in pairwise(places):
            first, second = body.text[start:middle], body.text[resume:end]
            # Texts and lambdas have no other place to stand in.
            if first != second and not {'"', "{"} & {*first, *second}:
                new = f"{second}{body.text[middle:resume]}{first}"
                yield Edit(start, end, new, f"{first} and {second} trade places")


def _statements(body: _Body) -> Iterator[Edit]:
    """A call, or the new value of a variable or an element, is left out."""
    for first, last in body.statements():
        tokens = body.tokens[first:last]
        follows = tokens[1].text if len(tokens) > 1 else ""
        is_update = any(token.text in ("=", "+=", "-=", "*=", "|=", "&=") for token in tokens)
        begins = tokens[0].kind == "name" and tokens[0].text not in KEYWORDS
        # Two names in a row declare, and so does a type with a star, reference or template's bracket.
        declares = len(tokens) > 1 and (tokens[1].kind == "name" or follows in ("*", "&", "::"))
        declares = declares or (follows == "<" and is_update)
        if begins and not declares and (is_update or follows in ("(", "<")):
            start, end = tokens[0].start, body.tokens[last].start
            yield Edit(start, end, "", "statement removed")


OPERATORS: tuple[Callable[[_Body], Iterator[Edit]], ...] = (
    _operators,
    _numbers,
    _names,
    _widths,
    _conditions,
    _arguments,
    _statements,
)
