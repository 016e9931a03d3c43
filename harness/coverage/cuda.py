"""Probes in CUDA sources, for the host and for nvcc alike: the text is rewritten, its lines stay the same.

Every kernel begins with `MLA_COV_KERNEL`, every basic block of every function with `MLA_COV(n)`, and the
conditions of `if`, loops, `?:` and both sides of `&&` and `||` become `MLA_COV_ARM(n, condition)`. What flag
n means is a tuple of sites. Braces are added where a body has none, on its own lines; a `#line` keeps the
compiler's line numbers.

| statement          | arms                             |
|--------------------|----------------------------------|
| if, ?:, and, or    | true, false                      |
| for, while, do     | trips, ends: each thread's own   |

A function that does not parse, or is constexpr and so must not have effects, gets no probe and is one
statement that says so and is never hit: none is passed over in silence. Macros are not looked into.

Headers with device functions are sources too: each source that is built has its own copy of them with probes,
and of those that its compiler did not read nothing is known.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from harness.coverage.python_sites import ENDS, FALSE, TRIPS, TRUE
from harness.coverage.sites import FileCoverage, Hits, Site, SiteKind, digest_of, text_of

HEADER = Path(__file__).with_name("mla_cov.h")
"""What an instrumented source includes."""

SUFFIXES = frozenset({".cu", ".cuh"})
HEADER_SUFFIXES = frozenset({".h", ".hpp"})
ON_DEVICE = re.compile(r"^(?!\s*(?:#|//)).*\b__(?:device|global)__\b.*\(", re.MULTILINE)
"""A line that begins a function of the device."""

IN_MEMORY = "-DMLA_COV_IN_MEMORY"
"""Builds probes that store every flag at once, where nvcc calls device functions rather than inline them."""
NOT_INLINED = re.compile(r"\bmla_cov_\d+\b")
"""What the compiler then says it does not know: a register of flags, by its name in PTX."""

NOT_INSTALLED = "reading CUDA needs tree-sitter: pip install 'mla-harness[coverage]'"

ILLEGIBLE = re.compile(rb"\b(?:MLA_WHERE|MLA_PASS)\b|\b__align__\s*\([^()]*\)")
"""What the grammar cannot read: macros that bring their own comma in a list, and CUDA's alignment."""

LEAVING = frozenset(
    {
        "return_statement",
        "break_statement",
        "continue_statement",
        "goto_statement",
        "throw_statement",
        "co_return_statement",
        "labeled_statement",
        "case_statement",
    }
)
"""Behind a statement with one of these in it, other code may run than before it."""

LOOPS = frozenset({"for_statement", "for_range_loop", "while_statement", "do_statement"})
CONDITIONAL_TEXT = frozenset(
    {"preproc_if", "preproc_ifdef", "preproc_else", "preproc_elif", "preproc_elifdef"}
)
SIMPLE = frozenset(
    {
        "expression_statement",
        "return_statement",
        "break_statement",
        "continue_statement",
        "goto_statement",
        "throw_statement",
        "declaration",
    }
)
UNEVALUATED = frozenset(
    {
        "template_argument_list",
        "sizeof_expression",
        "alignof_expression",
        "decltype",
        "noexcept",
        "requires_expression",
        "type_descriptor",
        "array_declarator",
        "static_assert_declaration",
    }
)
"""Nodes in which nothing runs."""


@dataclass
class CudaText:
    """An instrumented source.

    Attributes:
        text: what to compile; it includes `mla_cov.h`.
        flags: what each flag means, from the first on.
        sites: all of them, those without a flag too.
    """

    text: str
    flags: list[tuple[Site, ...]] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)


