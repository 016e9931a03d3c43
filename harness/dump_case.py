"""A dump of a step's metadata as a case, and what of it a case cannot say.

Lengths become rows. FastDeploy states them (`seq_lens_encoder`, `seq_lens_decoder`, `seq_lens_this_time`);
vLLM states new tokens and totals (`query_start_loc`, `seq_lens`), from which rows follow as in a batch-spec
string. Vectors have shape [B] or [B, 1]. Full blocks that rows share become tags where the language has that
sharing. Physical block ids, contents and names do not matter to a case: it lays out and fills its own.

What contradicts itself is refused; what is legal in an engine and not in the language is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cases import Case, Kind, Options, Row
from cases.case import MAX_SLOTS
from cases.contract import contract_of, operators
from cases.models import model_names
from cases.options import specs
from harness.capture import is_metadata
from harness.dump_file import Int64, Stub, Values
from harness.plan import UsageError

MAX_TOKENS = 2**27
"""Of a step's new tokens, and of a row: more than the cache of one layer holds on any GPU."""

MAX_NAMED = 3
"""Slots or tokens that a remark names; the rest is counted."""

_OPTION = {
    "block_size": "block",
    "num_attention_heads": "heads",
    "sliding_window": "window",
    "model": "model",
}
"""Name in a dump -> option."""


@dataclass
class Imported:
    """A case and, one sentence each, what the dump says and the case does not."""

    case: Case
    remarks: list[str]


@dataclass
class _Step:
    """Lengths of one step, [B] each, and the padding tokens behind them."""

    encoder: Int64
    cached: Int64
    new: Int64
    remarks: list[str] = field(default_factory=list)

    @property
    def slots(self) -> int:
        return len(self.new)

    @property
    def tokens(self) -> int:
        return int(self.new.sum())

    @property
    def length(self) -> Int64:
        return self.cached + self.new


def import_case(values: Values, operator: str) -> Imported:
    """The case of a dump.

    Raises:
        UsageError: a name is missing, or the dump contradicts itself.
        CaseError: the operator does not take such a case.
    """
    dump = {name: value for name, value in values.items() if is_metadata(name)}
    step = _fastdeploy(dump) if _is_fastdeploy(dump) else _vllm(dump)
    padding = _padding(dump, step)
    rows = [_row(step, slot) for slot in range(step.slots)]
    options = _options(dump, operator, step.remarks)
    rows = _tagged(dump, step, rows, options.block[0])
    if padding:
        rows.append(Row(Kind.PAD, new=padding))
    case = Case(operator, (tuple(rows),), options)
    contract_of(case)
    others = sorted(name for name in values if not is_metadata(name))
    if others:
        step.remarks.append(f"not read: {_some(others)}")
    step.remarks.append(
        "everything else is the case's own: data, page order, poison; a draft of one token reads as decode"
    )
    return Imported(case, step.remarks)


# ---- lengths -------------------------------------------------------------------------------------


def _is_fastdeploy(dump: Values) -> bool:
    """Whose names a dump has.

    Raises:
        UsageError: both's, or neither's.
    """
    ours = {"seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time"} & dump.keys()
    theirs = {"query_start_loc", "seq_lens", "num_computed_tokens"} & dump.keys()
    if ours and theirs:
        both = f"FastDeploy's {min(ours)} and vLLM's {min(theirs)}"
        raise UsageError(f"the dump has both {both}: leave one out")
    if not ours and not theirs:
        raise UsageError(
            "the dump must have seq_lens_encoder, seq_lens_decoder and seq_lens_this_time, or "
            f"query_start_loc and seq_lens, got {_some(sorted(dump)) or 'none of the names of a step'}"
        )
    return bool(ours)


