"""Probes in Triton kernels: what no tracer sees once a kernel is compiled, the kernel tells itself.

The syntax tree of every kernel of the measured files is rewritten before Triton compiles it:

- a basic block begins with a store of its flag. Kernels have no exceptions, so a block that began ran whole;
- `if` without `else` gets one, for its flag alone;
- a loop is preceded by one that is set if it has no trip, and by the flag of its body, which is not stored
  again with every trip: it would cost the kernel more than all other flags;
- masks pass through a function that sets a flag if some lane is on, and another if some is off;
- the buffer of flags is a last parameter that no caller knows of, `_mla_flags=None`, handed on to kernels
  that kernels call. Where it is None everything above is left out when the kernel is compiled.

Lines stay what they were. Kernels that are only handed over, to reductions and scans, get no buffer and stay
pure. Flags and not counts: an atomic counter would serialise what runs in parallel.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness.coverage.python_sites import (
    FALSE,
    NO_TRIP,
    OFF,
    ON,
    TRIPS,
    TRUE,
    Loop,
    Place,
    arms_of,
    is_run,
    mask_of,
    unmeasurable,
)
from harness.coverage.sites import Site

FLAGS = "_mla_flags"
"""The hidden parameter."""

CAPACITY = 1 << 16
"""Flags: one a block, loop and state of a mask."""

COPIES = 64
"""Copies of all flags in the buffer, 4 MiB. Thousands of programs that store to one line of memory wait for
one another; with a copy for every 64th of them, they do not."""

OWN_KERNELS = str(Path(__file__).with_name("_probe_kernels.py"))
"""What probes call has none of its own."""

HELPERS = ("hit", "masked", "entered", "tested")
_PREFIX = "_mla_probe_"
RANGES = ("range", "static_range")

Node = TypeVar("Node", bound=ast.AST)


class Probes:
    """The probes of this process. One at a time may be installed."""

    def __init__(self, files: Container[str], device: str, *, with_lanes: bool = True) -> None:
        self.is_on = True
        self._files = files
        self._with_lanes = with_lanes
        self._device = device
        self._sites: list[tuple[str, tuple[Site, ...]]] = []
        self._buffer: Any = None

    def install(self) -> None:
        """Puts probes into every kernel of the files that is decorated from now on, and compiled."""
        import torch
        from triton.runtime.jit import JITFunction

        # Not at the first launch: that may be within the capture of a graph.
        self._buffer = torch.zeros(COPIES, CAPACITY, dtype=torch.uint8, device=self._device)
        init = JITFunction.__init__

        def new_init(kernel: Any, fn: Any, *args: Any, **kwargs: Any) -> None:
            if type(kernel) is not JITFunction or not self._is_measured(fn):
                init(kernel, fn, *args, **kwargs)
                return
            _add_parameter(fn)
            init(kernel, fn, *args, **kwargs)
            self._instrument_compiled(kernel)

        JITFunction.__init__ = new_init

    def install_in_interpreter(self) -> None:
        """As `install`, for kernels interpreted: by which the probes themselves are tested."""
        import torch
        from triton.runtime.interpreter import FunctionRewriter, InterpretedFunction

        self._buffer = torch.zeros(COPIES, CAPACITY, dtype=torch.uint8, device=self._device)
        run, transform_ast = InterpretedFunction.run, FunctionRewriter._transform_ast

        def new_transform_ast(rewriter: Any, src: str) -> ast.Module:
            if not self._is_measured(rewriter.fn):
                tree: ast.Module = transform_ast(rewriter, src)
                return tree
            first = rewriter.def_file_lineno
            module = self._instrumented(rewriter.fn, src, first)
            self._hand_on(module, rewriter.fn)
            rewriter.ast_transformer.visit(module)
            ast.fix_missing_locations(module)
            ast.increment_lineno(module, first - 1)
            return module

        def new_run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            if self.is_on and self._is_measured(kernel.fn):
                kwargs[FLAGS] = self._buffer
            return run(kernel, *args, **kwargs)

        FunctionRewriter._transform_ast = new_transform_ast
        InterpretedFunction.run = new_run

    def take(self) -> dict[str, set[Site]]:
        """The sites hit since the last call, by file. Waits for the device."""
        import torch

        if self._buffer.is_cuda:
            # Kernels may have run on other streams.
            torch.cuda.synchronize()
        found: dict[str, set[Site]] = {}
        for number in self._buffer.any(dim=0).nonzero().flatten().tolist():
            file, sites = self._sites[number]
            found.setdefault(file, set()).update(sites)
        self._buffer.zero_()
        return found

    def _is_measured(self, fn: Any) -> bool:
        file = fn.__code__.co_filename
        return file in self._files and file != OWN_KERNELS

    def _instrument_compiled(self, kernel: Any) -> None:
        begin = len(self._sites)
        module = self._instrumented(kernel.fn, kernel.src, _def_line(kernel))
        ast.fix_missing_locations(module)
        # Triton's cache of compiled kernels goes by the source; which flags are whose is part of it here.
        kernel._unsafe_update_src(f"{kernel.src}\n# flags from {begin}\n")
        finished: list[ast.Module] = []

        def parse() -> ast.Module:
            # Not before: what a kernel calls may be defined behind it.
            if not finished:
                self._hand_on(module, kernel.fn)
                finished.append(module)
            return finished[0]

        run = kernel.run

        def new_run(*args: Any, **kwargs: Any) -> Any:
            if self.is_on:
                kwargs[FLAGS] = self._buffer
            return run(*args, **kwargs)

        kernel.parse, kernel.run = parse, new_run

    def _instrumented(self, fn: Any, src: str, first_line: int) -> ast.Module:
        """The tree of a kernel's source with probes, and those they call among its globals."""
        from harness.coverage import _probe_kernels

        for name in HELPERS:
            fn.__globals__[_PREFIX + name] = getattr(_probe_kernels, name)
        module = ast.parse(src)
        (function,) = module.body
        if not isinstance(function, ast.FunctionDef):
            raise TypeError(f"the source of kernel {fn.__qualname__} is no function")
        file = fn.__code__.co_filename
        place = Place(
            fn.__qualname__.replace(".<locals>", ""),
            is_kernel=True,
            lines=first_line - 1,
            columns=_indentation(fn),
        )
        _Instrumenter(place, lambda *sites: self._number(file, sites), with_lanes=self._with_lanes).kernel(
            function
        )
        return module

    def _number(self, file: str, sites: tuple[Site, ...]) -> int:
        if len(self._sites) >= CAPACITY:
            raise OverflowError(f"the kernels measured have more than {CAPACITY:,} blocks and masks")
        self._sites.append((file, sites))
        return len(self._sites) - 1

    def _hand_on(self, module: ast.Module, fn: Any) -> None:
        """Hands the buffer to every kernel with probes that a kernel calls."""
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and self._has_probes(node.func, fn):
                flags = ast.keyword(FLAGS, ast.Name(FLAGS, ast.Load()))
                node.keywords.append(ast.copy_location(flags, node))
                ast.fix_missing_locations(node)

    def _has_probes(self, function: ast.expr, fn: Any) -> bool:
        found = _resolve(function, fn)
        inner = getattr(found, "fn", None)
        is_kernel = type(found).__name__ in ("JITFunction", "InterpretedFunction")
        return is_kernel and hasattr(inner, "__code__") and self._is_measured(inner)


