"""A dump of one step's metadata as lengths, padding and block tables of its slots.

Lengths are FastDeploy's (`seq_lens_encoder`, `seq_lens_decoder`, `seq_lens_this_time`), or vLLM's new tokens
and totals (`query_start_loc`, `seq_lens`), from which rows follow as in a batch-spec string. Vectors have
shape [B] or [B, 1]. What contradicts itself is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cases import Kind, Row
from cases.case import MAX_SLOTS
from cases.options import specs
from harness.capture import REQUESTS, SCALARS, is_metadata
from harness.dump_file import Dump, Int64, Stub, Values
from harness.plan import UsageError

MAX_TOKENS = 2**27
"""Of a step's new tokens, and of a row: more than the cache of one layer holds on any GPU."""

MAX_NAMED = 3
"""Slots or tokens that a remark names; the rest is counted."""

OPTIONS = {
    "block_size": "block",
    "num_attention_heads": "heads",
    "sliding_window": "window",
    "model": "model",
}
"""Name in a dump -> option."""

Given = dict[str, int | str]
"""What a dump says of all steps: block_size, num_blocks, model, ..."""


class Remarks:
    """What dumps say and a case does not: one sentence of each kind, whatever the number of steps."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}
        self._again: dict[str, int] = {}

    def tell(self, kind: str, sentence: str, place: str = "") -> None:
        """Adds a sentence; of those of a kind the first is kept, and others are counted.

        place: what stands before it, as `step 3: `.
        """
        if kind not in self._told:
            self._told[kind] = f"{place}{sentence}"
        elif place:
            self._again[kind] = self._again.get(kind, 0) + 1

    def sentences(self) -> list[str]:
        """All of them, in the order in which the kinds came."""
        return [
            text + (f" ({count:,} more like it)" if (count := self._again.get(kind)) else "")
            for kind, text in self._told.items()
        ]


@dataclass
class Step:
    """One step of a dump, over B slots.

    Attributes:
        place: what stands before a sentence about it.
        encoder, cached, new: [B] lengths, as FastDeploy's.
        is_guessed: [B] bool, several new tokens behind cached ones that nothing tells from drafts.
        rows_move: whether a request may stand in another row from step to step: vLLM's may, FastDeploy's not.
        padding: tokens behind the step's own that belong to no slot.
        given: what the dump says of all steps.
        requests: [B] the number of each slot's request, below 0 for none; None where the dump has no ids.
        table: [B, blocks] physical blocks, as many as the longest row needs; None where it cannot be read.
        table_name: what the dump calls it.
    """

    place: str
    encoder: Int64
    cached: Int64
    new: Int64
    is_guessed: Any
    rows_move: bool
    padding: int = 0
    given: Given = field(default_factory=dict)
    requests: Int64 | None = None
    table: Int64 | None = None
    table_name: str = "block_tables"

    @property
    def slots(self) -> int:
        """B."""
        return len(self.new)

    @property
    def tokens(self) -> int:
        """New tokens, without padding."""
        return int(self.new.sum())

    @property
    def length(self) -> Int64:
        """[B] tokens that each slot holds after the step."""
        return self.cached + self.new

    def is_block(self, ids: Int64) -> Any:
        """[n] bool, whether each id is one of a block."""
        num_blocks = self.given.get("num_blocks")
        return (ids >= 0) & (ids < num_blocks if isinstance(num_blocks, int) else True)

    def blocks(self, slot: int, tokens: int, block_size: int) -> Int64 | None:
        """The physical blocks of a slot's first tokens; None without a table."""
        return None if self.table is None else self.table[slot, : -(-tokens // block_size)]


def read_step(dump: Dump, remarks: Remarks) -> Step:
    """What a dump says of its step.

    Raises:
        UsageError: a name is missing, or the dump contradicts itself.
    """
    try:
        return _read(dump, remarks)
    except UsageError as error:
        raise UsageError(f"{dump.place}{error}") from None


def _read(dump: Dump, remarks: Remarks) -> Step:
    values = {name: value for name, value in dump.values.items() if is_metadata(name)}
    read = _fastdeploy if _is_fastdeploy(values) else _vllm
    step = read(values, dump.place, remarks)
    _check(step)
    step.given = _given(values)
    step.padding = _padding(values, step, remarks)
    step.requests = _requests(values, step)
    _read_table(values, step, remarks)
    others = sorted(name for name in dump.values if not is_metadata(name))
    if others:
        told = f"not read: {some(others)}"
        remarks.tell(told, told)
    return step


# ---- lengths -------------------------------------------------------------------------------------


def _is_fastdeploy(values: Values) -> bool:
    """Whose names a dump has.

    Raises:
        UsageError: both's, or neither's.
    """
    ours = {"seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time"} & values.keys()
    theirs = {"query_start_loc", "seq_lens", "num_computed_tokens"} & values.keys()
    if ours and theirs:
        both = f"FastDeploy's {min(ours)} and vLLM's {min(theirs)}"
        raise UsageError(f"the dump has both {both}: leave one out")
    if not ours and not theirs:
        raise UsageError(
            "the dump must have seq_lens_encoder, seq_lens_decoder and seq_lens_this_time, or "
            f"query_start_loc and seq_lens, got {some(sorted(values)) or 'none of the names of a step'}"
        )
    return bool(ours)


def _fastdeploy(values: Values, place: str, remarks: Remarks) -> Step:
    encoder = _vector(values, "seq_lens_encoder")
    cached = _vector(values, "seq_lens_decoder", len(encoder))
    starts = _starts(values, "cu_seqlens_q", len(encoder)) if "cu_seqlens_q" in values else None
    if "seq_lens_this_time" in values or starts is None:
        new = _vector(values, "seq_lens_this_time", len(encoder))
        expected = np.concatenate([[0], np.cumsum(new)])
        if starts is not None and (entry := _first(starts != expected)) is not None:
            told = f"{expected[entry]:,}, the sum of seq_lens_this_time before it, got {starts[entry]:,}"
            raise UsageError(f"cu_seqlens_q[{entry}] must be {told}")
    else:
        new = np.diff(starts)
    if (slot := _first((encoder > 0) & (encoder != new))) is not None:
        told = f"seq_lens_encoder {encoder[slot]:,} and seq_lens_this_time {new[slot]:,}"
        raise UsageError(f"slot {slot} contradicts itself: {told} must be equal where the former is not 0")
    step = Step(place, encoder, cached, new, np.zeros(len(new), bool), rows_move=False)
    if "cu_seqlens_k" in values:
        keys = _starts(values, "cu_seqlens_k", step.slots)
        if not np.array_equal(keys, np.concatenate([[0], np.cumsum(step.length)])):
            told = "cu_seqlens_k is not the sum of cached and new tokens; the case's own is"
            remarks.tell("cu_seqlens_k", told, place)
    unsaid = np.flatnonzero((encoder == 0) & (cached == 0) & (new > 0))
    if len(unsaid):
        told = "new tokens, seq_lens_encoder 0 and nothing cached (rule V1): read as prefill"
        remarks.tell("V1", f"{slots_named(unsaid)}: {told}", place)
    return step


def _vllm(values: Values, place: str, remarks: Remarks) -> Step:
    slots = _number(values, "num_reqs")
    starts = _starts(values, "query_start_loc", slots)
    slots = len(starts) - 1
    new = np.diff(starts)
    if "seq_lens" in values:
        length = _vector(values, "seq_lens", slots, is_padded="num_reqs" in values)
    else:
        length = _vector(values, "num_computed_tokens", slots, is_padded="num_reqs" in values) + new
    if (slot := _first(length < new)) is not None:
        told = f"{length[slot]:,} tokens after a step that adds {new[slot]:,}"
        raise UsageError(f"slot {slot} contradicts itself: seq_lens and query_start_loc give it {told}")
    cached = length - new
    if "num_computed_tokens" in values:
        computed = _vector(values, "num_computed_tokens", slots, is_padded="num_reqs" in values)
        if (slot := _first(computed != cached)) is not None:
            told = f"{cached[slot]:,}, seq_lens less the new tokens, got {computed[slot]:,}"
            raise UsageError(f"num_computed_tokens[{slot}] must be {told}")
    is_guessed = np.zeros(slots, bool)
    if "num_prompt_tokens" in values:
        prompt = _vector(values, "num_prompt_tokens", slots, is_padded="num_reqs" in values)
        is_prefill = cached < prompt
    else:
        is_prefill = (cached == 0) | (new > 1)
        is_guessed = (cached > 0) & (new > 1)
    return Step(place, np.where(is_prefill, new, 0), cached, new, is_guessed, rows_move=True)


def _check(step: Step) -> None:
    """Refuses what no case can have as many slots or tokens as."""
    if step.slots > MAX_SLOTS:
        raise UsageError(f"a step has at most {MAX_SLOTS:,} slots, got {step.slots:,}")
    if (slot := _first(step.length > MAX_TOKENS)) is not None:
        told = f"{step.cached[slot]:,} cached and {step.new[slot]:,} new tokens"
        raise UsageError(f"slot {slot} has {told}, more than {MAX_TOKENS:,}: are these lengths?")
    if step.tokens > MAX_TOKENS:
        raise UsageError(
            f"the step has {step.tokens:,} new tokens, more than {MAX_TOKENS:,}: are these lengths?"
        )


def row_of(step: Step, slot: int) -> Row:
    """What a slot does, without tag and key."""
    cached, new = int(step.cached[slot]), int(step.new[slot])
    if new == 0:
        return Row(Kind.PAUSED, cached=cached) if cached else Row(Kind.IDLE)
    if not cached:
        return Row(Kind.PREFILL, new=new)
    if step.encoder[slot]:
        return Row(Kind.HIT, cached, new)
    return Row(Kind.DECODE, cached) if new == 1 else Row(Kind.DRAFT, cached, new)


def _padding(values: Values, step: Step, remarks: Remarks) -> int:
    """Padding tokens: those behind the step's own that belong to no slot."""
    ids = _array(values, "batch_id_per_token")
    slots = _array(values, "slot_mapping")
    for name, array in (("batch_id_per_token", ids), ("slot_mapping", slots)):
        if array is not None and len(array) < step.tokens:
            raise UsageError(f"{name} has {len(array):,} tokens and the lengths give {step.tokens:,}")
    if ids is not None:
        expected = np.repeat(np.arange(step.slots), step.new)
        if (token := _first(ids[: step.tokens] != expected)) is not None:
            told = f"{expected[token]}, the slot that the lengths give the token, got {ids[token]}"
            raise UsageError(f"batch_id_per_token[{token}] must be {told}")
    name, behind = "batch_id_per_token", ids
    if ids is None:
        name, behind = "slot_mapping", slots
    if behind is None:
        return 0
    behind = behind[step.tokens :]
    stale = _first(behind >= 0)
    if stale is not None:
        told = f"{name} goes on with {len(behind) - stale:,} entries of no padding: left out"
        remarks.tell("stale", told, step.place)
    return len(behind) if stale is None else stale


def _requests(values: Values, step: Step) -> Int64 | None:
    """[B] numbers of the slots' requests."""
    names = sorted(REQUESTS & values.keys())
    if not names:
        return None
    if len(names) > 1:
        raise UsageError(f"the dump has both {' and '.join(names)}: leave one out")
    (name,) = names
    ids = _array(values, name)
    if ids is None:
        return None
    if len(ids) < step.slots or (len(ids) > step.slots and "num_reqs" not in values):
        raise UsageError(f"{name} must have {step.slots:,} entries, one a slot, got {len(ids):,}")
    ids = ids[: step.slots]
    holds = step.length > 0
    if (slot := _first(holds & (ids < 0))) is not None:
        told = f"slot {slot} holds {step.length[slot]:,} tokens"
        raise UsageError(f"{name}[{slot}] names no request, and {told}")
    distinct, counts = np.unique(ids[holds], return_counts=True)
    if (twice := _first(counts > 1)) is not None:
        both = np.flatnonzero(holds & (ids == distinct[twice]))
        raise UsageError(f"{name} must differ, and those of slots {both[0]} and {both[1]} do not")
    return ids


# ---- blocks --------------------------------------------------------------------------------------


def _read_table(values: Values, step: Step, remarks: Remarks) -> None:
    """Gives the step its block table, and tells what its entries contradict."""
    step.table_name = name = "block_tables" if "block_tables" in values else "block_table"
    table = _array(values, name, axes=2)
    if table is None or not table.size:
        return
    block_size = step.given.get("block_size")
    if not isinstance(block_size, int):
        remarks.tell("unread", f"{name} cannot be read without block_size: no row is tagged")
        return
    needed = -(-step.length // block_size)
    if len(table) < step.slots:
        raise UsageError(f"{name} has {len(table):,} rows and the lengths give {step.slots:,} slots")
    if (slot := _first(needed > table.shape[1])) is not None:
        told = f"{needed[slot]:,} blocks of {block_size} tokens, and {name} has room for {table.shape[1]:,}"
        raise UsageError(f"slot {slot} holds {step.length[slot]:,} tokens: {told}")
    told = f"physical block ids of {name} are not kept: the case lays out blocks of its own"
    remarks.tell("ids", told)
    # What nobody follows is not kept: a session has many tables.
    step.table = table[: step.slots, : needed.max(initial=0)].copy()
    slots, places = table_entries(step, block_size)
    ids = step.table[slots, places]
    wrong = ~step.is_block(ids)
    if wrong.any():
        told = f"{slots_named(slots[wrong])}: {name} names no block where tokens are (rule V3)"
        remarks.tell("V3", told, step.place)
    _tell_slots(values, step, block_size, remarks)


def table_entries(step: Step, block_size: int) -> tuple[Int64, Int64]:
    """(slot, place) of every entry of a block table that holds tokens, [n] each."""
    needed = -(-step.length // block_size)
    slots = np.repeat(np.arange(step.slots), needed)
    places = np.arange(len(slots)) - np.repeat(np.cumsum(needed) - needed, needed)
    return slots, places


def _tell_slots(values: Values, step: Step, block_size: int, remarks: Remarks) -> None:
    """A remark on tokens whose slot is not the one that the block table gives them."""
    mapping = _array(values, "slot_mapping")
    if mapping is None or step.table is None:
        return
    slots = np.repeat(np.arange(step.slots), step.new)
    first = np.cumsum(step.new) - step.new
    positions = np.arange(step.tokens) - first[slots] + step.cached[slots]
    expected = step.table[slots, positions // block_size] * block_size + positions % block_size
    wrong = np.flatnonzero(mapping[: step.tokens] != expected)
    if len(wrong):
        token = int(wrong[0])
        told = (
            f"slot_mapping departs from the block table at {len(wrong):,} tokens, first at token {token}: "
            f"{mapping[token]} and not {expected[token]}; the case's own follows its table"
        )
        remarks.tell("slot_mapping", told, step.place)


# ---- values of a dump ----------------------------------------------------------------------------


def _given(values: Values) -> Given:
    """What a dump says of all steps, checked against the options that it becomes."""
    given: Given = {}
    for name in sorted(SCALARS & values.keys()):
        found = values[name]
        value = found if isinstance(found, str) else _number(values, name)
        spec = specs()["pool" if name == "num_blocks" else OPTIONS[name]]
        if not spec.accepts(value):
            raise UsageError(f"{name} must be {spec.form}, got {value!r}")
        if value is not None:
            given[name] = value
    return given


def _array(values: Values, name: str, axes: int = 1) -> Int64 | None:
    """Contents as [n] or [B, n]; [n, 1] is taken for [n]. None where the dump has none."""
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, Stub):
        raise UsageError(f"{name} has no contents in this dump, only its shape")
    if not isinstance(value, np.ndarray):
        raise UsageError(f"{name} must be an array, got {value!r}")
    if axes == 1 and value.ndim == 2 and value.shape[1] == 1:
        return value[:, 0]
    if value.ndim != axes and value.size:
        form = "[B] or [B, 1]" if axes == 1 else "[B, blocks]"
        raise UsageError(f"{name} must have shape {form}, got {list(value.shape)}")
    return value.reshape(-1) if axes == 1 else value


def _vector(values: Values, name: str, slots: int | None = None, *, is_padded: bool = False) -> Int64:
    """Lengths of the slots, [B]; those of the first `slots` where a buffer may be longer."""
    value = _array(values, name)
    if value is None:
        raise UsageError(f"the dump has no {name}")
    if slots is not None and (len(value) < slots or (len(value) > slots and not is_padded)):
        raise UsageError(f"{name} must have {slots:,} entries, one a slot, got {len(value):,}")
    value = value[:slots]
    if (slot := _first(value < 0)) is not None:
        raise UsageError(f"{name}[{slot}] must be at least 0, got {value[slot]:,}")
    # Sums of what is kept stay far within 64 bits.
    if (slot := _first(value > MAX_TOKENS)) is not None:
        raise UsageError(
            f"{name}[{slot}] is {value[slot]:,}, more than {MAX_TOKENS:,} tokens: is it a length?"
        )
    return value


def _starts(values: Values, name: str, slots: int | None = None) -> Int64:
    """Prefix sums, [B + 1]."""
    value = _array(values, name)
    if value is None:
        raise UsageError(f"the dump has no {name}")
    if slots is not None and name == "query_start_loc":
        value = value[: slots + 1]
    if not len(value) or (slots is not None and len(value) != slots + 1):
        wanted = "at least 1 entry" if slots is None else f"{slots + 1:,} entries, one more than slots"
        raise UsageError(f"{name} must have {wanted}, got {len(value):,}")
    if value[0] != 0:
        raise UsageError(f"{name} must begin with 0, got {value[0]:,}")
    if (entry := _first(np.diff(value) < 0)) is not None:
        raise UsageError(f"{name} must not fall, and does from {value[entry]:,} to {value[entry + 1]:,}")
    return value


def _number(values: Values, name: str) -> int | None:
    """One whole number, also as an array of one."""
    value = values.get(name)
    if isinstance(value, np.ndarray) and value.size == 1:
        value = int(value.reshape(-1)[0])
    if value is not None and not isinstance(value, int):
        shown = value if isinstance(value, str) else "an array"
        raise UsageError(f"{name} must be one whole number, got {shown}")
    return value


def _first(wrong: Any) -> int | None:
    """The first place where a condition holds."""
    places = np.flatnonzero(wrong)
    return int(places[0]) if len(places) else None


def slots_named(slots: Any) -> str:
    """`slot 3`, or `slots 0, 1, 2 and 5 more`."""
    distinct = np.unique(slots).tolist()
    word = "slot" if len(distinct) == 1 else "slots"
    return f"{word} {some(distinct)}"


def some(items: Sequence[object]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(items) - MAX_NAMED:,} more" if len(items) > MAX_NAMED else ""
    return ", ".join(map(str, items[:MAX_NAMED])) + more
