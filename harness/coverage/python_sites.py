"""Which sites a Python file has, from its syntax tree: its statements, arms and, in Triton kernels, lanes.

Statements are those that the interpreter runs, a compound one by its header; no docstrings, decorators,
signatures, imports for the type checker alone. Arms are the outcomes of `if`, `while` and `for`:

| statement   | in host code       | in a kernel       |
|-------------|--------------------|-------------------|
| if          | true, false        | true, false       |
| for         | trips, ends        | trips, no trip    |
| while       | trips, ends        | trips, no trip    |

A kernel's loop always ends, but whether it was ever entered with nothing to do is worth knowing. Lanes are
the states of masks: of `mask=` in loads, stores and atomics, and of the condition of `where`. In kernels
ternaries, `and`, `or` and bodies on the line of their condition have arms that nothing can measure: each
becomes an arm that says so and is never hit, so that none is passed over in silence.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness.coverage.sites import FileCoverage, Hits, Site, SiteKind, digest_of

MASKED = {
    "load": 1,
    "store": 2,
    "atomic_add": 2,
    "atomic_and": 2,
    "atomic_max": 2,
    "atomic_min": 2,
    "atomic_or": 2,
    "atomic_xchg": 2,
    "atomic_xor": 2,
}
"""Operations that take a mask, and the position of their `mask=`."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Loop = ast.For | ast.AsyncFor | ast.While

TRUE, FALSE, TRIPS, NO_TRIP, ENDS = "true", "false", "trips", "no trip", "ends"
ON, OFF = "on", "off"


@dataclass(frozen=True)
class Place:
    """Where a tree lies in its file, and in which function: what a tree of a part alone does not know."""

    function: str = ""
    is_kernel: bool = False
    lines: int = 0
    columns: int = 0

    def statement(self, node: ast.stmt) -> Site:
        """The site of a statement."""
        return Site(*self._lines(node), SiteKind.STATEMENT, "", node.col_offset + self.columns, self.function)

    def arm(self, node: ast.stmt | ast.expr, label: str) -> Site:
        """The site of one outcome of a statement, or of what cannot be measured."""
        return Site(*self._lines(node), SiteKind.ARM, label, node.col_offset + self.columns, self.function)

    def lane(self, node: ast.Call, label: str) -> Site:
        """The site of one state of a call's mask."""
        return Site(*self._lines(node), SiteKind.LANE, label, node.col_offset + self.columns, self.function)

    def _lines(self, node: ast.stmt | ast.expr) -> tuple[int, int]:
        return node.lineno + self.lines, _header_end(node) + self.lines


@dataclass
class PythonFile:
    """What a file's text says of it.

    Attributes:
        kernels: the Triton kernels, by qualified name.
        branches: every statement that has arms, with where it lies.
        straight: statements that run whenever the module is imported at all.
    """

    text: str
    sites: list[Site] = field(default_factory=list)
    kernels: dict[str, Function] = field(default_factory=dict)
    branches: list[tuple[ast.If | Loop, Place]] = field(default_factory=list)
    straight: list[Site] = field(default_factory=list)

    @property
    def language(self) -> str:
        """`triton` if it has a kernel, else `python`."""
        return "triton" if self.kernels else "python"

    def coverage(self, file: str, unmeasured: str = "") -> FileCoverage:
        """Its coverage before anything was hit."""
        sites = {site: Hits() for site in sorted(self.sites)}
        return FileCoverage(file, self.language, digest_of(self.text), sites, unmeasured)


def python_file(text: str) -> PythonFile:
    """The sites of a Python text.

    Raises:
        SyntaxError, ValueError: it is none.
    """
    found = PythonFile(text)
    tree = ast.parse(text)
    _Walk(found, _names_of_jit(tree)).suite(tree.body, Place(), is_straight=True)
    return found


def is_kernel(function: Function, jit: frozenset[str] = frozenset({"triton.jit"})) -> bool:
    """Whether Triton's decorator, called or not, by one of its names, decorates it."""
    names = {_dotted(item.func if isinstance(item, ast.Call) else item) for item in function.decorator_list}
    return bool(names & jit)


