"""Faults of query heads in groups: which KV head a head reads, windows, sinks, and what is written where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

from references.faults._attention import Attention, Token, of, of_heads, softmax, weighted, within
from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import places, read_as_dense
from references.oracle import Inputs, Writes, maybe_tensor, number, tensor

STEP = ("gqa_step",)
WRITE = ("gqa_cache_write",)
LN_2 = log(2)


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


def _rounded_up(_: Question, heads: Tensor, kv_heads: int) -> Tensor | None:
    """None. Raises IndexError where groups that are larger have heads behind the last."""
    group = len(heads) // kv_heads
    if group & (group - 1):
        raise IndexError("heads behind the last")
    return None


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
        (
            "groups-of-another-size",
            "a group is taken to have another number of heads",
            "P7",
            _rounded_up,
            "rounded up to a power of two, behind the last head too",
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
        "newest-key-unseen",
        "a token sees, window and all, what the one before it should",
        "B66",
        lambda token: (
            range(token.visible.start, token.seen - 1)
            if token.seen <= token.window
            else range(token.first - 1, token.seen - 1)
        ),
        "the window moves with it",
    )
    for operator in ("gqa_step", "mla_step"):
        yield Fault(
            "window-of-the-first-layer",
            (operator,),
            "the window of the layer that is launched first is kept for all",
            "L33",
            _window_of_the_first_layer,
        )
    yield from seeing(
        "window-of-the-last-token",
        "every token of a row has the window of its last",
        "B58",
        lambda token: range(min(replace(token, place=token.new - 1).first, token.seen), token.seen),
    )


def _window_of_the_first_layer(question: Question) -> Answers | None:
    if not question.first or "window" not in question.first:
        return None
    window = int(number(question.first, "window"))
    if window == int(number(question.inputs, "window")):
        return None
    changed = of(question).seeing(lambda token: replace(token, window=window).visible).answer()
    return {**question.truth, **{key: changed[key] for key in changed.keys() & question.truth}}


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


# ---- tiles of query rows and of keys -------------------------------------------------------------

ROW_TILES = (16, 32, 64)
"""Query rows of a KV head, token by token and within a token head by head, that kernels work on at a time."""

KEY_TILES = (32, 64)
EMPTY = -1
"""A position where a key of zeros stands: its logit is 0, and it counts."""


@dataclass(frozen=True)
class _Tile:
    """A tile of query rows: the first and the last token in it, and keys in tiles of so many.

    Attributes:
        is_aligned: whether tiles of keys begin at their multiples, and not at the first key of the window.
    """

    first: Token
    last: Token
    keys: int = 1
    is_aligned: bool = True

    @property
    def begin(self) -> int:
        """Where the first tile of keys begins."""
        return self.first.first // self.keys * self.keys if self.is_aligned else self.first.first

    def end(self, position: int) -> int:
        """Where the tiles of keys end that hold all positions before one."""
        return self.begin + -(-(position - self.begin) // self.keys) * self.keys


Seen = Callable[[Token, _Tile], Sequence[int]]
"""Positions that a token sees, `EMPTY` among them."""


def _tile_of(token: Token, head: int, group: int, rows: int) -> _Tile:
    """The tile of query rows that a head of a group is in."""
    number_of = (token.place * group + head) // rows
    last = min((number_of + 1) * rows - 1, token.new * group - 1) // group
    return _Tile(replace(token, place=number_of * rows // group), replace(token, place=last))


def _group(question: Question) -> int:
    return tensor(question.inputs, "query").shape[1] // _kv_heads(question.inputs)


def _with_empty(attention: Attention, positions_of: Callable[[int, Token], Sequence[int]]) -> Attention:
    """The same tokens with other keys, those of zeros among them."""
    listed = []
    for index, (token, rows) in enumerate(zip(attention.tokens, attention.listed, strict=True)):
        if len(rows) == 0 or not attention.asks(index):
            listed.append(rows)
            continue
        at = torch.tensor(list(positions_of(index, token)), dtype=torch.int64, device=rows.device)
        found = attention.row_of(token.slot, at.clamp_min(0))
        listed.append(torch.where(at == EMPTY, EMPTY, found))

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        is_key = (rows != EMPTY).view(1, -1, 1)
        keys, values = attention.keys_of(rows.clamp_min(0))
        # Times 0 would leave what is no number.
        return torch.where(is_key, keys, 0.0), torch.where(is_key, values, 0.0)

    return replace(attention, listed=tuple(listed), keys_of=keys_of)


def _in_tiles(
    name: str,
    summary: str,
    source: str,
    seen: Seen,
    *,
    keys: Sequence[int] = (1,),
    aligned: Sequence[bool] = (True,),
    windowed: bool = False,
    form: str = "",
) -> Iterator[Fault]:
    """Faults of what a token sees by the tile that it is in.

    Args:
        windowed: whether there is nothing to change without a window.
    """
    for rows in ROW_TILES:
        for size in keys:
            for is_aligned in aligned:

                def apply(
                    question: Question, rows: int = rows, size: int = size, is_aligned: bool = is_aligned
                ) -> Answers | None:
                    attention = of(question)
                    has_window = any(token.window for token in attention.tokens)
                    if not has_window and (windowed or is_aligned != aligned[0]):
                        return None
                    return _by_tiles(question, attention, seen, rows, size, is_aligned=is_aligned)

                words = [f"tiles of {rows} query rows", f"{size} keys" if size > 1 else ""]
                words += ["" if is_aligned else "from the window on", form]
                yield Fault(name, STEP, summary, source, apply, ", ".join(word for word in words if word))


def _by_tiles(
    question: Question, attention: Attention, seen: Seen, rows: int, keys: int, *, is_aligned: bool
) -> Answers | None:
    """The answer with what each head of each token sees; none where that is what it should."""
    group = _group(question)
    if group > rows:
        return None
    heads = torch.arange(attention.query.shape[1], device=attention.query.device) % group
    sides, positions = (0, group - 1), []
    for side in sides:
        of_tokens: list[Sequence[int]] = []
        for index, token in enumerate(attention.tokens):
            is_asked = token.slot >= 0 and attention.asks(index)
            tile = replace(_tile_of(token, side, group, rows), keys=keys, is_aligned=is_aligned)
            of_tokens.append(list(seen(token, tile)) if is_asked else ())
        positions.append(of_tokens)
    right = [
        list(token.visible) if token.slot >= 0 and attention.asks(index) else ()
        for index, token in enumerate(attention.tokens)
    ]
    if positions == [right, right]:
        return None
    # Most tiles are the same in rows of few tokens.
    key = f"tiles {hash((rows, tuple(tuple(map(tuple, side)) for side in positions)))}"
    if positions[0] == positions[1]:
        key = f"tiles {hash(tuple(map(tuple, positions[0])))}"
    if key in question.memory:
        return question.memory[key]  # type: ignore[return-value]
    first = _with_empty(attention, lambda index, _: positions[0][index]).answer()
    answers: Answers = first
    if positions[1] != positions[0]:
        second = _with_empty(attention, lambda index, _: positions[1][index]).answer()
        places_of = torch.tensor([token.place for token in attention.tokens], device=heads.device).view(-1, 1)
        of_second = (places_of * group + heads) // rows != places_of * group // rows
        answers = {
            name: torch.where(
                of_second.view(*of_second.shape, *[1] * (values.dim() - 2)), second[name], values
            )
            for name, values in first.items()
        }
    made = _attended(question, answers)
    question.memory[key] = made
    return made


def _attended(question: Question, answers: Answers) -> Answers:
    """The right answer with the results of attention; logits' sizes are not less than they were."""
    sizes = torch.maximum(
        *(tensor(dict(item), "logit_magnitude").nan_to_num(0.0) for item in (answers, question.truth))  # type: ignore[arg-type]
    )
    return {**question.truth, **answers, "logit_magnitude": sizes}


