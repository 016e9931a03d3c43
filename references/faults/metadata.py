"""Faults of step metadata: positions, slots, prefix sums, rows of the cache and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import (
    anew,
    begun,
    changing,
    empty_unwritten,
    places,
    read_as_dense,
    starts,
    tokens_unwritten,
    unwritten,
)
from references.oracle import Inputs, number, tensor

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
BY_TABLE = ("slot_mapping", "swa_indices")
BY_LENGTH = ("position_ids", "swa_indices")
BY_BATCH_ID = ("slot_mapping", "position_ids", "swa_indices")
SUMS = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_prefill")


def _is_prefill(inputs: Inputs) -> Tensor:
    return tensor(inputs, "seq_lens_encoder") > 0


def _lengths() -> Iterator[Fault]:
    """Positions from other cached lengths: of the operators that count from them."""
    lengths: list[tuple[str, str, str, Callable[[Inputs], Tensor]]] = [
        (
            "history-ignored",
            "a chunk that continues a sequence begins at position 0",
            "B01, B39",
            lambda inputs: tensor(inputs, "seq_lens_decoder") * ~_is_prefill(inputs),
        ),
        (
            "chunk-added-to-the-history",
            "a chunk's first token stands behind the whole chunk, counted with the cached tokens",
            "C1",
            lambda inputs: tensor(inputs, "seq_lens_decoder") + tensor(inputs, "seq_lens_encoder"),
        ),
        (
            "new-token-counted-twice",
            "positions are one too large: the cached length counts the new token already",
            "C7",
            lambda inputs: tensor(inputs, "seq_lens_decoder") + 1,
        ),
        (
            "one-position-too-early",
            "positions are one too small",
            "C7",
            lambda inputs: tensor(inputs, "seq_lens_decoder") - 1,
        ),
        (
            "positions-from-0",
            "positions of every row are counted from 0",
            "B01",
            lambda inputs: tensor(inputs, "seq_lens_decoder") * 0,
        ),
        (
            "place-in-step",
            "a token's place in the step is taken for its place in its row",
            "P8",
            lambda inputs: tensor(inputs, "seq_lens_decoder") + tensor(inputs, "cu_seqlens_q")[:-1],
        ),
    ]
    for name, summary, source, lengths_of in lengths:
        yield _from_lengths(name, summary, source, lengths_of)
    for step in (1, -1):
        yield _from_lengths(
            "neighbours-history",
            "a row has the cached length of another slot",
            "B07",
            lambda inputs, step=step: _neighbours(tensor(inputs, "seq_lens_decoder"), step),
            f"of the slot {'before' if step == 1 else 'behind'}",
        )


def _from_lengths(
    name: str, summary: str, source: str, lengths_of: Callable[[Inputs], Tensor], form: str = ""
) -> Fault:
    """The fault of counting positions from other cached lengths; keys behind the table have no row."""

    def apply(question: Question) -> Answers | None:
        lengths = lengths_of(question.inputs)
        if question.operator == "swa_indices":
            return windowed(question, lengths=lengths)
        return question.with_inputs(seq_lens_decoder=lengths)

    return Fault(name, BY_LENGTH, summary, source, apply, form)


def _neighbours(lengths: Tensor, step: int) -> Tensor:
    """[B]: of each slot the length of the one so many slots before it; at the end its own."""
    if len(lengths) == 0:
        return lengths
    at = torch.arange(len(lengths), device=lengths.device) - step
    return lengths[at.clamp(0, len(lengths) - 1)]


def _num_slots(inputs: Inputs) -> int:
    name = "seq_lens_decoder" if "seq_lens_decoder" in inputs else "block_tables"
    return len(tensor(inputs, name))


def _batch_ids() -> Iterator[Fault]:
    """Padding taken for a token, and slots that are lost."""
    changes: list[tuple[str, str, str, Callable[[Inputs], Tensor], str]] = [
        (
            "padding-in-the-last-slot",
            "padding's slot, -1, is counted from behind: the last slot's",
            "B31",
            lambda inputs: tensor(inputs, "batch_id_per_token") % max(1, _num_slots(inputs)),
            "",
        ),
        (
            "padding-in-slot-0",
            "padding is taken for tokens of slot 0",
            "B31, E12",
            lambda inputs: tensor(inputs, "batch_id_per_token").clamp_min(0),
            "",
        ),
        (
            "token-as-slot",
            "token t is taken for slot t",
            "B56",
            _own_slots,
            "",
        ),
        (
            "slots-limited",
            "tokens of slots behind a fixed number of them are left out",
            "B05",
            lambda inputs: _limited(tensor(inputs, "batch_id_per_token"), 1024),
            "behind 1024",
        ),
    ]
    for name, summary, source, ids_of, form in changes:

        def apply(question: Question, ids_of: Callable[[Inputs], Tensor] = ids_of) -> Answers | None:
            ids = ids_of(question.inputs)
            if question.operator == "swa_indices":
                return windowed(question, ids=ids) if _num_slots(question.inputs) else None
            return question.with_inputs(batch_id_per_token=ids)

        yield Fault(name, BY_BATCH_ID, summary, source, apply, form)


def _own_slots(inputs: Inputs) -> Tensor:
    """[Tp]: of each real token its own number, -1 where there is no such slot."""
    ids = tensor(inputs, "batch_id_per_token")
    tokens = torch.arange(len(ids), dtype=ids.dtype, device=ids.device)
    return torch.where((ids >= 0) & (tokens < _num_slots(inputs)), tokens, -1)


def _limited(ids: Tensor, slots: int) -> Tensor:
    return torch.where(ids < slots, ids, -1)


def _positions() -> Iterator[Fault]:
    """What no other length and no other slot explains."""
    yield Fault(
        "first-position-for-all",
        ("position_ids",),
        "every token of a row has the position of its first",
        "B21, T2",
        lambda question: _positions_of(question, lambda right, at: right - at),
    )
    yield changing(
        "chunk-counted-twice",
        ("position_ids",),
        "a prefix hit is counted as a chunk and again as a row with a cache: rows behind it begin too late",
        "B01",
        lambda inputs: {"cu_seqlens_q": _counted_twice(inputs)},
    )
    for operator in BY_BATCH_ID:
        yield unwritten(
            operator,
            "padding-unwritten",
            "tokens of padding are never written",
            "B31, B22",
            (operator,),
            lambda question, count: tensor(question.inputs, "batch_id_per_token").cpu() < 0,
        )
    yield from tokens_unwritten("position_ids", ("position_ids",), SIZES)


def _positions_of(question: Question, change: Callable[[Tensor, Tensor], Tensor]) -> Answers:
    right = question.truth["position_ids"]
    ids = tensor(question.inputs, "batch_id_per_token").long()
    if not isinstance(right, Tensor):
        raise TypeError("position_ids is a tensor")
    changed = torch.where(ids >= 0, change(right.long(), places(ids)), right.long())
    return {"position_ids": changed.to(right.dtype)}


def _counted_twice(inputs: Inputs) -> Tensor:
    hits = tensor(inputs, "seq_lens_encoder") * (tensor(inputs, "seq_lens_decoder") > 0)
    begins = tensor(inputs, "cu_seqlens_q").clone()
    begins[:-1] += (hits.cumsum(0) - hits).to(begins.dtype)
    return begins


# ---- prefix sums ---------------------------------------------------------------------------------


def _sums(
    name: str, summary: str, source: str, outputs: dict[str, Callable[[Inputs], Tensor]], form: str = ""
) -> Fault:
    """The fault of other prefix sums: of each output the lengths that are summed."""

    def apply(question: Question) -> Answers:
        made = {output: starts(lengths_of(question.inputs)) for output, lengths_of in outputs.items()}
        return {**question.truth, **made}

    return Fault(name, ("padding_offset",), summary, source, apply, form)


def _this_time(inputs: Inputs) -> Tensor:
    return tensor(inputs, "seq_lens_this_time")


def _cached(inputs: Inputs) -> Tensor:
    return tensor(inputs, "seq_lens_decoder")


def _all_keys(inputs: Inputs) -> Tensor:
    return _this_time(inputs) + _cached(inputs)


def _offsets() -> Iterator[Fault]:
    yield _sums(
        "keys-without-the-cache",
        "the prefix sum of keys counts the new tokens alone",
        "B04, B76, C2",
        {"cu_seqlens_k": _this_time},
    )
    yield _sums(
        "keys-without-the-cache",
        "the prefix sum of keys counts the new tokens alone",
        "B04, B76, C2",
        {
            "cu_seqlens_k": _this_time,
            "cu_seqlens_k_prefill": lambda inputs: _this_time(inputs) * _is_prefill(inputs),
        },
        "prefill rows' too",
    )
    yield _sums(
        "decode-keys-without-the-cache",
        "the prefix sum of keys counts what prefill rows alone have cached",
        "B74",
        {"cu_seqlens_k": lambda inputs: _this_time(inputs) + _cached(inputs) * _is_prefill(inputs)},
    )
    yield _sums(
        "paused-rows-not-counted",
        "keys of a slot without a token are not counted",
        "B20",
        {"cu_seqlens_k": lambda inputs: _all_keys(inputs) * (_this_time(inputs) > 0)},
    )
    yield _sums(
        "prefill-keys-without-the-cache",
        "prefill rows' keys are counted without what is cached",
        "B02, C2",
        {"cu_seqlens_k_prefill": lambda inputs: _this_time(inputs) * _is_prefill(inputs)},
    )
    yield _sums(
        "cache-means-decode",
        "a row with a cache is taken for a decode row: prefix hits are no prefill rows",
        "B20",
        {"cu_seqlens_k_prefill": lambda inputs: _all_keys(inputs) * (_cached(inputs) == 0)},
    )
    yield _sums(
        "decode-keys-among-prefill",
        "keys of decode rows are counted among those of prefill",
        "B19",
        {"cu_seqlens_k_prefill": _all_keys},
    )
    for output in ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_prefill"):
        yield Fault(
            "inclusive-sums",
            ("padding_offset",),
            "sums count the slot itself: entry b is the sum up to and with slot b",
            "B76",
            lambda question, output=output: _inclusive(question, (output,)),
            output,
        )
    yield Fault(
        "inclusive-sums",
        ("padding_offset",),
        "sums count the slot itself: entry b is the sum up to and with slot b",
        "B76",
        lambda question: _inclusive(question, ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_prefill")),
        "all",
    )
    for slots in (256, 1024):
        for outputs in (SUMS, *((output,) for output in SUMS)):
            yield Fault(
                "sums-begin-anew",
                ("padding_offset",),
                "sums begin anew behind as many slots as a block of threads has",
                "B05",
                lambda question, slots=slots, outputs=outputs: _anew(question, slots, outputs),
                f"every {slots}, {'all' if len(outputs) > 1 else outputs[0]}",
            )
        for upper in (True, False):
            middle = f"tokens are found in them by {'upper' if upper else 'lower'} middles"
            for outputs in (SUMS, SUMS[:1]):
                yield Fault(
                    "sums-begin-anew",
                    ("padding_offset",),
                    "sums begin anew behind as many slots as a block of threads has",
                    "B05",
                    lambda question, slots=slots, outputs=outputs, upper=upper: _found_in(
                        question, _anew(question, slots, outputs), upper=upper
                    ),
                    f"every {slots}, {'all' if len(outputs) > 1 else outputs[0]}, {middle}",
                )
            yield Fault(
                "sums-carry-one-block",
                ("padding_offset",),
                "a block of slots goes on from the sum of the block before it, not of all before it",
                "B05",
                lambda question, slots=slots, upper=upper: _found_in(
                    question, _anew(question, slots, SUMS, carried=1), upper=upper
                ),
                f"blocks of {slots}, {middle}",
            )
        yield Fault(
            "slots-limited",
            ("padding_offset",),
            "sums of slots behind a fixed number of them are never written, and no token is found in them",
            "B05",
            lambda question, slots=slots: _sums_limited(question, slots),
            f"behind {slots}",
        )
    yield Fault(
        "empty-slot-has-a-token",
        ("padding_offset",),
        "a slot without a token is counted as one with a token",
        "B07",
        _at_least_one,
    )
    for change, name, summary, form in (
        (
            lambda inputs, ids: torch.where(ids < 0, _num_slots(inputs) - 1, ids),
            "padding-in-the-last-slot",
            "padding is taken for tokens of the last slot",
            "",
        ),
        (
            lambda inputs, ids: ids.clamp_min(0),
            "padding-in-slot-0",
            "padding is taken for tokens of slot 0",
            "",
        ),
        (
            _one_early,
            "first-token-to-the-slot-before",
            "a row's first token belongs to the slot in front of it",
            "",
        ),
        (
            _first_to_the_row_before,
            "first-token-to-the-slot-before",
            "a row's first token belongs to the slot in front of it",
            "the last with a token",
        ),
        (
            _first_of_equals,
            "first-of-equal-starts",
            "an empty slot takes the tokens of the slot behind it",
            "",
        ),
    ):
        yield Fault(
            name,
            ("padding_offset",),
            summary,
            "B07, B31, B56",
            lambda question, change=change: {
                **question.truth,
                "batch_id_per_token": change(
                    question.inputs, tensor(dict(question.truth), "batch_id_per_token")
                ).to(torch.int32),
            },
            form,
        )
    yield unwritten(
        "padding_offset",
        "padding-unwritten",
        "tokens of padding are never written",
        "E9",
        ("batch_id_per_token",),
        lambda question, count: torch.arange(count) >= int(_this_time(question.inputs).sum()),
    )
    yield from tokens_unwritten("padding_offset", ("batch_id_per_token",), SIZES)
    for outputs, form in (((*SUMS, "batch_id_per_token"), ""), (SUMS, "the sums alone")):
        yield empty_unwritten(
            "padding_offset",
            "a step without a token, or without a slot, leaves its outputs as memory had them",
            "B75",
            outputs,
            lambda question: _num_slots(question.inputs) == 0 or _num_tokens(question) == 0,
            form,
        )


def _num_tokens(question: Question) -> int:
    return len(tensor(dict(question.truth), "batch_id_per_token"))  # type: ignore[arg-type]


def _found_in(question: Question, answers: Answers, *, upper: bool) -> Answers:
    """The slots of tokens as they are found in sums that may not ascend."""
    sums = answers["cu_seqlens_q"]
    if not isinstance(sums, Tensor):
        raise TypeError("cu_seqlens_q is a tensor")
    tokens = torch.arange(_num_tokens(question), device=sums.device)
    found = torch.where(tokens < sums[-1], begun(sums.long(), tokens, upper=upper), -1)
    return {**answers, "batch_id_per_token": found.to(torch.int32)}


def _sums_limited(question: Question, slots: int) -> Answers:
    """Sums up to a slot; those behind it are what memory had, and larger than any token."""
    right = {name: tensor(dict(question.truth), name) for name in SUMS}  # type: ignore[arg-type]
    at = torch.arange(len(right[SUMS[0]]), device=right[SUMS[0]].device)
    if len(at) - 1 <= slots:
        return question.truth
    stale = {SUMS[0]: torch.where(at <= slots, right[SUMS[0]], torch.iinfo(torch.int32).max)}
    found = _found_in(question, {**question.truth, **stale}, upper=True)
    return {**found, **{name: Unwritten(values, at <= slots) for name, values in right.items()}}


def _inclusive(question: Question, outputs: tuple[str, ...]) -> Answers:
    answers = dict(question.truth)
    for output in outputs:
        sums = answers[output]
        if isinstance(sums, Tensor):
            answers[output] = torch.cat([sums[1:], sums[-1:]])
    return answers


def _at_least_one(question: Question) -> Answers:
    """Every slot has a token, and those behind it stand a place later."""
    inputs = question.inputs
    lengths = _this_time(inputs).clamp_min(1)
    slots = torch.arange(len(lengths), device=lengths.device)
    right = tensor(dict(question.truth), "batch_id_per_token")  # type: ignore[arg-type]
    ids, found = slots.repeat_interleave(lengths.long())[: len(right)], torch.full_like(right, -1)
    found[: len(ids)] = ids.to(right.dtype)
    sums = {"cu_seqlens_q": starts(lengths), "cu_seqlens_k": starts(lengths + _cached(inputs))}
    return {**question.truth, **sums, "batch_id_per_token": found}


def _anew(question: Question, slots: int, outputs: Sequence[str], carried: int = 0) -> Answers:
    """Each slot's sum without what stands before its block of slots, or before so many blocks."""
    answers = dict(question.truth)
    for output in outputs:
        sums = answers[output]
        if isinstance(sums, Tensor):
            answers[output] = anew(sums, slots, carried)
    return answers