class _Instrumenter:
    """Puts probes into the tree of one kernel."""

    def __init__(self, place: Place, number: Callable[..., int], *, with_lanes: bool) -> None:
        self._place = place
        self._number = number
        self._with_lanes = with_lanes

    def kernel(self, function: ast.FunctionDef) -> None:
        """The whole of it, in place."""
        arguments = function.args
        arguments.args.append(ast.copy_location(ast.arg(FLAGS), function))
        arguments.defaults.append(ast.copy_location(ast.Constant(None), function))
        function.body = self._suite(function.body)
        ast.fix_missing_locations(function)

    def _suite(self, body: Sequence[ast.stmt], *first: Site) -> list[ast.stmt]:
        """A suite, its basic blocks led by their flags; `first` are sites hit by entering it."""
        result: list[ast.stmt] = []
        block: list[ast.stmt] = []
        sites = list(first)

        def close() -> None:
            if sites:
                where = block[0] if block else body[-1]
                result.append(self._call("hit", where, self._number(*sites)))
            result.extend(block)
            block.clear()
            sites.clear()

        for node in body:
            if is_run(node):
                sites.append(self._place.statement(node))
            may_return = any(isinstance(part, ast.Return) for part in ast.walk(node))
            block += self._statement(node)
            if may_return:
                close()
        close()
        return result

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        """A statement with probes in it, and what must stand before it."""
        if not isinstance(node, ast.If | Loop):
            return [self._with_masks(node)]
        labels = () if unmeasurable(node) else arms_of(node, in_kernel=True)
        arms = {label: self._place.arm(node, label) for label in labels}
        inside, outside = arms.get(TRUE) or arms.get(TRIPS), arms.get(FALSE)
        # Copied before masks are led through probes: what is evaluated twice has none, and no effect.
        bounds = _bounds(node) if NO_TRIP in arms else None
        test = copy.deepcopy(node.test) if NO_TRIP in arms and isinstance(node, ast.While) else None
        if isinstance(node, ast.For | ast.AsyncFor):
            node.iter = self._with_masks(node.iter)
        else:
            node.test = self._with_masks(node.test)
        node.body = self._suite(node.body, *([inside] if inside else []))
        if node.orelse:
            node.orelse = self._suite(node.orelse, *([outside] if outside else []))
        elif outside:
            node.orelse = [self._call("hit", node, self._number(outside))]
        before = []
        if bounds is not None:
            # The body's first block runs if there is a trip.
            numbers = self._number(arms[NO_TRIP]), _taken_flag(node.body)
            before = [self._call("entered", node, *numbers, *bounds)]
        elif test is not None:
            before = [self._call("tested", node, self._number(arms[NO_TRIP]), test)]
        return [*before, node]

    def _with_masks(self, node: Node) -> Node:
        """Every mask of a tree led through the function that looks at it."""
        if not self._with_lanes:
            return node
        for part in ast.walk(node):
            if not isinstance(part, ast.Call) or self._is_probe(part):
                continue
            mask = mask_of(part)
            if mask is not None:
                numbers = [self._number(self._place.lane(part, label)) for label in (ON, OFF)]
                probe = self._expression("masked", mask, *numbers, mask)
                part.args = [probe if item is mask else item for item in part.args]
                for keyword in part.keywords:
                    keyword.value = probe if keyword.value is mask else keyword.value
        return node

    @staticmethod
    def _is_probe(node: ast.Call) -> bool:
        return isinstance(node.func, ast.Name) and node.func.id.startswith(_PREFIX)

    def _call(self, helper: str, where: ast.stmt, *values: int | ast.expr) -> ast.stmt:
        return ast.copy_location(ast.Expr(self._expression(helper, where, *values)), where)

    def _expression(self, helper: str, where: ast.stmt | ast.expr, *values: int | ast.expr) -> ast.expr:
        arguments = [ast.Constant(value) if isinstance(value, int) else value for value in values]
        call = ast.Call(ast.Name(_PREFIX + helper, ast.Load()), [ast.Name(FLAGS, ast.Load()), *arguments], [])
        return _located(call, where)