def _fastdeploy(dump: Values) -> _Step:
    encoder = _vector(dump, "seq_lens_encoder")
    cached = _vector(dump, "seq_lens_decoder", len(encoder))
    starts = _starts(dump, "cu_seqlens_q", len(encoder)) if "cu_seqlens_q" in dump else None
    if "seq_lens_this_time" in dump or starts is None:
        new = _vector(dump, "seq_lens_this_time", len(encoder))
        expected = np.concatenate([[0], np.cumsum(new)])
        if starts is not None and (place := _first(starts != expected)) is not None:
            told = f"{expected[place]:,}, the sum of seq_lens_this_time before it, got {starts[place]:,}"
            raise UsageError(f"cu_seqlens_q[{place}] must be {told}")
    else:
        new = np.diff(starts)
    if (slot := _first((encoder > 0) & (encoder != new))) is not None:
        told = f"seq_lens_encoder {encoder[slot]:,} and seq_lens_this_time {new[slot]:,}"
        raise UsageError(f"slot {slot} contradicts itself: {told} must be equal where the former is not 0")
    step = _checked(_Step(encoder, cached, new))
    if "cu_seqlens_k" in dump:
        keys = _starts(dump, "cu_seqlens_k", step.slots)
        if not np.array_equal(keys, np.concatenate([[0], np.cumsum(step.length)])):
            step.remarks.append("cu_seqlens_k is not the sum of cached and new tokens; the case's own is")
    return step


def _vllm(dump: Values) -> _Step:
    slots = _number(dump, "num_reqs")
    starts = _starts(dump, "query_start_loc", slots)
    slots = len(starts) - 1
    new = np.diff(starts)
    if "seq_lens" in dump:
        length = _vector(dump, "seq_lens", slots, is_padded="num_reqs" in dump)
    else:
        length = _vector(dump, "num_computed_tokens", slots, is_padded="num_reqs" in dump) + new
    if (slot := _first(length < new)) is not None:
        told = f"{length[slot]:,} tokens after a step that adds {new[slot]:,}"
        raise UsageError(f"slot {slot} contradicts itself: seq_lens and query_start_loc give it {told}")
    cached = length - new
    if "num_computed_tokens" in dump:
        computed = _vector(dump, "num_computed_tokens", slots, is_padded="num_reqs" in dump)
        if (slot := _first(computed != cached)) is not None:
            told = f"{cached[slot]:,}, seq_lens less the new tokens, got {computed[slot]:,}"
            raise UsageError(f"num_computed_tokens[{slot}] must be {told}")
    if "num_prompt_tokens" in dump:
        prompt = _vector(dump, "num_prompt_tokens", slots, is_padded="num_reqs" in dump)
        is_prefill = cached < prompt
    else:
        is_prefill = (cached == 0) | (new > 1)
    step = _checked(_Step(np.where(is_prefill, new, 0), cached, new))
    guessed = np.flatnonzero((cached > 0) & (new > 1)).tolist()
    if guessed and "num_prompt_tokens" not in dump:
        step.remarks.append(
            f"{_slots(guessed)}: several new tokens behind cached ones are read as hit; num_prompt_tokens "
            "would tell drafts from them"
        )
    return step


def _checked(step: _Step) -> _Step:
    """The step, if a case can have as many slots and tokens."""
    if step.slots > MAX_SLOTS:
        raise UsageError(f"a step has at most {MAX_SLOTS:,} slots, got {step.slots:,}")
    if (slot := _first(step.length > MAX_TOKENS)) is not None:
        told = f"{step.cached[slot]:,} cached and {step.new[slot]:,} new tokens"
        raise UsageError(f"slot {slot} has {told}, more than {MAX_TOKENS:,}: are these lengths?")
    if step.tokens > MAX_TOKENS:
        raise UsageError(
            f"the step has {step.tokens:,} new tokens, more than {MAX_TOKENS:,}: are these lengths?"
        )
    return step


def _row(step: _Step, slot: int) -> Row:
    cached, new = int(step.cached[slot]), int(step.new[slot])
    if new == 0:
        return Row(Kind.PAUSED, cached=cached) if cached else Row(Kind.IDLE)
    if step.encoder[slot] and cached:
        return Row(Kind.HIT, cached, new)
    if cached:
        return Row(Kind.DECODE, cached) if new == 1 else Row(Kind.DRAFT, cached, new)
    if not step.encoder[slot]:
        step.remarks.append(
            f"slot {slot} has {new:,} new tokens, seq_lens_encoder 0 and nothing cached (rule V1): read as "
            f"prefill:{new}"
        )
    return Row(Kind.PREFILL, new=new)


