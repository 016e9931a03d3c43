"""Which mutants are tried on which tasks, and which survivors have a recorded reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from harness.mutation.generate import generate
from harness.mutation.mutant import Mutant, path_file, records_of, source_of, stale
from harness.task import Task


@dataclass
class Chosen:
    """Mutants with the tasks that must notice them.

    Attributes:
        tasks: by mutant, in the order of files and records.
        accepted: why a mutant may survive.
        stale: acceptances of mutants that are no longer generated.
    """

    tasks: dict[Mutant, Sequence[Task]] = field(default_factory=dict)
    accepted: dict[Mutant, str] = field(default_factory=dict)
    stale: list[Mutant] = field(default_factory=list)


def choose(tasks: Sequence[Task], only: str, *, generated: bool) -> Chosen:
    """Mutants whose id matches a glob, of every path that has a task: recorded ones, or generated.

    Raises:
        MutantError: a record cannot be read or applied.
    """
    chosen = Chosen()
    for path in dict.fromkeys(task.path for task in tasks):
        # Launching once says most; cases whose checks launch again come after all that do not.
        own = sorted((task for task in tasks if task.path == path), key=lambda task: bool(task.checks))
        records = records_of(path)
        found = records.mutants
        if generated:
            found = generate(records.file, source_of(path_file(path)))
            chosen.stale += stale(records.accepted, found)
        for mutant in found:
            if not fnmatchcase(mutant.id, only):
                continue
            mutant.applied(source_of(mutant.file))
            chosen.tasks[mutant] = own
            why = records.acceptance(mutant)
            if why is not None:
                chosen.accepted[mutant] = why
    return chosen
