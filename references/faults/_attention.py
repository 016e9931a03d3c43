"""Attention over listed keys, one token at a time: what faults of every attention operator change.

    s   = scale * query k^T      over the token's list
    lse = ln sum_j exp(s_j)
    out = sum_j exp(s_j - lse) v_j

in float64. A head's sink, where there is one, is a key with that logit and without a value. `of` makes it
from the inputs of an operator; a test holds its answer to the definition's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from references._packed_rows import packed_rows
from references.faults._fault import NotMade, Question
from references.oracle import Inputs, Writes, flag, maybe_tensor, number, tensor, text

LISTS = ("sparse_decode", "sparse_prefill", "static_attention")
"""Operators whose lists say what a token sees."""

ROWS = ("mla_decode", "prefill_attention", "mla_step", "gqa_step")
"""Operators that know rows of the batch, and no lists."""

OPERATORS = (*ROWS, *LISTS)
PAGED = ("mla_decode", "mla_step", "gqa_step")

TILE = 128

Combine = Callable[[Tensor, float, Tensor], tuple[Tensor, Tensor]]
"""(q k^T [H, n] without the scale, scale, values [H or 1, n, V]) -> out [H, V], lse [H]; n is not 0."""

Placed = Callable[[Tensor, float, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same of keys whose places [n] int64 are known: in their list, or among the keys of their row."""

KeysOf = Callable[[Tensor], tuple[Tensor, Tensor]]

Asked = frozenset[int] | None


@dataclass(frozen=True)
class Token:
    """Where a token stands.

    Attributes:
        slot: of the batch, -1 for padding. place: in its row, from 0.
        cached, new: of its row. is_prefill: whether that is a first or a later chunk of a prompt; where
            lists differ by it, whether it is a first chunk.
        window: how many keys it sees at most, itself included; 0 for all.
    """

    slot: int
    place: int = 0
    cached: int = 0
    new: int = 0
    is_prefill: bool = False
    window: int = 0

    @property
    def seen(self) -> int:
        """Keys up to its own."""
        return self.cached + self.place + 1

    @property
    def first(self) -> int:
        """The oldest position that it sees."""
        return max(0, self.seen - self.window) if self.window else 0

    @property
    def visible(self) -> range:
        """The positions that it sees."""
        return range(self.first, self.seen)


MOST_KNOWN = 4096
"""Answers of a token that are kept: 64 KiB each, with 16 heads of 512 columns."""


class _Known:
    """Answers of tokens by the keys that they see, as long as nothing else is another."""

    def __init__(self) -> None:
        self.attention: Attention | None = None
        self.answers: dict[tuple[int, bytes], list[Tensor]] = {}

    def of(self, attention: Attention, token: int, rows: Tensor) -> list[Tensor] | None:
        """Where the answer of a token is kept, empty if it is not known yet; None where none may be."""
        first = self.attention = self.attention or attention
        is_same = (
            attention.query is first.query
            and attention.keys_of is first.keys_of
            and attention.scale == first.scale
            and attention.sinks is first.sinks
        )
        if not is_same or (len(self.answers) >= MOST_KNOWN):
            return None
        return self.answers.setdefault((token, rows.cpu().numpy().tobytes()), [])


