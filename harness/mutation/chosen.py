"""Which mutants are tried on which tasks, and which survivors have a recorded reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from harness.mutation.generate import generate
from harness.mutation.generate_cuda import generate_cuda
from harness.mutation.mutant import Mutant, rank, records_of, source_of, stale
from harness.task import Task


@dataclass
class Chosen:
    """Mutants with the tasks that must notice them.

    Attributes:
        attempts: mutants and the tasks of one path, in the order of paths and records; a mutant of a file
            that several paths share is tried on each.
        accepted: why a mutant may survive.
        stale: acceptances of mutants that are no longer generated.
        notes: of which mutants a sample was drawn.
        recorded: whether they are recorded bugs, each of which must be one, or generated.
    """

    attempts: list[tuple[Mutant, Sequence[Task]]] = field(default_factory=list)
    accepted: dict[Mutant, str] = field(default_factory=dict)
    stale: list[Mutant] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    recorded: bool = False


def choose(
    tasks: Sequence[Task], only: str, *, generated: bool, sample: int | None = None, seed: int = 0
) -> Chosen:
    """Mutants whose id matches a glob, of every path that has a task: recorded ones, or generated.

    Args:
        sample: the most of a path, drawn by `seed`; None tries all.

    Raises:
        MutantError: a record cannot be read or applied, or mutants are to be generated of a path whose
            file is not called as it is and that has no record to name another.
    """
    chosen = Chosen(recorded=not generated)
    for path in dict.fromkeys(task.path for task in tasks):
        # Launching once says most; cases whose checks launch again come after all that do not.
        own = sorted((task for task in tasks if task.path == path), key=lambda task: bool(task.checks))
        records = records_of(path)
        found = records.mutants
        if generated:
            make = generate_cuda if records.file.endswith(".cu") else generate
            found = make(records.file, source_of(records.file))
            chosen.stale += [item for item in stale(records.accepted, found) if item not in chosen.stale]
        matching = [mutant for mutant in found if fnmatchcase(mutant.id, only)]
        if sample is not None and sample < len(matching):
            drawn = set(sorted(matching, key=lambda mutant: rank(mutant, seed))[:sample])
            chosen.notes.append(f"{path}: a sample of {sample} of {len(matching)} mutants, seed {seed}")
            matching = [mutant for mutant in matching if mutant in drawn]
        for mutant in matching:
            mutant.applied(source_of(mutant.file))
            chosen.attempts.append((mutant, own))
            why = records.acceptance(mutant)
            if why is not None:
                chosen.accepted[mutant] = why
    return chosen