def _whole_tile(token: Token, tile: _Tile, end: int) -> Sequence[int]:
    """What a token sees, and all of the keys of its tile up to a tile's end, zeros behind the last one."""
    last = tile.last.seen
    return [*range(token.first, min(max(token.seen, end), last)), *[EMPTY] * max(0, end - last)]


def _windowed_from(token: Token, tile: _Tile, oldest: int) -> Sequence[int]:
    """Keys from the oldest on; those that no token of the tile sees are zeros."""
    first = tile.first.first
    return [*[EMPTY] * max(0, first - max(tile.begin, oldest)), *range(max(first, oldest), token.seen)]


def _at_the_window(token: Token, tile: _Tile) -> Sequence[int]:
    """What a token sees where the tile that the last one's window begins in is not masked."""
    if not tile.is_aligned:
        whole = tile.begin + (tile.first.seen - tile.begin) // tile.keys * tile.keys
        return [*range(tile.begin, min(token.first, whole)), *token.visible]
    begin = tile.last.first // tile.keys * tile.keys
    if begin >= tile.first.seen // tile.keys * tile.keys:
        return token.visible
    more = range(max(begin, tile.first.first), min(token.first, begin + tile.keys))
    return [*[EMPTY] * max(0, tile.first.first - begin), *more, *token.visible]


