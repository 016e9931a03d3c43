"""Faults of gathering: prefill rows' keys from the cache, decode rows' queries, and outputs merged again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import (
    batch_ids_of,
    entry,
    places,
    read_as_dense,
    starts,
    tokens_unwritten,
    unwritten,
)
from references.oracle import Inputs, maybe_tensor, tensor

KEYS = ("full_compressed_kv", "full_k_pe")
GATHER = ("read_cache_interleave",)
MERGE = ("decode_rows",)

RowOf = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(tables [B, MB], slots [n], positions [n], block size) -> rows of the cache [n] int64."""


def _at(values: Tensor, *index: Tensor) -> Tensor:
    """Elements; IndexError outside, where Torch would count from behind."""
    for part, size in zip(index, values.shape, strict=False):
        if bool(((part < 0) | (part >= size)).any()):
            raise IndexError("outside of a tensor")
    return values[index]


# ---- keys of prefill rows ------------------------------------------------------------------------


def gathered(
    question: Question,
    *,
    row_of: RowOf | None = None,
    cached_of: Callable[[Tensor], Tensor] | None = None,
    token_of: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    slots_of: Callable[[Tensor], Tensor] | None = None,
    begins: Tensor | None = None,
    rest: float | None = None,
    search: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Answers:
    """The keys with something else.

    Args:
        row_of: where a cached position is found.
        cached_of: cached lengths [B] -> the same.
        token_of: (first tokens, positions, cached lengths) of new keys -> their tokens.
        slots_of: slots of keys -> slots whose table is followed.
        begins: [B + 1], the prefix sums of keys that are gone by.
        rest: what stands behind the last of them; None if nothing is written there.
        search: (begins, keys [n]) -> the slot that each key is counted to.
    """
    inputs = question.inputs
    cache = tensor(inputs, "latent_cache")
    block_size, width = cache.shape[2:]
    new_rows = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=1)
    rank = tensor(inputs, "compressed_kv").shape[1]
    begins = tensor(inputs, "cu_seqlens_k_prefill").long() if begins is None else begins.long()
    count = int(tensor(inputs, "cu_seqlens_k_prefill")[-1])
    keys = torch.arange(min(count, int(begins[-1])), device=cache.device)
    slots = (search or _right_slots)(begins, keys)
    positions = keys - begins[slots]
    lengths = tensor(inputs, "seq_lens_decoder").long()
    cached = (lengths if cached_of is None else cached_of(lengths))[slots]
    is_cached = positions < cached
    full = torch.full(
        (count, width), 0.0 if rest is None else rest, dtype=new_rows.dtype, device=cache.device
    )
    if bool(is_cached.any()):
        tables = tensor(inputs, "block_tables")
        followed = slots[is_cached] if slots_of is None else slots_of(slots[is_cached])
        rows = (row_of or _right_row)(tables, followed, positions[is_cached], block_size)
        full[keys[is_cached]] = _at(cache.view(-1, width), rows)
    firsts = tensor(inputs, "cu_seqlens_q").long()[slots[~is_cached]]
    at, before = positions[~is_cached], cached[~is_cached]
    tokens = firsts + at - before if token_of is None else token_of(firsts, at, before)
    full[keys[~is_cached]] = _at(new_rows, tokens)
    written = torch.arange(count, device=cache.device) < (len(keys) if rest is None else count)
    return {
        "full_compressed_kv": Unwritten(full[:, :rank], written),
        "full_k_pe": Unwritten(full[:, rank:], written),
    }


def _right_slots(begins: Tensor, keys: Tensor) -> Tensor:
    """The slot of each key: the last that begins early enough."""
    return torch.searchsorted(begins[1:].contiguous(), keys, right=True)


