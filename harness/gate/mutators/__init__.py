"""Which languages mutants can be generated in, one file each, ending in `MUTATOR`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cases.discovery import discover
from harness.mutation.mutant import Mutant


@dataclass(frozen=True)
class Mutator:
    """How the kernels of one language are broken.

    Attributes:
        language: as coverage calls it.
        lanes: where its kernels run; the first of these that hit the changed lines tries the mutants.
        generate: (file, its text) -> every mutant of its kernels and launchers, in the order of the text.
        cost: for how many of the mutants that a policy lets be tried one of these counts.
    """

    language: str
    lanes: tuple[str, ...]
    generate: Callable[[str, str], tuple[Mutant, ...]]
    cost: int = 1


@cache
def mutators() -> dict[str, Mutator]:
    """Every mutator by its language.

    Raises:
        ImportError: a file here cannot be imported: a score without its mutants would say too much.
    """
    found = {}
    for item in discover("harness.gate.mutators", Path(__file__).parent, "MUTATOR"):
        if not isinstance(item.value, Mutator):
            raise ImportError(f"{item.module} must end in MUTATOR: {item.reason or 'that is no Mutator'}")
        found[item.value.language] = item.value
    return found
