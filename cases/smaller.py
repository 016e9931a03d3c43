"""Smaller cases: every way to take something away from a case, what takes most first.

What is left keeps its data: a row that moves to another slot keeps its sequence's key. A case that the
language refuses, because a pool got too small for its rows, say, is left out.

A way is a function Case -> Iterator[Case]; `WAYS` has them in the order in which a search does best to go
through them. None undoes what another did: each lessens the `size`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from typing import Any

from cases.case import Case
from cases.errors import RuleError
from cases.options import Options, specs
from cases.rows import Kind, Row
from cases.schedule import Sequence, sequences

Steps = tuple[tuple[Row, ...], ...]
Way = Callable[[Case], Iterator[Case]]

_DEFAULTS = Options()
_INTRICACY = {
    Kind.IDLE: 0,
    Kind.PAD: 0,
    Kind.PREFILL: 0,
    Kind.DECODE: 1,
    Kind.PAUSED: 1,
    Kind.HIT: 2,
    Kind.DRAFT: 2,
}


def size(case: Case) -> tuple[int, ...]:
    """How large a case is; every way makes it smaller.

    (rows of all steps, steps, layers, tokens cached or new, intricacy of the rows' kinds, query heads, other
    options that are set, sum of their numbers, tags and keys that are written)
    """
    rows = [row for step in case.steps for row in step]
    options = [getattr(case.options, key) for key in specs() if key != "heads"]
    defaults = [getattr(_DEFAULTS, key) for key in specs() if key != "heads"]
    changed = [value for value, default in zip(options, defaults, strict=True) if value != default]
    parts = [part for value in changed for part in (value if isinstance(value, tuple) else (value,))]
    return (
        len(rows),
        len(case.steps),
        len(case.layers),
        sum(row.length for row in rows),
        sum(_INTRICACY[row.kind] for row in rows),
        sum(_heads(case)),
        len(changed),
        len(parts) + sum(part for part in parts if isinstance(part, int)),
        sum((row.tag is not None) + (row.key is not None) for row in rows),
    )


def fewer_steps(case: Case) -> Iterator[Case]:
    """One step alone, the last first; the case without its last step; without its first."""
    last = len(case.steps) - 1
    if last > 0:
        for step in range(last, -1, -1):
            yield from _legal(case.one_step, step)
        yield from _legal(replace, case, steps=case.steps[:-1])
        yield from _legal(replace, case, steps=_named(case)[1:])


def fewer_rows(case: Case) -> Iterator[Case]:
    """Without the padding; without so many neighbouring slots, at first half of them, at last one."""
    if any(not row.is_slot for step in case.steps for row in step):
        bare = tuple(tuple(row for row in step if row.is_slot) for step in case.steps)
        yield from _legal(replace, case, steps=bare)
    steps = _named(case)
    slots = max(sum(row.is_slot for row in step) for step in steps)
    count = slots if slots == 1 else slots // 2
    while count > 0:
        for first in range(0, slots, count):
            last = min(first + count, slots)
            # Of neighbours that are alike, the others go on as if the first had gone.
            if first == 0 or any(step[first - count : first] != step[first:last] for step in steps):
                yield from without_slots(case, range(first, last))
        count //= 2


def without_slots(case: Case, slots: Collection[int]) -> Iterator[Case]:
    """The case without these slots, if it can be; the others move up and keep their data."""
    dropped = frozenset(slots)
    steps = tuple(
        tuple(row for slot, row in enumerate(step) if not row.is_slot or slot not in dropped)
        for step in _named(case)
    )
    yield from _legal(replace, case, steps=steps)


def merged_rows(case: Case) -> Iterator[Case]:
    """Of a single step: one slot less, another as much longer, for what shows at a total of many rows.

    Longer first by the tokens of the one that goes, then by its blocks: of these short rows have many.
    """
    if len(case.steps) > 1:
        return
    rows = _named(case)[0]
    for unit in (1, max(case.options.block)):
        for slot, row in enumerate(rows):
            for other, taken in enumerate(rows):
                if row.is_slot and row.kind.lengths and other != slot and taken.is_slot and taken.length:
                    yield from _legal(_merged, case, rows, slot, other, unit)


def fewer_layers(case: Case) -> Iterator[Case]:
    """One layer alone; all layers but one."""
    layers = case.options.layers
    if layers > 1:
        for index in range(layers):
            yield from _legal(case.one_layer, index)
        for index in range(layers) if layers > 2 else ():
            yield from _legal(_without_layer, case, index)


def fewer_tokens(case: Case) -> Iterator[Case]:
    """Every length 1, then half of it; then one after another shorter, to 1 and by less and less."""
    for shorter in (lambda _: 1, lambda length: (length + 1) // 2):
        yield from (found for found in _legal(_all_lengths, case, shorter) if found != case)
    for step, rows in enumerate(case.steps):
        for slot, row in enumerate(rows):
            for name in row.kind.lengths:
                for value in _below(getattr(row, name), least=1):
                    yield from _legal(_with_length, case, step, slot, name, value)


def plainer_rows(case: Case) -> Iterator[Case]:
    """Chunks without what they have cached, one token for several, slots empty that only hold a sequence."""
    for step, rows in enumerate(case.steps):
        for slot, row in enumerate(rows):
            for plainer in _plainer(row):
                changed = (*rows[:slot], plainer, *rows[slot + 1 :])
                yield from _legal(replace, case, steps=(*case.steps[:step], changed, *case.steps[step + 1 :]))


def fewer_heads(case: Case) -> Iterator[Case]:
    """One head a layer; then fewer, by less and less."""
    heads = _heads(case)
    for value in _below(max(heads), least=1):
        yield from _legal(case.with_options, heads=tuple(min(value, count) for count in heads))


def fewer_options(case: Case) -> Iterator[Case]:
    """Options left out; one value for all layers; smaller numbers. Some options have ways of their own."""
    for item in fields(Options):
        value = getattr(case.options, item.name)
        if item.name in ("model", "heads", "layers") or value == item.default:
            continue
        simpler: list[object] = [item.default]
        if isinstance(value, tuple):
            simpler += [(one,) for one in dict.fromkeys(value)] if len(value) > 1 else []
        elif isinstance(value, int):
            simpler += _below(value, least=specs()[item.name].minimum)
        # Ranks of another number would have other heads.
        heads = {"heads": _heads(case)} if item.name == "tp" else {}
        for other in simpler:
            yield from _legal(case.with_options, **heads, **{item.name: other})


def fewer_names(case: Case) -> Iterator[Case]:
    """Without tags and data keys, all of them, then one by one: other data, no shared blocks."""
    for name in ("tag", "key"):
        named = [
            (step, slot)
            for step, rows in enumerate(case.steps)
            for slot, row in enumerate(rows)
            if getattr(row, name) is not None
        ]
        for places in ([named] if len(named) > 1 else []) + [[place] for place in named]:
            steps = tuple(
                tuple(
                    _without_name(row, name) if (step, slot) in places else row
                    for slot, row in enumerate(rows)
                )
                for step, rows in enumerate(case.steps)
            )
            yield from _legal(replace, case, steps=steps)


def default_model(case: Case) -> Iterator[Case]:
    """The default model: last, for it is larger than most."""
    if case.options.model != _DEFAULTS.model:
        yield from _legal(case.with_options, model=_DEFAULTS.model, heads=_heads(case))


WAYS: tuple[Way, ...] = (
    fewer_steps,
    fewer_rows,
    merged_rows,
    fewer_layers,
    fewer_heads,
    fewer_tokens,
    plainer_rows,
    fewer_options,
    fewer_names,
    default_model,
)


def _legal(make: Callable[..., Case], *args: Any, **changes: Any) -> Iterator[Case]:
    """What `make` makes, unless the language refuses it."""
    try:
        yield make(*args, **changes)
    except RuleError:
        return


def _heads(case: Case) -> tuple[int, ...]:
    return tuple(layer.num_attention_heads for layer in case.layers)


def _below(value: int, *, least: int) -> Iterator[int]:
    """`least`, then value less 2^k, from the largest such step to 1: a search from below, then from above."""
    if value > least:
        yield least
    step = 1 << max(value - least, 1).bit_length() - 1
    while step > 0:
        if value - step > least:
            yield value - step
        step //= 2


def _merged(case: Case, rows: tuple[Row, ...], slot: int, other: int, unit: int) -> Case:
    """The case without one slot, and another longer by its tokens, rounded up to whole units."""
    row = rows[slot]
    name = row.kind.lengths[0]
    longer = _changed(row, name, getattr(row, name) + -(-rows[other].length // unit) * unit)
    left = (longer if at == slot else item for at, item in enumerate(rows) if at != other)
    return replace(case, steps=(tuple(left),))


def _changed(row: Row, length: str, value: int) -> Row:
    """The row with another length, `cached` or `new`."""
    return replace(row, cached=value) if length == "cached" else replace(row, new=value)


def _without_name(row: Row, name: str) -> Row:
    return replace(row, tag=None) if name == "tag" else replace(row, key=None)


def _named(case: Case) -> Steps:
    """The steps with every sequence's data key written where it begins, or goes on, and its tag."""
    return tuple(
        tuple(_named_row(row, held) for row, held in zip(step, slots, strict=True))
        for step, slots in zip(case.steps, sequences(case.steps), strict=True)
    )