def _names_of_jit(tree: ast.Module) -> frozenset[str]:
    """The names by which a module knows Triton's decorator."""
    names = {"triton.jit"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {f"{item.asname}.jit" for item in node.names if item.name == "triton" and item.asname}
        elif isinstance(node, ast.ImportFrom) and node.module in ("triton", "triton.runtime.jit"):
            names |= {item.asname or item.name for item in node.names if item.name == "jit"}
    return frozenset(names)


def mask_of(call: ast.Call) -> ast.expr | None:
    """The mask of a load, store or atomic, or the condition of a `where`; None for any other call."""
    name = _dotted(call.func).rpartition(".")[2]
    if name == "where" and len(call.args) == 3:
        return call.args[0]
    if name not in MASKED:
        return None
    given = [item.value for item in call.keywords if item.arg == "mask"] or call.args[MASKED[name] :][:1]
    is_none = bool(given) and isinstance(given[0], ast.Constant) and given[0].value is None
    return given[0] if given and not is_none else None


def unmeasurable(node: ast.AST) -> str:
    """Why the arms of a part of a kernel cannot be measured; empty if they can, or if it has none."""
    if isinstance(node, ast.IfExp):
        return "not measurable: a ternary"
    if isinstance(node, ast.BoolOp):
        return f"not measurable: {'and' if isinstance(node.op, ast.And) else 'or'}"
    if isinstance(node, ast.If | Loop) and node.body[0].lineno <= _header_end(node):
        return "not measurable: its body is on the same line"
    return ""


def is_constant(test: ast.expr) -> bool:
    """Whether a condition has one outcome only: a literal, or what only a type checker believes."""
    return isinstance(test, ast.Constant) or _dotted(test).rpartition(".")[2] == "TYPE_CHECKING"


def arms_of(node: ast.If | Loop, *, in_kernel: bool) -> tuple[str, ...]:
    """The outcomes that a condition or loop can have."""
    if isinstance(node, ast.If):
        return () if is_constant(node.test) else (TRUE, FALSE)
    if not in_kernel:
        return () if isinstance(node, ast.While) and is_constant(node.test) else (TRIPS, ENDS)
    return (TRIPS,) if _always_trips(node) else (TRIPS, NO_TRIP)


def own_expressions(node: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement itself, not those of the statements within it."""
    waiting: list[ast.AST] = [
        child for child in ast.iter_child_nodes(node) if not isinstance(child, _OWN_STATEMENTS)
    ]
    while waiting:
        item = waiting.pop(0)
        yield item
        waiting += [child for child in ast.iter_child_nodes(item) if not isinstance(child, _OWN_STATEMENTS)]


_OWN_STATEMENTS = (ast.stmt, ast.ExceptHandler, ast.match_case)


def is_run(node: ast.stmt) -> bool:
    """Whether a statement is one that the interpreter runs and that is worth counting."""
    if isinstance(node, Function | ast.ClassDef | ast.Global | ast.Nonlocal | ast.Try | ast.TryStar):
        return False
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    # A string or `...` on its own is compiled to nothing.
    return not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


class _Walk:
    """Goes through a module, suite by suite."""

    def __init__(self, found: PythonFile, jit: frozenset[str]) -> None:
        self._found = found
        self._jit = jit

    def suite(self, body: Sequence[ast.stmt], place: Place, *, is_straight: bool = False) -> None:
        """One suite; `is_straight` if nothing but an exception can keep it from running."""
        for node in body:
            if is_run(node):
                site = place.statement(node)
                self._found.sites.append(site)
                if is_straight:
                    self._found.straight.append(site)
            if place.is_kernel:
                self._parts_of_a_kernel(node, place)
            self._within(node, place, is_straight=is_straight)
            # What stands behind an unconditional end does not run.
            is_straight = is_straight and not isinstance(node, ast.Raise)

    def _within(self, node: ast.stmt, place: Place, *, is_straight: bool) -> None:
        if isinstance(node, Function | ast.ClassDef):
            name = f"{place.function}.{node.name}" if place.function else node.name
            is_class = isinstance(node, ast.ClassDef)
            in_kernel = place.is_kernel or (isinstance(node, Function) and is_kernel(node, self._jit))
            if isinstance(node, Function) and in_kernel:
                self._found.kernels[name] = node
            inner = Place(name, in_kernel)
            self.suite(node.body, inner, is_straight=is_straight and is_class)
            return
        if isinstance(node, ast.If | Loop):
            self._branch(node, place)
            is_skipped = isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING")
            self.suite([] if is_skipped else node.body, place)
            self.suite(node.orelse, place)
        elif isinstance(node, ast.With | ast.AsyncWith):
            self.suite(node.body, place, is_straight=is_straight)
        elif isinstance(node, ast.Try | ast.TryStar):
            for body in (node.body, *(item.body for item in node.handlers), node.orelse, node.finalbody):
                self.suite(body, place)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                self.suite(case.body, place)

    def _branch(self, node: ast.If | Loop, place: Place) -> None:
        labels = arms_of(node, in_kernel=place.is_kernel)
        # No tool tells the outcomes of a branch apart whose body is on its own line.
        if labels and not unmeasurable(node):
            self._found.sites += [place.arm(node, label) for label in labels]
            self._found.branches.append((node, place))

    def _parts_of_a_kernel(self, node: ast.stmt, place: Place) -> None:
        if isinstance(node, ast.If | Loop) and unmeasurable(node):
            self._found.sites.append(place.arm(node, unmeasurable(node)))
        for part in own_expressions(node):
            if isinstance(part, ast.expr) and unmeasurable(part):
                self._found.sites.append(place.arm(part, unmeasurable(part)))
            if isinstance(part, ast.Call) and mask_of(part) is not None:
                self._found.sites += [place.lane(part, label) for label in (ON, OFF)]


def _always_trips(node: Loop) -> bool:
    """Whether a loop's range is of literals and not empty."""
    if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call):
        return False
    values = [item.value for item in node.iter.args if isinstance(item, ast.Constant)]
    is_literal = len(values) == len(node.iter.args) and all(isinstance(value, int) for value in values)
    return is_literal and 1 <= len(values) <= 3 and len(range(*values)) > 0  # type: ignore[arg-type]


def _header_end(node: ast.stmt | ast.expr) -> int:
    """The last line of a statement without the statements in it."""
    if isinstance(node, ast.If | ast.While):
        return node.test.end_lineno or node.lineno
    if isinstance(node, ast.For | ast.AsyncFor):
        return node.iter.end_lineno or node.lineno
    if isinstance(node, ast.With | ast.AsyncWith):
        last = node.items[-1]
        return (last.optional_vars or last.context_expr).end_lineno or node.lineno
    if isinstance(node, ast.Match):
        return node.subject.end_lineno or node.lineno
    return node.end_lineno or node.lineno


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of such an expression, else empty."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
