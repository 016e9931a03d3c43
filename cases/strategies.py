"""Hypothesis strategies: any valid case, and every part of one.

    @given(cases(operator="mla_decode"))
    def test_...(case): ...

What they draw is not canonical: keys, tags and options may say what holds anyway, lists may repeat one
value. `Case` brings it into form. The module needs hypothesis: only tests and `mla-harness fuzz` import it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from cases.blocks import blocks_needed
from cases.case import Case
from cases.contract import Operator, contract_of, operators
from cases.engine import random_schedule
from cases.errors import CaseError, RuleError
from cases.models import load_model, model_names
from cases.options import Options, OptionSpec, specs
from cases.rows import MAX_DIGITS, MAX_LENGTH, Kind, Row
from cases.schedule import Sequence, Slots, sequences

MAX_LAYERS = 4
"""Layers of a drawn case: enough for every list to differ at its ends and within."""

_EDGES = (15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 1024, 8193)
"""Lengths around the ends of blocks and of tiles of keys."""

_SLOT_KINDS = tuple(kind for kind in Kind if kind is not Kind.PAD)
_KINDS_OF_ANY_SLOT = (Kind.PREFILL, Kind.IDLE)
_CONTINUING_KINDS = (Kind.HIT, Kind.DECODE, Kind.DRAFT, Kind.PAUSED)


@st.composite
def rows(
    draw: DrawFn,
    kinds: tuple[Kind, ...] = tuple(Kind),
    *,
    min_cached: int = 1,
    max_cached: int = MAX_LENGTH,
    max_length: int = MAX_LENGTH,
) -> Row:
    """A row of one of the kinds, with or without tag and key.

    Args:
        kinds: the kinds to draw from; at least one must have room for its lengths.
        min_cached: fewest cached tokens, for the kinds that have any.
        max_cached: most cached tokens.
        max_length: most tokens, cached and new together.
    """
    room = [kind for kind in kinds if "cached" not in kind.lengths or min_cached + _least(kind) <= max_length]
    kind = draw(st.sampled_from(room))
    cached = new = 0
    if "cached" in kind.lengths:
        cached = draw(_lengths(min_cached, min(max_cached, max_length - _least(kind))))
    if "new" in kind.lengths:
        new = draw(_lengths(1, max_length - cached))
    if kind in (Kind.IDLE, Kind.PAD):
        return Row(kind, cached, new)
    return Row(kind, cached, new, tag=draw(st.none() | _TAGS), key=draw(st.none() | _KEYS))


@st.composite
def steps(
    draw: DrawFn, *, max_steps: int = 3, max_slots: int = 6, max_length: int = MAX_LENGTH
) -> tuple[tuple[Row, ...], ...]:
    """Successive steps of rows: sequences start, continue, lose drafts and end.

    Args:
        max_steps: most steps; there is at least one.
        max_slots: most slots of a step, padding not counted.
        max_length: most tokens of a row, cached and new together.
    """
    drawn: tuple[tuple[Row, ...], ...] = ()
    for _ in range(draw(st.integers(1, max_steps))):
        held = sequences(drawn)[-1] if drawn else ()
        drawn += (draw(_steps_after(held, max_slots, max_length)),)
    return drawn


@st.composite
def schedules(
    draw: DrawFn, *, max_steps: int = 8, max_slots: int = 4, max_tokens: int = 100, computed: int = 0
) -> tuple[tuple[Row, ...], ...]:
    """The steps of an engine that serves random requests: see `cases/engine.py`.

    Args:
        max_steps: most steps.
        max_slots: most requests at a time.
        max_tokens: most tokens of a prompt.
        computed: as in `random_schedule`.
    """
    return random_schedule(
        lambda least, most: draw(st.integers(least, most)),
        steps=draw(st.integers(1, max_steps)),
        slots=draw(st.integers(1, max_slots)),
        tokens=draw(st.integers(1, max_tokens)),
        computed=computed,
    )


@st.composite
def options(draw: DrawFn, keys: tuple[str, ...] | None = None) -> Options:
    """Options with any of the keys set: one value or a list in per-layer ones.

    Args:
        keys: the keys that may be set; default all.
    """
    chosen = [key for key in (specs() if keys is None else keys) if draw(st.booleans())]
    values: dict[str, Any] = {}
    if "layers" in chosen:
        values["layers"] = draw(st.integers(1, MAX_LAYERS))
    layers = values.get("layers", 1)
    for key in chosen:
        spec = specs()[key]
        if spec.per_layer:
            count = draw(st.sampled_from([1, layers]))
            values[key] = draw(st.tuples(*[_values(spec)] * count))
        elif key not in ("layers", "tp"):
            values[key] = draw(_values(spec))
    if "tp" in chosen:
        heads = load_model(values.get("model", Options().model)).num_attention_heads
        values["tp"] = draw(st.sampled_from([size for size in range(1, heads + 1) if heads % size == 0]))
    return Options(**values)


@st.composite
def cases(
    draw: DrawFn,
    operator: str | None = None,
    *,
    max_steps: int = 3,
    max_slots: int = 6,
    max_length: int = MAX_LENGTH,
) -> Case:
    """A valid case; where an operator is named, one that its contract accepts.

    Args:
        operator: name of an operator that has a contract; default any name, with every option.
        max_steps: as in `steps`; a named operator is judged on one, or plays a schedule.
        max_slots: as in `steps`.
        max_length: as in `steps`.
    """
    if operator is None:
        name = draw(st.sampled_from(sorted(operators())) | _OPERATORS)
        drawn = draw(options())
    else:
        name, max_steps = operator, 1
        drawn = draw(options(operators()[operator].options))
    if operator is not None:
        drawn = _accepted(draw, operators()[operator], drawn)
    if operator is not None and operators()[operator].is_stack:
        drawn = replace(drawn, heads=drawn.heads[:1], block=drawn.block[:1])
        if load_model(drawn.model).model_type is None:
            drawn = replace(drawn, model=Options().model)
        walked = draw(schedules(max_slots=max_slots, computed=drawn.block[0]))
    else:
        walked = draw(steps(max_steps=max_steps, max_slots=max_slots, max_length=max_length))
    if operator is not None and drawn.cache != Options().cache:
        # What no operator takes: fp8 without scales, and packed rows of another dtype.
        kinds = tuple("packed" if kind == "fp8" else kind for kind in drawn.cache)
        drawn = replace(drawn, cache=kinds, dtype="bf16" if "packed" in kinds else drawn.dtype)
    if drawn.table == "none" and any(row.cached for step in walked for row in step):
        drawn = replace(drawn, table="given")
    if drawn.pool is not None:
        canonical = Case(name, walked, replace(drawn, pool=None)).steps
        needed = max(blocks_needed(canonical, size) for size in drawn.block)
        pool = needed + draw(st.integers(0, 9))
        drawn = replace(drawn, pool=pool if specs()["pool"].accepts(pool) else None)
    return Case(name, walked, drawn)


@dataclass(frozen=True)
class Scale:
    """How large the cases may be that `batches` draws: what a lane judges in a moment.

    Attributes:
        slots: rows of a step. length: tokens of a row, cached and new. heads: query heads of a layer.
        layers: layers of a case. keys: entries of a list of keys.
    """

    slots: int = 4
    length: int = 300
    heads: int = 4
    layers: int = 3
    keys: int = 150


@st.composite
def batches(draw: DrawFn, operator: str, scale: Scale) -> Case:
    """A case as engines make them, of one operator: lengths mostly where something ends.

    That is around a block, a few blocks and 8 or 16 of them, a tile of keys, and a window; head counts mostly
    around a tile of heads. Every other option stands at its default more often than not. What a contract
    refuses all the same is not drawn.
    """
    contract = operators()[operator]
    layers = draw(st.sampled_from([1, 1, 1, *range(2, scale.layers + 1)]))
    blocks = draw(_per_layer(st.sampled_from([64, 64, 32, 16, 128, 1, 8, 48]), layers))
    windows = draw(_per_layer(st.sampled_from([0, 1, blocks[0], blocks[0] + 1, 63, 65, 100]), layers))
    ends = {number * blocks[0] for number in (1, 2, 3, 4, 8, 16, 32)}
    ends |= {32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, *windows}
    around = _around(ends, scale.length - 1)
    lengths = st.sampled_from(around) | st.integers(1, 9) | st.integers(1, scale.length - 1)
    heads = st.sampled_from(_around(_HEAD_TILES, scale.heads)) | st.integers(1, scale.heads)
    rows = _batch_rows(lengths, scale)
    drawn = draw(schedules(computed=blocks[0]) if contract.is_stack else st.tuples(rows))
    models = [name for name in model_names() if not contract.is_stack or load_model(name).model_type]
    rare: dict[str, SearchStrategy[Any]] = {
        "model": st.sampled_from(models),
        "tp": st.sampled_from([1, 2, 4]),
        "splits": st.integers(1, 9),
        "topk": st.integers(1, scale.keys),
        **{key: _values(specs()[key]) for key in _WORDS},
    }
    chosen: dict[str, Any] = {
        "layers": 1 if contract.is_stack else layers,
        "heads": draw(_per_layer(heads, layers)),
        "block": blocks,
        "window": windows,
        "topk": scale.keys,
        "seed": draw(st.integers(0, 99)),
    }
    for key, values in rare.items():
        if draw(st.integers(0, 3)) == 0:
            value = draw(values)
            chosen[key] = (value,) if specs()[key].per_layer else value
    if contract.is_stack:
        chosen |= {key: chosen[key][:1] for key in ("heads", "block", "window")}
    if any(row.cached for step in drawn for row in step):
        chosen.pop("table", None)
    taken = {key: value for key, value in chosen.items() if key in contract.options}
    try:
        case = Case(operator, drawn, _accepted(draw, contract, Options(**taken)))
        contract_of(case)
    except (RuleError, CaseError):
        reject()
    return case


_HEAD_TILES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Heads that kernels work on at a time."""


