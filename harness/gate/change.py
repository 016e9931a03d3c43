"""What a change is compared with, asked of git: a revision's merge base, or the last commit.

The diff is the one between the merge base of two revisions and the working tree, files that git does not
know yet included, or a file that somebody else's `git diff` wrote.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.gate.diff import ChangedFile, changed_files, whole
from harness.plan import UsageError

BRANCHES = ("origin/HEAD", "origin/main", "origin/master", "main", "master")
"""What a change is compared with where nobody says: the first of these that there is."""

GIT_SECONDS = 120
NO_REPOSITORY = "not a git repository"


class NothingToCompare(Exception):
    """There is no history that a change could be compared with; the message is one sentence."""


@dataclass(frozen=True)
class Change:
    """The files of a change, deleted ones left out, what it is compared with in words, and notes on that."""

    against: str
    files: tuple[ChangedFile, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_lines(self) -> int:
        """How many lines it adds or rewrites."""
        return sum(len(item.lines) for item in self.files)


def repository_root(folder: Path) -> Path:
    """The top folder of the repository that a folder lies in.

    Raises:
        NothingToCompare: it lies in none.
        UsageError: git cannot say.
    """
    try:
        return Path(_git(folder, "rev-parse", "--show-toplevel").removesuffix("\n"))
    except UsageError as error:
        if NO_REPOSITORY in str(error):
            raise NothingToCompare(
                f"there is nothing to compare with: {folder} is in no git repository; "
                "name a change with --diff-file"
            ) from None
        raise


def repository_files(root: Path) -> list[str]:
    """Every file under a root that git knows or does not ignore; outside of a repository every file."""
    try:
        names = _git_bytes(root, "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    except UsageError:
        return [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    return [name.decode("utf-8", errors="surrogateescape") for name in names.split(b"\0") if name]


def change_since(root: Path, base: str) -> Change:
    """What the working tree changes since it left a revision: since their merge base.

    Raises:
        UsageError: there is no such revision, or no common ancestor.
    """
    commit = _resolved(root, base)
    if commit is None:
        raise UsageError(f"--base {base!r} is no revision of {root}; fetch it, or give --diff-file")
    ancestor = _merge_base(root, commit)
    if ancestor is None:
        raise UsageError(
            f"{base} and HEAD have no common ancestor here: fetch more history (a full clone, "
            "`fetch-depth: 0`), or give --diff-file"
        )
    return _change(root, ancestor, f"{ancestor[:12]}, the merge base with {base}")


def change_since_branch(root: Path) -> Change:
    """What the working tree changes since it left the main branch, or, on that branch, its last commit.

    Raises:
        NothingToCompare: there is no main branch here, or no commit before this one.
    """
    head = _resolved(root, "HEAD")
    if head is None:
        raise NothingToCompare("there is nothing to compare with: this repository has no commit")
    branch, ancestor = _main_branch(root)
    if ancestor != head:
        return _change(root, ancestor, f"{ancestor[:12]}, the merge base with {branch}")
    parent = _resolved(root, "HEAD^")
    if parent is None:
        raise NothingToCompare(
            f"there is nothing to compare with: HEAD is in {branch}, and the commit before it is not here"
        )
    return _change(root, parent, f"{parent[:12]}, the commit before HEAD, which is in {branch}")


def change_of_diff(root: Path, file: Path) -> Change:
    """The change that a diff file describes, against the files under a root as they are after it.

    Raises:
        UsageError: it cannot be read or is no unified diff.
    """
    try:
        diff = file.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the diff {file}: {error.strerror}") from None
    if diff.strip() and not any(line.startswith((b"diff ", b"--- ", b"@@ ")) for line in diff.splitlines()):
        raise UsageError(f"{file} is no unified diff: no line begins with 'diff ', '--- ' or '@@ '")
    return Change(f"the diff {file}", tuple(changed_files(diff, root, str(file))))


def _change(root: Path, ancestor: str, against: str) -> Change:
    diff = _git_bytes(
        root,
        *("-c", "core.quotepath=off", "diff", "--unified=0", "--no-color", "--no-ext-diff", "--no-textconv"),
        *("--find-renames", "--ignore-submodules", "--src-prefix=a/", "--dst-prefix=b/", ancestor, "--"),
    )
    found = list(changed_files(diff, root, "what git diff wrote"))
    names = _git_bytes(root, "ls-files", "--others", "--exclude-standard", "-z").split(b"\0")
    unknown = (name.decode("utf-8", errors="surrogateescape") for name in names if name)
    found += [whole(root, name) for name in unknown if not (root / name).is_symlink()]
    return Change(against, tuple(sorted(found, key=lambda item: item.file)))


def _main_branch(root: Path) -> tuple[str, str]:
    """The main branch, as it is called here, and where HEAD left it."""
    for branch in BRANCHES:
        commit = _resolved(root, branch)
        ancestor = None if commit is None else _merge_base(root, commit)
        if ancestor is not None:
            return branch, ancestor
    raise NothingToCompare(
        f"there is nothing to compare with: HEAD shares no history with any of {', '.join(BRANCHES)} "
        "in this clone; name a revision with --base"
    )


def _resolved(root: Path, revision: str) -> str | None:
    """The commit that a revision names, or None."""
    try:
        found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except UsageError:
        return None
    return found.strip() or None


def _merge_base(root: Path, commit: str) -> str | None:
    try:
        return _git(root, "merge-base", commit, "HEAD").strip() or None
    except UsageError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    return _git_bytes(folder, *arguments).decode("utf-8", errors="surrogateescape")


def _git_bytes(folder: Path, *arguments: str) -> bytes:
    """What a git command prints.

    Raises:
        UsageError: it fails; the message is git's own.
    """
    command: Sequence[str] = ("git", "-C", str(folder), *arguments)
    try:
        # Git's messages are read here, so they are asked for in English.
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            check=False,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"git cannot be run: {error}") from None
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", errors="replace").strip()
        raise UsageError(f"git {arguments[0]} failed: {said or f'exit code {done.returncode}'}")
    return done.stdout
