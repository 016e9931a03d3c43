"""What lines cannot tell of an interpreted kernel: the lanes of its masks, and loops without a trip.

Both are noted while the kernel runs. A mask is that of the call on its line and column; a loop is wrapped by
the transformer by which Triton's interpreter rewrites kernels.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterator
from functools import wraps
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import numpy.typing as npt

from harness.accesses import OURS, kernel_frame, watch
from harness.coverage.python_sites import NO_TRIP, OFF, ON, PythonFile
from harness.coverage.sites import Site, SiteKind

_BOTH = 3
_ON, _OFF = 1, 2

_MASKS: dict[tuple[CodeType, int], int] = {}
"""By code and instruction: which states were seen since the last `take`."""

_EMPTY_LOOPS: set[tuple[str, int]] = set()
"""File and line of loops that were entered with nothing to do since then."""

CALLS_TRACED = 100
"""Calls of each of the harness's own functions in the interpreter that are traced between two `take`: they
are called for every operation of a kernel, and tracing all of them would double what measuring costs."""

_CALLS: Counter[Any] = Counter()

_TRIPS, _WHILE = "_mla_trips", "_mla_while"


class _Installed:
    """Whether this process notes anything yet."""

    done = False


def install(files: Container[str]) -> None:
    """Notes lanes and loops of every kernel rewritten from now on. Idempotent.

    Args:
        files: those that are measured.
    """
    from triton.runtime import interpreter

    if _Installed.done:
        return
    _Installed.done = True
    OURS.add(__file__)
    watch(_note_mask)
    # What of the module is ours stands within what is not traced, so it comes first.
    _trace_ours(interpreter, files)
    _skip_the_library()
    for owner in (interpreter.InterpreterBuilder, interpreter.ReduceOps):
        _trace_ours(owner, files)
    interpreter.FunctionRewriter.ast_transformer = _transformer()
    # The interpreter hands its own globals to every kernel.
    interpreter._mla_trips, interpreter._mla_while = _trips, _while


def _skip_the_library() -> None:
    """Does not trace what Triton's interpreter does itself, most of the time that interpreting takes."""
    from triton.runtime import interpreter

    patch_attr = interpreter._patch_attr

    def new_patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        patch_attr(obj, name, _untraced(member), builder, scope)

    interpreter._patch_attr = new_patch_attr
    interpreter._patch_lang = _untraced(interpreter._patch_lang)
    interpreter._implicit_cvt = _untraced(interpreter._implicit_cvt)


def _trace_ours(owner: Any, files: Container[str]) -> None:
    """Traces those of the library's functions that the harness has put in the place of others."""
    for name, member in list(vars(owner).items()):
        if isinstance(member, FunctionType) and member.__code__.co_filename in files:
            setattr(owner, name, _traced(member))


class _Tracer:
    """The trace function that is set aside while the library runs."""

    current: Any = None


def _untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = sys.gettrace()
        if tracer is None:
            return function(*args, **kwargs)
        _Tracer.current = tracer
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    return call


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_traced = sys.gettrace() is not None
        if is_traced or _Tracer.current is None or _CALLS[function] >= CALLS_TRACED:
            return function(*args, **kwargs)
        _CALLS[function] += 1
        sys.settrace(_Tracer.current)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(None)

    return call


def take(source: Callable[[str], PythonFile | None]) -> dict[str, set[Site]]:
    """What was noted since the last call, as sites by file.

    Args:
        source: file -> what its text says, or None if nothing of it is wanted.
    """
    masks, loops = dict(_MASKS), set(_EMPTY_LOOPS)
    _MASKS.clear()
    _EMPTY_LOOPS.clear()
    _CALLS.clear()
    found: dict[str, set[Site]] = {}
    for (code, instruction), seen in masks.items():
        file = source(code.co_filename)
        if file is not None:
            position = list(code.co_positions())[instruction // 2]
            labels = [label for bit, label in ((_ON, ON), (_OFF, OFF)) if seen & bit]
            found.setdefault(code.co_filename, set()).update(_lanes_at(file, position, labels))
    for name, line in loops:
        file = source(name)
        if file is not None:
            empty = (site for site in file.sites if site.label == NO_TRIP and site.first == line)
            found.setdefault(name, set()).update(empty)
    return found


def _lanes_at(file: PythonFile, position: tuple[int | None, ...], labels: list[str]) -> Iterator[Site]:
    """The lanes of the call at a position, whose column counts from the indentation of its kernel."""
    line, _, column, _ = position
    for site in file.sites:
        if site.kind is SiteKind.LANE and site.first == line and site.label in labels:
            indentation = file.kernels[site.function].col_offset
            if column is not None and site.column == column + indentation:
                yield site


def _note_mask(what: str, pointers: Any, mask: npt.NDArray[np.bool_]) -> None:
    frame = kernel_frame()
    if frame is None:
        return
    key = (frame.f_code, frame.f_lasti)
    seen = _MASKS.get(key, 0)
    if seen != _BOTH:
        _MASKS[key] = seen | (_ON if mask.any() else 0) | (0 if mask.all() else _OFF)


def _trips(iterable: Any) -> Any:
    """What a loop goes through, noted if it is empty."""
    if hasattr(iterable, "__len__") and len(iterable) == 0:
        _note_empty(sys._getframe(1))
    return iterable


def _while(entered: list[bool], test: Any) -> Any:
    """The condition of a loop, noted if it is false at once. `entered` is empty on entry."""
    if not entered and not test:
        _note_empty(sys._getframe(1))
    entered.append(True)
    return test


def _note_empty(frame: Any) -> None:
    _EMPTY_LOOPS.add((frame.f_code.co_filename, frame.f_lineno))


def _transformer() -> Any:
    from triton.runtime import interpreter

    class Transformer(interpreter.ASTTransformer):  # type: ignore[misc]
        """Triton's own, and loops that say when they are empty."""

        def visit_For(self, node: ast.For) -> ast.AST:  # noqa: N802 as ast names it
            self.generic_visit(node)
            node.iter = _on_line(node, _call(_TRIPS, node.iter))
            return node

        def visit_While(self, node: ast.While) -> list[ast.stmt]:  # noqa: N802 as ast names it
            self.generic_visit(node)
            name = f"_mla_entered_{node.lineno}_{node.col_offset}"
            target = ast.Name(name, ast.Store())
            begin = _on_line(node, ast.Assign([target], ast.List([], ast.Load())))
            node.test = _on_line(node, _call(_WHILE, ast.Name(name, ast.Load()), node.test))
            return [begin, node]

    return Transformer()


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(args), [])


def _on_line(loop: ast.For | ast.While, node: Any) -> Any:
    """A new node, and what is new in it, on the first line of its loop."""
    for part in ast.walk(node):
        if not hasattr(part, "lineno") and isinstance(part, ast.expr | ast.stmt):
            part.lineno = part.end_lineno = loop.lineno
            part.col_offset = part.end_col_offset = loop.col_offset
    return node