@dataclass(frozen=True)
class Attention:
    """The tokens of a step and the keys of each.

    Attributes:
        query: [Tp, H, W], as stored.
        keys_of: rows [n] int64 -> keys [H or 1, n, W] and values [H or 1, n, V], float64. Rows are physical
            rows of a cache, rows of key tensors, or tokens of the step.
        listed: of each token the rows of its keys, oldest first; no keys, no output.
        tokens: where each token stands.
        row_of: (slot, positions [n] int64) -> the rows that hold them. Raises IndexError outside.
        scale: what logits are multiplied by.
        rank: R of the latent that stands at the front of keys; None where keys are of heads.
        splits: into how many parts a row's keys are divided; None if nobody says.
        value_width: V.
        asked: the tokens whose answers are wanted; None for all.
        sinks: [H] float64, logits of no key; None where there are none.
        places: of listed keys where they stand in their list; None where they stand side by side.
        entries: of a list, keys or none; None where nothing but keys is listed.
        known: what tokens were found to answer with other keys; most faults change few of them.
    """

    query: Tensor
    keys_of: KeysOf
    listed: tuple[Tensor, ...]
    tokens: tuple[Token, ...]
    row_of: Callable[[int, Tensor], Tensor]
    scale: float
    rank: int | None
    splits: int | None
    value_width: int
    asked: frozenset[int] | None = None
    sinks: Tensor | None = None
    places: tuple[Tensor, ...] | None = None
    entries: int | None = None
    known: _Known | None = None

    def answer(self, combine: Combine | None = None, placed: Placed | None = None) -> dict[str, Tensor]:
        """Out [Tp, H, V], lse and logit_magnitude [Tp, H], float64: 0, -inf and 0 where a list is empty."""
        count, heads = self.query.shape[:2]
        shape = {"dtype": torch.float64, "device": self.query.device}
        out = torch.zeros(count, heads, self.value_width, **shape)  # type: ignore[call-overload]
        lse = torch.full((count, heads), -torch.inf, **shape)  # type: ignore[call-overload]
        magnitude = torch.zeros(count, heads, **shape)  # type: ignore[call-overload]
        for token, rows in enumerate(self.listed):
            if len(rows) == 0 or not self.asks(token):
                continue
            known = None if combine or placed or self.known is None else self.known.of(self, token, rows)
            if known is not None and known:
                out[token], lse[token], magnitude[token] = known
                continue
            keys, values = self.keys_of(rows)
            query = self.query[token].double().unsqueeze(1)
            raw = (query @ keys.mT).squeeze(1)
            spread = (query.square() @ keys.mT.square()).squeeze(1).sqrt()
            magnitude[token] = torch.maximum(raw.abs(), spread).amax(-1) * self.scale
            if self.sinks is not None:
                magnitude[token] = torch.maximum(magnitude[token], self.sinks.abs())
                raw = torch.cat([raw, self.sinks.unsqueeze(1) / self.scale], dim=1)
                values = torch.cat([values, torch.zeros_like(values[:, :1])], dim=1)
            if placed is None:
                out[token], lse[token] = (combine or softmax)(raw, self.scale, values)
            else:
                out[token], lse[token] = placed(raw, self.scale, values, self.places_of(token, raw.shape[1]))
            if known is not None:
                known += (out[token], lse[token], magnitude[token])
        return {"out": out, "lse": lse, "logit_magnitude": magnitude}

    def places_of(self, token: int, count: int) -> Tensor:
        """[count] int64: where the keys of a token stand."""
        return torch.arange(count, device=self.query.device) if self.places is None else self.places[token]

    def asks(self, token: int) -> bool:
        """Whether the answer of a token is wanted."""
        return self.asked is None or token in self.asked

    def seeing(self, positions_of: Callable[[Token], Sequence[int] | range]) -> Attention:
        """The same tokens, each with these positions of its row; those without keys keep none."""
        listed = []
        for index, (token, rows) in enumerate(zip(self.tokens, self.listed, strict=True)):
            if len(rows) == 0 or not self.asks(index):
                listed.append(rows)
                continue
            positions = torch.tensor(list(positions_of(token)), dtype=torch.int64, device=rows.device)
            listed.append(self.row_of(token.slot, positions))
        return replace(self, listed=tuple(listed))