def _around(ends: Iterable[int], most: int) -> list[int]:
    """The numbers from 1 to `most` that are an end, one less or one more."""
    return sorted({number for end in ends for number in (end - 1, end, end + 1) if 1 <= number <= most})


_WORDS = ("dtype", "cache", "scale_fmt", "data", "pages", "tail", "poison", "strided", "table")


def _per_layer(values: SearchStrategy[Any], layers: int) -> SearchStrategy[tuple[Any, ...]]:
    """One value for all layers, or one a layer."""
    return st.tuples(values) | st.tuples(*[values] * layers)


@st.composite
def _batch_rows(draw: DrawFn, lengths: SearchStrategy[int], scale: Scale) -> tuple[Row, ...]:
    """The rows of one step; padding behind them now and then."""
    few = st.integers(1, 9)
    rows: list[Row] = []
    for _ in range(draw(st.integers(0, scale.slots))):
        kind = draw(st.sampled_from(_SLOT_KINDS))
        cached = draw(lengths) if "cached" in kind.lengths else 0
        new = 0
        if "new" in kind.lengths:
            new = min(draw(few if kind is Kind.DRAFT else lengths), scale.length - cached)
        tag = draw(st.sampled_from([None, None, None, "sys"])) if cached else None
        rows += [Row(kind, cached, new, tag=tag)] * draw(st.sampled_from([1, 1, 1, 2, 3]))
    rows = rows[: scale.slots]
    if draw(st.integers(0, 2)) == 0:
        rows.append(Row(Kind.PAD, new=draw(few)))
    return tuple(rows)