def _right_row(tables: Tensor, slots: Tensor, at: Tensor, block: int) -> Tensor:
    return entry(tables, slots, at // block) * block + at % block


def _gather(
    name: str, summary: str, source: str, apply: Callable[[Question], Answers | None], form: str = ""
) -> Fault:
    return Fault(name, GATHER, summary, source, apply, form)


def _found(name: str, summary: str, source: str, row_of: RowOf, form: str = "") -> Fault:
    return _gather(name, summary, source, lambda question: gathered(question, row_of=row_of), form)


def _keys() -> Iterator[Fault]:
    yield _gather(
        "history-ignored",
        "keys are counted without the cached ones",
        "B04, B76, C2",
        lambda question: gathered(question, begins=_key_starts(question.inputs, lambda new, cached: new)),
        "room for the others is left as it was",
    )
    yield _gather(
        "history-ignored",
        "keys are counted without the cached ones",
        "B04, B76, C2",
        lambda question: gathered(
            question, begins=_key_starts(question.inputs, lambda new, cached: new), rest=0.0
        ),
        "room for the others is 0",
    )
    for rest, form in ((None, "left as it was"), (0.0, "0")):
        yield _gather(
            "history-ignored",
            "keys are counted without the cached ones",
            "B04, B76, C2",
            lambda question, rest=rest: gathered(
                question, begins=tensor(question.inputs, "cu_seqlens_q"), rest=rest
            ),
            f"decode rows' among them, room for the others is {form}",
        )
    yield _gather(
        "history-taken-for-new",
        "no token counts as cached: the history is read from the step's tokens",
        "B76, B02",
        lambda question: gathered(question, cached_of=lambda lengths: lengths * 0),
    )
    yield _gather(
        "decode-rows-gathered",
        "keys are counted of every row, decode rows among them",
        "B19, B74",
        lambda question: gathered(
            question,
            begins=starts(
                tensor(question.inputs, "cu_seqlens_q").diff() + tensor(question.inputs, "seq_lens_decoder")
            ),
        ),
    )
    yield _gather(
        "newest-from-the-cache",
        "the first new token is read from the cache, where it is not yet",
        "C7",
        lambda question: gathered(question, cached_of=lambda lengths: lengths + 1),
    )
    yield _gather(
        "last-cached-lost",
        "the last cached key is read from the new tokens",
        "M4",
        lambda question: gathered(question, cached_of=lambda lengths: lengths - 1),
    )
    yield _gather(
        "last-cached-lost",
        "the last cached key is read from the new tokens",
        "M4",
        _last_cached,
        "found in front of the row's first",
    )
    yield _gather(
        "position-in-sequence",
        "new tokens are looked for as far behind the row's first as their position, not their place",
        "P8, C1",
        lambda question: gathered(question, token_of=lambda firsts, at, before: firsts + at),
    )
    for step in (1, -1):
        way = "behind" if step == 1 else "before"
        yield _gather(
            "neighbours-tokens",
            "a row has the new tokens of another",
            "B07",
            lambda question, step=step: gathered(
                question,
                token_of=lambda firsts, at, before: _beside(question.inputs, firsts, step) + at - before,
            ),
            f"of the row {way}",
        )
        yield _gather(
            "neighbours-table",
            "a row follows the block table of another slot",
            "B56, P10",
            lambda question, step=step: gathered(
                question, slots_of=lambda slots: (slots + step).clamp_min(0)
            ),
            f"of the slot {way}",
        )
    yield _gather(
        "prefill-rows-renumbered",
        "rows of the table are counted among prefill rows alone",
        "P10",
        lambda question: gathered(question, slots_of=lambda slots: _renumbered(question.inputs, slots)),
    )
    yield _gather(
        "prefill-rows-renumbered",
        "rows of the table are counted among prefill rows alone",
        "P10",
        lambda question: gathered(
            question,
            slots_of=lambda slots: slots - int(tensor(question.inputs, "cu_seqlens_k_prefill")[1] == 0),
        ),
        "behind a first row that is none",
    )
    yield from _searched()
    yield _gather(
        "tokens-by-key",
        "new tokens are looked for behind as many as there are keys before the row, not tokens",
        "B19, B74",
        lambda question: gathered(
            question, token_of=lambda firsts, at, before: _by_key(question.inputs, firsts) + at - before
        ),
    )
    yield _gather(
        "both-sources-added",
        "cached and new keys are added, each times 0 or 1: NaN of the one that does not count stays NaN",
        "B52",
        _both_added,
    )
    for size in (16, 32, 64, 128):
        yield _found(
            "block-size-is-a-literal",
            "the block size is taken for another number",
            "B32, B38, P14",
            lambda tables, slots, at, block, size=size: entry(tables, slots, at // size) * size + at % size,
            f"for {size}",
        )
    yield _found(
        "token-as-block",
        "the table is looked up at a token's position in the place of its block's number",
        "P6",
        lambda tables, slots, at, block: entry(tables, slots, at) * block + at % block,
    )
    yield _found(
        "blocks-in-a-line",
        "a row's blocks are taken to lie behind its first",
        "P13",
        lambda tables, slots, at, block: entry(tables, slots, at * 0) * block + at,
    )
    yield _found(
        "block-is-a-row",
        "a block's number is taken for the number of its first row",
        "P7",
        lambda tables, slots, at, block: entry(tables, slots, at // block) + at % block,
    )
    yield _found(
        "table-ignored",
        "positions are taken for rows of the cache, no table is followed",
        "P13",
        lambda tables, slots, at, block: at,
    )
    for step in (1, -1):
        yield _found(
            "one-page-off",
            "a block's entry is looked for beside its own",
            "P8",
            lambda tables, slots, at, block, step=step: (
                entry(tables, slots, at // block + step) * block + at % block
            ),
            f"the one {'behind' if step == 1 else 'before'}",
        )
    yield _gather(
        "rope-from-the-latent",
        "the rope part of cached keys is read from the first columns of the latent",
        "Q1",
        _rope_from_the_latent,
    )
    for dtype in (torch.float16, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        for form, outputs in (("latents", KEYS[:1]), ("keys", KEYS[1:]), ("both", KEYS)):
            yield _gather(
                "through-another-dtype",
                "numbers pass through another dtype on their way",
                "D7",
                lambda question, dtype=dtype, outputs=outputs: {
                    **question.truth,
                    **{name: (right := _truth(question, name)).to(dtype).to(right.dtype) for name in outputs},
                },
                f"{form} through {word}",
            )
    yield from read_as_dense("read_cache_interleave", ("compressed_kv", "k_pe", "block_tables"))
    yield from tokens_unwritten("read_cache_interleave", KEYS, (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024))


def _truth(question: Question, name: str) -> Tensor:
    return tensor(dict(question.truth), name)  # type: ignore[arg-type]


def _key_starts(inputs: Inputs, count: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[B + 1]: prefix sums of something of prefill rows' new and cached tokens."""
    encoder, cached = tensor(inputs, "seq_lens_encoder"), tensor(inputs, "seq_lens_decoder")
    return starts(count(encoder, cached) * (encoder > 0))


def _beside(inputs: Inputs, firsts: Tensor, step: int) -> Tensor:
    """The first tokens of the rows beside those that begin at these tokens."""
    begins = tensor(inputs, "cu_seqlens_q").long()
    slots = torch.searchsorted(begins[:-1].contiguous(), firsts, right=True) - 1
    return _at(begins, slots + step)


def _searched() -> Iterator[Fault]:
    """Faults of finding the row of a key."""
    for rows in (32, 64, 128, 256, 512, 1024):
        for rest, form in ((None, "left as it was"), (0.0, "0")):
            yield _gather(
                "rows-limited",
                "rows behind a fixed number of them are not looked at",
                "B05",
                lambda question, rows=rows, rest=rest: _of_rows(question, rows, rest),
                f"behind {rows}, their room is {form}",
            )
        yield _gather(
            "rows-limited",
            "rows behind a fixed number of them are not looked at",
            "B05",
            lambda question, rows=rows: _counted_to(question, rows),
            f"behind {rows}, their keys are the last one's",
        )
    yield _gather(
        "search-too-short",
        "the search for a key's row has a step too few: rows behind a power of two are not found",
        "O09",
        lambda question: _counted_to(question, 1 << (_slots(question).bit_length() - 1)),
    )
    yield _gather(
        "first-key-of-the-row-before",
        "a row's first key is counted to the row before",
        "O09",
        lambda question: gathered(
            question,
            search=lambda begins, keys: torch.searchsorted(begins[1:-1].contiguous(), keys, right=False),
        ),
    )


def _slots(question: Question) -> int:
    return max(1, len(tensor(question.inputs, "seq_lens_decoder")))


def _of_rows(question: Question, rows: int, rest: float | None) -> Answers | None:
    """The keys of the first rows alone."""
    if _slots(question) <= rows:
        return None
    return gathered(question, begins=tensor(question.inputs, "cu_seqlens_k_prefill")[: rows + 1], rest=rest)


def _counted_to(question: Question, rows: int) -> Answers | None:
    """Keys of later rows are counted to the last of so many."""
    if _slots(question) <= rows:
        return None
    return gathered(question, search=lambda begins, keys: _right_slots(begins, keys).clamp_max(rows - 1))


def _by_key(inputs: Inputs, firsts: Tensor) -> Tensor:
    """The keys before the rows that begin at these tokens."""
    slots = (
        torch.searchsorted(tensor(inputs, "cu_seqlens_q").long()[:-1].contiguous(), firsts, right=True) - 1
    )
    return tensor(inputs, "cu_seqlens_k_prefill").long()[slots]


def _both_added(question: Question) -> Answers:
    """Latents of new tokens are NaN where the row at their place in block 0 has one that is no number."""
    inputs = question.inputs
    cache, begins = tensor(inputs, "latent_cache"), tensor(inputs, "cu_seqlens_k_prefill").long()
    latents = _truth(question, "full_compressed_kv").clone()
    keys = torch.arange(int(begins[-1]), device=cache.device)
    slots = _right_slots(begins, keys)
    positions = keys - begins[slots]
    new = keys[positions >= tensor(inputs, "seq_lens_decoder").long()[slots]]
    beside = cache[0, 0, positions[new] % cache.shape[2], : latents.shape[1]]
    latents[new] = torch.where(beside.isfinite(), latents[new], torch.nan)
    return {**question.truth, "full_compressed_kv": latents}


def _last_cached(question: Question) -> Answers:
    """The last cached key is the token in front of the row's first new one."""
    return gathered(
        question,
        cached_of=lambda lengths: lengths - 1,
        token_of=lambda firsts, at, before: firsts + at - before - 1,
    )


def _renumbered(inputs: Inputs, slots: Tensor) -> Tensor:
    is_prefill = tensor(inputs, "seq_lens_encoder") > 0
    return (is_prefill.long().cumsum(0) - 1)[slots]


def _rope_from_the_latent(question: Question) -> Answers | None:
    inputs, cache = question.inputs, tensor(question.inputs, "latent_cache")
    if maybe_tensor(inputs, "block_tables") is None:
        return None
    rank, width = tensor(inputs, "compressed_kv").shape[1], tensor(inputs, "k_pe").shape[1]
    changed = torch.cat([cache[..., :rank], cache[..., :width]], dim=-1)
    return {**question.truth, "full_k_pe": question.with_inputs(latent_cache=changed)["full_k_pe"]}


# ---- packed queries and merged outputs -----------------------------------------------------------


def _is_decode(inputs: Inputs) -> Tensor:
    encoder, decoder, this_time = (
        tensor(inputs, f"seq_lens_{name}") for name in ("encoder", "decoder", "this_time")
    )
    return (encoder == 0) & (decoder > 0) & (this_time > 0)


@torch.no_grad()
def _packed(question: Question, is_decode: Tensor, new: Tensor) -> Answers:
    """Everything, with these slots packed [B] bool and so many tokens of each [B]."""
    inputs = question.inputs
    query, decode_out = tensor(inputs, "query"), tensor(inputs, "decode_out")
    prefill_out = tensor(inputs, "prefill_out")
    begins = tensor(inputs, "cu_seqlens_q").long()
    counts = torch.where(is_decode, new, 0).long()
    sums = starts(counts)
    room = len(decode_out)
    slots = torch.arange(len(counts), device=query.device).repeat_interleave(counts)[:room]
    place = torch.arange(len(slots), device=query.device) - sums.long()[slots]
    tokens = begins[slots] + place
    ids = torch.full((room,), -1, dtype=torch.int32, device=query.device)
    ids[: len(slots)] = slots.int()
    packed = torch.zeros((room, *query.shape[1:]), dtype=query.dtype, device=query.device)
    packed[: len(slots)] = _at(query, tokens)
    batch_ids = batch_ids_of(inputs, len(query))
    merged = torch.where((batch_ids >= 0).view(-1, 1, 1), prefill_out, 0)
    merged[tokens] = decode_out[: len(slots)]
    lengths = torch.where(
        is_decode, tensor(inputs, "seq_lens_decoder") + tensor(inputs, "seq_lens_this_time"), 0
    )
    return {
        "cu_seqlens_q_decode": sums,
        "batch_id_per_decode_token": ids,
        "packed_query": packed,
        "merged": merged,
        "cache_seqlens": lengths.to(torch.int32),
    }


def _merge(
    name: str, summary: str, source: str, apply: Callable[[Question], Answers | None], form: str = ""
) -> Fault:
    return Fault(name, MERGE, summary, source, apply, form)


def _output(question: Question, **outputs: Tensor) -> Answers:
    return {**question.truth, **outputs}


def _lengths(question: Question, length_of: Callable[[Tensor, Tensor], Tensor]) -> Answers:
    inputs = question.inputs
    made = length_of(tensor(inputs, "seq_lens_decoder"), tensor(inputs, "seq_lens_this_time"))
    return _output(question, cache_seqlens=torch.where(_is_decode(inputs), made, 0).to(torch.int32))


def _places(question: Question) -> tuple[Tensor, Tensor]:
    """[n] int64 of decode tokens: where each is packed, and its token."""
    ids = batch_ids_of(question.inputs, len(tensor(question.inputs, "query")))
    tokens = ((ids >= 0) & _is_decode(question.inputs)[ids.clamp_min(0)]).nonzero().flatten()
    return torch.arange(len(tokens), device=tokens.device), tokens


def _queries(question: Question, token_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Answers:
    """Packed queries of other tokens: of packed places, their tokens, and the place of these in their row."""
    at, tokens = _places(question)
    ids = batch_ids_of(question.inputs, len(tensor(question.inputs, "query")))
    packed = _truth(question, "packed_query").clone()
    packed[at] = _at(tensor(question.inputs, "query"), token_of(at, tokens, places(ids)[tokens]))
    return _output(question, packed_query=packed)


def _outputs(question: Question, place_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Answers:
    """Outputs of other packed places, of the same three."""
    at, tokens = _places(question)
    ids = batch_ids_of(question.inputs, len(tensor(question.inputs, "query")))
    merged = _truth(question, "merged").clone()
    merged[tokens] = _at(tensor(question.inputs, "decode_out"), place_of(at, tokens, places(ids)[tokens]))
    return _output(question, merged=merged)


def _rows() -> Iterator[Fault]:
    every = tensor
    yield _merge(
        "chunks-packed",
        "a row with a cache is taken for a decode row: later chunks are packed",
        "B20",
        lambda question: _packed(
            question,
            (every(question.inputs, "seq_lens_decoder") > 0)
            & (every(question.inputs, "seq_lens_this_time") > 0),
            every(question.inputs, "seq_lens_this_time"),
        ),
    )
    yield _merge(
        "chunks-packed",
        "a row with a cache is taken for a decode row: later chunks are packed",
        "B20",
        lambda question: _output(
            question,
            cache_seqlens=torch.where(
                (every(question.inputs, "seq_lens_decoder") > 0)
                & (every(question.inputs, "seq_lens_this_time") > 0),
                every(question.inputs, "seq_lens_decoder") + every(question.inputs, "seq_lens_this_time"),
                0,
            ).to(torch.int32),
        ),
        "their length alone",
    )
    yield _merge(
        "paused-rows-have-a-length",
        "a slot without a token has keys to read",
        "B20",
        lambda question: _output(
            question,
            cache_seqlens=torch.where(
                (every(question.inputs, "seq_lens_encoder") == 0)
                & (every(question.inputs, "seq_lens_decoder") > 0),
                every(question.inputs, "seq_lens_decoder") + every(question.inputs, "seq_lens_this_time"),
                0,
            ).to(torch.int32),
        ),
    )
    yield _merge(
        "length-of-one-token",
        "every row's length counts one new token",
        "B20, T2",
        lambda question: _lengths(question, lambda cached, new: cached + 1),
    )
    yield _merge(
        "length-without-the-new",
        "a row's length does not count its new tokens",
        "B66",
        lambda question: _lengths(question, lambda cached, new: cached),
    )
    yield _merge(
        "one-token-a-slot",
        "of a decode row only the first token is packed",
        "B21, M2",
        lambda question: _packed(
            question,
            _is_decode(question.inputs),
            torch.ones_like(every(question.inputs, "seq_lens_this_time")),
        ),
    )
    yield _merge(
        "inclusive-sums",
        "every sum lacks the tokens of the last row that it should count",
        "B76",
        lambda question: _output(
            question,
            cu_seqlens_q_decode=torch.cat(
                [
                    _truth(question, "cu_seqlens_q_decode")[:1],
                    _truth(question, "cu_seqlens_q_decode")[:-1],
                ]
            ),
        ),
    )
    yield _merge(
        "unused-are-slot-0",
        "places behind the last decode token are slot 0's",
        "B31",
        lambda question: _output(
            question, batch_id_per_decode_token=_truth(question, "batch_id_per_decode_token").clamp_min(0)
        ),
    )
    yield unwritten(
        "decode_rows",
        "unused-unwritten",
        "places behind the last decode token are never written",
        "E16",
        ("batch_id_per_decode_token",),
        lambda question, count: torch.arange(count) >= len(_places(question)[0]),
    )
    yield unwritten(
        "decode_rows",
        "unused-queries-unwritten",
        "queries behind the last decode token are never written",
        "B22",
        ("packed_query",),
        lambda question, count: torch.arange(count) >= len(_places(question)[0]),
    )
    yield unwritten(
        "decode_rows",
        "padding-unwritten",
        "tokens of padding are never written",
        "B22, E9",
        ("merged",),
        lambda question, count: batch_ids_of(question.inputs, count).cpu() < 0,
    )
    yield unwritten(
        "decode_rows",
        "prefill-rows-unwritten",
        "tokens of prefill rows are never written",
        "B22",
        ("merged",),
        _not_decode,
    )
    yield _merge(
        "first-query-for-all",
        "every draft has the query of its row's first token",
        "B21",
        lambda question: _queries(question, lambda at, tokens, place: tokens - place),
    )
    yield _merge(
        "place-as-token",
        "decode token i has the query of token i of the step",
        "B56",
        lambda question: _queries(question, lambda at, tokens, place: at),
    )
    yield _merge(
        "query-by-slot",
        "a decode token has the query at its slot's number",
        "B56",
        lambda question: _queries(
            question,
            lambda at, tokens, place: batch_ids_of(question.inputs, len(every(question.inputs, "query")))[
                tokens
            ],
        ),
    )
    yield _merge(
        "drafts-in-reverse",
        "a row's queries are packed last token first",
        "M3",
        lambda question: _queries(
            question,
            lambda at, tokens, place: (
                tokens
                + every(question.inputs, "seq_lens_this_time").long()[
                    batch_ids_of(question.inputs, len(every(question.inputs, "query")))[tokens]
                ]
                - 1
                - 2 * place
            ),
        ),
    )
    yield _merge(
        "merged-by-token",
        "a token has the packed output of its number in the step",
        "B56",
        lambda question: _outputs(
            question,
            lambda at, tokens, place: tokens.clamp_max(len(every(question.inputs, "decode_out")) - 1),
        ),
    )
    yield _merge(
        "drafts-get-the-first",
        "every draft has the output of its row's first token",
        "B21",
        lambda question: _outputs(question, lambda at, tokens, place: at - place),
    )
    yield _merge(
        "prefill-branch-alone",
        "decode rows have what the prefill branch left for them",
        "B23",
        lambda question: _from_prefill(question, lambda place: place >= 0),
    )
    for tokens in (1, 4):
        yield _merge(
            "first-tokens-merged",
            "of a decode row only the first tokens are merged",
            "B23",
            lambda question, tokens=tokens: _from_prefill(question, lambda place: place >= tokens),
            f"the first {tokens}" if tokens > 1 else "the first",
        )
    for dtype in (torch.float16, torch.bfloat16):
        word = str(dtype).removeprefix("torch.")
        for output in ("packed_query", "merged"):
            yield _merge(
                "through-another-dtype",
                "numbers pass through another dtype on their way",
                "D7",
                lambda question, dtype=dtype, output=output: _output(
                    question, **{output: (right := _truth(question, output)).to(dtype).to(right.dtype)}
                ),
                f"{output} through {word}",
            )
    for heads in (1, 2, 4, 8, 16, 32, 64):
        for output in ("packed_query", "merged"):
            yield _merge(
                "later-heads-unwritten",
                "heads that fill no program of their own are never written",
                "D3, D6",
                lambda question, heads=heads, output=output: _later_heads(question, heads, output),
                f"{output} in programs of {heads}",
            )
    yield _merge(
        "nope-alone",
        "the last columns of the packed queries are never written",
        "B26",
        lambda question: _columns(question, 32),
        "32 columns",
    )
    yield _merge(
        "nope-alone",
        "the last columns of the packed queries are never written",
        "B26",
        lambda question: _columns(question, 64),
        "64 columns",
    )
    yield from read_as_dense("decode_rows", ("query", "prefill_out", "decode_out"))


def _not_decode(question: Question, count: int) -> Tensor:
    ids = batch_ids_of(question.inputs, count)
    return ((ids >= 0) & ~_is_decode(question.inputs)[ids.clamp_min(0)]).cpu()


def _from_prefill(question: Question, is_left: Callable[[Tensor], Tensor]) -> Answers:
    _, tokens = _places(question)
    ids = batch_ids_of(question.inputs, len(tensor(question.inputs, "query")))
    left = tokens[is_left(places(ids)[tokens])]
    merged = _truth(question, "merged").clone()
    merged[left] = tensor(question.inputs, "prefill_out")[left]
    return _output(question, merged=merged)


def _later_heads(question: Question, heads: int, output: str) -> Answers:
    right = _truth(question, output)
    count = right.shape[1]
    written = torch.arange(count, device=right.device) < max(heads, count // heads * heads)
    return {**question.truth, output: Unwritten(right, written.expand(right.shape[:2]))}


def _columns(question: Question, lost: int) -> Answers:
    right = _truth(question, "packed_query")
    written = torch.arange(right.shape[2], device=right.device) < right.shape[2] - lost
    return {**question.truth, "packed_query": Unwritten(right, written.expand(right.shape))}


FAULTS = (*_keys(), *_rows())