def _row_tiles() -> Iterator[Fault]:
    yield from _in_tiles(
        "not-causal",
        "every token of a tile of query rows sees the keys of its newest",
        "B12",
        lambda token, tile: tile.last.visible,
    )
    yield from _in_tiles(
        "not-causal",
        "every token sees its row's keys up to the newest of its tile, behind them zeros up to the row's",
        "B12",
        lambda token, tile: [
            *range(replace(token, place=token.new - 1).first, tile.last.seen),
            *[EMPTY] * (min(tile.end(tile.last.seen), token.cached + token.new) - tile.last.seen),
        ],
        keys=KEY_TILES,
    )
    yield from _in_tiles(
        "next-token-seen",
        "a token sees the token behind it in its tile of query rows",
        "M2",
        lambda token, tile: range(token.first, min(token.seen + 1, tile.last.seen)),
    )
    yield from _in_tiles(
        "one-key-too-many",
        "a token sees the first key that it should not; behind its tile's last that is one of zeros",
        "M2",
        lambda token, tile: [
            *range(token.first, min(token.seen + 1, tile.last.seen)),
            *[EMPTY] * (token.seen == tile.last.seen < tile.end(tile.last.seen)),
        ],
        keys=KEY_TILES,
        aligned=(True, False),
    )
    yield from _in_tiles(
        "newest-key-unseen",
        "a token does not see its own key, but where that ends a tile that all see",
        "B66",
        lambda token, tile: range(
            token.first,
            token.seen
            if token.seen == 1 or (token.place == tile.first.place and token.seen % tile.keys == 0)
            else token.seen - 1,
        ),
        keys=KEY_TILES,
    )
    yield from _in_tiles(
        "window-of-the-first-token",
        "every token of a tile of query rows has the window of its first",
        "B58, B39",
        lambda token, tile: range(tile.first.first, token.seen),
        windowed=True,
    )
    yield from _in_tiles(
        "window-of-the-first-token",
        "every token of a tile of query rows has the window of its row's first, zeros before its tile's",
        "B58",
        lambda token, tile: _windowed_from(token, tile, replace(token, place=0).first),
        keys=KEY_TILES,
        windowed=True,
        form="zeros before it",
    )
    yield from _in_tiles(
        "window-ignored",
        "rows of several tokens see all that is read for their tile of query rows, zeros before it",
        "B39",
        lambda token, tile: _windowed_from(token, tile, 0 if token.new > 1 else token.first),
        keys=KEY_TILES,
        windowed=True,
    )
    yield from _in_tiles(
        "tile-at-the-window-unmasked",
        "the tile of keys that the window begins in is taken for one that all see",
        "E18",
        _at_the_window,
        keys=KEY_TILES,
        aligned=(True, False),
        windowed=True,
    )
    yield from _in_tiles(
        "last-tile-unmasked",
        "the tile of keys that a token's own ends is taken for one that all see, what is no key for zeros",
        "M9",
        lambda token, tile: _whole_tile(token, tile, tile.end(tile.first.seen)),
        keys=KEY_TILES,
    )
    yield from _in_tiles(
        "last-tile-unmasked",
        "the tile of keys that a token's own ends is taken for one that all see, what is no key for zeros",
        "M9",
        lambda token, tile: _whole_tile(
            token,
            tile,
            max(tile.end(tile.first.seen), min(tile.end(tile.first.seen + 1), tile.end(tile.last.seen))),
        ),
        keys=KEY_TILES,
        aligned=(False,),
    )
    for rows in ROW_TILES:
        for keys in KEY_TILES:
            yield Fault(
                "nothing-seen-is-nan",
                STEP,
                "a token that sees no key of the first tile is NaN: minus infinity less itself",
                "S8",
                lambda question, rows=rows, keys=keys: _lost(
                    question, rows, keys, _sees_nothing, lambda values: True, lse=True
                ),
                f"tiles of {rows} query rows, {keys} keys",
            )
            yield Fault(
                "hidden-keys-are-read",
                STEP,
                "keys of a tile that lie behind the window weigh 0, and 0 times NaN is NaN",
                "S8, E14",
                lambda question, rows=rows, keys=keys: _lost(
                    question,
                    rows,
                    keys,
                    lambda token, tile, _: range(tile.begin, tile.first.first),
                    lambda values: bool(values.isnan().any()),
                    lse=False,
                ),
                f"tiles of {rows} query rows, {keys} keys",
            )
    for rows in ROW_TILES:
        forms: list[tuple[str, Callable[[int, int, int], int]]] = [
            ("whole tiles", lambda tokens, group, slots, rows=rows: -(-tokens * group // rows)),
            ("whole tiles and one", lambda tokens, group, slots, rows=rows: tokens * group // rows + 1),
            (
                "tiles of tokens",
                lambda tokens, group, slots, rows=rows: -(-tokens // rows) + slots + 1,
            ),
        ]
        for form, tiles_of in forms:
            yield Fault(
                "launch-limited",
                STEP,
                "tiles of query rows behind those that the launch counts are never computed",
                "B64",
                lambda question, rows=rows, tiles_of=tiles_of: _behind_the_launch(question, rows, tiles_of),
                f"{form}, of {rows} query rows",
            )


def _sees_nothing(token: Token, tile: _Tile, parts: Sequence[range]) -> Sequence[int]:
    """One position if a token sees no key of the first tile of some part; none if it does of all."""
    for part in parts:
        end = min(part.start + tile.keys, part.stop)
        if token.seen <= part.start or token.first >= end:
            return (token.first,)
    return ()


def _lost(
    question: Question,
    rows: int,
    keys: int,
    touched: Callable[[Token, _Tile, Sequence[range]], Sequence[int]],
    is_lost: Callable[[Tensor], bool],
    *,
    lse: bool,
) -> Answers | None:
    """NaN where the values of positions that a head touches, if there are any, are lost."""
    attention, group = of(question), _group(question)
    if group > rows or not any(token.window for token in attention.tokens):
        return None
    out, log_sum = (tensor(dict(question.truth), name).clone() for name in ("out", "lse"))  # type: ignore[arg-type]
    is_made = False
    for index, token in enumerate(attention.tokens):
        if token.slot < 0 or not attention.asks(index):
            continue
        for head in range(group):
            tile = replace(_tile_of(token, head, group, rows), keys=keys)
            parts = _parts_of(question, token, tile, rows, 1)
            at = torch.tensor(list(touched(token, tile, parts)), dtype=torch.int64, device=out.device)
            heads = slice(head, None, group)
            if len(at) and is_lost(attention.keys_of(attention.row_of(token.slot, at))[1][heads]):
                is_made = True
                out[index, heads] = torch.nan
                if lse:
                    log_sum[index, heads] = torch.nan
    return {**question.truth, "out": out, "lse": log_sum} if is_made else None


def _behind_the_launch(
    question: Question, rows: int, tiles_of: Callable[[int, int, int], int]
) -> Answers | None:
    """Query rows of the last tiles as they were: (tokens, group, slots) -> how many tiles are computed."""
    group, lengths = _group(question), tensor(question.inputs, "cu_seqlens_q").diff().tolist()
    tokens = len(tensor(question.inputs, "query"))
    lengths.append(tokens - sum(lengths))
    heads = torch.arange(group)
    numbers, before = [], 0
    for new in lengths:
        numbers.append(before + (torch.arange(new).unsqueeze(1) * group + heads) // rows)
        before += -(-new * group // rows)
    is_written = torch.cat(numbers) < tiles_of(tokens, group, len(lengths) - 1)
    if bool(is_written.all()):
        return None
    answers: dict[str, object] = dict(question.truth)
    for name in ("out", "lse"):
        values = tensor(dict(question.truth), name)  # type: ignore[arg-type]
        written = is_written.repeat(1, values.shape[1] // group).to(values.device)
        written = written.view(*written.shape, *[1] * (values.dim() - 2)).expand_as(values)
        answers[name] = torch.where(written, values, torch.nan)
    return answers  # type: ignore[return-value]


# ---- splits --------------------------------------------------------------------------------------

FEWEST = (1, 256, 2048, 4096)
"""Keys that are worth a split."""


def _parts_of(
    question: Question, token: Token, tile: _Tile, rows: int, fewest: int, *, whole: bool = False
) -> list[range]:
    """The splits of the keys that a token's tile of query rows sees; one where the row fills several tiles.

    Args:
        whole: whether keys behind the window are divided, too.
    """
    begin, end, splits = 0 if whole else tile.begin, tile.last.seen, of(question).splits
    share = max(1, end - begin)
    if splits is not None and token.new * _group(question) <= rows:
        share = max(-(-share // splits), fewest)
        share = -(-share // tile.keys) * tile.keys
    return [range(first, min(first + share, end)) for first in range(begin, end, share)]


Parts = Sequence[range]


def _divided(
    name: str,
    summary: str,
    source: str,
    answer_of: Callable[[Question, Attention, list[Parts]], Answers | None],
) -> Iterator[Fault]:
    """Faults of rows whose keys are divided: (question, attention, splits of each token) -> the answer."""
    for rows in ROW_TILES:
        for keys in KEY_TILES:
            for fewest in FEWEST:

                def apply(
                    question: Question, rows: int = rows, keys: int = keys, fewest: int = fewest
                ) -> Answers | None:
                    attention, group = of(question), _group(question)
                    if (attention.splits or 1) == 1 or group > rows:
                        return None
                    parts: list[Parts] = []
                    for token in attention.tokens:
                        tile = replace(_tile_of(token, 0, group, rows), keys=keys)
                        parts.append(
                            _parts_of(question, token, tile, rows, fewest) if token.slot >= 0 else [range(1)]
                        )
                    if all(len(of_token) == 1 for of_token in parts):
                        return None
                    # Most forms divide the keys of a batch alike.
                    key = f"{name} {parts}"
                    if key not in question.memory:
                        question.memory[key] = answer_of(question, attention, parts)
                    return question.memory[key]  # type: ignore[return-value]

                worth = f", at least {fewest}" if fewest > 1 else ""
                yield Fault(
                    name, STEP, summary, source, apply, f"tiles of {rows} query rows, {keys} keys{worth}"
                )


def _keeping(kept_of: Callable[[Parts], Parts]) -> Callable[[Question, Attention, list[Parts]], Answers]:
    """Of each token's splits some alone."""

    def answer_of(question: Question, attention: Attention, parts: list[Parts]) -> Answers:
        def positions_of(index: int, token: Token) -> list[int]:
            kept = kept_of(parts[index]) if len(parts[index]) > 1 else parts[index]
            return [at for part in kept for at in part if token.first <= at < token.seen]

        return _attended(question, _with_empty(attention, positions_of).answer())

    return answer_of


def _merging(
    weigh: Callable[[Tensor, Tensor, float], Tensor],
) -> Callable[[Question, Attention, list[Parts]], Answers]:
    """Splits merged by other weights, then the sink as it should: of maxima [H, s], sums [H, s] and scale."""

    def answer_of(question: Question, attention: Attention, parts: list[Parts]) -> Answers:
        out, lse = (tensor(dict(question.truth), name).clone() for name in ("out", "lse"))  # type: ignore[arg-type]
        for index, (token, of_token) in enumerate(zip(attention.tokens, parts, strict=True)):
            if len(of_token) == 1 or not attention.asks(index):
                continue
            shares = []
            for part in of_token:
                seen = range(max(part.start, token.first), min(part.stop, token.seen))
                if seen:
                    at = torch.arange(seen.start, seen.stop, device=out.device)
                    keys, values = attention.keys_of(attention.row_of(token.slot, at))
                    raw = (attention.query[index].double().unsqueeze(1) @ keys.mT).squeeze(1)
                    shares.append((raw, softmax(raw, attention.scale, values)[0]))
            maxima = torch.stack([raw.amax(-1) for raw, _ in shares], -1)
            sums = [
                torch.exp((raw - raw.amax(-1, keepdim=True)) * attention.scale).sum(-1) for raw, _ in shares
            ]
            weights = weigh(maxima, torch.stack(sums, -1), attention.scale)
            total = weights.sum(-1, keepdim=True)
            merged = ((weights / total).unsqueeze(-1) * torch.stack([part for _, part in shares], 1)).sum(1)
            own = maxima.amax(-1) * attention.scale + torch.log(total.squeeze(-1))
            out[index], lse[index] = _with_sink(attention, merged, own)
        return {**question.truth, "out": out, "lse": lse}

    return answer_of


def _with_sink(attention: Attention, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """[H, V] and [H] of keys alone with the heads' sinks, where there are any."""
    if attention.sinks is None:
        return out, lse
    whole = torch.logaddexp(lse, attention.sinks)
    return out * torch.exp(lse - whole).unsqueeze(-1), whole


def _of_divided_rows(
    change: Callable[[Question, Attention, list[bool]], Answers | None],
) -> Callable[[Question, Attention, list[Parts]], Answers | None]:
    """Other results of tokens whose keys are divided."""

    def answer_of(question: Question, attention: Attention, parts: list[Parts]) -> Answers | None:
        return change(question, attention, [len(of_token) > 1 for of_token in parts])

    return answer_of


def _of_the_first(question: Question, attention: Attention, is_divided: list[bool]) -> Answers:
    taken = [
        index - token.place * divided
        for index, (token, divided) in enumerate(zip(attention.tokens, is_divided, strict=True))
    ]
    return {
        **question.truth,
        **{name: tensor(dict(question.truth), name)[torch.tensor(taken)] for name in ("out", "lse")},  # type: ignore[arg-type]
    }


def _without_their_sinks(question: Question, attention: Attention, is_divided: list[bool]) -> Answers | None:
    if attention.sinks is None:
        return None
    answers, changed = dict(question.truth), replace(attention, sinks=None).answer()
    mask = torch.tensor(is_divided)
    for name in ("out", "lse"):
        right = tensor(dict(question.truth), name)  # type: ignore[arg-type]
        of_tokens = mask.view(-1, *[1] * (right.dim() - 1)).to(right.device)
        answers[name] = torch.where(of_tokens, changed[name], right)
    return answers


def _splits() -> Iterator[Fault]:
    losses: list[tuple[str, str, Callable[[Parts], Parts]]] = [
        ("last-split-lost", "a row's last split is not merged", lambda parts: parts[:-1]),
        ("first-split-lost", "a row's first split is not merged", lambda parts: parts[1:]),
        *(
            (
                "later-splits-lost",
                "splits behind those that are held at a time are not merged",
                lambda parts, held=held: parts[:held],
            )
            for held in (16,)
        ),
    ]
    for name, summary, kept_of in losses:
        yield from _divided(name, summary, "B13, S4", _keeping(kept_of))
    merges: list[tuple[str, str, Callable[[Tensor, Tensor, float], Tensor]]] = [
        (
            "splits-merged-without-log2-e",
            "splits are merged with 2^x in the place of e^x",
            lambda maxima, sums, scale: sums * torch.exp(_relative(maxima) * scale * LN_2),
        ),
        (
            "splits-merged-without-maxima",
            "splits are summed as they are, whatever their maxima",
            lambda maxima, sums, scale: sums,
        ),
        (
            "splits-merged-by-maxima",
            "splits are merged by their maxima, without their sums",
            lambda maxima, sums, scale: torch.exp(_relative(maxima) * scale),
        ),
        (
            "splits-merged-evenly",
            "splits count alike, whatever their keys weigh",
            lambda maxima, sums, scale: torch.ones_like(sums),
        ),
    ]
    for name, summary, weigh in merges:
        yield from _divided(name, summary, "S1, S4", _merging(weigh))
    yield from _divided(
        "drafts-get-the-first",
        "every token of a row whose keys are divided has the results of its first",
        "B23",
        _of_divided_rows(_of_the_first),
    )
    yield from _divided(
        "sink-ignored",
        "the sink does not count where keys are divided",
        "P5, gpt-oss",
        _of_divided_rows(_without_their_sinks),
    )
    for rows in ROW_TILES:
        for keys in KEY_TILES:
            for fewest in FEWEST:
                yield Fault(
                    "unwritten-splits-merged",
                    STEP,
                    "as many splits are merged as the whole history has, not those within the window alone",
                    "E18",
                    lambda question, rows=rows, keys=keys, fewest=fewest: _with_unwritten(
                        question, rows, keys, fewest
                    ),
                    f"tiles of {rows} query rows, {keys} keys"
                    + (f", at least {fewest}" if fewest > 1 else ""),
                )


def _relative(maxima: Tensor) -> Tensor:
    return maxima - maxima.amax(-1, keepdim=True)


def _with_unwritten(question: Question, rows: int, keys: int, fewest: int) -> Answers | None:
    """NaN, which memory held, where the history has more splits than the window."""
    attention, group = of(question), _group(question)
    if (attention.splits or 1) == 1 or group > rows:
        return None
    more = []
    for token in attention.tokens:
        tile = replace(_tile_of(token, 0, group, rows), keys=keys)
        counts = [
            len(_parts_of(question, token, tile, rows, fewest, whole=whole)) if token.slot >= 0 else 0
            for whole in (False, True)
        ]
        more.append(counts[0] < counts[1])
    if not any(more):
        return None
    answers = dict(question.truth)
    for name in ("out", "lse"):
        right = tensor(dict(question.truth), name)  # type: ignore[arg-type]
        mask = torch.tensor(more, device=right.device).view(-1, *[1] * (right.dim() - 1))
        answers[name] = right.masked_fill(mask, torch.nan)
    return answers


# ---- sinks beside faulty sums --------------------------------------------------------------------


def _beside_sinks() -> Iterator[Fault]:
    """Sums of keys that are wrong before the sink is counted, which is right."""
    sums: list[tuple[str, str, str, Callable[[Tensor, float], tuple[Tensor, Tensor]], str]] = [
        (
            "log2-e-missing",
            "the scale of e^x is given to 2^x: the softmax is too flat",
            "S1",
            lambda raw, scale: (raw.amax(-1, keepdim=True), torch.tensor(LN_2)),
            "",
        ),
        *(
            (
                "maximum-begins-at-a-number",
                "the running maximum begins at a number: logits far below it weigh nothing",
                "B14, S8",
                lambda raw, scale, least=least: (
                    raw.amax(-1, keepdim=True).clamp_min(least),
                    torch.tensor(1.0),
                ),
                f", at {least:g}",
            )
            for least in (-5e4, -1e4, 0.0)
        ),
    ]
    for name, summary, source, sums_of, form in sums:

        def apply(
            question: Question,
            sums_of: Callable[[Tensor, float], tuple[Tensor, Tensor]] = sums_of,
        ) -> Answers | None:
            attention = of(question)
            if attention.sinks is None:
                return None

            def combine(raw: Tensor, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
                # The last key is the sink.
                raw, values = raw[:, :-1], values[:, :-1]
                largest, flatness = sums_of(raw, scale)
                weights = torch.exp2(((raw - largest) * scale * flatness / LN_2).float()).double()
                total = weights.sum(-1, keepdim=True)
                lse = (largest * scale + torch.log(total)).squeeze(-1)
                return _with_sink(attention, weighted(weights / total, values), lse)

            return _attended(question, attention.answer(combine))

        yield Fault(name, STEP, summary, source, apply, f"the sink apart{form}")


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
            "heads-counted-by-kv-heads",
            "keys begin behind as many query heads as there are KV heads",
            "B63",
            lambda _, w: (w.kv_heads * w.keys, *_right_begins(w)[1:]),
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
        form = {3: "keys alone", len(parsings) - 1: "values alone"}.get(number_of, "")
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
        *(
            (
                "history-ignored",
                "rows of one token, or those of several, are written from position 0 on",
                "B01, B48",
                lambda inputs, is_one=is_one: (
                    _cached(inputs) * ((tensor(inputs, "cu_seqlens_q").diff() == 1) != is_one)
                ),
                f"of rows of {'one token' if is_one else 'several tokens'}",
            )
            for is_one in (True, False)
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
    yield Fault(
        "padding-in-slot-0",
        WRITE,
        "padding is taken for tokens of slot 0",
        "B31",
        _padding_in_slot_0,
    )


def _padding_in_slot_0(question: Question) -> Answers | None:
    """Padding written behind the first row's tokens, where its place in the step says.

    Raises:
        IndexError: that is outside of the block table or of the rotation's.
    """
    ids = _ids(question.inputs)
    if bool((ids >= 0).all()):
        return None
    made = question.with_inputs(batch_id_per_token=ids.clamp_min(0))
    for name in CACHES:
        writes, cache = made[name], tensor(question.inputs, name)
        if isinstance(writes, Writes):
            within(writes.rows, cache.numel() // cache.shape[3])
    return made


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
    for caches, word in ((CACHES[:1], "keys"), (CACHES[1:], "values")):
        for heads in (0, 1, 2, 4, 8):
            yield Fault(
                "later-heads-unwritten",
                WRITE,
                "KV heads behind the first ones, or that fill no last tile of them, are not written",
                "D3, O24",
                lambda question, heads=heads, caches=caches: _of_some_rows(
                    question, lambda kv, kv_heads, _: kv < heads, caches
                ),
                f"{word} behind {heads}",
            )
    yield Fault(
        "one-kv-head-for-all",
        WRITE,
        "every KV head is written to the first one's row, where the last one stays",
        "O24",
        _in_the_first_head,
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


def _in_the_first_head(question: Question) -> Answers | None:
    kv_heads, block_size = tensor(question.inputs, "k_cache").shape[1:3]
    if kv_heads == 1:
        return None
    last = _of_some_rows(question, lambda kv, heads, _: kv == heads - 1)
    moved = {
        name: Writes(writes.rows - (kv_heads - 1) * block_size, writes.values)
        for name in CACHES
        if isinstance(writes := last[name], Writes)
    }
    return {**last, **moved}


def _of_some_rows(
    question: Question, keeps: Callable[[Tensor, int, Tensor], Tensor], caches: Sequence[str] = CACHES
) -> Answers:
    """Rows that are written where keeps(KV head of the row, G, whether its token is of a prompt)."""
    ids, kv_heads = _ids(question.inputs), _kv_heads(question.inputs)
    of_rows = ids[ids >= 0].repeat_interleave(kv_heads)
    heads = torch.arange(kv_heads, device=ids.device).repeat(int((ids >= 0).sum()))
    kept = keeps(heads, kv_heads, (tensor(question.inputs, "seq_lens_encoder") > 0)[of_rows])
    answers = dict(question.truth)
    for name in caches:
        writes = _written(question, name)
        answers[name] = Writes(writes.rows[kept], writes.values[kept])
    products = answers["k_cache_products"]
    if isinstance(products, Tensor) and "k_cache" in caches:
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
        "products-rounded",
        WRITE,
        "products of the rotation are rounded before they are added",
        "D7",
        _products_rounded,
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


def _products_rounded(question: Question) -> Answers | None:
    """Rotated parts whose two products are rounded before they are added."""
    inputs, right = question.inputs, question.truth
    if maybe_tensor(inputs, "cos_sin_cache") is None:
        return None
    cos, sin = _table(inputs)
    by_cos, by_sin = (
        question.with_inputs(cos_sin_cache=torch.cat(parts, dim=-1))
        for parts in ((cos, torch.zeros_like(sin)), (torch.zeros_like(cos), sin))
    )
    dtype, turned = tensor(inputs, "qkv").dtype, 2 * cos.shape[1]

    def sums(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
        added = first.to(dtype).double() + second.to(dtype).double()
        return torch.where(torch.arange(values.shape[-1], device=values.device) < turned, added, values)

    writes = [answers["k_cache"] for answers in (right, by_cos, by_sin)]
    rows = [item for item in writes if isinstance(item, Writes)]
    return {
        **right,
        "query": sums(*(tensor(dict(answers), "query") for answers in (right, by_cos, by_sin))),  # type: ignore[arg-type]
        "k_cache": Writes(rows[0].rows, sums(*(item.values for item in rows))),
    }


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
    *_row_tiles(),
    *_splits(),
    *_beside_sinks(),
    *_parts(),
    *_positions(),
    *_where(),
    *_rotation(),
)