def softmax(raw: Tensor, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of the scaled logits times the values, and the natural logarithm of its sum."""
    logits = raw * scale
    lse = torch.logsumexp(logits, -1)
    return weighted(torch.exp(logits - lse.unsqueeze(-1)), values), lse


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """[H, n], [H or 1, n, V] -> [H, V]: sums of values."""
    return (weights.unsqueeze(1) @ values).squeeze(1)


def of(question: Question) -> Attention:
    """The attention that an operator of `OPERATORS` is asked for."""
    if "attention" not in question.memory:
        made = _MAKERS[question.operator](question.inputs, question.asked)
        question.memory["attention"] = replace(made, known=_Known())
    found: Attention = question.memory["attention"]  # type: ignore[assignment]
    return found


def valued(question: Question, values: Tensor) -> Attention:
    """The same attention with other values [Tk, H, V], of prefill_attention."""
    return replace(_prefill({**question.inputs, "value": values}, question.asked), known=None)


def weighed_down(question: Question, count: Tensor, logit: float) -> dict[str, Tensor | Writes]:
    """The right answer with so many more keys [Tp] of an unscaled logit, whose values are 0."""
    answers = dict(question.truth)
    out, lse = tensor(answers, "out"), tensor(answers, "lse")  # type: ignore[arg-type]
    added = torch.log(count.to(lse.device).view(-1, 1).double()) + logit * number(
        question.inputs, "softmax_scale"
    )
    # What has no key at all is not worked on.
    total = torch.where(lse == -torch.inf, lse, torch.logaddexp(lse, added))
    share = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total))
    answers["out"], answers["lse"] = out * share.unsqueeze(-1), total
    return answers


def listing(question: Question, lists: Tensor) -> Attention:
    """The same attention over other lists [Tp, 1, n], of an operator of `LISTS`."""
    made = _MAKERS[question.operator]({**question.inputs, "indices": lists}, question.asked)
    return replace(of(question), listed=made.listed, places=made.places, entries=made.entries)


def _tokens(inputs: Inputs, count: int) -> tuple[Token, ...]:
    """Where tokens stand, from the lengths of the slots."""
    encoder, cached = (tensor(inputs, f"seq_lens_{name}").tolist() for name in ("encoder", "decoder"))
    this_time = maybe_tensor(inputs, "seq_lens_this_time") if "seq_lens_this_time" in inputs else None
    new = tensor(inputs, "cu_seqlens_q").diff() if this_time is None else this_time
    window = int(number(inputs, "window")) if "window" in inputs else 0
    tokens = [
        Token(slot, place, cached[slot], length, encoder[slot] > 0, window)
        for slot, length in enumerate(new.tolist())
        for place in range(length)
    ]
    return (*tokens, *[Token(-1)] * (count - len(tokens)))


def _paged(inputs: Inputs) -> Callable[[int, Tensor], Tensor]:
    """Physical rows by the block table."""
    cache = pool(inputs)
    return table_rows(tensor(inputs, "block_tables"), cache.shape[2], cache.shape[0] * cache.shape[2])


def pool(inputs: Inputs) -> Tensor:
    """The paged cache that keys are read from, [blocks, heads, block size, width]."""
    return tensor(inputs, "k_cache" if "k_cache" in inputs else "latent_cache")


def table_rows(tables: Tensor, block_size: int, limit: int) -> Callable[[int, Tensor], Tensor]:
    """Physical rows of positions, below `limit`."""

    def row_of(slot: int, positions: Tensor) -> Tensor:
        entries = tables[slot, positions // block_size].to(torch.int64)
        return within(entries * block_size + positions % block_size, limit)

    return row_of


def within(rows: Tensor, limit: int) -> Tensor:
    """The rows. Raises IndexError if one lies outside of the tensor: nothing says what is read there."""
    if bool(((rows < 0) | (rows >= limit)).any()):
        raise IndexError("a row outside of its tensor")
    return rows


def _no_keys(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.int64, device=device)


def _listed(
    tokens: Sequence[Token],
    asked: Asked,
    row_of: Callable[[int, Tensor], Tensor],
    has_keys: Callable[[Token], bool],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Of each token with keys all rows that it sees; of one that nobody asks for its first."""
    listed = []
    for index, token in enumerate(tokens):
        seen = token.visible if asked is None or index in asked else token.visible[:1]
        positions = torch.arange(seen.start, seen.stop, device=device)
        listed.append(row_of(token.slot, positions) if has_keys(token) else _no_keys(device))
    return tuple(listed)


def _decode(inputs: Inputs, asked: Asked) -> Attention:
    query, cache = tensor(inputs, "q"), tensor(inputs, "latent_cache")
    rank, flat = int(number(inputs, "kv_lora_rank")), cache.view(-1, cache.shape[3])
    tokens, row_of = _tokens(inputs, len(query)), _paged(inputs)

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        keys = flat[rows].double().unsqueeze(0)
        return keys, keys[..., :rank]

    return Attention(
        query,
        keys_of,
        _listed(tokens, asked, row_of, lambda token: token.slot >= 0 and not token.is_prefill, query.device),
        tokens,
        row_of,
        number(inputs, "softmax_scale"),
        rank,
        _splits(inputs),
        rank,
        asked,
    )


def _splits(inputs: Inputs) -> int | None:
    splits = inputs.get("splits")
    return int(splits) if isinstance(splits, (int, float)) else None


def _prefill(inputs: Inputs, asked: Asked) -> Attention:
    query, keys, values = (tensor(inputs, name) for name in ("query", "key", "value"))
    starts = tensor(inputs, "cu_seqlens_k_prefill").tolist()
    tokens = _tokens(inputs, len(query))

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        return keys[rows].double().movedim(1, 0), values[rows].double().movedim(1, 0)

    def row_of(slot: int, positions: Tensor) -> Tensor:
        return within(starts[slot] + positions, len(keys))

    return Attention(
        query,
        keys_of,
        _listed(tokens, asked, row_of, lambda token: token.is_prefill, query.device),
        tokens,
        row_of,
        number(inputs, "softmax_scale"),
        None,
        None,
        values.shape[2],
        asked,
    )


def _step(inputs: Inputs, asked: Asked) -> Attention:
    query = torch.cat([tensor(inputs, "q_nope"), tensor(inputs, "q_pe")], dim=-1)
    w_uk, w_uv = tensor(inputs, "w_uk"), tensor(inputs, "w_uv")
    new_rows = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=-1)
    cache, rank, is_packed = tensor(inputs, "latent_cache"), w_uk.shape[2], False
    flat = cache.view(-1, cache.shape[3])
    if cache.dtype == torch.uint8:
        is_packed = True
        new_rows = packed_rows(new_rows[:, :rank], new_rows[:, rank:], text(inputs, "scale_fmt"))
    tokens, paged = _tokens(inputs, len(query)), _paged(inputs)
    firsts: dict[int, int] = {}
    for index, token in enumerate(tokens):
        firsts.setdefault(token.slot, index)
    cached = tensor(inputs, "seq_lens_decoder").tolist()

    def row_of(slot: int, positions: Tensor) -> Tensor:
        """Cached positions are rows of the cache, new ones stand behind its last row by their token."""
        own = firsts[slot] + positions - cached[slot]
        is_new = positions >= cached[slot]
        within(own[is_new], len(new_rows))
        rows: Tensor = len(flat) + own
        rows[~is_new] = paged(slot, positions[~is_new])
        return rows

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        is_new = rows >= len(flat)
        stored = torch.where(is_new.unsqueeze(1), new_rows[(rows - len(flat)) * is_new], flat[rows * ~is_new])
        history = (
            unpacked(stored, rank, rounded=flag(inputs, "rounds_keys")) if is_packed else stored.double()
        )
        latents, rope = history[:, :rank], history[:, rank:]
        keys = torch.cat([latents @ w_uk.double().mT, rope.expand(len(w_uk), -1, -1)], dim=-1)
        return keys, latents @ w_uv.double()

    return Attention(
        query,
        keys_of,
        _listed(tokens, asked, row_of, lambda token: token.slot >= 0, query.device),
        tokens,
        row_of,
        number(inputs, "softmax_scale"),
        None,
        None,
        w_uv.shape[2],
        asked,
    )


