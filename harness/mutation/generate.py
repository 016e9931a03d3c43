"""Mutants of any Triton file, from its syntax tree: small changes that compile and mean something else.

Only kernels and the functions that launch them are mutated: a planner's wrong guess costs time, not
correctness. Every operator of `OPERATORS` maps a node to edits of the text; an edit becomes a record with
whole lines as its old text, as many as make it unique.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from harness.mutation.mutant import Mutant, occurrences

ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
COMPARISONS = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
}
FUNCTIONS = {
    "maximum": "minimum",
    "minimum": "maximum",
    "max": "min",
    "min": "max",
    "sum": "max",
    "exp2": "exp",
    "exp": "exp2",
    "log": "log2",
    "log2": "log",
}
SYMMETRIC = frozenset({"maximum", "minimum", "max", "min"})
"""Functions whose two arguments may trade places."""
NOT_FINITE = frozenset({"float('-inf')", "float('inf')", "float('nan')"})


@dataclass(frozen=True)
class Edit:
    """Replace text[start:end] by `text`; `what` says it in a few words."""

    start: int
    end: int
    text: str
    what: str


class _Source:
    """A file's text, addressed by the positions of its syntax tree."""

    def __init__(self, text: str) -> None:
        self.text = text
        # Python's lines end at a newline only, those of `splitlines` at a form feed or U+2028 as well.
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._code = self._without_comments()

    def start(self, node: ast.AST) -> int:
        return self._offset(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def end(self, node: ast.AST) -> int:
        return self._offset(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def of(self, node: ast.AST) -> str:
        return self.text[self.start(node) : self.end(node)]

    def argument(self, node: ast.AST) -> tuple[int, int]:
        """Where one of several arguments stands, with the parentheses of its own, which no node has."""
        start, end = self.start(node), self.end(node)
        while self._code[:start].rstrip().endswith("(") and self._code[end:].lstrip().startswith(")"):
            start, end = self._code.rindex("(", 0, start), self._code.index(")", end) + 1
        return start, end

    def between(self, left: ast.AST, right: ast.AST, token: str) -> tuple[int, int]:
        """Where a token stands between two nodes."""
        start = self._code.index(token, self.end(left), self.start(right))
        return start, start + len(token)

    def _offset(self, line: int, column: int) -> int:
        # The tree counts bytes of UTF-8, the text characters.
        before = self._lines[line - 1].encode()[:column]
        return self._starts[line - 1] + len(before.decode())

    def _without_comments(self) -> str:
        """The text with spaces for its comments: what stands in one is no operator and no parenthesis."""
        code = self.text
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.COMMENT:
                start = self._starts[token.start[0] - 1] + token.start[1]
                end = start + len(token.string)
                code = code[:start] + " " * (end - start) + code[end:]
        return code


def generate(file: str, text: str) -> tuple[Mutant, ...]:
    """Every mutant of a file's kernels and launchers, in the order of the text.

    Args:
        file: what the records name it. text: its contents.
    """
    source = _Source(text)
    edits: dict[tuple[int, int, str], Edit] = {}
    for function in _mutated_functions(ast.parse(text)):
        for statement in function.body:
            if not _is_docstring(statement):
                for edit in _edits_under(source, statement, function):
                    edits.setdefault((edit.start, edit.end, edit.text), edit)
    ordered = sorted(edits.values(), key=lambda edit: (edit.start, edit.end, edit.text))
    return tuple(record(file, text, edit, number) for number, edit in enumerate(ordered, start=1))


def _mutated_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            is_kernel = any("jit" in ast.unparse(item) for item in node.decorator_list)
            if is_kernel or any(_is_launch(item) for item in ast.walk(node)):
                yield node


def _is_launch(node: ast.AST) -> bool:
    """`kernel[grid](...)`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _edits_under(source: _Source, statement: ast.stmt, function: ast.FunctionDef) -> Iterator[Edit]:
    skipped: set[ast.AST] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.AnnAssign):
            skipped.update(ast.walk(node.annotation))
        if isinstance(node, ast.keyword) and node.arg == "other":
            # Operator `other` changes it as a whole.
            skipped.update(ast.walk(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            # With its sign it is one constant.
            skipped.add(node.operand)
        if node in skipped:
            continue
        for operator in OPERATORS:
            yield from operator(source, node)
        if isinstance(node, ast.stmt):
            yield from _statement(source, node, function)


def _arithmetic(source: _Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        old, new = ARITHMETIC[type(node.op)]
        start, end = source.between(node.left, node.right, old)
        yield Edit(start, end, new, f"{old} becomes {new}")


def _comparison(source: _Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        old, alternatives = COMPARISONS[type(node.ops[0])]
        start, end = source.between(node.left, node.comparators[0], old)
        for new in alternatives:
            yield Edit(start, end, new, f"{old} becomes {new}")


def _constant(source: _Source, node: ast.AST) -> Iterator[Edit]:
    new = _other_constant(node)
    if new is not None:
        old = source.of(node)
        yield Edit(source.start(node), source.end(node), new, f"{old} becomes {new}")


def _other_constant(node: ast.AST) -> str | None:
    """Another value for a number, a truth value or `float("-inf")`; None for anything else."""
    if isinstance(node, ast.Call):
        return "0.0" if ast.unparse(node) in NOT_FINITE else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        # The other value of `True` in `not True` is what `not True` is.
        return None
    sign = -1 if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) else 1
    number = node.operand if isinstance(node, ast.UnaryOp) else node
    value = number.value if isinstance(number, ast.Constant) else None
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int | float):
        # An axis or an off-by-one term of 1 is most telling as 0.
        return repr(type(value)(0 if sign * value == 1 else sign * value + 1))
    return None


def _mask(source: _Source, node: ast.AST) -> Iterator[Edit]:
    """`mask=` removed, with the `other=` that has no meaning without it."""
    if not isinstance(node, ast.Call):
        return
    dropped = [item for item in node.keywords if item.arg in ("mask", "other")]
    if not any(item.arg == "mask" for item in dropped):
        return
    kept = [source.of(item) for item in (*node.args, *node.keywords) if item not in dropped]
    yield Edit(
        source.start(node), source.end(node), f"{source.of(node.func)}({', '.join(kept)})", "mask removed"
    )


def _other(source: _Source, node: ast.AST) -> Iterator[Edit]:
    """What masked lanes read; without `mask=` no lane reads it."""
    given = {item.arg: item.value for item in node.keywords} if isinstance(node, ast.Call) else {}
    if "mask" not in given or "other" not in given:
        return
    value = given["other"]
    new = _other_constant(value)
    if new is not None:
        old = source.of(value)
        yield Edit(source.start(value), source.end(value), new, f"other={old} becomes other={new}")


def _arguments(source: _Source, node: ast.AST) -> Iterator[Edit]:
    """Neighbouring positional arguments trade places."""
    if not isinstance(node, ast.Call):
        return
    if _name(node.func) in SYMMETRIC:
        return
    for left, right in zip(node.args, node.args[1:], strict=False):
        if isinstance(left, ast.Starred) or isinstance(right, ast.Starred):
            continue
        (start, middle), (resume, end) = source.argument(left), source.argument(right)
        first, second = source.text[start:middle], source.text[resume:end]
        if first != second:
            text = f"{second}{source.text[middle:resume]}{first}"
            yield Edit(start, end, text, f"{first} and {second} trade places")


def _function(source: _Source, node: ast.AST) -> Iterator[Edit]:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
        return
    name = _name(node.func)
    if name in FUNCTIONS:
        end = source.end(node.func)
        yield Edit(end - len(name), end, FUNCTIONS[name], f"{name} becomes {FUNCTIONS[name]}")
    if name == "cdiv" and len(node.args) == 2:
        left, right = (source.of(item) for item in node.args)
        new = f"(({left}) // ({right}))"
        yield Edit(source.start(node), source.end(node), new, "cdiv becomes //")


def _select(source: _Source, node: ast.AST) -> Iterator[Edit]:
    """`where(c, a, b)` becomes a or b."""
    if isinstance(node, ast.Call) and _name(node.func) == "where" and len(node.args) == 3:
        for kept in node.args[1:]:
            text = source.of(kept)
            yield Edit(source.start(node), source.end(node), f"({text})", f"where becomes {text}")


def _cast(source: _Source, node: ast.AST) -> Iterator[Edit]:
    """`x.to(dtype)` becomes x."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        dot = source.text.rindex(".", 0, source.end(node.func))
        yield Edit(dot, source.end(node), "", f"{source.of(node.func.value)} is not cast")


def _condition(source: _Source, node: ast.AST) -> Iterator[Edit]:
    if isinstance(node, ast.If):
        for new in ("True", "False"):
            yield Edit(source.start(node.test), source.end(node.test), new, f"condition becomes {new}")


OPERATORS: tuple[Callable[[_Source, ast.AST], Iterator[Edit]], ...] = (
    _arithmetic,
    _comparison,
    _constant,
    _mask,
    _other,
    _arguments,
    _function,
    _select,
    _cast,
    _condition,
)


def _statement(source: _Source, node: ast.stmt, function: ast.FunctionDef) -> Iterator[Edit]:
    """A call, or the new value of a variable that has one already, is left out."""
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    is_update = isinstance(node, ast.AugAssign)
    if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
        name = node.targets[0].id
        is_update = any(argument.arg == name for argument in _parameters(function)) or any(
            isinstance(other, ast.Name)
            and other.id == name
            and isinstance(other.ctx, ast.Store)
            and other.lineno < node.lineno
            for other in ast.walk(function)
        )
    if is_call or is_update:
        yield Edit(source.start(node), source.end(node), "pass", "statement removed")


def _parameters(function: ast.FunctionDef) -> Iterator[ast.arg]:
    return (node for node in ast.walk(function.args) if isinstance(node, ast.arg))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def record(file: str, text: str, edit: Edit, number: int) -> Mutant:
    """The edit as a record: whole lines, with those above, then below, that make the old text unique."""
    start, end = text.rfind("\n", 0, edit.start) + 1, _line_end(text, edit.end)
    while occurrences(text, text[start:end]) > 1:
        if start > 0:
            start = text.rfind("\n", 0, start - 1) + 1
        else:
            end = _line_end(text, end + 1)
    old = text[start:end]
    new = text[start : edit.start] + edit.text + text[edit.end : end]
    return Mutant(f"g{number:03}", file, old, new, edit.what)


def _line_end(text: str, start: int) -> int:
    """Where the line of a position ends, its newline not counted."""
    end = text.find("\n", start)
    return len(text) if end < 0 else end
