"""How the rows of successive steps belong together: sequences that live in slots.

Slot i of a step continues the sequence that slot i held after the step before, unless it starts a new
one (`prefill`), frees the slot (`idle`, or the step has fewer rows), or admits a sequence with
history into a free slot. A continued row may leave out tag and key; what it states must agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cases.errors import RuleError
from cases.rows import Kind, Row


@dataclass(frozen=True)
class Sequence:
    """The sequence a slot holds during one step.

    Attributes:
        key: data key, fixed when the sequence begins.
        tag: name of its shared prefix, or None.
        tagged_tokens: how many of its first tokens are the tag's: those of the row that began the
            sequence, cached ones or, of a first chunk, new ones. 0 without a tag.
        began: the step in which the sequence began.
        held: tokens in the cache after the step, drafts included.
        floor: fewest tokens that the next step may find: less than `held` only after a draft, whose
            tokens may be rejected.
    """

    key: int
    tag: str | None
    tagged_tokens: int
    began: int
    held: int
    floor: int


Slots = tuple[Sequence | None, ...]


def sequences(steps: tuple[tuple[Row, ...], ...]) -> tuple[Slots, ...]:
    """For every step, the sequence in each slot (None for an idle slot).

    Raises:
        RuleError: a row that cannot follow the step before it.
    """
    held: Slots = ()
    walked = []
    for index, step in enumerate(steps):
        held = _play(index, step, held)
        walked.append(held)
    return tuple(walked)


def canonical_steps(steps: tuple[tuple[Row, ...], ...]) -> tuple[tuple[Row, ...], ...]:
    """The steps with every key and tag dropped that says only what holds anyway.

    Raises:
        RuleError: as `sequences`; also for padding that is not the one last row of its step.
    """
    for index, step in enumerate(steps):
        for slot, row in enumerate(step[:-1]):
            if not row.is_slot:
                raise RuleError("pad comes once and last in a step (rule V2)", step=index, slot=slot)
    before: Slots = ()
    canonical = []
    for step, after in zip(steps, sequences(steps), strict=True):
        rows = []
        for slot, row in enumerate(step):
            continued = _continued(row, before, slot)
            key = continued.key if continued else slot
            if row.key == key:
                row = replace(row, key=None)
            if continued and row.tag == continued.tag:
                row = replace(row, tag=None)
            rows.append(row)
        canonical.append(tuple(rows))
        before = after
    return tuple(canonical)


def _continued(row: Row, before: Slots, slot: int) -> Sequence | None:
    """The sequence that a row continues, or None where it begins one or holds none."""
    if row.kind in (Kind.IDLE, Kind.PAD, Kind.PREFILL) or slot >= len(before):
        return None
    return before[slot]


def _play(index: int, step: tuple[Row, ...], before: Slots) -> Slots:
    after: list[Sequence | None] = []
    for slot, row in enumerate(step):
        if row.kind in (Kind.IDLE, Kind.PAD):
            after.append(None)
            continue
        sequence = _continued(row, before, slot)
        if sequence is not None:
            _check_continues(index, slot, row, sequence)
        else:
            key = slot if row.key is None else row.key
            tagged = 0 if row.tag is None else row.cached or row.new
            sequence = Sequence(key, row.tag, tagged, began=index, held=0, floor=0)
        floor = row.cached if row.kind is Kind.DRAFT else row.length
        after.append(replace(sequence, held=row.length, floor=floor))
    return tuple(after)


def _check_continues(index: int, slot: int, row: Row, sequence: Sequence) -> None:
    if not sequence.floor <= row.cached <= sequence.held:
        span = f"{sequence.held}"
        if sequence.floor < sequence.held:
            span = f"{sequence.floor} to {sequence.held}"
        raise RuleError(
            f"slot {slot} holds {span} tokens after the step before, so C cannot be {row.cached}; "
            "put an idle step between to admit another sequence",
            step=index,
            slot=slot,
        )
    if row.key is not None and row.key != sequence.key:
        raise RuleError(
            f"slot {slot} continues a sequence with data key {sequence.key}, got .k{row.key}",
            step=index,
            slot=slot,
        )
    if row.tag is not None and row.tag != sequence.tag:
        known = "without a tag" if sequence.tag is None else f"with tag {sequence.tag}"
        raise RuleError(
            f"slot {slot} continues a sequence {known}, got @{row.tag}",
            step=index,
            slot=slot,
        )