def _named_row(row: Row, held: Sequence | None) -> Row:
    return row if held is None else replace(row, key=held.key, tag=held.tag)


def _without_layer(case: Case, index: int) -> Case:
    layers = case.options.layers
    changes = {
        key: values[:index] + values[index + 1 :]
        for key, spec in specs().items()
        if spec.per_layer
        for values in [getattr(case.options, key)]
        if len(values) == layers
    }
    return case.with_options(layers=layers - 1, **changes)


def _with_length(case: Case, step: int, slot: int, name: str, value: int) -> Case:
    """The case with another length of one row; what its sequence has cached later is that much less."""
    row = case.steps[step][slot]
    less = getattr(row, name) - value
    held = sequences(case.steps)
    steps = [list(rows) for rows in case.steps]
    steps[step][slot] = _changed(row, name, value)
    began = held[step][slot].began if held[step][slot] is not None else step  # type: ignore[union-attr]
    for later in range(step + 1, len(steps)):
        sequence = held[later][slot] if slot < len(held[later]) else None
        if sequence is None or sequence.began != began:
            break
        steps[later][slot] = replace(steps[later][slot], cached=steps[later][slot].cached - less)
    return replace(case, steps=tuple(map(tuple, steps)))


def _all_lengths(case: Case, shorter: Callable[[int], int]) -> Case:
    """Every length that is written as `shorter` makes it, where sequences can still go on from it."""
    for step, rows in enumerate(case.steps):
        for slot, row in enumerate(rows):
            goes_on = step > 0 and slot < len(case.steps[step - 1]) and "cached" in row.kind.lengths
            for name in row.kind.lengths:
                if name == "cached" and goes_on:
                    continue
                length = getattr(case.steps[step][slot], name)
                case = _with_length(case, step, slot, name, shorter(length))
    return case


def _plainer(row: Row) -> Iterator[Row]:
    if row.kind is Kind.HIT:
        yield Row(Kind.PREFILL, new=row.new, tag=row.tag, key=row.key)
    if row.kind in (Kind.HIT, Kind.DRAFT):
        for cached in dict.fromkeys((row.cached, row.length - 1)):
            yield Row(Kind.DECODE, cached=cached, tag=row.tag, key=row.key)
    if row.kind is Kind.PAUSED:
        yield Row(Kind.IDLE)