def _one_early(inputs: Inputs, ids: Tensor) -> Tensor:
    """[Tp]: the first token of every row, but of the first, in the slot of the one before it."""
    is_first = (places(ids.long()) == 0) & (ids > 0)
    return torch.where(is_first, ids - 1, ids)


def _first_to_the_row_before(inputs: Inputs, ids: Tensor) -> Tensor:
    """[Tp]: the last slot that begins before the token, not at it; slot 0 where none does."""
    if len(_this_time(inputs)) == 0:
        return ids
    begins = starts(_this_time(inputs))[:-1].contiguous()
    tokens = torch.arange(len(ids), dtype=begins.dtype, device=ids.device)
    before = (torch.searchsorted(begins, tokens) - 1).clamp_min(0)
    return torch.where(ids >= 0, before.to(ids.dtype), ids)


def _first_of_equals(inputs: Inputs, ids: Tensor) -> Tensor:
    """[Tp]: every row in the first of the slots that begin at the same token."""
    begins = starts(_this_time(inputs))[:-1]
    slots = torch.arange(len(begins), device=ids.device)
    first = torch.stack([(begins == begin).nonzero().min() for begin in begins]) if len(begins) else slots
    return torch.where(ids >= 0, first[ids.long().clamp_min(0)] if len(first) else ids, ids)