def _bounds(node: ast.stmt) -> tuple[ast.expr, ast.expr, ast.expr] | None:
    """Start, stop and step of a loop over a range, copied; None of any other."""
    if not isinstance(node, ast.For) or not isinstance(node.iter, ast.Call):
        return None
    function, values = node.iter.func, [copy.deepcopy(value) for value in node.iter.args]
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name not in RANGES or not 1 <= len(values) <= 3:
        return None
    start = values[0] if len(values) > 1 else ast.Constant(0)
    stop = values[1] if len(values) > 1 else values[0]
    step = values[2] if len(values) == 3 else ast.Constant(1)
    return start, stop, step


def _taken_flag(body: list[ast.stmt]) -> int:
    """The number of the flag that a suite with probes begins by storing, which it does no more."""
    match body[0]:
        case ast.Expr(ast.Call(args=[_, ast.Constant(int(number)), *_])):
            del body[0]
            return number
    raise AssertionError("a suite with probes begins with a flag")


def _located(node: ast.Call, where: ast.stmt | ast.expr) -> ast.Call:
    """A new call, on one line: a block that begins with it must not seem to begin elsewhere."""
    for part in _new_parts(node):
        part.lineno = part.end_lineno = where.lineno  # type: ignore[attr-defined]
        part.col_offset = part.end_col_offset = where.col_offset  # type: ignore[attr-defined]
    return node


def _new_parts(node: ast.AST) -> Iterable[ast.AST]:
    """The nodes that have no place yet."""
    for part in ast.walk(node):
        if isinstance(part, ast.expr) and not hasattr(part, "lineno"):
            yield part


def _add_parameter(fn: Any) -> None:
    """Makes a function's signature say that it has the hidden parameter."""
    signature = inspect.signature(fn)
    hidden = inspect.Parameter(FLAGS, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    fn.__signature__ = signature.replace(parameters=[*signature.parameters.values(), hidden])


def _def_line(kernel: Any) -> int:
    """The line of a kernel's `def`, from 1."""
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(n for n, line in enumerate(lines) if line.lstrip().startswith("def "))


def _indentation(fn: Any) -> int:
    """By how many columns Triton moves a kernel's source to the left."""
    first = inspect.getsourcelines(fn)[0][0]
    return len(first) - len(first.lstrip())


def _resolve(function: ast.expr, fn: Any) -> Any:
    """What the name of a called function stands for where a kernel is defined, or None."""
    if isinstance(function, ast.Attribute):
        return getattr(_resolve(function.value, fn), function.attr, None)
    if not isinstance(function, ast.Name):
        return None
    names = fn.__code__.co_freevars
    if function.id in names:
        return fn.__closure__[names.index(function.id)].cell_contents
    return fn.__globals__.get(function.id)
