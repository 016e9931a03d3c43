"""What explains a broken path without an answer to compare: launches that differ in one thing.

A kernel whose threads race is right in one order of them and wrong in another. One that leaves its tensors
has no outputs; but if it is right as soon as the case has no padding, it is padding that it follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from cases import Case, Kind, Row, RuleError
from cases.contract import contract_of
from cases.errors import CaseError
from harness.bounds import OutOfBounds
from harness.checks.guard import run as guard
from harness.checks.races import FORWARD, SCHEDULES
from harness.cuda import build
from harness.launch import Launch, PathFailure
from harness.verdict import Status

HOST = "host"
WRITTEN_AS_DENSE = "written-as-dense"
IsRight = Callable[[Launch], bool]


@dataclass(frozen=True)
class Experiment:
    """What was found out by other launches.

    Attributes:
        name: of the mistake. sentence: what it is and how it was found.
        is_sure: whether nothing else does the same.
    """

    name: str
    sentence: str
    is_sure: bool = False


def orders(launch: Launch, is_right: IsRight) -> Experiment | None:
    """Whether a CUDA kernel on the processor gives other bits in other orders of its threads; None if not.

    Launches again, and leaves the launch as the first order makes it.
    """
    if not launch.path.is_cuda or launch.lane.name != HOST or not launch.has_ended:
        return None
    seen: set[str] = set()
    right = 0
    try:
        for order, kind, seed in (*SCHEDULES, ("forward", FORWARD, 0)):
            build.set_schedule(kind, seed)
            launch.reset()
            try:
                launch.run()
            except PathFailure:
                seen.add(order)
                continue
            seen.add(launch.outputs_digest())
            right += is_right(launch)
    finally:
        build.set_schedule(FORWARD)
    if len(seen) == 1:
        return None
    if right:
        return Experiment(
            "race",
            "race: outputs are right in one order of the kernel's threads and not in another",
            is_sure=True,
        )
    return Experiment("race", "likely race: outputs change with the order of the kernel's threads")


@dataclass(frozen=True)
class _Remedy:
    """One thing taken out of a case, and the mistake that is gone with it.

    Attributes:
        change: the case without it; None where it has it not.
        of_outputs: whether the mistake may give wrong outputs, too, and not leave its tensors.
    """

    name: str
    summary: str
    change: Callable[[Case], Case | None]
    of_outputs: bool = False


def remedies(launch: Launch, is_right: IsRight) -> list[Experiment]:
    """The mistakes without whose occasion the path is right; none where it is with it, too."""
    is_wrong = launch.has_ended and not is_right(launch)
    case = launch.case.one_step(launch.step)
    return _helping(case, lambda other: _succeeds(launch, other, is_right), of_outputs=is_wrong)


def remedies_by_verdict(case: Case, is_right: Callable[[Case], bool]) -> list[Experiment]:
    """The same of a path that raised or ended its process, which leaves no launch; none of several steps.

    Args:
        is_right: whether the path takes a case and passes it.
    """
    return _helping(case, is_right, of_outputs=False) if len(case.steps) == 1 else []


def _helping(case: Case, succeeds: Callable[[Case], bool], *, of_outputs: bool) -> list[Experiment]:
    """The mistakes without whose occasion a case succeeds; `of_outputs`: only those that give wrong ones."""
    if succeeds(case):
        return []
    found: dict[str, Experiment] = {}
    for remedy in REMEDIES:
        if remedy.name in found or (of_outputs and not remedy.of_outputs):
            continue
        changed = _changed(remedy, case)
        if changed is not None and succeeds(changed):
            found[remedy.name] = Experiment(remedy.name, f"{remedy.name}: {remedy.summary}")
    return list(found.values())


def _changed(remedy: _Remedy, case: Case) -> Case | None:
    """A case without what occasions a mistake; None where it has it not, or cannot be without."""
    try:
        changed = remedy.change(case)
    except (CaseError, RuleError):
        return None
    return None if changed == case else changed


def _succeeds(launch: Launch, case: Case, is_right: IsRight) -> bool:
    """Whether the path of a launch takes a case, stays within its tensors and is right."""
    try:
        if launch.path.supports(case) is not None:
            return False
        again = Launch.prepare(case, launch.path, launch.lane)
        again.run()
    except (CaseError, RuleError, OutOfBounds, PathFailure):
        return False
    return is_right(again) and all(result.status is not Status.FAILED for result in guard(again))


def _without_padding(case: Case) -> Case | None:
    rows = tuple(row for row in case.steps[0] if row.is_slot)
    return replace(case, steps=(rows,)) if len(rows) < len(case.steps[0]) else None


def _in_a_small_cache(case: Case) -> Case | None:
    return None if case.options.pool is None else case.with_options(pool=None)


def _near(case: Case) -> Case | None:
    """Without what makes positions large."""
    rows = tuple(replace(row, cached=1) if row.cached > 2**20 else row for row in case.steps[0])
    return None if rows == case.steps[0] else replace(case, steps=(rows,))


def _without_slices(case: Case) -> Case | None:
    return case.with_options(strided="0") if "strided" in contract_of(case).options else None


def _in_whole_tiles(heads: int) -> Callable[[Case], Case | None]:
    def change(case: Case) -> Case | None:
        if "heads" not in contract_of(case).options:
            return None
        return case.with_options(heads=(heads,) * len(case.options.heads))

    return change


WHOLE = 1024
"""Tokens, and slots, that fill tiles of every usual size."""


def _in_whole_tiles_of_tokens(case: Case) -> Case | None:
    """With padding behind, or with more of it."""
    rows = case.steps[0]
    missing = -sum(row.new for row in rows) % WHOLE
    if not missing:
        return None
    if rows and not rows[-1].is_slot:
        return replace(case, steps=((*rows[:-1], replace(rows[-1], new=rows[-1].new + missing)),))
    return replace(case, steps=((*rows, Row(Kind.PAD, new=missing)),))


def _in_whole_tiles_of_slots(case: Case) -> Case | None:
    """With idle slots behind the others."""
    slots = [row for row in case.steps[0] if row.is_slot]
    padding = case.steps[0][len(slots) :]
    missing = -len(slots) % WHOLE
    idle = (Row(Kind.IDLE),) * missing
    return replace(case, steps=((*slots, *idle, *padding),)) if missing else None


REMEDIES = (
    _Remedy(
        "padding-followed",
        "padding, of slot -1, is taken for a token: without it the path is right, as in B31, E10",
        _without_padding,
    ),
    _Remedy(
        "offsets-32-bit",
        "offsets wrap in 32 bits: in a small cache the path is right, as in B28, P2, B09",
        _in_a_small_cache,
        of_outputs=True,
    ),
    _Remedy(
        "offsets-32-bit",
        "offsets wrap in 32 bits: at early positions the path is right, as in P2",
        _near,
        of_outputs=True,
    ),
    _Remedy(
        WRITTEN_AS_DENSE,
        "a slice of a wider tensor is taken for contiguous: without slices the path is right, as in P17",
        _without_slices,
        of_outputs=True,
    ),
    _Remedy(
        "tail-unguarded",
        f"what fills no tile is computed past its end: with {WHOLE:,} tokens the path is right, as in E2",
        _in_whole_tiles_of_tokens,
    ),
    _Remedy(
        "tail-unguarded",
        f"what fills no tile is computed past its end: with {WHOLE:,} slots the path is right, as in E2",
        _in_whole_tiles_of_slots,
    ),
    *(
        _Remedy(
            "heads-unmasked",
            f"heads behind the last are computed, too: with {heads} of them the path is right, as in L37, D3",
            _in_whole_tiles(heads),
        )
        for heads in (16, 64)
    ),
)