# ---- rows of the cache ---------------------------------------------------------------------------

RowOf = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(tables [B, MB] int64, slots [n], positions [n], block size) -> rows [n] int64, -1 where there is none."""


def entries(tables: Tensor, slots: Tensor, columns: Tensor) -> Tensor:
    """Entries of the table, -1 outside of it."""
    inside = (slots >= 0) & (slots < len(tables)) & (columns >= 0) & (columns < tables.shape[1])
    found = torch.full_like(columns, -1)
    found[inside] = tables[slots[inside], columns[inside]]
    return found


def _rows(found: Tensor, rows: Tensor) -> Tensor:
    return torch.where(found >= 0, rows, -1)


def _by_rows(
    name: str,
    summary: str,
    source: str,
    row_of: RowOf,
    form: str = "",
    *,
    operators: Sequence[str] = BY_TABLE,
    of_padding: bool = False,
) -> Fault:
    """The fault of finding another row of the cache, for operators that find them; of padding too, or not."""

    def apply(question: Question) -> Answers | None:
        inputs = question.inputs
        tables, block_size = tensor(inputs, "block_tables").long(), int(number(inputs, "block_size"))
        if question.operator == "slot_mapping":
            slots, at = tensor(inputs, "batch_id_per_token").long(), tensor(inputs, "position_ids").long()
            right = tensor(dict(question.truth), "slot_mapping")  # type: ignore[arg-type]
            real = (slots >= 0) & (at >= 0) & (at // block_size < tables.shape[1])
            made = right.clone()
            real |= of_padding
            made[real] = row_of(tables, slots[real], at[real], block_size)
            return {"slot_mapping": made}
        return windowed(question, row_of=row_of)

    return Fault(name, tuple(operators), summary, source, apply, form)


def windowed(
    question: Question,
    *,
    row_of: RowOf | None = None,
    oldest_of: Callable[[Tensor, Tensor, int], Tensor] | None = None,
    newest_of: Callable[[Tensor], Tensor] | None = None,
    unused: int = -1,
    lengths: Tensor | None = None,
    ids: Tensor | None = None,
) -> Answers:
    """swa_indices with something else.

    Args:
        lengths: [B], what positions are counted from. ids: [Tp], the slots of tokens.
        oldest_of: (positions, cached lengths, window) -> the first position that is seen.
        newest_of: positions -> the last one. unused: what stands behind it.
    """
    inputs = question.inputs
    right = tensor(dict(question.truth), "swa_indices")  # type: ignore[arg-type]
    tables, block_size = tensor(inputs, "block_tables").long(), int(number(inputs, "block_size"))
    window = int(number(inputs, "window"))
    ids = tensor(inputs, "batch_id_per_token").long() if ids is None else ids.long()
    real = ids >= 0
    slots, tokens = ids[real], torch.arange(len(ids), device=ids.device)[real]
    cached = (tensor(inputs, "seq_lens_decoder") if lengths is None else lengths).long()[slots]
    at = cached + tokens - tensor(inputs, "cu_seqlens_q").long()[slots]
    newest = at if newest_of is None else newest_of(at)
    oldest = (at - window + 1).clamp_min(0) if window else torch.zeros_like(at)
    if oldest_of is not None:
        oldest = oldest_of(at, cached, window)
    keys = oldest.unsqueeze(1) + torch.arange(right.shape[2], device=ids.device)
    seen = (keys <= newest.unsqueeze(1)) & (keys >= 0)
    seen &= keys // block_size < tables.shape[1]
    flat_slots = slots.unsqueeze(1).expand_as(keys)
    rows = (row_of or _right_row)(tables, flat_slots[seen], keys[seen], block_size)
    made = torch.full(keys.shape, unused, dtype=torch.int64, device=ids.device)
    made[seen] = rows
    answer = torch.full_like(right, unused)
    answer[real, 0] = made.to(right.dtype)
    return {"swa_indices": answer}


def _right_row(tables: Tensor, slots: Tensor, at: Tensor, block: int) -> Tensor:
    found = entries(tables, slots, at // block)
    return _rows(found, found * block + at % block)


def _linear(tables: Tensor, slots: Tensor, at: Tensor, block: int) -> Tensor:
    found = entries(tables, slots, at * 0)
    return _rows(found, found * block + at)


def _found() -> Iterator[Fault]:
    for size in (16, 32, 64, 128):
        yield _by_rows(
            "block-size-is-a-literal",
            "the block size is taken for another number",
            "B32, B38, P14",
            lambda tables, slots, at, block, size=size: _rows(
                found := entries(tables, slots, at // size), found * size + at % size
            ),
            f"for {size}",
        )
    yield _by_rows(
        "block-is-a-row",
        "a block's number is taken for the number of its first row",
        "P7",
        lambda tables, slots, at, block: _rows(
            found := entries(tables, slots, at // block), found + at % block
        ),
    )
    yield _by_rows("blocks-in-a-line", "a row's blocks are taken to lie behind its first", "P13", _linear)
    yield _by_rows(
        "token-as-block",
        "the table is looked up at a token's position in the place of its block's number",
        "P6",
        lambda tables, slots, at, block: _rows(
            found := entries(tables, slots, at), found * block + at % block
        ),
    )
    yield _by_rows(
        "table-ignored",
        "a token's position is taken for its row of the cache",
        "P13",
        lambda tables, slots, at, block: at,
    )
    yield _by_rows(
        "missing-entry-multiplied",
        "an entry of -1 is multiplied like any other: a row in front of the cache",
        "B30",
        lambda tables, slots, at, block: entries(tables, slots, at // block) * block + at % block,
        operators=("slot_mapping",),
        of_padding=True,
    )
    yield _by_rows(
        "missing-entry-is-row-0",
        "what has no row is given row 0",
        "E12",
        lambda tables, slots, at, block: _right_row(tables, slots, at, block).clamp_min(0),
        operators=("slot_mapping",),
        of_padding=True,
    )
    for step in (1, -1):
        yield _by_rows(
            "neighbours-table",
            "a row follows the block table of another slot",
            "B56",
            lambda tables, slots, at, block, step=step: _right_row(
                tables, (slots + step).clamp_min(0), at, block
            ),
            f"of the slot {'behind' if step == 1 else 'before'}",
        )
        yield _by_rows(
            "one-page-off",
            "a block's entry is looked for beside its own",
            "P8",
            lambda tables, slots, at, block, step=step: _rows(
                found := entries(tables, slots, at // block + step), found * block + at % block
            ),
            f"the one {'behind' if step == 1 else 'before'}",
        )
    yield _by_rows(
        "rows-32-bit",
        "rows are kept in 32 bits: they wrap behind 2^31",
        "B28, P2",
        lambda tables, slots, at, block: _right_row(tables, slots, at, block).to(torch.int32).long(),
        operators=("slot_mapping",),
    )
    yield _by_rows(
        "rows-32-bit-unsigned",
        "rows are kept modulo 2^32",
        "B09",
        lambda tables, slots, at, block: _modulo(_right_row(tables, slots, at, block)),
        operators=("slot_mapping",),
    )
    yield changing(
        "position-in-step",
        ("slot_mapping",),
        "a token's place in the step is taken for its position",
        "P8",
        lambda inputs: {"position_ids": torch.arange(len(tensor(inputs, "position_ids")))},
    )
    yield changing(
        "position-in-chunk",
        ("slot_mapping",),
        "a token's place in its row's new tokens is taken for its position",
        "P8",
        lambda inputs: {"position_ids": places(tensor(inputs, "batch_id_per_token").long())},
    )
    yield from read_as_dense("slot_mapping", ("block_tables",))
    yield from read_as_dense("swa_indices", ("block_tables",))
    yield from tokens_unwritten("slot_mapping", ("slot_mapping",), SIZES)


def _modulo(rows: Tensor) -> Tensor:
    return torch.where(rows >= 0, rows % 2**32, rows)


# ---- windows -------------------------------------------------------------------------------------


def _windows() -> Iterator[Fault]:
    def fault(
        name: str, summary: str, source: str, apply: Callable[[Question], Answers | None], form: str = ""
    ) -> Fault:
        return Fault(name, ("swa_indices",), summary, source, apply, form)

    yield fault(
        "window-one-too-long",
        "the window counts the keys before a token, without itself",
        "B58",
        lambda question: windowed(question, oldest_of=lambda at, _, window: _oldest(at, window, 0)),
    )
    yield fault(
        "window-one-too-short",
        "the oldest key of the window is not seen",
        "B58",
        lambda question: windowed(
            question, oldest_of=lambda at, _, window: torch.minimum(_oldest(at, window, 2), at)
        ),
    )
    yield fault(
        "window-ignored",
        "everything before a token is seen, whatever the window",
        "B57",
        lambda question: windowed(question, oldest_of=lambda at, *_: at * 0),
    )
    yield fault(
        "window-is-the-room",
        "the window is taken for the number of indices, a multiple of 128",
        "O21",
        lambda question: windowed(
            question,
            oldest_of=lambda at, *_: _oldest(
                at,
                tensor(dict(question.truth), "swa_indices").shape[2],  # type: ignore[arg-type]
                1,
            ),
        ),
    )
    yield fault(
        "history-unseen",
        "nothing that is cached is seen",
        "B39",
        lambda question: windowed(
            question, oldest_of=lambda at, cached, window: torch.maximum(_oldest(at, window, 1), cached)
        ),
    )
    yield fault(
        "itself-unseen",
        "a token sees what is before it, but not itself",
        "O21",
        lambda question: windowed(question, newest_of=lambda at: at - 1),
    )
    yield fault(
        "next-token-seen",
        "the first key that a token should not see is seen",
        "O21",
        lambda question: windowed(question, newest_of=lambda at: at + 1),
    )
    yield fault(
        "first-position-for-all",
        "every token of a row stands at the position of its first",
        "B12",
        _at_the_first,
    )
    yield fault(
        "unused-are-row-0",
        "entries without a key point to row 0",
        "E12",
        lambda question: windowed(question, unused=0),
    )
    yield unwritten_behind()
    yield fault(
        "indices-of-the-step", "indices are tokens of the step, not rows of the cache", "B71", _of_the_step
    )
    for size in (128, 256, 512):
        yield fault(
            "indices-limited",
            "indices behind a fixed number of them are never written",
            "L32",
            lambda question, size=size: _columns_unwritten(question, lambda at, count: at >= size),
            f"behind {size}",
        )
    for size in (64, 128, 256):
        yield fault(
            "last-of-a-tile-unwritten",
            "of every tile of indices the last 32, one of each lane, are never written",
            "B05",
            lambda question, size=size: _columns_unwritten(
                question, lambda at, count: at % size >= size - 32
            ),
            f"tiles of {size}",
        )
    yield fault(
        "tiles-overlap",
        "a tile of indices begins 32 behind the one before it, and not behind all of it",
        "E2",
        lambda question: _columns_unwritten(
            question, lambda at, count: at >= (-(-count // 128) - 1) * 32 + 128
        ),
    )
    yield fault(
        "window-of-none",
        "a layer without a window is taken for one with a window of 0",
        "B57",
        lambda question: windowed(question, oldest_of=lambda at, _, window: (at - window + 1).clamp_min(0)),
        "it sees nothing",
    )
    yield fault(
        "window-of-none",
        "a layer without a window is taken for one with a window of 0",
        "B57",
        lambda question: windowed(
            question,
            oldest_of=lambda at, _, window: torch.minimum((at - window + 1).clamp_min(0), at),
        ),
        "it sees itself alone",
    )
    yield from tokens_unwritten("swa_indices", ("swa_indices",), SIZES)


def _oldest(at: Tensor, window: int, later: int) -> Tensor:
    return (at - window + later).clamp_min(0) if window else torch.zeros_like(at)


def _at_the_first(question: Question) -> Answers:
    ids = tensor(question.inputs, "batch_id_per_token").long()
    back = places(ids)[ids >= 0]
    return windowed(
        question,
        oldest_of=lambda at, _, window: _oldest(at - back, window, 1),
        newest_of=lambda at: at - back,
    )


def _of_the_step(question: Question) -> Answers:
    begins = tensor(question.inputs, "cu_seqlens_q").long()
    cached = tensor(question.inputs, "seq_lens_decoder").long()
    return windowed(question, row_of=lambda tables, slots, at, block: begins[slots] + at - cached[slots])


def unwritten_behind() -> Fault:
    """The fault of leaving entries without a key as they were."""

    def apply(question: Question) -> Answers:
        right = tensor(dict(question.truth), "swa_indices")  # type: ignore[arg-type]
        return {"swa_indices": Unwritten(right, right >= 0)}

    return Fault(
        "unused-unwritten", ("swa_indices",), "entries without a key are never written", "B67", apply
    )


def _columns_unwritten(question: Question, is_lost: Callable[[Tensor, int], Tensor]) -> Answers:
    """Indices without some columns: (columns, their number) -> bool."""
    right = tensor(dict(question.truth), "swa_indices")  # type: ignore[arg-type]
    count = right.shape[2]
    lost = is_lost(torch.arange(count, device=right.device), count)
    return {"swa_indices": Unwritten(right, ~lost.expand_as(right))}


# ---- plans ---------------------------------------------------------------------------------------


def _plans() -> Iterator[Fault]:
    changes: list[tuple[str, str, str, Callable[[Inputs], Mapping[str, Tensor | float | str | None]]]] = [
        (
            "block-size-is-a-literal",
            "the block size is taken for 64",
            "B32, B38",
            lambda inputs: {"block_size": 64},
        ),
        (
            "multiprocessors-ignored",
            "tiles are counted and not waves of them: the most tiles win",
            "B13",
            lambda inputs: {"multiprocessors": 2**31 - 1},
        ),
    ]
    for name, summary, source, change in changes:
        yield changing(name, ("step_plan",), summary, source, change)
    for count in (78, 80, 108, 114, 132, 148):
        yield changing(
            "multiprocessors-of-another-gpu",
            ("step_plan",),
            "the plan is made for another GPU's multiprocessors",
            "B13, M9",
            lambda inputs, count=count: {"multiprocessors": count},
            f"{count}",
        )
    lengths: list[tuple[str, str, str, Callable[[Inputs], Mapping[str, Tensor]]]] = [
        (
            "cache-means-decode",
            "a row with a cache is taken for a decode row, prefix hits among them",
            "B20",
            lambda inputs: {"seq_lens_encoder": tensor(inputs, "seq_lens_encoder") * (_cached(inputs) == 0)},
        ),
        (
            "keys-without-the-cache",
            "rows are as long as they have new tokens",
            "B04",
            lambda inputs: {"seq_lens_decoder": _cached(inputs) * 0},
        ),
        (
            "length-of-one-token",
            "every row's length counts one new token",
            "B20, T2",
            lambda inputs: {"seq_lens_this_time": _this_time(inputs).clamp_max(1)},
        ),
        (
            "empty-slot-has-a-token",
            "a slot without a token is counted as one with a token",
            "B07",
            lambda inputs: {"seq_lens_this_time": _this_time(inputs).clamp_min(1)},
        ),
    ]
    for name, summary, source, change_of in lengths:
        for form, outputs in (
            ("", ()),
            ("in the tiles alone", TILES),
            ("in the maxima alone", ("max_lens",)),
        ):

            def apply(
                question: Question,
                change_of: Callable[[Inputs], Mapping[str, Tensor]] = change_of,
                outputs: tuple[str, ...] = outputs,
            ) -> Answers:
                made = question.with_inputs(**change_of(question.inputs))
                return {**question.truth, **{key: made[key] for key in outputs or made}}

            yield Fault(name, ("step_plan",), summary, source, apply, form)
    for slots in (32, 64, 128, 256, 512, 1024):
        yield changing(
            "slots-limited",
            ("step_plan",),
            "slots behind a fixed number of them are not looked at",
            "B05",
            lambda inputs, slots=slots: {
                name: tensor(inputs, name) * (torch.arange(_num_slots(inputs)) < slots)
                for name in ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
            },
            f"behind {slots}",
        )
    yield from _listed()
    yield from _chosen()
    yield from _maxima()
    yield from tokens_unwritten("step_plan", TILES[:2], (78, 80, 108, 114, 132, 148, *SIZES[4:]))
    yield empty_unwritten(
        "step_plan",
        "a step without a slot leaves its outputs as memory had them",
        "B36, B67",
        ("max_lens", *TILES),
        lambda question: _num_slots(question.inputs) == 0,
    )
    yield Fault(
        "numbers-of-the-list",
        ("step_plan",),
        "a tile has its number in the list, not in its row",
        "O05",
        _numbered_in_the_list,
    )
    yield Fault(
        "unused-unwritten",
        ("step_plan",),
        "entries behind the last tile are never written",
        "O05, E16",
        lambda question: {
            **question.truth,
            **{
                name: Unwritten(values, values >= 0)
                for name in TILES[:2]
                for values in [tensor(dict(question.truth), name)]  # type: ignore[arg-type]
            },
        },
    )


TILES = ("decoder_batch_ids", "decoder_tile_ids", "decoder_num_tiles", "decoder_chunk_size")
LONE_CHUNK = 64
CANDIDATES = 12


def planned(
    question: Question,
    *,
    keys: Tensor | None = None,
    counted: Tensor | None = None,
    tiles_of: Callable[[Tensor, int], Tensor] | None = None,
    begins_of: Callable[[Tensor], Tensor] | None = None,
    row_of: Callable[[Tensor, Tensor], Tensor] | None = None,
    smaller: bool = False,
    is_alone: bool | None = None,
) -> Answers:
    """The plan with something else.

    Args:
        keys: [B], of each row, that are listed. counted: [B], that the chunk is chosen for.
        tiles_of: (keys, chunk) -> tiles of each row, listed.
        begins_of: tiles -> [B + 1], where each row's begin in the list.
        row_of: (begins, entries) -> the row of each entry.
        smaller: whether the smaller of equal candidates is chosen. is_alone: whether none is.
    """
    inputs = question.inputs
    right = torch.where(_is_decode(inputs), _all_keys(inputs), 0).long()
    keys = right if keys is None else keys.long()
    counted = right if counted is None else counted.long()
    if len(keys) == 1 if is_alone is None else is_alone:
        chunk = LONE_CHUNK
    else:
        chunk = _chunk(inputs, counted, smaller=smaller)
    tiles = (_ceil_div if tiles_of is None else tiles_of)(keys, chunk)
    begins = (starts if begins_of is None else begins_of)(tiles).long()
    entries = torch.arange(int(number(inputs, "plan_tiles")), device=keys.device)
    used = entries[entries < begins[-1]]
    rows = begun(begins, used, upper=True) if row_of is None else row_of(begins, used)
    batch_ids = torch.full_like(entries, -1)
    tile_ids = batch_ids.clone()
    batch_ids[: len(used)], tile_ids[: len(used)] = rows, used - begins[rows]
    made = (batch_ids, tile_ids, begins[-1:], torch.full_like(begins[:1], chunk))
    lists = {name: values.to(torch.int32) for name, values in zip(TILES, made, strict=True)}
    return {**question.truth, **lists}


def _chunk(inputs: Inputs, keys: Tensor, *, smaller: bool) -> int:
    """The candidate of the fullest last wave, and of equal ones the larger or the smaller."""
    candidates = int(number(inputs, "block_size")) * 2 ** torch.arange(CANDIDATES, device=keys.device)
    totals = _ceil_div(keys[None, :], candidates[:, None]).sum(1) % int(number(inputs, "multiprocessors"))
    best = (totals == totals.max()).nonzero()
    return int(candidates[best.min() if smaller else best.max()])


def _ceil_div(values: Tensor, by: int | Tensor) -> Tensor:
    return (values + by - 1) // by


def _is_decode(inputs: Inputs) -> Tensor:
    return (tensor(inputs, "seq_lens_encoder") == 0) & (_this_time(inputs) > 0)


def _listed() -> Iterator[Fault]:
    """Other keys of rows: in the list alone, and in what the chunk is chosen for, too."""
    rows: list[tuple[str, str, str, Callable[[Inputs], Tensor]]] = [
        (
            "cache-means-decode",
            "a row with a cache is taken for a decode row, prefix hits among them",
            "B20",
            lambda inputs: _all_keys(inputs) * ((_cached(inputs) > 0) & (_this_time(inputs) > 0)),
        ),
        (
            "paused-rows-have-tiles",
            "a resident slot without a token is taken for a decode row",
            "B07, B20",
            lambda inputs: _all_keys(inputs) * ~_is_prefill(inputs),
        ),
        (
            "length-without-the-new",
            "a row's keys do not count its new tokens",
            "B66",
            lambda inputs: _cached(inputs) * _is_decode(inputs),
        ),
    ]
    for name, summary, source, keys_of in rows:
        for form, is_counted in (
            ("in the list alone", False),
            ("in the choice of the chunk, too", True),
        ):

            def apply(
                question: Question,
                keys_of: Callable[[Inputs], Tensor] = keys_of,
                is_counted: bool = is_counted,
            ) -> Answers:
                keys = keys_of(question.inputs)
                return planned(question, keys=keys, counted=keys if is_counted else None)

            yield Fault(name, ("step_plan",), summary, source, apply, form)


def _plan(
    name: str, summary: str, source: str, apply: Callable[[Question], Answers | None], form: str = ""
) -> Fault:
    return Fault(name, ("step_plan",), summary, source, apply, form)


def _floored(question: Question) -> Tensor:
    """[B]: keys of decode rows in whole blocks."""
    inputs, block = question.inputs, int(number(question.inputs, "block_size"))
    return _all_keys(inputs) * _is_decode(inputs) // block * block


def _chosen() -> Iterator[Fault]:
    """Tiles counted in another way, and another chunk."""
    for form, counted_of in (
        ("in the list alone", lambda question: None),
        ("in the choice of the chunk, too", _floored),
    ):
        yield _plan(
            "last-tile-lost",
            "tiles are rounded down: a row's last keys belong to none",
            "B03",
            lambda question, counted_of=counted_of: planned(
                question, counted=counted_of(question), tiles_of=lambda keys, chunk: keys // chunk
            ),
            form,
        )
    yield _plan(
        "empty-last-tile",
        "a row that ends with a tile has an empty one behind it",
        "E14",
        lambda question: planned(
            question, tiles_of=lambda keys, chunk: keys // chunk + (keys > 0).to(keys.dtype)
        ),
    )
    for slots in (256, 1024):
        for upper in (True, False):
            for carried, name, summary in (
                (0, "sums-begin-anew", "the list begins anew behind as many slots as a block of threads has"),
                (
                    1,
                    "sums-carry-one-block",
                    "a block of slots goes on from the sum of the block before it, not of all before it",
                ),
            ):
                yield _plan(
                    name,
                    summary,
                    "B05",
                    lambda question, slots=slots, carried=carried, upper=upper: _begun_anew(
                        question, slots, carried, upper=upper
                    ),
                    f"blocks of {slots}, tiles are found in them by {'upper' if upper else 'lower'} middles",
                )
    yield _plan(
        "first-of-equal-starts",
        "the first tile of a row belongs to the row in front of it",
        "B56",
        lambda question: planned(
            question,
            row_of=lambda begins, entries: (
                torch.searchsorted(begins[:-1].contiguous(), entries) - 1
            ).clamp_min(0),
        ),
    )
    yield _plan(
        "smaller-of-equal-chunks",
        "of candidates that fill the last wave alike the smaller is chosen",
        "O05",
        lambda question: planned(question, smaller=True),
    )
    yield _plan(
        "lone-slot-by-waves",
        "a step of one slot is cut like any other",
        "O05",
        lambda question: planned(question, is_alone=False),
    )
    yield _plan(
        "one-decode-row-is-alone",
        "a step with one decode row is cut as if it had one slot",
        "O05",
        lambda question: planned(question, is_alone=int(_is_decode(question.inputs).sum()) <= 1),
    )
    yield _plan(
        "tiles-of-half-a-warp",
        "tiles are counted of every other 16 slots alone: half of the lanes are left out of the sum",
        "B34",
        lambda question: planned(
            question,
            counted=_all_keys(question.inputs)
            * _is_decode(question.inputs)
            * (torch.arange(_num_slots(question.inputs)) % 32 < 16),
        ),
    )


def _begun_anew(question: Question, slots: int, carried: int, *, upper: bool) -> Answers:
    """The plan by sums that forget; what is left at the end is the last block's."""
    answers = planned(
        question,
        begins_of=lambda tiles: anew(starts(tiles), slots, carried),
        row_of=lambda begins, entries: begun(begins, entries, upper=upper),
    )
    last = planned(question, begins_of=lambda tiles: anew(starts(tiles), slots))
    return {**answers, "decoder_num_tiles": last["decoder_num_tiles"]}