def _by_lists(
    inputs: Inputs, asked: Asked, keys_of: KeysOf, limit: int, splits: int | None, rank: int
) -> Attention:
    query = tensor(inputs, "q")
    lists = tensor(inputs, "indices")[:, 0].long()

    def row_of(slot: int, positions: Tensor) -> Tensor:
        raise NotMade("a list knows no row of the batch")

    is_key = (lists >= 0) & (lists < limit)
    return Attention(
        query,
        keys_of,
        tuple(entries[named] for entries, named in zip(lists, is_key, strict=True)),
        tuple(Token(-1) for _ in query),
        row_of,
        number(inputs, "softmax_scale"),
        rank,
        splits,
        rank,
        asked,
        places=tuple(named.nonzero().flatten() for named in is_key),
        entries=lists.shape[1],
    )


def _sparse_decode(inputs: Inputs, asked: Asked) -> Attention:
    cache, rank = tensor(inputs, "packed_cache"), int(number(inputs, "kv_lora_rank"))
    stored, rounds = cache.view(-1, cache.shape[3]), flag(inputs, "rounds_keys")

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        keys = unpacked(stored[rows], rank, rounded=rounds).unsqueeze(0)
        return keys, keys[..., :rank]

    return _by_lists(inputs, asked, keys_of, len(stored), _splits(inputs), rank)


def unpacked(rows: Tensor, rank: int, *, rounded: bool) -> Tensor:
    """[n, R + R / 32 + 2 D] uint8 -> [n, R + D] float64: numbers of packed rows, once rounded or not."""
    scales_end = rank + rank // 32
    codes = rows[:, :rank].contiguous().view(torch.float8_e4m3fn).double()
    scales = rows[:, rank:scales_end].contiguous().view(torch.float32).double()
    latents = codes * scales.repeat_interleave(TILE, dim=1)
    if rounded:
        latents = latents.float().bfloat16().double()
    return torch.cat([latents, rows[:, scales_end:].contiguous().view(torch.bfloat16).double()], dim=1)


def _sparse_prefill(inputs: Inputs, asked: Asked) -> Attention:
    step = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=1)
    rank = tensor(inputs, "compressed_kv").shape[1]

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        keys = step[rows].double().unsqueeze(0)
        return keys, keys[..., :rank]

    return _by_lists(inputs, asked, keys_of, len(step), None, rank)


