"""Dumps of an engine's steps as a case, and what of them a case cannot say.

Lengths become rows, rows of successive steps sequences (`harness/dump_stays.py`). Full blocks that sequences
share become tags where the language has that sharing. Physical block ids, contents and names do not matter to
a case: it lays out and fills its own.

What contradicts itself is refused; what is legal in an engine and not in the language is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cases import Case, Kind, Options, Row
from cases.contract import contract_of, operators
from cases.errors import CaseError
from cases.models import model_names
from cases.options import specs
from harness.dump_file import Dump, Int64
from harness.dump_stays import Stay, follow, place
from harness.dump_step import OPTIONS, Given, Remarks, Step, read_step, slots_named, table_entries
from harness.plan import UsageError

MAX_ROWS = 2**18
"""Of all steps together."""

MAX_ENTRIES = 2**26
"""Of the block tables of all steps together, as far as rows need them."""


@dataclass
class Imported:
    """A case and, one sentence each, what the dumps say and the case does not."""

    case: Case
    remarks: list[str]


def import_case(dumps: Iterable[Dump], operator: str) -> Imported:
    """The case of a dump, or of the dumps of successive steps.

    Raises:
        UsageError: a name is missing, a dump contradicts itself or another, there is more than a case can
            have, or the operator does not take such a case.
    """
    remarks = Remarks()
    steps = _steps(dumps, remarks)
    options = _options(steps[0].given, operator, remarks)
    block_size = int(steps[0].given.get("block_size", options.block[0]))
    stays = follow(steps, block_size, remarks)
    place(stays, remarks)
    _give_tags(stays, block_size)
    for index, step in enumerate(steps):
        _tell_blocks(index, step, stays, block_size, remarks)
    case = Case(operator, _rows(steps, stays), options)
    try:
        contract_of(case)
    except CaseError as error:
        advice = ": import one of its files" if len(steps) > 1 and "one step" in error.message else ""
        raise UsageError(f"{error.message}{advice}") from None
    told = "everything else is the case's own: data, page order, poison; a draft of one token reads as decode"
    remarks.tell("own", told)
    return Imported(case, remarks.sentences())


def _steps(dumps: Iterable[Dump], remarks: Remarks) -> list[Step]:
    """Every step, if they belong together and are not too many."""
    steps: list[Step] = []
    rows = entries = 0
    last: int | None = None
    for dump in dumps:
        step = read_step(dump, remarks)
        if steps:
            _check_belongs(steps[0], step)
            if step.tokens and _has_lengths_of(step, steps[-1]):
                told = "it has the lengths of the step before: was one step captured twice?"
                remarks.tell("twice", told, dump.place)
            if dump.step is not None and last is not None and dump.step > last + 1:
                told = f"{dump.step - last - 1:,} before it are missing: the case goes on from step {last}"
                remarks.tell("missing", told, dump.place)
        steps.append(step)
        last = dump.step
        rows += step.slots
        entries += step.table.size if step.table is not None else 0
        if rows > MAX_ROWS or entries > MAX_ENTRIES:
            told = f"{MAX_ROWS:,} rows or {MAX_ENTRIES:,} blocks of rows"
            raise UsageError(f"{dump.place}until here there are more than {told}: choose with --steps")
    return steps


def _has_lengths_of(step: Step, other: Step) -> bool:
    return np.array_equal(step.cached, other.cached) and np.array_equal(step.new, other.new)


def _check_belongs(first: Step, step: Step) -> None:
    """Refuses a step that is not of the session that began with another."""
    for name in sorted(step.given):
        if step.given[name] != first.given.get(name):
            told = f"{name} is {step.given[name]}, and the first step says {first.given.get(name, 'nothing')}"
            raise UsageError(f"{step.place}{told}: are these of one run?")
    if (first.requests is None) != (step.requests is None):
        told = "ids of requests, the first step none" if first.requests is None else "no ids of requests"
        raise UsageError(f"{step.place}it has {told}: give them in all steps, or in none")


def _rows(steps: Sequence[Step], stays: Sequence[Stay]) -> tuple[tuple[Row, ...], ...]:
    """The rows of the case: as many slots as a step of the dump has, and those of stays beyond them."""
    rows = [[Row(Kind.IDLE)] * step.slots for step in steps]
    for stay in stays:
        for number, row in enumerate(stay.rows):
            of_step = rows[stay.begin + number]
            of_step += [Row(Kind.IDLE)] * (stay.slot + 1 - len(of_step))
            of_step[stay.slot] = replace(row, tag=stay.tag, key=stay.key) if number == 0 else row
    for of_step, step in zip(rows, steps, strict=True):
        if step.padding:
            of_step.append(Row(Kind.PAD, new=step.padding))
    return tuple(map(tuple, rows))


# ---- blocks --------------------------------------------------------------------------------------


class _Group:
    """Stays that may have one tag: in every step they share what the tag says."""

    def __init__(self, block_size: int) -> None:
        self.stays: list[Stay] = []
        self.firsts: set[int] = set()
        self._block_size = block_size
        # Step -> full blocks of the member that has most: what begins as it does begins as all of them do.
        self._longest: dict[int, Int64] = {}

    def shared_by(self, stay: Stay) -> int | None:
        """How many blocks a stay shares as the tag would say; None where it does not share one of them."""
        shared = 0
        for step, own in _full_blocks(stay, self._block_size):
            other = self._longest.get(step, own[:0])
            count = min(len(own), len(other))
            if not np.array_equal(own[:count], other[:count]):
                return None
            shared += count
        return shared

    def add(self, stay: Stay) -> None:
        """Makes a stay a member."""
        self.stays.append(stay)
        for step, own in _full_blocks(stay, self._block_size):
            self.firsts.add(int(own[0]))
            if len(own) > len(self._longest.get(step, ())):
                self._longest[step] = own

    def join(self, other: _Group) -> None:
        """Takes over the members of another group if all of them can be, which leaves it without any."""
        if all(self.shared_by(stay) is not None for stay in other.stays):
            for stay in other.stays:
                self.add(stay)
            other.stays = []


def _full_blocks(stay: Stay, block_size: int) -> Iterator[tuple[int, Int64]]:
    """(step, blocks that a tag would share) of each row that has any."""
    for number, blocks in enumerate(stay.blocks):
        step = stay.begin + number
        count = stay.full_blocks(step, block_size)
        if blocks is not None and count:
            yield step, blocks[:count]


def _give_tags(stays: Sequence[Stay], block_size: int) -> None:
    """Gives the stays that share their full blocks as the language shares them a tag."""
    groups: list[_Group] = []
    by_block: dict[int, list[_Group]] = {}
    # Of those that begin together the longest comes first.
    for stay in sorted(stays, key=lambda stay: (stay.begin, -stay.tagged)):
        firsts = {int(blocks[0]) for _, blocks in _full_blocks(stay, block_size)}
        known = {id(group): group for first in firsts for group in by_block.get(first, [])}.values()
        fitting = [group for group in known if group.stays and group.shared_by(stay)]
        group = fitting[0] if fitting else _Group(block_size)
        group.add(stay)
        for other in fitting[1:]:
            group.join(other)
        groups += [] if fitting else [group]
        for first in group.firsts:
            if group not in by_block.setdefault(first, []):
                by_block[first].append(group)
    found = [group for group in groups if len(group.stays) > 1]
    found.sort(key=lambda group: min((stay.begin, stay.slot) for stay in group.stays))
    for number, group in enumerate(found):
        for stay in group.stays:
            stay.tag = f"p{number}"


def _tell_blocks(index: int, step: Step, stays: Sequence[Stay], block_size: int, remarks: Remarks) -> None:
    """A remark on blocks shared in another way than tags say."""
    if step.table is None:
        return
    slots, places = table_entries(step, block_size)
    ids = step.table[slots, places]
    # What a tag shares is of the tag, everything else of its slot.
    owner_of = -1 - np.arange(step.slots)
    shared_of = np.zeros(step.slots, np.int64)
    for stay in stays:
        slot = stay.found_in[index - stay.begin] if stay.begin <= index < stay.end else None
        if slot is not None and stay.tag is not None:
            owner_of[slot] = int(stay.tag[1:])
            shared_of[slot] = stay.full_blocks(index, block_size)
    owner = np.where(places < shared_of[slots], owner_of[slots], -1 - slots)
    distinct = np.unique(np.stack([ids, owner, places]), axis=1)
    owned, counts = np.unique(distinct[0], return_counts=True)
    otherwise = np.isin(ids, owned[counts > 1]) & step.is_block(ids)
    if otherwise.any():
        told = "the language shares all full cached blocks of two rows as far as both have them, or none"
        sentence = f"{slots_named(slots[otherwise])} share blocks otherwise than tags can say: {told}"
        remarks.tell("shared", sentence, step.place)


# ---- options -------------------------------------------------------------------------------------


def _options(given: Given, operator: str, remarks: Remarks) -> Options:
    changes: dict[str, Any] = {}
    legal = operators()[operator].options if operator in operators() else tuple(specs())
    for name, option in OPTIONS.items():
        value = given.get(name)
        if value is None:
            continue
        if option == "model" and value not in model_names():
            remarks.tell(name, f"there is no model {value!r}: the case's is {Options().model}")
        elif option not in legal:
            remarks.tell(name, f"{name} is not kept: {operator} has no option {option}")
        else:
            changes[option] = (value,) if specs()[option].per_layer else value
    if "block_size" not in given:
        remarks.tell("block_size", f"no block_size: the case's is {Options().block[0]}")
    if "num_blocks" in given:
        told = f"pool={given['num_blocks']}"
        remarks.tell("num_blocks", f"the size of the pool is not kept: add option {told} for ids as large")
    return Options(**changes)