def _maxima() -> Iterator[Fault]:
    """Largest lengths over other slots."""
    largest: list[tuple[str, str, str, int, Callable[[Inputs], Tensor]]] = [
        (
            "longest-without-the-cache",
            "the longest row is measured by its new tokens",
            "B03",
            3,
            _this_time,
        ),
        (
            "paused-rows-among-the-longest",
            "the longest row is looked for among those without a token, too",
            "O05",
            3,
            _all_keys,
        ),
        (
            "rows-without-a-cache-counted",
            "the longest row with a cache is looked for among those without one, too",
            "O05",
            5,
            lambda inputs: _all_keys(inputs) * (_this_time(inputs) > 0),
        ),
    ]
    for name, summary, source, index, lengths_of in largest:
        yield _plan(
            name,
            summary,
            source,
            lambda question, index=index, lengths_of=lengths_of: _with_maximum(
                question, question.truth, index, lengths_of(question.inputs)
            ),
        )
    for form, is_counted in (
        ("in a maximum alone", False),
        ("in a maximum and the choice of the chunk", True),
    ):

        def apply(question: Question, is_counted: bool = is_counted) -> Answers:
            inputs = question.inputs
            has_cache = (_cached(inputs) > 0) & (_this_time(inputs) > 0)
            answers: Answers = question.truth
            if is_counted:
                answers = planned(question, counted=_all_keys(inputs) * has_cache)
            return _with_maximum(question, answers, 4, _cached(inputs) * has_cache)

        yield _plan(
            "cache-means-decode",
            "a row with a cache is taken for a decode row, prefix hits among them",
            "B20",
            apply,
            form,
        )
    for threads in (128, 256, 1024):
        yield _plan(
            "maxima-of-one-warp",
            "maxima are those of the first 32 threads, and not of the block's",
            "B05, B34",
            lambda question, threads=threads: {
                **question.truth,
                "max_lens": question.with_inputs(
                    **{
                        name: tensor(question.inputs, name)
                        * (torch.arange(_num_slots(question.inputs)) % threads < 32)
                        for name in ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
                    }
                )["max_lens"],
            },
            f"of {threads}",
        )
    for first, form in ((6, "all of them"), (8, "the last")):
        yield unwritten(
            "step_plan",
            "unused-maxima-unwritten",
            "the places behind the maxima are never written",
            "B67",
            ("max_lens",),
            lambda question, count, first=first: torch.arange(count) >= first,
            form,
        )


def _with_maximum(question: Question, answers: Answers, index: int, lengths: Tensor) -> Answers:
    maxima = tensor(dict(question.truth), "max_lens").clone()  # type: ignore[arg-type]
    maxima[index] = lengths.max() if len(lengths) else 0
    return {**answers, "max_lens": maxima}


def _numbered_in_the_list(question: Question) -> Answers:
    right = tensor(dict(question.truth), "decoder_tile_ids")  # type: ignore[arg-type]
    numbers = torch.arange(len(right), dtype=right.dtype, device=right.device)
    return {**question.truth, "decoder_tile_ids": torch.where(right >= 0, numbers, -1)}


FAULTS = (
    *_lengths(),
    *_batch_ids(),
    *_positions(),
    *_offsets(),
    *_found(),
    *_windows(),
    *_plans(),
)