class CudaProbes:
    """The probes of a process that builds CUDA sources: instruments, and reads what libraries flagged.

    A builder asks `prepare` for the text to compile and the arguments to compile it with, and calls
    `loaded` with the library that came of it.
    """

    def __init__(self, files: Container[str]) -> None:
        self._files = files
        self._flags: dict[Path, list[tuple[str, tuple[Site, ...]]]] = {}
        self._copies: dict[Path, dict[str, Path]] = {}
        self._libraries: list[tuple[Path, _Library]] = []
        self._built: set[str] = set()

    def prepare(self, source: Path, include: Path, folder: Path) -> tuple[Path, list[str]]:
        """Writes a source, and those headers of a folder that are measured, with probes.

        Args:
            include: the folder by which the source names headers.
            folder: where to write, in a folder named by the hash of what is written, to be kept.

        Returns:
            what to compile, and the arguments that must come before those of other folders.
        """
        flags: list[tuple[str, tuple[Site, ...]]] = []
        texts: dict[Path, str] = {}
        for file in (*sorted(include.rglob("*")), source):
            if str(file) in self._files or file == source:
                found = instrument(text_of(file), str(file), len(flags))
                flags += [(str(file), sites) for sites in found.flags]
                texts[file] = found.text
        whole = digest_of("\0".join([HEADER.read_text(encoding="utf-8"), *texts.values()]))
        own = folder.resolve() / whole / "include"
        copies = {file: own / file.relative_to(include) for file in texts if file != source}
        copies[source] = own.parent / source.name
        for file, text in texts.items():
            _write(copies[file], text)
        self._flags[source] = flags
        self._copies[source] = {str(file): copy for file, copy in copies.items()}
        folders = [own, HEADER.parent, source.parent]
        return copies[source], [f"-DMLA_COV_FLAGS={len(flags)}", *(f"-I{item}" for item in folders)]

    def loaded(self, source: Path, library: Path, *, on_device: bool = False) -> None:
        """Reads the flags of a library from now on; the compute device's too where it has any.

        Beside the library lies what its compiler read, as make reads it (`library.d`).
        """
        # Where a path has a blank, make wants it escaped.
        read = library.with_suffix(".d").read_text(encoding="utf-8").replace("\\ ", " ")
        self._built.update(file for file, copy in self._copies[source].items() if str(copy) in read)
        self._libraries.append((source, _Library(library, len(self._flags[source]), on_device=on_device)))

    def take(self) -> dict[str, set[Site]]:
        """The sites hit since the last call, by file, none of a file just built too. Waits for the device."""
        found: dict[str, set[Site]] = {file: set() for file in self._built}
        self._built.clear()
        for source, library in self._libraries:
            for (file, sites), flag in zip(self._flags[source], library.take(), strict=True):
                if flag:
                    found.setdefault(file, set()).update(sites)
        return found


