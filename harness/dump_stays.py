"""Which rows of a session's steps are one sequence, and which slot of a case it gets.

A stay is a request's time in a slot, from its admission until it ends, loses its blocks or is gone. Rows are
followed by the ids of their requests; where a dump has none, by their slot, or by their blocks where an
engine moves rows about, as vLLM does. Either way a row goes on with what was held before only if its lengths
and its blocks say so: a request that lost its blocks and computes them again begins another stay, with the
same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cases import Kind, Row
from harness.dump_file import Int64
from harness.dump_step import Remarks, Step, row_of, some


@dataclass(eq=False)
class Stay:
    """One sequence of a case.

    Attributes:
        request: number of its request, or None.
        begin: the step of its first row.
        rows: one a step from then on.
        first_slot: the slot of the dump that the first row stands in.
        found_in: that of each row; None where the request was not in the step.
        blocks: [n] physical blocks of each row's tokens; None without a table.
        is_guessed: whether its last row may have been drafts. drafts: whether one has shown to be.
        slot, key, tag: those of the case.
    """

    request: int | None
    begin: int
    first_slot: int
    rows: list[Row] = field(default_factory=list)
    found_in: list[int | None] = field(default_factory=list)
    blocks: list[Int64 | None] = field(default_factory=list)
    is_guessed: bool = False
    drafts: bool = False
    slot: int = -1
    key: int = -1
    tag: str | None = None

    @property
    def end(self) -> int:
        """The step behind its last row."""
        return self.begin + len(self.rows)

    @property
    def tagged(self) -> int:
        """How many of its first tokens a tag would name."""
        return self.rows[0].cached or self.rows[0].new

    def add(self, row: Row, slot: int | None, blocks: Int64 | None) -> None:
        """Goes on for a step."""
        self.rows.append(row)
        self.found_in.append(slot)
        self.blocks.append(blocks)

    def full_blocks(self, step: int, block_size: int) -> int:
        """How many of its first blocks a tag would share in a step."""
        return min(self.rows[step - self.begin].cached, self.tagged) // block_size


def follow(steps: Sequence[Step], block_size: int, remarks: Remarks) -> list[Stay]:
    """The stays of a session, in the order in which they begin."""
    stays: list[Stay] = []
    latest: dict[int, Stay] = {}
    before: dict[int, Stay] = {}
    for index, step in enumerate(steps):
        active = np.flatnonzero(step.length).tolist()
        if step.requests is None:
            known = _by_place(step, active, before, block_size)
        else:
            ids = step.requests.tolist()
            known = {slot: latest[ids[slot]] for slot in active if ids[slot] in latest}
        before = {}
        for slot in active:
            stay = known.get(slot)
            if stay is None or not _goes_on(stay, index, step, slot, block_size, remarks):
                stay = Stay(None if step.requests is None else int(step.requests[slot]), index, slot)
                stays.append(stay)
            _add(stay, index, step, slot, block_size)
            before[slot] = stay
            if stay.request is not None:
                latest[stay.request] = stay
    _tell_guesses(steps, stays, remarks)
    return stays


def _by_place(step: Step, active: Sequence[int], before: dict[int, Stay], block_size: int) -> dict[int, Stay]:
    """Slot -> the stay of the step before that goes on there: of the same slot, else of the same blocks."""
    found = {
        slot: before[slot]
        for slot in active
        if slot in before and _difference(before[slot], step, slot, block_size) is None
    }
    if not step.rows_move or step.table is None:
        return found
    by_block: dict[int, list[Stay]] = {}
    for slot, stay in before.items():
        blocks = stay.blocks[-1]
        if slot not in found and blocks is not None:
            by_block.setdefault(int(blocks[0]), []).append(stay)
    for slot in active:
        if slot in found:
            continue
        candidates = by_block.get(int(step.table[slot, 0]), [])
        for stay in candidates:
            if _difference(stay, step, slot, block_size) is None:
                found[slot] = stay
                candidates.remove(stay)
                break
    return found


def _difference(stay: Stay, step: Step, slot: int, block_size: int) -> str | None:
    """Why a slot does not go on with what a stay held: `later`, `earlier` or `blocks`; None if it does."""
    cached, last = int(step.cached[slot]), stay.rows[-1]
    if cached > last.length:
        return "later"
    # A decode row whose token is computed again was a draft of one.
    may_be_rejected = last.is_decode or stay.is_guessed
    if cached == 0 or cached < (last.cached if may_be_rejected else last.length):
        return "earlier"
    held, blocks = stay.blocks[-1], step.blocks(slot, cached, block_size)
    if held is not None and blocks is not None and not np.array_equal(held[: len(blocks)], blocks):
        return "blocks"
    return None


def _goes_on(stay: Stay, index: int, step: Step, slot: int, block_size: int, remarks: Remarks) -> bool:
    """Whether a slot goes on with the last stay of its request; what of that no case shows is told."""
    difference = _difference(stay, step, slot, block_size)
    held, cached = stay.rows[-1].length, int(step.cached[slot])
    told = f"slot {slot} has {cached:,} tokens cached and its request held {held:,} before"
    again = "read as another sequence with the same data"
    if difference == "later":
        remarks.tell("later", f"{told}, are steps missing? {again}", step.place)
    if difference == "blocks":
        told = f"slot {slot} has other blocks than its request had before"
        is_next = stay.end == index
        kept = "a sequence keeps its blocks, but for those that get shared" if is_next else again
        remarks.tell("moved", f"{told}: {kept}", step.place)
        return is_next
    return difference is None


def _add(stay: Stay, index: int, step: Step, slot: int, block_size: int) -> None:
    """Adds the row of a slot to a stay, which waited in the steps that did not have it."""
    row = row_of(step, slot)
    if stay.rows:
        last = stay.rows[-1]
        if row.cached < last.length:
            # Tokens of a prompt are not taken back.
            stay.rows[-1] = Row(Kind.DRAFT, last.cached, last.new)
            stay.drafts = True
        while stay.end < index:
            stay.add(Row(Kind.PAUSED, cached=row.cached), None, step.blocks(slot, row.cached, block_size))
    stay.is_guessed = bool(step.is_guessed[slot])
    if stay.is_guessed and stay.drafts:
        row = Row(Kind.DRAFT, row.cached, row.new)
        stay.is_guessed = False
    stay.add(row, slot, step.blocks(slot, row.length, block_size))


def _tell_guesses(steps: Sequence[Step], stays: Sequence[Stay], remarks: Remarks) -> None:
    """A remark on several new tokens that may be a chunk or a draft."""
    guessed: dict[int, list[int]] = {}
    for stay in stays:
        for number, (row, slot) in enumerate(zip(stay.rows, stay.found_in, strict=True)):
            index = stay.begin + number
            if slot is not None and steps[index].is_guessed[slot] and row.kind is Kind.HIT:
                guessed.setdefault(index, []).append(slot)
    for index, slots in sorted(guessed.items()):
        word = "slot" if len(slots) == 1 else "slots"
        told = (
            f"{word} {some(sorted(slots))}: several new tokens behind cached ones are read as hit; "
            "num_prompt_tokens would tell drafts from them"
        )
        remarks.tell("guessed", told, steps[index].place)


def place(stays: Sequence[Stay], remarks: Remarks) -> None:
    """Gives every stay a slot and a data key.

    It gets the slot that it begins in, unless another one holds it still, or held it in the step before: what
    begins with a history needs a slot that was empty. Otherwise it gets the first that can be.
    """
    free_from: dict[int, int] = {}
    for begin in sorted({stay.begin for stay in stays}):
        waiting = []
        for stay in (stay for stay in stays if stay.begin == begin):
            if _can_have(stay, stay.first_slot, free_from):
                _give(stay, stay.first_slot, free_from)
            else:
                waiting.append(stay)
        for stay in waiting:
            slot = 0
            while not _can_have(stay, slot, free_from):
                slot += 1
            _give(stay, slot, free_from)
    _tell_slots(stays, remarks)
    _give_keys(stays)


def _can_have(stay: Stay, slot: int, free_from: dict[int, int]) -> bool:
    if slot not in free_from:
        return True
    needs_empty = stay.rows[0].cached > 0
    return free_from[slot] + needs_empty <= stay.begin


def _give(stay: Stay, slot: int, free_from: dict[int, int]) -> None:
    stay.slot = slot
    free_from[slot] = stay.end


def _tell_slots(stays: Sequence[Stay], remarks: Remarks) -> None:
    moved = [stay for stay in stays if any(slot not in (None, stay.slot) for slot in stay.found_in)]
    if moved:
        told = f"{len(moved):,} of {len(stays):,} sequences stand in another slot than in the dump"
        why = "a sequence keeps its slot, and begins with a history only where a slot was empty before"
        remarks.tell("slots", f"{told}: {why}")


def _give_keys(stays: Sequence[Stay]) -> None:
    """A key for each request: the slot where it is the first there, else a number that is no slot's."""
    of_request: dict[int, int] = {}
    taken: set[int] = set()
    beyond = 1 + max((stay.slot for stay in stays), default=0)
    for stay in stays:
        key = None if stay.request is None else of_request.get(stay.request)
        if key is None:
            key = stay.slot
            if key in taken:
                key, beyond = beyond, beyond + 1
            taken.add(key)
        if stay.request is not None:
            of_request[stay.request] = key
        stay.key = key