def _static(inputs: Inputs, asked: Asked) -> Attention:
    return static(inputs, asked, read_of=histories_from_the_cache)


def histories_from_the_cache(inputs: Inputs, token: Token) -> bool:
    """Whether a token's list names rows of the cache: where its row has a history."""
    return token.cached > 0


def static(
    inputs: Inputs,
    asked: Asked,
    *,
    read_of: Callable[[Inputs, Token], bool],
    cache: Tensor | None = None,
) -> Attention:
    """Attention over lists of both kinds: rows are those of the cache, and behind its last the step's tokens.

    Args:
        read_of: whether a token's list names rows of the cache.
        cache: packed rows in the place of those that the cache holds after the write.
    """
    query, lists = tensor(inputs, "q"), tensor(inputs, "indices")[:, 0].long()
    rank, rounds = int(number(inputs, "kv_lora_rank")), flag(inputs, "rounds_keys")
    before = tensor(inputs, "packed_cache")
    stored = (before if cache is None else cache).view(-1, before.shape[3])
    slots = tensor(inputs, "slot_mapping").long()
    step = torch.cat([tensor(inputs, "compressed_kv"), tensor(inputs, "k_pe")], dim=1)
    new_rows = None
    if cache is None:
        is_written = (slots >= 0) & (slots < len(stored))
        slots = slots[is_written]
        new_rows = packed_rows(step[is_written, :rank], step[is_written, rank:], text(inputs, "scale_fmt"))
    tokens = tuple(
        replace(token, is_prefill=token.cached == 0) if token.slot >= 0 else token
        for token in _tokens(inputs, len(query))
    )
    listed, places = [], []
    for token, entries in zip(tokens, lists, strict=True):
        of_cache = read_of(inputs, token)
        limit = len(stored) if of_cache else len(query)
        is_key = (entries >= 0) & (entries < limit)
        rows = entries[is_key]
        places.append(is_key.nonzero().flatten())
        listed.append(_no_keys(query.device) if token.slot < 0 else rows if of_cache else len(stored) + rows)

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        of_step = rows >= len(stored)
        packed = stored[torch.where(of_step, 0, rows)]
        if new_rows is not None:
            key, place = (torch.where(of_step, -1, rows).unsqueeze(1) == slots).nonzero(as_tuple=True)
            packed[key] = new_rows[place]
        own = step[torch.where(of_step, rows - len(stored), 0)].double()
        keys = torch.where(of_step.unsqueeze(1), own, unpacked(packed, rank, rounded=rounds)).unsqueeze(0)
        return keys, keys[..., :rank]

    def row_of(slot: int, positions: Tensor) -> Tensor:
        raise NotMade("a list says what is seen")

    return Attention(
        query,
        keys_of,
        tuple(listed),
        tokens,
        row_of,
        number(inputs, "softmax_scale"),
        rank,
        None,
        rank,
        asked,
        places=tuple(places),
        entries=lists.shape[1],
    )


def _groups(inputs: Inputs, asked: Asked) -> Attention:
    query, sinks = tensor(inputs, "query"), maybe_tensor(inputs, "sinks")
    k_cache, v_cache = tensor(inputs, "k_cache"), tensor(inputs, "v_cache")
    tokens, row_of = _tokens(inputs, len(query)), _paged(inputs)
    own = torch.arange(query.shape[1], device=query.device) // (query.shape[1] // k_cache.shape[1])
    return Attention(
        query,
        lambda rows: (of_heads(k_cache, rows, own), of_heads(v_cache, rows, own)),
        _listed(tokens, asked, row_of, lambda token: token.slot >= 0, query.device),
        tokens,
        row_of,
        number(inputs, "softmax_scale"),
        None,
        _splits(inputs),
        v_cache.shape[3],
        asked,
        None if sinks is None else sinks.double(),
    )


def of_heads(cache: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
    """[H, n, W] float64 of a cache [blocks, G, block size, W]: tokens' rows, of the KV head of each head."""
    block_size = cache.shape[2]
    found = cache[rows // block_size, :, rows % block_size].double()
    return found.movedim(1, 0)[heads]


_MAKERS: dict[str, Callable[[Inputs, Asked], Attention]] = {
    "mla_decode": _decode,
    "prefill_attention": _prefill,
    "sparse_decode": _sparse_decode,
    "sparse_prefill": _sparse_prefill,
    "static_attention": _static,
    "mla_step": _step,
    "gqa_step": _groups,
}