def _write(target: Path, text: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another process may be compiling it.
    part = target.with_name(f"{target.name}.{os.getpid()}")
    part.write_bytes(text.encode("utf-8", "surrogateescape"))
    part.replace(target)


class _Library:
    """The flags of a library that is loaded, or loaded here."""

    def __init__(self, library: Path, count: int, *, on_device: bool) -> None:
        self._count = count
        self._handle = ctypes.CDLL(str(library))
        self._handle.mla_cov_flags.restype = ctypes.c_void_p
        self._device: Any = None
        if on_device:
            import torch

            self._device = torch.zeros(self._handle.mla_cov_words(), dtype=torch.int32, device="cuda")
            error = self._handle.mla_cov_set_device(ctypes.c_void_p(self._device.data_ptr()))
            if error:
                raise RuntimeError(f"{library.name} took no flags on the device: CUDA error {error}")

    def take(self) -> bytes:
        """Its flags, which are cleared."""
        address = self._handle.mla_cov_flags()
        flags = ctypes.string_at(address, self._count)
        ctypes.memset(address, 0, self._count)
        if self._device is not None:
            words = [word & 0xFFFFFFFF for word in self._device.cpu().tolist()]
            self._device.zero_()
            flags = bytes(flag | words[n // 32] >> n % 32 & 1 for n, flag in enumerate(flags))
        return flags


def is_cuda(name: str, text: str) -> bool:
    """Whether a file is measured as CUDA: by its name, a header by whether it has functions of the device."""
    suffix = Path(name).suffix.lower()
    return suffix in SUFFIXES or (suffix in HEADER_SUFFIXES and bool(ON_DEVICE.search(text)))


def cuda_coverage(file: Path) -> FileCoverage:
    """A source's coverage before anything was hit."""
    text = text_of(file)
    try:
        sites = {site: Hits() for site in sorted(set(instrument(text, str(file)).sites))}
    except ImportError:
        return FileCoverage(str(file), "cuda", digest_of(text), {}, NOT_INSTALLED)
    return FileCoverage(str(file), "cuda", digest_of(text), sites)


def instrument(text: str, file: str, first: int = 0) -> CudaText:
    """A source with probes.

    Args:
        file: the name by which the compiler is to call it.
        first: the number of its first flag.

    Raises:
        ImportError: tree-sitter or its grammar is not installed.
    """
    source = text.encode("utf-8", "surrogateescape")
    tree = _parser().parse(_legible(source))
    work = _Instrumenter(first)
    work.outside(tree.root_node)
    work.found.sites = sorted({*work.found.sites, *(site for flag in work.found.flags for site in flag)})
    quoted = file.replace("\\", "\\\\").replace('"', '\\"')
    # One copy of the header on one line, and the source's own first line is line 1 again.
    head = f'#include "{HEADER.name}"\n#line 1 "{quoted}"\n'
    work.found.text = head + work.applied(source).decode("utf-8", "surrogateescape")
    return work.found


def _legible(source: bytes) -> bytes:
    """What the grammar is to read, of the same length."""
    return ILLEGIBLE.sub(lambda found: b" " * len(found[0]), source)


@cache
def _parser() -> Any:
    import tree_sitter
    import tree_sitter_cuda

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_cuda.language()))


class _Instrumenter:
    """Collects sites and insertions; `node` is tree-sitter's everywhere."""

    def __init__(self, first: int) -> None:
        self.found = CudaText("")
        self._first = first
        self._function = ""
        self._insertions: list[tuple[int, int, str]] = []

    def applied(self, source: bytes) -> bytes:
        """The source with the insertions; where several meet, what ends comes before what begins."""
        parts, last = [], 0
        for position, _, text in sorted(self._insertions, key=lambda item: item[:2]):
            parts += [source[last:position], text.encode()]
            last = position
        return b"".join([*parts, source[last:]])

    def outside(self, node: Any) -> None:
        """Goes through what is no function, and instruments every function in it."""
        for child in node.children:
            if child.type == "function_definition":
                self._function_definition(child)
            elif child.type == "ERROR" and b"{" in child.text:
                self._unmeasurable(child, "", "it does not parse")
            else:
                self.outside(child)

    def _function_definition(self, node: Any) -> None:
        body = node.child_by_field_name("body")
        name = _name_of(node)
        if body is None or body.type != "compound_statement":
            return
        words = {child.text for child in node.children if child.type == "type_qualifier"}
        if node.has_error:
            self._unmeasurable(node, name, "it does not parse")
        elif words & {b"constexpr", b"consteval"}:
            self._unmeasurable(node, name, "it is constexpr")
        else:
            outer, self._function = self._function, name
            if any(child.type == "__global__" for child in node.children):
                self._open(body.children[0].end_byte, " MLA_COV_KERNEL;")
            self._compound(body)
            self._function = outer

    def _unmeasurable(self, node: Any, name: str, why: str) -> None:
        label = f"not measurable: {why}"
        self.found.sites.append(
            Site(
                node.start_point[0] + 1,
                _last_line(node),
                SiteKind.STATEMENT,
                label,
                node.start_point[1],
                name,
            )
        )

    # --- statements ---------------------------------------------------------------------------

    def _compound(self, node: Any, *first: Site) -> None:
        """A block in braces; `first` are sites hit by entering it."""
        self._suite(node.named_children, node.children[0].end_byte, first)

    def _body(self, node: Any, *first: Site) -> None:
        """The body of a condition or loop, in braces if it has none."""
        if node.type == "compound_statement":
            self._compound(node, *first)
            return
        self._open(node.start_byte, "{")
        self._suite([node], node.start_byte, first)
        self._close(node.end_byte, "}")

    def _suite(self, nodes: Iterable[Any], begin: int | None, first: Iterable[Site] = ()) -> None:
        """Statements one after the other.

        Args:
            begin: where the first block's probe goes; None: right before the first statement.
            first: sites hit by entering.
        """
        block = _Block(begin, list(first))
        for node, is_after_pragma in _statements(nodes):
            if node.type in CONDITIONAL_TEXT:
                # Nothing can stand behind #endif on its line: what follows begins at itself.
                self._finish(block, None)
                self._conditional_text(node)
            elif node.type == "labeled_statement":
                self._finish(block, node.end_byte)
                self._suite(node.named_children[1:], _colon(node))
            else:
                self._one(block, node, is_after_pragma=is_after_pragma)
        self._finish(block, None)

    def _one(self, block: _Block, node: Any, *, is_after_pragma: bool) -> None:
        """One statement of a block, which ends behind it if control may."""
        if block.begin is None and not is_after_pragma:
            block.begin = node.start_byte
        site = self._site_of(node)
        if site is not None and block.begin is None:
            # A probe between a pragma and its loop would take the loop's place.
            self._unmeasurable(node, self._function, "it follows #endif and #pragma")
        elif site is not None:
            block.sites.append(site)
        # The block's probe stands before whatever the statement begins with.
        place = len(self._insertions)
        self._statement(node)
        inner, self._insertions = self._insertions[place:], self._insertions[:place]
        if _may_leave(node):
            self._finish(block, node.end_byte)
        self._insertions += inner

    def _finish(self, block: _Block, end: int | None) -> None:
        """Puts a block's probe where it begins; another begins at `end`."""
        if block.sites and block.begin is not None:
            self._open(block.begin, f" MLA_COV({self._number(*block.sites)});")
        block.begin, block.sites = end, []

    def _statement(self, node: Any) -> None:
        match node.type:
            case "compound_statement":
                self._compound(node)
            case "if_statement":
                self._if(node)
            case loop if loop in LOOPS:
                self._loop(node)
            case "switch_statement":
                self._switch(node)
            case "try_statement":
                self._try(node)
            case "declaration" if not _is_constant(node):
                self._expression(node)
            case "expression_statement" | "return_statement" | "throw_statement":
                self._expression(node)
            case "class_specifier" | "struct_specifier":
                self.outside(node)

    def _if(self, node: Any) -> None:
        condition = node.child_by_field_name("condition")
        value = condition.child_by_field_name("value")
        arms = {label: self._arm(node, label, _last_line(condition)) for label in (TRUE, FALSE)}
        is_static = any(child.type == "constexpr" for child in node.children)
        alternative = node.child_by_field_name("alternative")
        inside: tuple[Site, ...] = ()
        outside: tuple[Site, ...] = ()
        if is_static or value.type == "declaration":
            # Which arm it is shows by where it leads to: the condition itself cannot be wrapped.
            inside, outside = (arms[TRUE],), (arms[FALSE],)
        elif not _is_literal(value):
            self._wrap(value, arms[TRUE], arms[FALSE])
            self._expression(value)
        consequence = node.child_by_field_name("consequence")
        self._body(consequence, *inside)
        if alternative is not None:
            self._body(alternative.named_children[-1], *outside)
        elif outside:
            self._close(consequence.end_byte, f" else {{ MLA_COV({self._number(*outside)}); }}")

    def _loop(self, node: Any) -> None:
        body = node.child_by_field_name("body")
        condition = node.child_by_field_name("condition")
        if condition is not None and condition.type in ("condition_clause", "parenthesized_expression"):
            condition = condition.child_by_field_name("value") or condition.named_children[0]
        for name in ("initializer", "update", "right"):
            if (part := node.child_by_field_name(name)) is not None:
                self._expression(part)
        inside: tuple[Site, ...] = ()
        if node.type == "for_range_loop":
            # It has no condition of its own; that a thread went through the whole of it is not told.
            inside = (self._arm(node, TRIPS, _header_end(node)),)
        elif condition is not None and condition.type != "declaration" and not _is_literal(condition):
            trips, ends = (self._arm(node, label, _header_end(node)) for label in (TRIPS, ENDS))
            self._wrap(condition, trips, ends, self._do_condition(node, condition))
            self._expression(condition)
        self._body(body, *inside)

    def _do_condition(self, node: Any, condition: Any) -> tuple[Site, ...]:
        """The statement that the condition of a `do` is, on lines of its own."""
        if node.type != "do_statement":
            return ()
        return (self._site(condition.start_point, _last_line(condition), SiteKind.STATEMENT),)

    def _switch(self, node: Any) -> None:
        self._expression(node.child_by_field_name("condition"))
        for case in node.child_by_field_name("body").named_children:
            if case.type == "case_statement":
                self._case(case)

    def _try(self, node: Any) -> None:
        self._compound(node.child_by_field_name("body"))
        for clause in node.named_children:
            if clause.type == "catch_clause":
                self._compound(clause.child_by_field_name("body"))

    def _case(self, node: Any) -> None:
        value = node.child_by_field_name("value")
        statements = [child for child in node.named_children if child != value]
        self._suite(statements, _colon(node))

    def _conditional_text(self, node: Any) -> None:
        """Statements that are compiled under a condition of the preprocessor."""
        statements = []
        for child in node.named_children:
            if child.type in CONDITIONAL_TEXT:
                self._conditional_text(child)
            elif node.field_name_for_child(node.children.index(child)) != "condition":
                statements.append(child)
        self._suite(statements, None)

    # --- expressions --------------------------------------------------------------------------

    def _expression(self, node: Any) -> None:
        """Probes in the conditions of an expression, and in lambdas."""
        if node is None or node.type in UNEVALUATED:
            return
        if node.type == "lambda_expression":
            self._compound(node.child_by_field_name("body"))
            return
        if node.type == "conditional_expression":
            mark = next(child for child in node.children if child.type == "?")
            self._condition(node.child_by_field_name("condition"), mark)
        elif node.type == "binary_expression" and _is_chain(node):
            for operand in (node.child_by_field_name("left"), node.child_by_field_name("right")):
                # The outcome of a chain is that of its own operands.
                if not _is_chain(operand):
                    self._condition(operand, operand)
        for child in node.children:
            self._expression(child)

    def _condition(self, node: Any, place: Any) -> None:
        """Both outcomes of a part of an expression, named by a place of their own."""
        if not _is_literal(node):
            true, false = (self._arm(place, label, _last_line(place)) for label in (TRUE, FALSE))
            self._wrap(node, true, false)

    def _wrap(self, node: Any, true: Site, false: Site, also: tuple[Site, ...] = ()) -> None:
        number = self._number(true, *also)
        self._number(false, *also)
        self._open(node.start_byte, f"MLA_COV_ARM({number}, (")
        self._close(node.end_byte, "))")

    # --- sites and text -----------------------------------------------------------------------

    def _site_of(self, node: Any) -> Site | None:
        """The site of a statement, or None if nothing runs where it stands."""
        if node.type in ("if_statement", "switch_statement"):
            last = _last_line(node.child_by_field_name("condition"))
        elif node.type in LOOPS - {"do_statement"}:
            last = _header_end(node)
        elif node.type == "declaration":
            if not _has_value(node) or _is_constant(node):
                return None
            last = _last_line(node)
        elif node.type in SIMPLE and node.named_child_count + (node.type != "expression_statement"):
            last = _last_line(node)
        else:
            return None
        return self._site(node.start_point, last, SiteKind.STATEMENT)

    def _arm(self, node: Any, label: str, last: int) -> Site:
        return self._site(node.start_point, last, SiteKind.ARM, label)

    def _site(self, start: tuple[int, int], last: int, kind: SiteKind, label: str = "") -> Site:
        return Site(start[0] + 1, last, kind, label, start[1], self._function)

    def _number(self, *sites: Site) -> int:
        """A new flag, which means these sites."""
        self.found.flags.append(sites)
        return self._first + len(self.found.flags) - 1

    def _open(self, position: int, text: str) -> None:
        self._insertions.append((position, 1, text))

    def _close(self, position: int, text: str) -> None:
        self._insertions.append((position, 0, text))


@dataclass
class _Block:
    """Statements that run one after the other: where their probe goes, None before the next, and sites."""

    begin: int | None
    sites: list[Site]


def _statements(nodes: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """The statements among nodes, and conditional text; each with whether a pragma stands before it."""
    is_after_pragma = False
    for node in nodes:
        if node.type == "preproc_call":
            is_after_pragma = True
        elif node.type in CONDITIONAL_TEXT or _is_statement(node):
            yield node, is_after_pragma
            is_after_pragma = False


def _is_statement(node: Any) -> bool:
    name: str = node.type
    is_local_class = name in ("class_specifier", "struct_specifier")
    return name == "declaration" or name.endswith("_statement") or name == "for_range_loop" or is_local_class


def _may_leave(node: Any) -> bool:
    """Whether control may leave a statement other than by its end, or enter it."""
    if node.type == "lambda_expression":
        return False
    return node.type in LEAVING or any(_may_leave(child) for child in node.named_children)


def _has_value(node: Any) -> bool:
    """Whether a declaration computes something."""
    return any(child.type == "init_declarator" for child in node.named_children)


def _is_constant(node: Any) -> bool:
    return any(child.text in (b"constexpr", b"constinit") for child in node.children)


def _is_chain(node: Any) -> bool:
    """Whether an expression is of `&&` or `||`, in parentheses or not."""
    while node.type == "parenthesized_expression":
        node = node.named_children[0]
    if node.type != "binary_expression":
        return False
    return bool(node.child_by_field_name("operator").text in (b"&&", b"||"))


def _is_literal(node: Any) -> bool:
    """Whether a condition has one outcome only."""
    return node.type in ("true", "false", "number_literal")


def _header_end(node: Any) -> int:
    """The last line of what stands before a loop's body; of a `do`, of its condition."""
    if node.type == "do_statement":
        return _last_line(node.child_by_field_name("condition"))
    if node.type == "while_statement":
        return _last_line(node.child_by_field_name("condition"))
    body = node.child_by_field_name("body")
    last = max(child.end_point[0] for child in node.children if child.end_byte <= body.start_byte)
    return int(last) + 1


def _last_line(node: Any) -> int:
    return int(node.end_point[0]) + 1


def _colon(node: Any) -> int:
    """Where the label of a statement ends."""
    return next(int(child.end_byte) for child in node.children if child.type == ":")


def _name_of(node: Any) -> str:
    """The name of a defined function, as it is written."""
    declarator = node.child_by_field_name("declarator")
    while declarator is not None and declarator.type != "function_declarator":
        inner = declarator.child_by_field_name("declarator")
        declarator = inner or next(iter(declarator.named_children), None)
    name = None if declarator is None else declarator.child_by_field_name("declarator")
    return "" if name is None else str(name.text.decode("utf-8", "replace"))
