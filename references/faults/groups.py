"""Faults of query heads in groups: which KV head a head reads, windows, sinks, and what is written where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from references.faults._attention import Attention, Token, of, of_heads, softmax, within
from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import places, read_as_dense
from references.oracle import Inputs, Writes, maybe_tensor, number, tensor

STEP = ("gqa_step",)
WRITE = ("gqa_cache_write",)


def _kv_heads(inputs: Inputs) -> int:
    return tensor(inputs, "k_cache").shape[1]


# ---- attention -----------------------------------------------------------------------------------


def _attending(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Question, Attention], Attention | None],
    form: str = "",
) -> Fault:
    """The fault of another attention; none where there is nothing to change."""

    def apply(question: Question) -> Answers | None:
        changed = change(question, of(question))
        return None if changed is None else {**question.truth, **changed.answer()}

    return Fault(name, STEP, summary, source, apply, form)


def _of_kv_heads(
    head_of: Callable[[Question, Tensor, int], Tensor | None],
) -> Callable[..., Attention | None]:
    """KV heads read by other heads: (question, [H] heads, G) -> [H]; none where all are as they should."""

    def change(question: Question, attention: Attention) -> Attention | None:
        inputs, kv_heads = question.inputs, _kv_heads(question.inputs)
        k_cache, v_cache = tensor(inputs, "k_cache"), tensor(inputs, "v_cache")
        heads = torch.arange(attention.query.shape[1], device=attention.query.device)
        own = head_of(question, heads, kv_heads)
        if own is None:
            return None
        within(own, kv_heads)
        return replace(
            attention, keys_of=lambda rows: (of_heads(k_cache, rows, own), of_heads(v_cache, rows, own))
        )

    return change


def _strided(cache: Tensor, rows: Tensor, own: Tensor, step: int) -> Tensor:
    """[H, n, W] float64: rows of a cache found in memory as if they were `step` numbers apart."""
    block_size, width = cache.shape[2:]
    numbers = (rows // block_size * cache.shape[1] + own.unsqueeze(1)) * block_size + rows % block_size
    at = numbers.unsqueeze(2) * step + torch.arange(width, device=rows.device)
    return cache.reshape(-1)[within(at, cache.numel())].double()


def _heads_of_the_first_layer(question: Question, heads: Tensor, kv_heads: int) -> Tensor | None:
    first = _kv_heads(question.first) if question.first else kv_heads
    return heads // max(1, len(heads) // first)


def _keys() -> Iterator[Fault]:
    heads: list[tuple[str, str, str, Callable[[Question, Tensor, int], Tensor | None], str]] = [
        (
            "groups-interleaved",
            "query head h reads KV head h mod G, not h div (H / G)",
            "O24",
            lambda _, heads, kv_heads: heads % kv_heads,
            "",
        ),
        (
            "one-kv-head-for-all",
            "every head reads the first KV head",
            "O24",
            lambda _, heads, kv_heads: heads * 0,
            "",
        ),
        (
            "heads-of-the-first-layer",
            "the KV heads of the layer that is launched first are kept for all",
            "B63, B64",
            _heads_of_the_first_layer,
            "",
        ),
        *(
            (
                "groups-of-another-size",
                "a group is taken to have another number of heads",
                "P7",
                lambda _, heads, kv_heads, size=size: (heads // size).clamp_max(kv_heads - 1),
                f"of {size}",
            )
            for size in (1, 2, 4, 8, 16)
        ),
    ]
    for name, summary, source, head_of, form in heads:
        yield _attending(name, summary, source, _of_kv_heads(head_of), form)
    for step in (1, -1):
        yield _attending(
            "neighbours-kv-head",
            "a group reads the KV head beside its own",
            "O24",
            _of_kv_heads(
                lambda _, heads, kv_heads, step=step: (heads // (len(heads) // kv_heads) + step) % kv_heads
            ),
            f"the one {'behind' if step == 1 else 'before'}",
        )
    yield _attending(
        "tokens-before-heads",
        "a block of the cache is taken to hold tokens before heads",
        "O24",
        _tokens_before_heads,
    )
    for name, word in (("values-as-wide-as-keys", "v_cache"), ("keys-as-wide-as-values", "k_cache")):
        yield _attending(
            name,
            "rows of one cache are stepped over by the width of the other's",
            "B49",
            lambda question, attention, word=word: _stepped(question, attention, word),
        )
    for columns in (64, 128):
        yield _attending(
            "last-columns-of-keys-lost",
            "columns of queries and keys behind a fixed number of them do not count",
            "L38",
            lambda _, attention, columns=columns: replace(
                attention,
                query=torch.where(
                    torch.arange(attention.query.shape[2], device=attention.query.device) < columns,
                    attention.query,
                    0,
                ),
            ),
            f"behind {columns}",
        )
    for columns in (16, 32, 64, 128):
        yield Fault(
            "last-values-unwritten",
            STEP,
            "columns of the output that fill no last tile of them are never written",
            "L38",
            lambda question, columns=columns: _columns_unwritten(question, columns),
            f"tiles of {columns}",
        )
    yield from read_as_dense("gqa_step", ("query", "block_tables"))


def _tokens_before_heads(question: Question, attention: Attention) -> Attention:
    caches = [tensor(question.inputs, name) for name in ("k_cache", "v_cache")]
    group = attention.query.shape[1] // caches[0].shape[1]
    own = torch.arange(attention.query.shape[1], device=attention.query.device) // group

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        blocks, kv_heads, block_size = caches[0].shape[:3]
        keys, values = (
            of_heads(cache.reshape(blocks, block_size, kv_heads, -1).transpose(1, 2), rows, own)
            for cache in caches
        )
        return keys, values

    return replace(attention, keys_of=keys_of)


def _stepped(question: Question, attention: Attention, name: str) -> Attention:
    k_cache, v_cache = tensor(question.inputs, "k_cache"), tensor(question.inputs, "v_cache")
    step = (k_cache if name == "v_cache" else v_cache).shape[3]
    group = attention.query.shape[1] // k_cache.shape[1]
    own = torch.arange(attention.query.shape[1], device=attention.query.device) // group

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = attention.keys_of(rows)
        if name == "v_cache":
            return keys, _strided(v_cache, rows, own, step)
        return _strided(k_cache, rows, own, step), values

    return replace(attention, keys_of=keys_of)


def _columns_unwritten(question: Question, columns: int) -> Answers:
    right = tensor(dict(question.truth), "out")  # type: ignore[arg-type]
    real = torch.tensor([token.slot >= 0 for token in of(question).tokens], dtype=torch.bool)
    written = torch.arange(right.shape[2], device=right.device) < right.shape[2] // columns * columns
    written = written | ~real.to(right.device).view(-1, 1, 1)
    return {**question.truth, "out": Unwritten(right, written.expand_as(right))}


# ---- windows -------------------------------------------------------------------------------------


def _windows() -> Iterator[Fault]:
    def seeing(
        name: str, summary: str, source: str, positions_of: Callable[[Token], range], form: str = ""
    ) -> Iterator[Fault]:
        for operator in ("gqa_step", "mla_step"):

            def apply(question: Question) -> Answers | None:
                attention = of(question)
                if not any(token.window for token in attention.tokens):
                    return None
                changed = attention.seeing(positions_of).answer()
                return {**question.truth, **{key: changed[key] for key in changed.keys() & question.truth}}

            yield Fault(name, (operator,), summary, source, apply, form)

    yield from seeing(
        "window-one-too-long",
        "the window counts the keys before a token, without itself",
        "B58",
        lambda token: range(max(token.first - 1, 0), token.seen),
    )
    yield from seeing(
        "window-one-too-short",
        "the oldest key of the window is not seen",
        "B58",
        lambda token: range(min(max(0, token.seen - token.window + 1), token.seen - 1), token.seen),
    )
    yield from seeing(
        "window-ignored",
        "everything before a token is seen, whatever the window",
        "B57",
        lambda token: range(token.seen),
    )
    yield from seeing(
        "window-ignored",
        "everything before a token is seen, whatever the window",
        "B39",
        lambda token: range(token.seen) if token.new > 1 else token.visible,
        "by rows of several tokens",
    )
    yield from seeing(
        "window-ignored",
        "everything before a token is seen, whatever the window",
        "B39",
        lambda token: range(token.seen) if token.is_prefill else token.visible,
        "by prefill rows",
    )
    yield from seeing(
        "window-of-the-first-token",
        "every token of a row has the window of its first",
        "B58",
        lambda token: range(replace(token, place=0).first, token.seen),
    )
    yield from seeing(
        "window-of-the-last-token",
        "every token of a row has the window of its last",
        "B58",
        lambda token: range(min(replace(token, place=token.new - 1).first, token.seen), token.seen),
    )


# ---- sinks ---------------------------------------------------------------------------------------


def _sinks() -> Iterator[Fault]:
    changes: list[tuple[str, str, Callable[[Attention, Tensor], Tensor | None]]] = [
        ("sink-ignored", "the sink does not count", lambda attention, sinks: None),
        (
            "sink-scaled-again",
            "the sink is multiplied by the softmax scale, though it is a logit already",
            lambda attention, sinks: sinks * attention.scale,
        ),
        (
            "sink-of-the-first-head",
            "every head has the first one's sink",
            lambda attention, sinks: sinks[:1].expand_as(sinks),
        ),
        (
            "sink-of-the-neighbour",
            "a head has the sink of the one beside it",
            lambda attention, sinks: sinks.roll(1),
        ),
    ]
    for name, summary, sinks_of in changes:

        def change(
            _: Question,
            attention: Attention,
            sinks_of: Callable[[Attention, Tensor], Tensor | None] = sinks_of,
        ) -> Attention | None:
            if attention.sinks is None:
                return None
            return replace(attention, sinks=sinks_of(attention, attention.sinks))

        yield _attending(name, summary, "P5, gpt-oss", change)
    yield Fault(
        "sink-not-in-the-sum",
        STEP,
        "the sink moves the maximum and is left out of the sum",
        "P5, gpt-oss",
        lambda question: _without_sinks(question, lambda token: True),
        "",
    )
    yield Fault(
        "sink-ignored",
        STEP,
        "the sink does not count",
        "P5, gpt-oss",
        lambda question: _without_sinks(question, lambda token: not token.is_prefill),
        "in decode rows",
    )
    yield Fault(
        "padding-has-a-sink",
        STEP,
        "the LSE of padding is its head's sink",
        "E9",
        _sinks_of_padding,
    )


def _without_sinks(question: Question, is_without: Callable[[Token], bool]) -> Answers | None:
    attention = of(question)
    if attention.sinks is None:
        return None
    answers, changed = dict(question.truth), replace(attention, sinks=None).answer(softmax)
    lost = [is_without(token) for token in attention.tokens]
    for name in ("out", "lse"):
        right = answers[name]
        if isinstance(right, Tensor):
            mask = torch.tensor(lost, dtype=torch.bool, device=right.device)
            answers[name] = torch.where(mask.view(-1, *[1] * (right.dim() - 1)), changed[name], right)
    return answers


def _sinks_of_padding(question: Question) -> Answers | None:
    attention = of(question)
    if attention.sinks is None:
        return None
    lse = tensor(dict(question.truth), "lse")  # type: ignore[arg-type]
    padding = torch.tensor([token.slot < 0 for token in attention.tokens], dtype=torch.bool)
    is_padding = padding.to(lse.device).unsqueeze(1)
    return {**question.truth, "lse": torch.where(is_padding, attention.sinks, lse)}


# ---- the write -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Widths:
    """How a packed projection is divided: query heads, KV heads, and the widths of keys and of values."""

    heads: int
    kv_heads: int
    keys: int
    values: int


def _widths(inputs: Inputs) -> _Widths:
    k_cache, v_cache = tensor(inputs, "k_cache"), tensor(inputs, "v_cache")
    kv_heads, keys, values = k_cache.shape[1], k_cache.shape[3], v_cache.shape[3]
    width = tensor(inputs, "qkv").shape[1]
    return _Widths((width - kv_heads * (keys + values)) // keys, kv_heads, keys, values)


def _parsing(
    name: str,
    summary: str,
    source: str,
    begins_of: Callable[[Question, _Widths], tuple[int, int, int, int] | None],
    form: str = "",
) -> Fault:
    """The fault of taking keys and values from elsewhere in the projection.

    Args:
        begins_of: where keys begin and how far their heads are apart, the same of values; None for nothing.
    """

    def apply(question: Question) -> Answers | None:
        qkv, widths = tensor(question.inputs, "qkv"), _widths(question.inputs)
        begins = begins_of(question, widths)
        if begins is None:
            return None
        key_begin, key_step, value_begin, value_step = begins
        own = torch.arange(widths.kv_heads, device=qkv.device).unsqueeze(1)
        keys = key_begin + own * key_step + torch.arange(widths.keys, device=qkv.device)
        values = value_begin + own * value_step + torch.arange(widths.values, device=qkv.device)
        queries = torch.arange(widths.heads * widths.keys, device=qkv.device)
        columns = within(torch.cat([queries, keys.flatten(), values.flatten()]), qkv.shape[1])
        return question.with_inputs(qkv=qkv[:, columns])

    return Fault(name, WRITE, summary, source, apply, form)


def _right_begins(w: _Widths) -> tuple[int, int, int, int]:
    keys = w.heads * w.keys
    return keys, w.keys, keys + w.kv_heads * w.keys, w.values


def _of_the_first_layer(question: Question, w: _Widths) -> tuple[int, int, int, int]:
    keys, key_step, _, value_step = _right_begins(w)
    first = _widths(question.first).kv_heads if question.first else w.kv_heads
    return keys, key_step, keys + first * w.keys, value_step


def _parts() -> Iterator[Fault]:
    parsings: list[tuple[str, str, str, Callable[[Question, _Widths], tuple[int, int, int, int] | None]]] = [
        (
            "heads-of-the-first-layer",
            "values are looked for behind the keys of as many KV heads as the first layer has",
            "B63",
            _of_the_first_layer,
        ),
        (
            "heads-counted-by-kv-heads",
            "keys begin behind as many query heads as there are KV heads",
            "B63",
            lambda _, w: (
                w.kv_heads * w.keys,
                w.keys,
                2 * w.kv_heads * w.keys,
                w.values,
            ),
        ),
        (
            "values-as-wide-as-keys",
            "values are parsed in steps of the width of keys",
            "B49",
            lambda _, w: (*_right_begins(w)[:3], w.keys),
        ),
        (
            "keys-as-wide-as-values",
            "values begin behind as much as keys of their own width would take",
            "B49",
            lambda _, w: (*_right_begins(w)[:2], w.heads * w.keys + w.kv_heads * w.values, w.values),
        ),
        (
            "keys-and-values-head-by-head",
            "the projection is read as the key and the value of one KV head after the other",
            "O24",
            lambda _, w: (
                w.heads * w.keys,
                w.keys + w.values,
                w.heads * w.keys + w.keys,
                w.keys + w.values,
            ),
        ),
        (
            "keys-and-values-head-by-head",
            "the projection is read as the key and the value of one KV head after the other",
            "O24",
            lambda _, w: (w.heads * w.keys, w.keys, (w.heads + 1) * w.keys, w.keys + w.values),
        ),
    ]
    for number_of, (name, summary, source, begins_of) in enumerate(parsings):
        form = "values alone" if number_of == len(parsings) - 1 else ""
        yield _parsing(name, summary, source, begins_of, form)
    yield from read_as_dense("gqa_cache_write", ("qkv", "block_tables", "cos_sin_cache"))


def _ids(inputs: Inputs) -> Tensor:
    return tensor(inputs, "batch_id_per_token").long()


def _cached(inputs: Inputs) -> Tensor:
    return tensor(inputs, "seq_lens_decoder").long()


def _positions() -> Iterator[Fault]:
    """Tokens that turn and are written as if they stood elsewhere."""
    prefill = "seq_lens_encoder"
    lengths: list[tuple[str, str, str, Callable[[Inputs], Tensor], str]] = [
        (
            "history-ignored",
            "a continued chunk is written from position 0 on, over its history",
            "B01, B48",
            lambda inputs: _cached(inputs) * (tensor(inputs, prefill) == 0),
            "of prefill rows",
        ),
        (
            "history-ignored",
            "a decode row is written at position 0, over its first key",
            "B48",
            lambda inputs: _cached(inputs) * (tensor(inputs, prefill) > 0),
            "of decode rows",
        ),
        (
            "positions-from-0",
            "positions of every row are counted from 0",
            "B01",
            lambda inputs: _cached(inputs) * 0,
            "",
        ),
        (
            "place-in-step",
            "a token's place in the step is taken for its place in its row",
            "C1",
            lambda inputs: _cached(inputs) + tensor(inputs, "cu_seqlens_q")[:-1].long(),
            "",
        ),
        (
            "one-position-too-early",
            "positions are one too small",
            "C7",
            lambda inputs: _cached(inputs) - 1,
            "",
        ),
    ]
    for name, summary, source, lengths_of, form in lengths:

        def apply(question: Question, lengths_of: Callable[[Inputs], Tensor] = lengths_of) -> Answers:
            return question.with_inputs(seq_lens_decoder=lengths_of(question.inputs))

        yield Fault(name, WRITE, summary, source, apply, form)
    yield Fault(
        "first-position-for-all",
        WRITE,
        "every token of a row with a history has the position of its first",
        "B23",
        _at_the_first_position,
    )


def _at_the_first_position(question: Question) -> Answers:
    """Each token of a row with a history as the only one of it; the last of those is what is written."""
    inputs, ids = question.inputs, _ids(question.inputs)
    back = places(ids) * (_cached(inputs)[ids.clamp_min(0)] > 0)
    # A row of its own for every token, with as much cached as the token's position says.
    tables, real = tensor(inputs, "block_tables"), ids >= 0
    own = torch.where(real, torch.arange(len(ids), device=ids.device), -1)
    at = _cached(inputs)[ids.clamp_min(0)] + places(ids) - back
    return question.with_inputs(
        batch_id_per_token=own,
        cu_seqlens_q=torch.arange(len(ids) + 1, device=ids.device),
        seq_lens_decoder=at,
        block_tables=tables[ids.clamp_min(0)],
    )


# ---- what is written, and where ------------------------------------------------------------------

CACHES = ("k_cache", "v_cache")

RowOf = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[int, int, int]], Tensor]
"""(tables, slots [n, 1], positions [n, 1], KV heads [G], (blocks, G, block size)) -> rows [n, G]."""


def _placed(name: str, summary: str, source: str, row_of: RowOf, form: str = "") -> Iterator[Fault]:
    """Faults of other rows: of both caches, and of each alone."""
    for part, caches in (("", CACHES), ("keys alone", CACHES[:1]), ("values alone", CACHES[1:])):

        def apply(question: Question, caches: tuple[str, ...] = caches) -> Answers:
            inputs, answers = question.inputs, dict(question.truth)
            blocks, kv_heads, block_size = tensor(inputs, "k_cache").shape[:3]
            ids = _ids(inputs)
            slots = ids[ids >= 0].unsqueeze(1)
            at = _cached(inputs)[slots] + places(ids)[ids >= 0].unsqueeze(1)
            own = torch.arange(kv_heads, device=ids.device)
            tables = tensor(inputs, "block_tables").long()
            rows = row_of(tables, slots, at, own, (blocks, kv_heads, block_size))
            within(rows, blocks * kv_heads * block_size)
            for cache in caches:
                answers[cache] = Writes(rows.expand(-1, kv_heads).flatten(), _written(question, cache).values)
            return answers

        yield Fault(name, WRITE, summary, source, apply, ", ".join(word for word in (form, part) if word))


def _written(question: Question, name: str) -> Writes:
    writes = question.truth[name]
    if not isinstance(writes, Writes):
        raise TypeError(f"{name} is written")
    return writes


def _where() -> Iterator[Fault]:
    yield from _placed(
        "tokens-before-heads",
        "a block of the cache is taken to hold tokens before heads",
        "O24",
        lambda tables, slots, at, own, shape: (
            (tables[slots, at // shape[2]] * shape[2] + at % shape[2]) * shape[1] + own
        ),
    )
    yield from _placed(
        "blocks-of-one-head",
        "blocks are stepped over as if each had one head",
        "L36",
        lambda tables, slots, at, own, shape: (
            tables[slots, at // shape[2]] * shape[2] + own * shape[2] + at % shape[2]
        ),
    )
    yield from _placed(
        "blocks-in-a-line",
        "a row's blocks are taken to lie behind its first",
        "P13",
        lambda tables, slots, at, own, shape: (
            ((tables[slots, at * 0] + at // shape[2]) * shape[1] + own) * shape[2] + at % shape[2]
        ),
    )
    for size in (16, 32, 64, 128):
        yield from _placed(
            "block-size-is-a-literal",
            "the block size is taken for another number",
            "B38",
            lambda tables, slots, at, own, shape, size=size: (
                (tables[slots, at // size] * shape[1] + own) * shape[2] + at % shape[2]
            ),
            f"for {size} in the table",
        )
        yield from _placed(
            "block-size-is-a-literal",
            "the block size is taken for another number",
            "B38",
            lambda tables, slots, at, own, shape, size=size: (
                (tables[slots, torch.minimum(at // size, at // shape[2])] * shape[1] + own) * shape[2]
                + at % shape[2]
            ),
            f"for {size} in the table where that is larger",
        )
    for step in (1, -1):
        yield from _placed(
            "neighbours-table",
            "a row is written through the block table of another slot",
            "B56",
            lambda tables, slots, at, own, shape, step=step: (
                (tables[(slots + step).clamp_min(0), at // shape[2]] * shape[1] + own) * shape[2]
                + at % shape[2]
            ),
            f"of the slot {'behind' if step == 1 else 'before'}",
        )
    for heads in (1, 2, 4, 8):
        yield Fault(
            "later-heads-unwritten",
            WRITE,
            "KV heads behind the first ones, or that fill no last tile of them, are not written",
            "D3, O24",
            lambda question, heads=heads: _of_some_rows(
                question, lambda kv, kv_heads, _: kv < max(heads, kv_heads // heads * heads)
            ),
            f"tiles of {heads}",
        )
        yield Fault(
            "later-heads-unwritten",
            WRITE,
            "KV heads behind the first ones, or that fill no last tile of them, are not written",
            "D3, O24",
            lambda question, heads=heads: _of_some_rows(question, lambda kv, kv_heads, _: kv < heads),
            f"behind {heads}",
        )
    yield Fault(
        "prefill-rows-unwritten",
        WRITE,
        "tokens of prompts are not written",
        "C7",
        lambda question: _of_some_rows(question, lambda kv, kv_heads, is_prefill: ~is_prefill),
    )
    yield Fault(
        "decode-rows-unwritten",
        WRITE,
        "tokens of decode rows are not written",
        "C7",
        lambda question: _of_some_rows(question, lambda kv, kv_heads, is_prefill: is_prefill),
    )


def _of_some_rows(question: Question, keeps: Callable[[Tensor, int, Tensor], Tensor]) -> Answers:
    """Rows that are written where keeps(KV head of the row, G, whether its token is of a prompt)."""
    ids, kv_heads = _ids(question.inputs), _kv_heads(question.inputs)
    of_rows = ids[ids >= 0].repeat_interleave(kv_heads)
    heads = torch.arange(kv_heads, device=ids.device).repeat(int((ids >= 0).sum()))
    kept = keeps(heads, kv_heads, (tensor(question.inputs, "seq_lens_encoder") > 0)[of_rows])
    answers = dict(question.truth)
    for name in CACHES:
        writes = _written(question, name)
        answers[name] = Writes(writes.rows[kept], writes.values[kept])
    products = answers["k_cache_products"]
    if isinstance(products, Tensor):
        answers["k_cache_products"] = products[kept]
    return answers


def _table(inputs: Inputs) -> tuple[Tensor, Tensor]:
    cos, sin = tensor(inputs, "cos_sin_cache").chunk(2, dim=-1)
    return cos, sin


PARTS = {"": ("query", "k_cache"), "queries": ("query",), "keys": ("k_cache",)}


def _turned(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Inputs], dict[str, Tensor | float | None]],
    form: str = "",
) -> Iterator[Fault]:
    """Faults of the rotation, of queries and keys or of one of them; none where nothing is rotated."""
    for part, outputs in PARTS.items():

        def apply(question: Question, outputs: tuple[str, ...] = outputs) -> Answers | None:
            if maybe_tensor(question.inputs, "cos_sin_cache") is None:
                return None
            made = question.with_inputs(**change(question.inputs))
            taken = [name for output in outputs for name in (output, f"{output}_products")]
            return {**question.truth, **{name: made[name] for name in taken}}

        yield Fault(name, WRITE, summary, source, apply, ", ".join(word for word in (form, part) if word))


def _rotation() -> Iterator[Fault]:
    yield from _turned(
        "unrotated",
        "a part is handed on as the projection left it",
        "O24",
        lambda inputs: {
            "cos_sin_cache": torch.cat(
                [torch.ones_like(_table(inputs)[0]), torch.zeros_like(_table(inputs)[1])], dim=-1
            )
        },
    )
    yield from _turned(
        "cosine-for-sine",
        "the cosine stands in the place of the sine",
        "X3",
        lambda inputs: {"cos_sin_cache": torch.cat([_table(inputs)[0]] * 2, dim=-1)},
    )
    yield from _turned(
        "sines-first",
        "rows of the table are taken for [sin | cos]",
        "X3",
        lambda inputs: {"cos_sin_cache": torch.cat(_table(inputs)[::-1], dim=-1)},
    )
    yield from _turned(
        "sine-sign",
        "pairs are turned the other way",
        "X3",
        lambda inputs: {"cos_sin_cache": torch.cat([_table(inputs)[0], -_table(inputs)[1]], dim=-1)},
    )
    yield from _turned(
        "pairing-exchanged",
        "pairs are taken half split where the model interleaves them, or the other way round",
        "L45, X3",
        lambda inputs: {"is_neox": 1 - int(number(inputs, "is_neox"))},
    )
    yield Fault(
        "rest-unwritten",
        WRITE,
        "columns that are not rotated are never written",
        "L45",
        _rest_unwritten,
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        yield Fault(
            "through-another-dtype",
            WRITE,
            "values pass through another dtype on their way",
            "D7",
            lambda question, dtype=dtype: {
                **question.truth,
                "v_cache": Writes(
                    _written(question, "v_cache").rows,
                    (values := _written(question, "v_cache").values).to(dtype).to(values.dtype),
                ),
            },
            f"through {str(dtype).removeprefix('torch.')}",
        )
    yield Fault(
        "padding-unwritten",
        WRITE,
        "queries of padding are never written",
        "B22, E9",
        lambda question: {
            **question.truth,
            "query": Unwritten(tensor(dict(question.truth), "query"), _ids(question.inputs) >= 0),  # type: ignore[arg-type]
        },
    )


def _rest_unwritten(question: Question) -> Answers | None:
    """Rotated columns alone are written; of real tokens, and of whole rows of padding none are missing."""
    table = maybe_tensor(question.inputs, "cos_sin_cache")
    query = tensor(dict(question.truth), "query")  # type: ignore[arg-type]
    turned = 0 if table is None else table.shape[1]
    if turned == query.shape[2]:
        return None
    columns = torch.arange(query.shape[2], device=query.device) < turned
    answers = dict(question.truth)
    answers["query"] = Unwritten(query, columns.expand_as(query))  # type: ignore[assignment]
    writes, cache = _written(question, "k_cache"), tensor(question.inputs, "k_cache")
    stood = cache.view(-1, cache.shape[3])[writes.rows].double()
    answers["k_cache"] = Writes(writes.rows, torch.where(columns, writes.values, stood))
    return answers


FAULTS = (
    *_keys(),
    *_windows(),
    *_sinks(),
    *_parts(),
    *_positions(),
    *_where(),
    *_rotation(),
)