def _padding(dump: Values, step: _Step) -> int:
    """Padding tokens: those behind the step's own that belong to no slot."""
    ids = _array(dump, "batch_id_per_token")
    slots = _array(dump, "slot_mapping")
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
        step.remarks.append(f"{name} goes on with {len(behind) - stale:,} entries of no padding: left out")
    return len(behind) if stale is None else stale


# ---- blocks --------------------------------------------------------------------------------------


def _tagged(dump: Values, step: _Step, rows: Sequence[Row], block_size: int) -> list[Row]:
    """The rows, with tags where blocks are shared as the language shares them."""
    rows = list(rows)
    name = "block_tables" if "block_tables" in dump else "block_table"
    table = _array(dump, name, axes=2)
    if table is None or not table.size:
        return rows
    if "block_size" not in dump:
        step.remarks.append(f"{name} cannot be read without block_size: no row is tagged")
        return rows
    needed = -(-step.length // block_size)
    if len(table) < step.slots:
        raise UsageError(f"{name} has {len(table):,} rows and the lengths give {step.slots:,} slots")
    if (slot := _first(needed > table.shape[1])) is not None:
        told = f"{needed[slot]:,} blocks of {block_size} tokens, and {name} has room for {table.shape[1]:,}"
        raise UsageError(f"slot {slot} holds {step.length[slot]:,} tokens: {told}")
    step.remarks.append(f"physical block ids of {name} are not kept: the case lays out blocks of its own")
    groups = _groups(table, step.cached // block_size)
    for number, group in enumerate(groups):
        for slot in group:
            rows[slot] = replace(rows[slot], tag=f"p{number}")
    _tell_blocks(name, table, needed, step, groups, block_size, _number(dump, "num_blocks"))
    _tell_slots(dump, table, step, block_size)
    return rows


def _groups(table: Int64, full: Int64) -> list[list[int]]:
    """Slots whose full cached blocks are the same, as far as the shorter of any two goes.

    table: [B, max_blocks]. full: [B], full cached blocks of each slot.
    """
    by_first: dict[int, list[int]] = {}
    for slot in np.flatnonzero(full).tolist():
        by_first.setdefault(int(table[slot, 0]), []).append(slot)
    groups = []
    for slots in by_first.values():
        found: list[list[int]] = []
        # The longest of a group comes first: what begins as it does begins as all of them do.
        for slot in sorted(slots, key=lambda slot: -full[slot]):
            own = table[slot, : full[slot]]
            group = next(
                (group for group in found if np.array_equal(table[group[0], : full[slot]], own)), None
            )
            if group is None:
                found.append([slot])
            else:
                group.append(slot)
        groups += [sorted(group) for group in found if len(group) > 1]
    return sorted(groups)


def _tell_blocks(
    name: str,
    table: Int64,
    needed: Int64,
    step: _Step,
    groups: Sequence[Sequence[int]],
    block_size: int,
    num_blocks: int | None,
) -> None:
    """Remarks on entries that name no block, and on blocks shared in another way than tags say."""
    slots = np.repeat(np.arange(step.slots), needed)
    places = np.arange(len(slots)) - np.repeat(np.cumsum(needed) - needed, needed)
    ids = table[slots, places]
    wrong = (ids < 0) | (ids >= num_blocks if num_blocks is not None else False)
    if wrong.any():
        step.remarks.append(f"{_slots(slots[wrong])}: {name} names no block where tokens are (rule V3)")
    group_of = np.full(step.slots, -1)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    # A tagged block that every holder has full and in the same place is what the tag says.
    is_told = (group_of[slots] >= 0) & (places < (step.cached // block_size)[slots])
    identity = np.stack([ids, np.where(is_told, group_of[slots], -1 - slots), places])
    distinct = np.unique(identity, axis=1)
    owners, counts = np.unique(distinct[0], return_counts=True)
    otherwise = np.isin(ids, owners[counts > 1]) & ~wrong
    if otherwise.any():
        told = "the language shares all full cached blocks of two rows as far as both have them, or none"
        step.remarks.append(f"{_slots(slots[otherwise])} share blocks otherwise than tags can say: {told}")


def _tell_slots(dump: Values, table: Int64, step: _Step, block_size: int) -> None:
    """A remark on tokens whose slot is not the one that the block table gives them."""
    mapping = _array(dump, "slot_mapping")
    if mapping is None:
        return
    slots = np.repeat(np.arange(step.slots), step.new)
    first = np.cumsum(step.new) - step.new
    positions = np.arange(step.tokens) - first[slots] + step.cached[slots]
    expected = table[slots, positions // block_size] * block_size + positions % block_size
    wrong = np.flatnonzero(mapping[: step.tokens] != expected)
    if len(wrong):
        token = int(wrong[0])
        step.remarks.append(
            f"slot_mapping departs from the block table at {len(wrong):,} tokens, first at token {token}: "
            f"{mapping[token]} and not {expected[token]}; the case's own follows its table"
        )


# ---- options -------------------------------------------------------------------------------------


def _options(dump: Values, operator: str, remarks: list[str]) -> Options:
    changes: dict[str, Any] = {}
    legal = operators()[operator].options if operator in operators() else tuple(specs())
    for name, option in _OPTION.items():
        value = dump.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            value = _number(dump, name)
        spec = specs()[option]
        if not spec.accepts(value):
            raise UsageError(f"{name} must be {spec.form}, got {value!r}")
        if option == "model" and value not in model_names():
            remarks.append(f"there is no model {value!r}: the case's is {Options().model}")
        elif option not in legal:
            remarks.append(f"{name} is not kept: {operator} has no option {option}")
        else:
            changes[option] = (value,) if spec.per_layer else value
    if "block_size" not in dump:
        remarks.append(f"no block_size: the case's is {Options().block[0]}")
    if "num_blocks" in dump:
        told = f"pool={_number(dump, 'num_blocks')}"
        remarks.append(f"the size of the pool is not kept: add option {told} for block ids as large")
    return Options(**changes)


# ---- values of a dump ----------------------------------------------------------------------------


def _array(dump: Values, name: str, axes: int = 1) -> Int64 | None:
    """Contents as [n] or [B, n]; [n, 1] is taken for [n]. None where the dump has none."""
    value = dump.get(name)
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


def _vector(dump: Values, name: str, slots: int | None = None, *, is_padded: bool = False) -> Int64:
    """Lengths of the slots, [B]; those of the first `slots` where a buffer may be longer."""
    value = _array(dump, name)
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


def _starts(dump: Values, name: str, slots: int | None = None) -> Int64:
    """Prefix sums, [B + 1]."""
    value = _array(dump, name)
    if value is None:
        raise UsageError(f"the dump has no {name}")
    if slots is not None and name == "query_start_loc":
        value = value[: slots + 1]
    if not len(value) or (slots is not None and len(value) != slots + 1):
        wanted = "at least 1 entry" if slots is None else f"{slots + 1:,} entries, one more than slots"
        raise UsageError(f"{name} must have {wanted}, got {len(value):,}")
    if value[0] != 0:
        raise UsageError(f"{name} must begin with 0, got {value[0]:,}")
    if (place := _first(np.diff(value) < 0)) is not None:
        raise UsageError(f"{name} must not fall, and does from {value[place]:,} to {value[place + 1]:,}")
    return value


def _number(dump: Values, name: str) -> int | None:
    """One whole number, also as an array of one."""
    value = dump.get(name)
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


def _slots(slots: Any) -> str:
    distinct = np.unique(slots).tolist()
    word = "slot" if len(distinct) == 1 else "slots"
    return f"{word} {_some(distinct)}"


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - MAX_NAMED:,} more" if len(items) > MAX_NAMED else ""
    return ", ".join(map(str, items[:MAX_NAMED])) + more
