"""The text of a changed file, which language it is in, and whether coverage is of that text."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.coverage.cuda import is_cuda
from harness.coverage.sites import digest_of

TRITON = re.compile(r"\btriton\b")
JIT = re.compile(r"^\s*@.*\bjit\b", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        language: python, triton or cuda; empty for what nobody measures.
        lines: the text's lines, without their ends.
        digests: by which coverage of this text may go: line ends as they are, or all newlines.
    """

    language: str
    lines: tuple[str, ...]
    digests: frozenset[str]

    @property
    def is_kernel(self) -> bool:
        """Whether it is judged as a kernel."""
        return self.language in ("triton", "cuda")


def read_source(root: Path, file: str) -> Source | None:
    """A file under a root, None if it is none or cannot be read."""
    try:
        text = (root / file).read_bytes().decode("utf-8", errors="surrogateescape")
    except OSError:
        return None
    translated = text.replace("\r\n", "\n").replace("\r", "\n")
    digests = frozenset({digest_of(text), digest_of(translated)})
    # As git counts them: a lone carriage return or a form feed ends no line.
    lines = tuple(line.removesuffix("\r") for line in text.split("\n"))
    return Source(language_of(file, translated), lines, digests)


def language_of(file: str, text: str) -> str:
    """Which language a file is in, told from its name and, Triton from Python, from its text."""
    if is_cuda(file, text):
        return "cuda"
    if PurePosixPath(file).suffix.lower() != ".py":
        return ""
    return "triton" if TRITON.search(text) and _has_kernel(text) else "python"


def _has_kernel(text: str) -> bool:
    """Whether a function is decorated by some `jit`; of what does not parse, whether it looks so."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return bool(JIT.search(text))
    return any(
        "jit" in ast.unparse(decorator)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    )
