"""Faults of step metadata: positions, slots, prefix sums, rows of the cache and windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import changing, places, read_as_dense, starts, tokens_unwritten, unwritten
from references.oracle import Inputs, number, tensor

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
BY_TABLE = ("slot_mapping", "swa_indices")
BY_LENGTH = ("position_ids", "swa_indices")
BY_BATCH_ID = ("slot_mapping", "position_ids", "swa_indices")


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
        yield changing(
            name,
            BY_LENGTH,
            summary,
            source,
            lambda inputs, lengths_of=lengths_of: {"seq_lens_decoder": lengths_of(inputs)},
        )
    for step in (1, -1):
        yield changing(
            "neighbours-history",
            BY_LENGTH,
            "a row has the cached length of another slot",
            "B07",
            lambda inputs, step=step: {
                "seq_lens_decoder": _neighbours(tensor(inputs, "seq_lens_decoder"), step)
            },
            f"of the slot {'before' if step == 1 else 'behind'}",
        )


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
        yield changing(
            name,
            BY_BATCH_ID,
            summary,
            source,
            lambda inputs, ids_of=ids_of: {"batch_id_per_token": ids_of(inputs)},
            form,
        )


def _own_slots(inputs: Inputs) -> Tensor:
    """[Tp]: of each real token its own number, -1 where there is no such slot."""
    ids = tensor(inputs, "batch_id_per_token")
    tokens = torch.arange(len(ids), dtype=ids.dtype, device=ids.device)
    return torch.where((ids >= 0) & (tokens < _num_slots(inputs)), tokens, -1)


def _limited(ids: Tensor, slots: int) -> Tensor:
    return torch.where(ids < slots, ids, -1)


def _positions() -> Iterator[Fault]:
    """Of operator position_ids alone: what no other length explains."""
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
    yield unwritten(
        "position_ids",
        "padding-unwritten",
        "tokens of padding are never written",
        "B31",
        ("position_ids",),
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
    sums = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_prefill")
    for slots in (256, 1024):
        for outputs in (sums, *((output,) for output in sums)):
            yield Fault(
                "sums-begin-anew",
                ("padding_offset",),
                "sums begin anew behind as many slots as a block of threads has",
                "B05",
                lambda question, slots=slots, outputs=outputs: _anew(question, slots, outputs),
                f"every {slots}, {'all' if len(outputs) > 1 else outputs[0]}",
            )
    yield Fault(
        "empty-slot-has-a-token",
        ("padding_offset",),
        "a slot without a token is counted as one with a token",
        "B07",
        _at_least_one,
    )
    for change, name, summary in (
        (
            lambda inputs, ids: torch.where(ids < 0, _num_slots(inputs) - 1, ids),
            "padding-in-the-last-slot",
            "padding is taken for tokens of the last slot",
        ),
        (lambda inputs, ids: ids.clamp_min(0), "padding-in-slot-0", "padding is taken for tokens of slot 0"),
        (
            _one_early,
            "first-token-to-the-slot-before",
            "a row's first token belongs to the slot in front of it",
        ),
        (
            _first_of_equals,
            "first-of-equal-starts",
            "an empty slot takes the tokens of the slot behind it",
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


def _anew(question: Question, slots: int, outputs: Sequence[str]) -> Answers:
    """Each slot's sum without what stands before its block of slots."""
    answers = dict(question.truth)
    for output in outputs:
        sums = answers[output]
        if isinstance(sums, Tensor):
            at = torch.arange(len(sums), device=sums.device)
            begins = (at - 1).clamp_min(0) // slots * slots
            answers[output] = sums - sums[begins]
    return answers


def _one_early(inputs: Inputs, ids: Tensor) -> Tensor:
    """[Tp]: the first token of every row, but of the first, in the slot of the one before it."""
    is_first = (places(ids.long()) == 0) & (ids > 0)
    return torch.where(is_first, ids - 1, ids)


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
) -> Answers:
    """swa_indices with something else.

    Args:
        oldest_of: (positions, cached lengths, window) -> the first position that is seen.
        newest_of: positions -> the last one. unused: what stands behind it.
    """
    inputs = question.inputs
    right = tensor(dict(question.truth), "swa_indices")  # type: ignore[arg-type]
    tables, block_size = tensor(inputs, "block_tables").long(), int(number(inputs, "block_size"))
    window = int(number(inputs, "window"))
    ids = tensor(inputs, "batch_id_per_token").long()
    real = ids >= 0
    slots = ids[real]
    cached = tensor(inputs, "seq_lens_decoder").long()[slots]
    at = cached + places(ids)[real]
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
    answer = right.clone()
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
            lambda question, size=size: _columns_unwritten(question, size),
            f"behind {size}",
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


def _columns_unwritten(question: Question, size: int) -> Answers:
    right = tensor(dict(question.truth), "swa_indices")  # type: ignore[arg-type]
    written = torch.arange(right.shape[2], device=right.device) < size
    return {"swa_indices": Unwritten(right, written.expand_as(right))}


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
