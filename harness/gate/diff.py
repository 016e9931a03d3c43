"""Unified diffs, as git writes them under any configuration, or another tool: what each file's lines are.

Hunks are read by unidiff. What git writes before them is read here: its first line does not separate two
names with spaces, and only this part knows of renames, copies, modes and binary files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from harness.plan import UsageError

if TYPE_CHECKING:
    from unidiff.patch import Hunk, PatchedFile, PatchSet

DEV_NULL = "/dev/null"
GIT_HEADER = "diff --git "
SECTION = re.compile(r"^(?=diff )", re.MULTILINE)
BODY = re.compile(r"^--- ", re.MULTILINE)
LINK_OR_SUBMODULE = re.compile(r"^(?:new file mode|new mode|index \S+) (?:120000|160000)$", re.MULTILINE)
DELETED = re.compile(r"^deleted file mode ", re.MULTILINE)
HUNK = re.compile(r"^@@ ", re.MULTILINE)
COMBINED = re.compile(r"^diff --(?:cc|combined) ", re.MULTILINE)
BINARY = re.compile(r"^(?:Binary files .* differ|GIT binary patch)$", re.MULTILINE)
COPIED = re.compile(r"^copy to ", re.MULTILINE)
MOVED_FROM = re.compile(r"^(?:rename|copy) from (.*)$", re.MULTILINE)
MOVED_TO = re.compile(r"^(?:rename|copy) to (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class ChangedFile:
    """One file of a change, as it is after it.

    Attributes:
        file: posix path relative to the root.
        lines: numbers, from 1, of added and rewritten lines.
        cuts: numbers of lines behind which lines were taken out and none put in; 0 is the file's beginning.
        is_binary: git shows no lines of it.
    """

    file: str
    lines: frozenset[int] = frozenset()
    cuts: frozenset[int] = frozenset()
    is_binary: bool = False

    def touches(self, first: int, last: int) -> bool:
        """Whether something between two lines, inclusive, was changed, or taken out from between them."""
        inside = any(first <= line <= last for line in self.lines)
        return inside or any(first <= cut < last for cut in self.cuts)


def changed_files(diff: bytes, root: Path, where: str) -> Iterator[ChangedFile]:
    """Every file of a diff that is there after it; links and submodules are no text and left out.

    Args:
        diff: with as many lines of context as it likes.
        root: where the files are. where: names the diff in messages.

    Raises:
        UsageError: it is no unified diff.
        ImportError: unidiff is not installed.
    """
    # Lines end at a newline only: neither a lone carriage return nor a form feed ends one for git.
    for section in SECTION.split(diff.decode("utf-8", errors="surrogateescape")):
        start = BODY.search(section)
        header, body = (section[: start.start()], section[start.start() :]) if start else (section, "")
        if LINK_OR_SUBMODULE.search(header) or DELETED.search(header):
            continue
        if HUNK.search(header):
            raise UsageError(f"{where} is no unified diff: it has a hunk without the names of its file")
        if COMBINED.search(header):
            raise UsageError(f"{where} is the combined diff of a merge: compare with one commit")
        name = _name_in(header)
        if BINARY.search(header):
            yield ChangedFile(name, is_binary=True)
        elif _is_new_throughout(header, name):
            yield whole(root, name)
        elif body:
            yield from _patched_files(body, header, where)
        elif name:
            yield ChangedFile(name)


def whole(root: Path, file: str) -> ChangedFile:
    """A file all of whose lines are new."""
    try:
        content = (root / file).read_bytes()
    except OSError:
        return ChangedFile(file)
    if b"\0" in content:
        return ChangedFile(file, is_binary=True)
    count = content.count(b"\n") + (bool(content) and not content.endswith(b"\n"))
    return ChangedFile(file, frozenset(range(1, count + 1)))


def _name_in(header: str) -> str:
    """The name that git's lines before the hunks give a file; empty where only the hunks' own have it."""
    moved = MOVED_TO.search(header)
    if moved:
        return _unquoted(moved[1])
    source, target = _names_in(header)
    return _unquoted(target) if source == target else _without_prefix(_unquoted(target))


def _names_in(header: str) -> tuple[str, str]:
    """Both names of git's first line; they are equally long unless the file was moved. Empty without it."""
    if not header.startswith(GIT_HEADER):
        return "", ""
    names = header.removeprefix(GIT_HEADER).partition("\n")[0]
    half = len(names) // 2
    return names[:half], names[half + 1 :]


def _is_new_throughout(header: str, name: str) -> bool:
    """Whether git calls a file a copy, or says that it had a name of another language."""
    before = MOVED_FROM.search(header)
    if before is None:
        return False
    had_suffix = PurePosixPath(_unquoted(before[1])).suffix
    return bool(COPIED.search(header)) or had_suffix != PurePosixPath(name).suffix


def _patched_files(body: str, header: str, where: str) -> Iterator[ChangedFile]:
    """The files of a diff from its first `---` line on: one of git's, as many as there are of others."""
    for patched in _patches(body, where):
        if patched.is_removed_file:
            continue
        touched = [_touched(hunk) for hunk in patched]
        yield ChangedFile(
            _name_of(patched, header),
            frozenset(line for lines, _ in touched for line in lines),
            frozenset(cut for _, cuts in touched for cut in cuts),
        )


def _patches(body: str, where: str) -> PatchSet:
    try:
        from unidiff.errors import UnidiffParseError
        from unidiff.patch import PatchSet
    except ImportError:
        raise ImportError(
            "gate reads diffs with unidiff, which is not installed: pip install 'mla-harness[gate]'"
        ) from None
    try:
        return PatchSet(io.StringIO(body, newline="\n"))
    except UnidiffParseError as error:
        raise UsageError(f"{where} is no unified diff: {str(error).strip()}") from None


def _name_of(patched: PatchedFile, header: str) -> str:
    """A file's name after the change, without the prefix by which git tells it from the one before."""
    source, target = _unquoted(patched.source_file), _unquoted(patched.target_file)
    if header.startswith(GIT_HEADER):
        moved = MOVED_TO.search(header)
        before, after = _names_in(header)
        return _unquoted(moved[1]) if moved else target if before == after else _without_prefix(target)
    is_one_name = source == target or (source == DEV_NULL and not target.startswith("b/"))
    return target if is_one_name else _without_prefix(target)


def _without_prefix(name: str) -> str:
    return name.partition("/")[2] or name


def _unquoted(name: str) -> str:
    """A file name as git writes it, which quotes one with unusual characters as C does."""
    if not (len(name) > 1 and name.startswith('"') and name.endswith('"')):
        return name
    raw = name[1:-1].encode("utf-8", errors="surrogateescape")
    return raw.decode("unicode_escape").encode("latin-1").decode("utf-8", errors="surrogateescape")


def _touched(hunk: Hunk) -> tuple[set[int], set[int]]:
    """Added lines of a hunk, and the lines behind which it only takes out."""
    lines: set[int] = set()
    cuts: set[int] = set()
    # Of a hunk without lines the header names the line before it.
    here = hunk.target_start - 1 if hunk.target_length else hunk.target_start
    cut: int | None = None
    is_replaced = False
    for line in hunk:
        if line.is_context:
            cuts |= {cut} if cut is not None and not is_replaced else set()
            here, cut, is_replaced = here + 1, None, False
        elif line.is_added:
            here, is_replaced = here + 1, True
            lines.add(here)
        elif line.is_removed and cut is None:
            cut = here
    cuts |= {cut} if cut is not None and not is_replaced else set()
    return lines, cuts