def _accepted(draw: DrawFn, operator: Operator, drawn: Options) -> Options:
    """Drawn options with a model that the operator has, and KV heads that the query heads are groups of."""
    if "kv_heads" not in operator.options:
        has_latents = load_model(drawn.model).has_latents
        return drawn if has_latents else replace(drawn, model=Options().model, tp=1)
    heads = drawn.heads or (load_model(drawn.model).num_attention_heads // drawn.tp,)
    most = specs()["kv_heads"].maximum
    # One for all ranks, one for each, one for every head.
    choices = [
        [count for count in (1, drawn.tp, own * drawn.tp) if count <= most]
        for own in (heads if len(heads) > 1 else heads[:1])
    ]
    return replace(drawn, kv_heads=tuple(draw(st.sampled_from(counts)) for counts in choices))


_OPERATORS = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
_TAGS = st.sampled_from(["sys", "a", "b2"]) | st.from_regex(r"[a-z][a-z0-9]{0,5}", fullmatch=True)
_KEYS = st.integers(0, 7) | st.integers(0, 10**MAX_DIGITS - 1)


def _least(kind: Kind) -> int:
    """The fewest new tokens of a row of that kind."""
    return 0 if kind is Kind.PAUSED else 1


@st.composite
def _lengths(draw: DrawFn, least: int, most: int) -> int:
    """A length within bounds: near either, at an edge, or any."""
    # Not `st.one_of`: it merges equal branches or not, as a cache has them, and draws would not repeat.
    edges = [length for length in _EDGES if least <= length <= most]
    ranges = [(least, min(most, least + 7)), (max(least, most - 3), most), (least, most)]
    choice = draw(st.integers(0, len(ranges)))
    if choice < len(ranges):
        return draw(st.integers(*ranges[choice]))
    return draw(st.sampled_from(edges or [least]))


def _values(spec: OptionSpec) -> SearchStrategy[str | int]:
    """Every value of an option; small integers more often."""
    if spec.is_name:
        return st.sampled_from(model_names())
    if spec.choices is not None:
        return st.sampled_from(spec.choices)
    return st.integers(spec.minimum, spec.minimum + 3) | _lengths(spec.minimum, spec.maximum)


@st.composite
def _steps_after(draw: DrawFn, held: Slots, max_slots: int, max_length: int) -> tuple[Row, ...]:
    """One step that may follow one after which the slots hold these sequences."""
    slots = draw(st.integers(0, max_slots))
    step: list[Row] = []
    while len(step) < slots:
        sequence = _holder(held, len(step))
        if sequence is not None and draw(st.booleans()):
            step.append(draw(_continuations(sequence, max_length)))
            continue
        kinds = _SLOT_KINDS if sequence is None else _KINDS_OF_ANY_SLOT
        row = draw(rows(kinds, max_length=max_length))
        for _ in range(draw(st.integers(1, 3))):
            if len(step) < slots and (row.kind in _KINDS_OF_ANY_SLOT or _holder(held, len(step)) is None):
                step.append(row)
    if draw(st.booleans()):
        step.append(draw(rows((Kind.PAD,), max_length=max_length)))
    return tuple(step)


@st.composite
def _continuations(draw: DrawFn, sequence: Sequence, max_length: int) -> Row:
    """A row that continues a sequence and repeats its tag and key, or leaves them out."""
    row = draw(
        rows(
            _CONTINUING_KINDS,
            min_cached=sequence.floor,
            max_cached=sequence.held,
            max_length=max_length,
        )
    )
    tag, key = draw(st.sampled_from([None, sequence.tag])), draw(st.sampled_from([None, sequence.key]))
    return replace(row, tag=tag, key=key)


def _holder(held: Slots, slot: int) -> Sequence | None:
    return held[slot] if slot < len(held) else None
