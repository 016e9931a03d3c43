"""`Mutant`: one change of one source file that a suite must notice, and the files that record them.

    file = "harness/paths/triton/mla_decode.py"

    [[mutant]]
    id = "newest-key-dropped"
    why = "FastDeploy B66: the history without the token just written"
    old = "decoder + token - first + 1"
    new = "decoder + token - first"

    [[mutant]]
    id = "rescaling-dropped"
    file = "harness/cuda/include/mla/attention.h"
    ...

    [[accepted]]
    why = "equivalent: ..."
    old = "..."
    new = "..."

`old` occurs exactly once in the file; a mutant of a .cu file may name a header that it includes. `mutant`
entries are bugs that engines shipped, written by hand; `accepted` entries are generated mutants that no case
can, or need, tell from the kernel.
`harness/mutation/known/<family>/<operator>.toml` records those of `harness/paths/<family>/<operator>.py`,
and `<operator>_<variant>.toml` those of `<operator>_<variant>.py` where a variant has a file of its own.
`known/_<operator>.toml` records those of `harness/paths/_<operator>.py`, a composition that families share.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
KNOWN = Path(__file__).parent / "known"


class MutantError(ValueError):
    """A mutant that cannot be applied or a record that cannot be read; the message says which."""


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        id: a name without '/', unique within its file.
        file: the source file, relative to the packages' parent folder.
        old: text that occurs exactly once in the file. new: what it becomes.
        why: what the change stands for, one sentence.
        shows: for bugs that change numbers smoothly, the data mode that must show it by a margin:
            `budgets` weighs it there. Empty for all others.
        stage: for bugs of a whole model, the output that departs first: a case has noticed only if it says
            so. Empty for all others.
    """

    id: str
    file: str
    old: str
    new: str
    why: str
    shows: str = ""
    stage: str = ""

    def applied(self, source: str) -> str:
        """The file's text with the change made.

        Raises:
            MutantError: `old` does not occur exactly once, or nothing changes.
        """
        found = occurrences(source, self.old)
        if found != 1:
            first_line, _, _ = self.old.strip().partition("\n")
            raise MutantError(
                f"mutant {self.id}: its old text must occur once in {self.file}, got {found} times: "
                f"{first_line!r}"
            )
        if self.old == self.new:
            raise MutantError(f"mutant {self.id} of {self.file} changes nothing")
        return source.replace(self.old, self.new)

    def line(self, source: str) -> int:
        """The line, from 1, on which the file first changes."""
        start = source.index(self.old)
        same = next(
            (i for i, (a, b) in enumerate(zip(self.old, self.new, strict=False)) if a != b),
            min(len(self.old), len(self.new)),
        )
        return source.count("\n", 0, start + same) + 1


@dataclass(frozen=True)
class Records:
    """What is recorded of one source file."""

    file: str
    mutants: tuple[Mutant, ...]
    accepted: tuple[Mutant, ...]

    def acceptance(self, mutant: Mutant) -> str | None:
        """Why a generated mutant need not be noticed, or None."""
        same = (item.why for item in self.accepted if (item.old, item.new) == (mutant.old, mutant.new))
        return next(same, None)


def occurrences(text: str, part: str) -> int:
    """How often a part stands in a text; unlike `str.count`, places that overlap count each."""
    found, start = 0, text.find(part)
    while start >= 0:
        found, start = found + 1, text.find(part, start + 1)
    return found


def source_of(file: str) -> str:
    """The text of a source file named as in a record.

    Raises:
        MutantError: there is no such file, or it is not UTF-8.
    """
    try:
        return (ROOT / file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MutantError(f"{file} cannot be read: {error}") from None


def path_file(path: str) -> str:
    """The source file of a path, by the convention that a file is called as its path is.

    A variant's is `<operator>_<variant>.py` where there is one, and the operator's where there is none. Of
    a CUDA path it is the .cu file beside the module, of a path that only names its family's operators the
    composition, `_<operator>.py` above the families' folders; of an adapter the library's.
    """
    base, _, variant = path.partition("@")
    family, _, operator = base.partition("/")
    if family == "adapters":
        return f"harness/paths/adapters/{operator.partition('/')[0]}.py"
    names = [f"{operator}_{variant}", operator] if variant else [operator]
    places = [f"{folder}{name}" for name in names for folder in ("_", f"{family}/")]
    files = [f"harness/paths/{place}{suffix}" for place in places for suffix in (".cu", ".py")]
    return next((file for file in files if (ROOT / file).exists()), files[-1])


def records_of(path: str) -> Records:
    """What is recorded of a path's file; nothing where there is no record.

    Raises:
        MutantError: the record cannot be read.
    """
    file = path_file(path)
    recorded = KNOWN / Path(file).relative_to("harness/paths").with_suffix(".toml")
    if not recorded.exists():
        return Records(file, (), ())
    where = str(recorded.relative_to(ROOT))
    return read_records(source_of(where), where)


def read_records(text: str, where: str) -> Records:
    """The records in the text of a file; `where` names it in messages.

    Raises:
        MutantError: it is not TOML, a key is missing, unknown or of another type, or an id occurs twice.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise MutantError(f"{where} is not TOML: {error}") from None
    unknown = data.keys() - {"file", "mutant", "accepted"}
    if unknown:
        raise MutantError(f"{where} takes file, [[mutant]] and [[accepted]], got {min(unknown)!r}")
    file = data.get("file")
    if not isinstance(file, str):
        raise MutantError(f"{where}: file is missing or not a text")
    mutants, accepted = _entries(data, "mutant", where), _entries(data, "accepted", where)
    found = Records(
        file,
        tuple(_mutant(entry, file, f"{where}, mutant {n}") for n, entry in enumerate(mutants, 1)),
        tuple(
            _mutant({"id": f"accepted-{n}", **entry}, file, f"{where}, accepted {n}")
            for n, entry in enumerate(accepted, 1)
        ),
    )
    ids = [item.id for item in found.mutants]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise MutantError(f"{where}: the id {twice[0]!r} occurs twice")
    return found


def rank(mutant: Mutant, seed: int) -> bytes:
    """Where a mutant stands in the draw of a seed: by itself, whatever others there are, on every machine."""
    key = "\0".join((str(seed), mutant.file, mutant.old, mutant.new))
    return hashlib.blake2b(key.encode("utf-8", errors="surrogateescape")).digest()


def stale(accepted: Iterable[Mutant], generated: Iterable[Mutant]) -> list[Mutant]:
    """Accepted mutants that are no longer generated: the kernel has changed under them."""
    changes = {(item.old, item.new) for item in generated}
    return [item for item in accepted if (item.old, item.new) not in changes]


def _entries(data: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    entries = data.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise MutantError(f"{where}: each {key} is a table of its own, [[{key}]]")
    return entries


def _mutant(entry: dict[str, Any], file: str, where: str) -> Mutant:
    needed, optional = {"id", "old", "new", "why"}, {"shows", "stage", "file"}
    missing, unknown = needed - entry.keys(), entry.keys() - needed - optional
    if missing or unknown:
        raise MutantError(
            f"{where} takes id, old, new, why, shows, stage and file; "
            + (f"{min(missing)} is missing" if missing else f"got {min(unknown)!r}")
        )
    wrong = [key for key, value in entry.items() if not isinstance(value, str)]
    if wrong or not entry["why"].strip() or not entry["old"].strip():
        raise MutantError(f"{where}: {wrong[0] if wrong else 'why and old'} must be a text, not empty")
    if "/" in entry["id"]:
        raise MutantError(f"{where}: an id has no '/', got {entry['id']!r}")
    return Mutant(**{"file": file, **entry})
