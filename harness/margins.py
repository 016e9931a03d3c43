"""How far clean errors stay below their budgets, and how far mutants go beyond them.

The table of `harness/budgets.py` holds if, in every dtype and data mode, the worst clean error is at most
1 / CLEAN_MARGIN of its budget, and every recorded mutant whose numbers depart smoothly is at least
MUTANT_MARGIN times over budget, by its values or its LSE, in the mode that its record names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cases import parse
from harness.mutation.mutant import Mutant
from harness.plan import Asked, distinct
from harness.verdict import Status, Verdict

CLEAN_MARGIN = 1.5
MUTANT_MARGIN = 2.0
DTYPES = ("bf16", "fp16", "fp32")
CHECKS = ("values", "lse")


@dataclass(frozen=True)
class Margin:
    """One check's worst row: its error, its budget, and the case."""

    error: float
    budget: float
    case: str

    @property
    def share(self) -> float:
        """Error as a share of the budget; infinite where the error is not a number."""
        return self.error / self.budget if math.isfinite(self.error) else math.inf


@dataclass(frozen=True)
class Cell:
    """One dtype and data mode of a path.

    Attributes:
        clean: the worst clean margin by check. refused: clean cases that failed.
        shares: of each mutant that changes anything here, its largest error as a share of the budget.
        due: the mutants whose records name this data mode.
    """

    path: str
    dtype: str
    data: str
    cases: int
    clean: Mapping[str, Margin]
    refused: tuple[str, ...]
    shares: Mapping[str, float]
    due: frozenset[str]

    @property
    def weakest(self) -> tuple[str, float] | None:
        """The mutant due here that goes least beyond the budget."""
        due = [(name, share) for name, share in self.shares.items() if name in self.due]
        return min(due, key=lambda item: item[1], default=None)

    @property
    def caught(self) -> int:
        """How many mutants, due or not, are over budget here."""
        return sum(share > 1 for share in self.shares.values())

    def complaints(self) -> list[str]:
        """What does not hold here, one sentence each."""
        where = f"{self.path} {self.dtype} {self.data}"
        found = [f"{where}: a clean kernel is refused on {case}" for case in self.refused]
        found += [
            f"{where}: clean {check} reaches {margin.share:.2f} of its budget on {margin.case}, "
            f"at most {1 / CLEAN_MARGIN:.2f} is allowed"
            for check, margin in self.clean.items()
            if margin.share > 1 / CLEAN_MARGIN
        ]
        found += [
            f"{where}: mutant {name} is {share:.2f} times the budget, at least {MUTANT_MARGIN:g} is asked"
            for name, share in self.shares.items()
            if name in self.due and share < MUTANT_MARGIN
        ]
        return found


def in_every_dtype(asked: Iterable[Asked]) -> list[Asked]:
    """Every case once a dtype; those that differ in their dtype only become one."""
    return distinct(
        replace(item, case=replace(item.case, options=replace(item.case.options, dtype=dtype)))
        for item in asked
        for dtype in DTYPES
    )


def cells(
    path: str, clean: Sequence[Verdict], broken: Mapping[Mutant, Sequence[Verdict]]
) -> tuple[Cell, ...]:
    """The table of one path.

    Args:
        clean: verdicts of the path itself, on any number of seeds.
        broken: verdicts of each of its mutants; none where the mutant ended its process.
    """
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in clean:
        if verdict.status is not Status.SKIPPED:
            groups.setdefault(_cell_of(verdict), []).append(verdict)
    return tuple(
        Cell(
            path,
            dtype,
            data,
            len(verdicts),
            {check: worst for check in CHECKS if (worst := _worst(verdicts, check)) is not None},
            tuple(verdict.case for verdict in verdicts if verdict.is_bad),
            _shares(verdicts, (dtype, data), broken),
            frozenset(mutant.id for mutant in broken if mutant.shows == data),
        )
        for (dtype, data), verdicts in sorted(groups.items())
    )


def _cell_of(verdict: Verdict) -> tuple[str, str]:
    options = parse(verdict.case).options
    return options.dtype, options.data


def _worst(verdicts: Iterable[Verdict], check: str) -> Margin | None:
    margins = [
        Margin(item.error, item.budget, verdict.case)
        for verdict in verdicts
        for item in verdict.checks
        if item.name == check and item.error is not None and item.budget is not None
    ]
    return max(margins, key=lambda margin: margin.share, default=None)


def _shares(
    clean: Sequence[Verdict], cell: tuple[str, str], broken: Mapping[Mutant, Sequence[Verdict]]
) -> dict[str, float]:
    """By mutant, its largest share of a budget; left out where it leaves every output bit alone."""
    digests = {verdict.case: verdict.outputs_digest for verdict in clean}
    shares = {}
    for mutant, all_verdicts in broken.items():
        verdicts = [verdict for verdict in all_verdicts if _cell_of(verdict) == cell]
        if verdicts and all(_is_unchanged(verdict, digests) for verdict in verdicts):
            continue
        shares[mutant.id] = max((_share(verdict) for verdict in verdicts), default=math.inf)
    return shares


def _is_unchanged(verdict: Verdict, digests: Mapping[str, str]) -> bool:
    """Whether a mutant's outputs are the clean kernel's, or both skipped the case."""
    if verdict.status is Status.SKIPPED:
        return verdict.case not in digests
    return verdict.outputs_digest == digests.get(verdict.case)


def _share(verdict: Verdict) -> float:
    """The largest share among a verdict's checks; infinite where it failed without a number."""
    shares = [margin.share for check in CHECKS if (margin := _worst([verdict], check)) is not None]
    failed_otherwise = verdict.is_bad and all(share <= 1 for share in shares)
    return math.inf if failed_otherwise else max(shares, default=0.0)
