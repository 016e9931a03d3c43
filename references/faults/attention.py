"""Faults of attention: which keys a token sees, what of them, at which scale, and what the sums become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isnan, log

import torch
from torch import Tensor

from references.faults._attention import (
    LISTS,
    OPERATORS,
    PAGED,
    ROWS,
    Attention,
    Combine,
    Placed,
    Token,
    of,
    pool,
    softmax,
    weighed_down,
    weighted,
    within,
)
from references.faults._fault import Answers, Fault, NotMade, Question, Unwritten
from references.faults._tokens import entry
from references.oracle import maybe_tensor, number, tensor

LN_2 = log(2)
TILES = (16, 32, 64, 128)
"""Keys that kernels work on at a time."""

APART = ("mla_decode", "prefill_attention", "gqa_step", *LISTS)
"""Operators that have an LSE."""

ROPED = tuple(operator for operator in OPERATORS if operator != "gqa_step")
"""Operators whose heads have a part that is rotated behind one that is not."""

BRANCHED = ("mla_step", "static_attention")
"""Operators whose two kinds of rows are computed by kernels of their own."""

Change = Callable[[Question, Attention], Attention | None]

KINDS = {"": None, "prefill rows": True, "decode rows": False}
"""Forms of the faults of `BRANCHED`: of which rows they are; of lists, prefill rows are first chunks."""


def _answers(
    question: Question,
    changed: Attention,
    combine: Combine | None = None,
    *,
    placed: Placed | None = None,
    of_prefill: bool | None = None,
) -> Answers:
    """The changed attention's answer, of all rows or of one kind; everything else as it should be."""
    answers = dict(question.truth)
    for name, values in changed.answer(combine, placed).items():
        right = answers.get(name)
        if name == "logit_magnitude" and isinstance(right, Tensor):
            # Partial sums that a definition looks at by itself are not less with other keys.
            answers[name] = torch.maximum(values.nan_to_num(0.0), right)
            continue
        if isinstance(right, Tensor):
            is_of_kind = [of_prefill in (None, token.is_prefill) for token in changed.tokens]
            mask = torch.tensor(is_of_kind, dtype=torch.bool, device=values.device)
            answers[name] = torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, right)
    return answers


def _forms(
    name: str,
    summary: str,
    source: str,
    change: Change,
    *,
    operators: Sequence[str],
    form: str = "",
    combine: Combine | None = None,
    placed_of: Callable[[Attention], Placed | None] | None = None,
) -> Iterator[Fault]:
    """The fault of all operators, and of those with two branches once for each kind of rows."""
    for kind, of_prefill in KINDS.items():

        def apply(question: Question, of_prefill: bool | None = of_prefill) -> Answers | None:
            changed = change(question, of(question))
            placed = None if changed is None or placed_of is None else placed_of(changed)
            if changed is None or (placed is None and placed_of is not None):
                return None
            return _answers(question, changed, combine, placed=placed, of_prefill=of_prefill)

        of_kind = (
            tuple(operators)
            if not kind
            else tuple(operator for operator in BRANCHED if operator in operators)
        )
        if of_kind:
            text = ", ".join(part for part in (form, kind) if part)
            yield Fault(name, of_kind, summary, source, apply, text)


def _seeing(
    name: str,
    summary: str,
    source: str,
    positions_of: Callable[[Token], Sequence[int] | range],
    *,
    operators: Sequence[str] = ROWS,
    form: str = "",
) -> Iterator[Fault]:
    """Faults of which positions of its row a token sees."""
    yield from _forms(
        name,
        summary,
        source,
        lambda _, attention: attention.seeing(positions_of),
        operators=operators,
        form=form,
    )


def _combining(name: str, summary: str, source: str, combine: Combine, form: str = "") -> Iterator[Fault]:
    """Faults of what is done with the logits of a list."""
    yield from _forms(
        name, summary, source, lambda _, attention: attention, operators=OPERATORS, combine=combine, form=form
    )


def _of_list(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Tensor], Tensor],
    form: str = "",
    *,
    operators: Sequence[str] = OPERATORS,
) -> Iterator[Fault]:
    """Faults that leave out some of a list's rows, whatever they are."""

    def shortened(_: Question, attention: Attention) -> Attention:
        return replace(attention, listed=tuple(change(rows) for rows in attention.listed))

    yield from _forms(name, summary, source, shortened, operators=operators, form=form)


# ---- which keys ----------------------------------------------------------------------------------


def _visibility() -> Iterator[Fault]:
    yield from _seeing(
        "newest-key-unseen",
        "a token does not see the newest key that it should, its own",
        "B66",
        lambda token: range(token.first, token.seen - 1),
    )
    yield from _seeing(
        "newest-key-unseen",
        "a token does not see the newest key that it should, its own",
        "B66",
        lambda token: range(token.first, max(token.seen - 1, token.first + 1)),
        form="but a first token sees itself",
    )
    yield from _seeing(
        "one-key-too-many",
        "a token sees the first key that it should not, behind its row's last too",
        "M2",
        lambda token: range(token.first, token.seen + 1),
    )
    yield from _seeing(
        "next-token-seen",
        "a token sees the token behind it in its row",
        "M2, O21",
        lambda token: range(token.first, min(token.seen + 1, token.cached + token.new)),
    )
    yield from _seeing(
        "oldest-key-lost",
        "the oldest key that a token should see is not seen",
        "M4",
        lambda token: token.visible[1:],
    )
    yield from _seeing(
        "causal-top-left",
        "the causal mask begins at the first key: a row's token i sees i + 1 keys, whatever is cached",
        "B11, M11",
        lambda token: replace(token, cached=0).visible,
    )
    yield from _seeing(
        "not-causal",
        "every token of a row sees all of the row's keys",
        "M3, M13",
        lambda token: range(token.first, token.cached + token.new),
    )
    yield from _seeing(
        "history-ignored",
        "the cached keys are not seen: attention over the new tokens alone",
        "B02, B04, B39, B76",
        lambda token: range(max(token.first, token.cached), token.seen),
    )
    yield from _seeing(
        "new-tokens-unseen",
        "the cached keys alone are seen, none of the new tokens",
        "B66, B02",
        lambda token: range(token.first, token.cached),
    )
    for tokens in (1, 2, 4, 8):
        yield from _seeing(
            "later-tokens-see-no-more",
            "a row's tokens behind the first few see what the last of these does",
            "B12, B21, T2",
            lambda token, tokens=tokens: replace(token, place=min(token.place, tokens - 1)).visible,
            form=f"behind the first {tokens}" if tokens > 1 else "behind the first",
        )
    for queries in QUERIES:
        yield from _forms(
            "later-tokens-see-no-more",
            "a row's tokens behind the first few see what the last of these does",
            "B12, B21, T2",
            _grouped(queries, lambda token, first, _: replace(token, place=first).visible),
            operators=("mla_decode",),
            form=f"tiles of {queries} tokens and heads, the first of each",
        )
        for tile in TILES:
            yield from _forms(
                "mask-of-the-last-token",
                "a tile of keys that the last of some tokens sees whole is not masked for those before it",
                "M11, E9",
                _grouped(
                    queries,
                    lambda token, _, last, tile=tile: range(
                        token.first, max(token.seen, (token.cached + last + 1) // tile * tile)
                    ),
                ),
                operators=("mla_decode",),
                form=f"tiles of {queries} tokens and heads, and of {tile} keys",
            )
    for queries in (32, 64, 128):
        yield from _seeing(
            "not-causal",
            "every token of a row sees all of the row's keys",
            "M3, M13",
            lambda token, queries=queries: range(
                token.first, token.cached + min(token.new, (token.place // queries + 1) * queries)
            ),
            operators=("prefill_attention",),
            form=f"up to the last of its tile of {queries}",
        )
        yield from _seeing(
            "next-token-seen",
            "a token sees the token behind it in its row",
            "M2, O21",
            lambda token, queries=queries: range(
                token.first,
                min(token.seen + 1, token.cached + min(token.new, (token.place // queries + 1) * queries)),
            ),
            operators=("prefill_attention",),
            form=f"within its tile of {queries}",
        )
    yield from _rows_elsewhere()
    for keys in (32, 64, 128, 256, 512, 1024):
        yield from _seeing(
            "keys-beyond-a-bound",
            "keys behind a fixed number of them are not seen",
            "B03, L3",
            lambda token, keys=keys: range(token.first, min(token.seen, keys)),
            form=f"behind {keys}",
        )
    for tile in TILES:
        yield from _seeing(
            "keys-beyond-the-chunk",
            "as many keys are seen as the row has new tokens, in whole tiles: what is cached is not counted",
            "B03, C2",
            lambda token, tile=tile: range(token.first, min(token.seen, -(-token.new // tile) * tile)),
            operators=("prefill_attention", "mla_step"),
            form=f"tiles of {tile}",
        )
    for window in (64, 128, 256, 512):
        yield from _seeing(
            "windowed",
            "only the newest keys are seen, where there is no window",
            "B57",
            lambda token, window=window: range(max(token.first, token.seen - window), token.seen),
            form=f"a window of {window}",
        )


QUERIES = (16, 32, 64)
"""Queries, of a token and a head each, that decode kernels work on at a time."""


def _grouped(queries: int, positions_of: Callable[[Token, int, int], range]) -> Change:
    """Tokens of a row share a program, with all heads: (token, the first place of its group, the last)."""

    def change(_: Question, attention: Attention) -> Attention:
        size = max(1, queries // attention.query.shape[1])

        def positions(token: Token) -> range:
            first = token.place // size * size
            return positions_of(token, first, min(first + size, token.new) - 1)

        return attention.seeing(positions)

    return change


def _rows_elsewhere() -> Iterator[Fault]:
    """Rows whose keys begin elsewhere among those of the step."""

    def beginning(begin_of: Callable[[int, int, int], int]) -> Change:
        """(first new token, first key, end of the keys) of a row -> where its keys begin."""

        def change(question: Question, attention: Attention) -> Attention:
            tokens, keys = (
                tensor(question.inputs, name).tolist() for name in ("cu_seqlens_q", "cu_seqlens_k_prefill")
            )
            count = len(tensor(question.inputs, "key"))
            listed = []
            for token, rows in zip(attention.tokens, attention.listed, strict=True):
                if len(rows) == 0:
                    listed.append(rows)
                    continue
                end = keys[token.slot + 1]
                begin = begin_of(tokens[token.slot], keys[token.slot], end)
                seen = max(0, end - begin - token.new + token.place + 1)
                listed.append(within(torch.arange(begin, begin + seen, device=rows.device), count))
            return replace(attention, listed=tuple(listed))

        return change

    for form, begin_of in (
        ("one behind, of rows behind the first", lambda token, key, end: min(key + (token > 0), end)),
        ("where the new tokens' do", lambda token, _, end: min(token, end)),
    ):
        yield from _forms(
            "keys-begin-elsewhere",
            "a row's keys are looked for where a prefix sum over other rows says",
            "B74",
            beginning(begin_of),
            operators=("prefill_attention",),
            form=form,
        )


def _rounded_down(rows: Tensor, tile: int, *, at_least_one: bool) -> Tensor:
    """As many rows as fill whole tiles."""
    whole = len(rows) // tile * tile
    return rows if at_least_one and whole == 0 else rows[:whole]


def _tiles() -> Iterator[Fault]:
    for tile in TILES:
        for keeps in (True, False):
            also = ", a lone tile apart" if keeps else ""
            yield from _of_list(
                "last-keys-lost",
                "keys that do not fill a last tile are not seen",
                "M9, B03, E14",
                lambda rows, tile=tile, keeps=keeps: _rounded_down(rows, tile, at_least_one=keeps),
                form=f"tiles of {tile}{also}",
            )
        yield from _of_list(
            "first-tile-lost",
            "the first tile of keys is not seen",
            "M9",
            lambda rows, tile=tile: rows[tile:] if len(rows) > tile else rows,
            form=f"tiles of {tile}",
        )
        yield from _of_list(
            "last-tile-lost",
            "the last tile of keys is not seen, full or not",
            "M9",
            lambda rows, tile=tile: rows[: (len(rows) - 1) // tile * tile] if len(rows) > tile else rows,
            form=f"tiles of {tile}",
        )
    yield from _of_list(
        "last-key-lost", "the last key of a list is not seen", "O19", lambda rows: rows[:-1], operators=LISTS
    )
    yield from _of_list(
        "first-key-lost", "the first key of a list is not seen", "O18", lambda rows: rows[1:], operators=LISTS
    )


# ---- splits --------------------------------------------------------------------------------------


def _ceil_div(value: int, by: int) -> int:
    return (value + by - 1) // by


@dataclass(frozen=True)
class _Cut:
    """How keys are divided into splits: whole tiles of so many keys, and not fewer than are worth a split."""

    tile: int
    fewest: int

    def parts(self, keys: int, splits: int) -> list[range]:
        """The splits of so many keys, all that have one."""
        share = _ceil_div(max(_ceil_div(keys, splits), self.fewest), self.tile) * self.tile
        return [range(first, min(first + share, keys)) for first in range(0, keys, share)]

    @property
    def form(self) -> str:
        """In words."""
        fewest = f", at least {self.fewest} keys" if self.fewest > 1 else ""
        return f"tiles of {self.tile}{fewest}"


CUTS = tuple(_Cut(tile, fewest) for fewest in (1, 256) for tile in (1, *TILES))


def _keeping(kept_of: Callable[[list[range], int, int], Sequence[range]], cut: _Cut) -> Change:
    """Of each list some parts alone: (its splits, its entries, how many splits at most) -> those kept."""

    def change(_: Question, attention: Attention) -> Attention | None:
        splits = attention.splits
        if splits is None or splits == 1:
            return None
        listed, places = [], []
        for token, rows in enumerate(attention.listed):
            count = len(rows) if attention.entries is None else attention.entries
            at = attention.places_of(token, len(rows))
            is_kept = torch.zeros_like(at, dtype=torch.bool)
            for part in kept_of(cut.parts(count, splits), count, splits):
                is_kept |= (at >= part.start) & (at < part.stop)
            listed.append(rows[is_kept])
            places.append(at[is_kept])
        return replace(attention, listed=tuple(listed), places=tuple(places))

    return change


def _without_short(parts: list[range]) -> Sequence[range]:
    """Without a last one that is shorter than the others."""
    is_short = len(parts) > 1 and len(parts[-1]) < len(parts[0])
    return parts[:-1] if is_short else parts


def _without_every(parts: list[range], every: int) -> Sequence[range]:
    return [part for number, part in enumerate(parts) if number % every != every - 1]


def _last_of_each(cut: _Cut) -> Change:
    """Every split without its last key."""

    def change(_: Question, attention: Attention) -> Attention | None:
        if attention.splits in (None, 1):
            return None
        listed, places = [], []
        for token, rows in enumerate(attention.listed):
            at = attention.places_of(token, len(rows))
            is_last = torch.zeros_like(at, dtype=torch.bool)
            is_last[[share.stop - 1 for share in _shares(attention, cut, at)] if len(at) else []] = True
            listed.append(rows[~is_last])
            places.append(at[~is_last])
        return replace(attention, listed=tuple(listed), places=tuple(places))

    return change


def _several(attention: Attention, cut: _Cut) -> list[bool]:
    """Of each token whether its keys are of several splits."""
    splits = attention.splits or 1
    return [len(cut.parts(len(rows), splits)) > 1 for rows in attention.listed]


def _largest_and_sum(question: Question) -> tuple[Tensor, Tensor]:
    """[Tp, H] each: largest logit, and the sum of exponentials relative to it; 0 and 1 without a key."""
    if "sums" not in question.memory:
        attention = of(question)
        shape = attention.query.shape[:2]
        largest, total = torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)

        for token, rows in enumerate(attention.listed):
            if len(rows) and attention.asks(token):
                keys, _ = attention.keys_of(rows)
                raw = (attention.query[token].double().unsqueeze(1) @ keys.mT).squeeze(1)
                most, weight = _sums(raw, attention.scale)
                largest[token], total[token] = (
                    (most * attention.scale).squeeze(-1).cpu(),
                    weight.squeeze(-1).cpu(),
                )
        question.memory["sums"] = largest, total
    found: tuple[Tensor, Tensor] = question.memory["sums"]  # type: ignore[assignment]
    return found


def _lse_of(cut: _Cut, *, several: bool, of_the_sum: bool) -> Callable[[Question], Answers | None]:
    """The LSE to base 2 of tokens whose keys are of several splits, or of one."""

    def apply(question: Question) -> Answers | None:
        attention = of(question)
        right = question.truth["lse"]
        if attention.splits in (None, 1) or not isinstance(right, Tensor):
            return None
        largest, total = (values.to(right.device) for values in _largest_and_sum(question))
        base_2 = largest + torch.log2(total) if of_the_sum else (largest + torch.log(total)) / LN_2
        is_chosen = [split is several for split in _several(attention, cut)]
        chosen = torch.tensor(is_chosen, dtype=torch.bool, device=right.device)
        mask = chosen.view(-1, 1) & ~right.isinf()
        return {**question.truth, "lse": torch.where(mask, base_2, right)}

    return apply


def _unmerged(cut: _Cut, *, where: str) -> Callable[[Question], Answers | None]:
    """NaN for tokens of several splits.

    Args:
        where: `all`; `unused`, fewer splits than there is room for; `without a key`, one that has none.
    """

    def apply(question: Question) -> Answers | None:
        attention = of(question)
        splits = attention.splits
        if splits is None or splits == 1:
            return None
        chosen = []
        for token, rows in enumerate(attention.listed):
            count = len(rows) if attention.entries is None else attention.entries
            used = len(cut.parts(count, splits))
            if where == "without a key":
                filled = len(_shares(attention, cut, attention.places_of(token, len(rows))))
                chosen.append(len(rows) > 0 and filled < used)
            else:
                chosen.append(used > 1 and (where == "all" or used < splits))

        def change(name: str, right: Tensor) -> Tensor:
            mask = torch.tensor(chosen, dtype=torch.bool, device=right.device)
            return right.masked_fill(mask.view(-1, *[1] * (right.dim() - 1)), torch.nan)

        results = _results(question, change)
        return {**results, "lse": question.truth["lse"]} if where == "without a key" else results

    return apply


def _rounded_shares(keys: int, splits: int, cut: _Cut) -> Sequence[range]:
    """As many keys as splits hold whose share is rounded down to whole tiles."""
    share = max(keys // splits // cut.tile * cut.tile, cut.fewest, cut.tile)
    return [range(min(keys, share * splits))]


def _merging(
    weigh: Callable[[Tensor, Tensor, float], Tensor], cut: _Cut
) -> Callable[[Question], Answers | None]:
    """Splits merged by other weights: of the splits' maxima [H, s] and sums [H, s], and the scale."""

    def apply(question: Question) -> Answers | None:
        attention = of(question)
        splits = attention.splits
        # A sink is no key of any split.
        if splits is None or splits == 1 or attention.sinks is not None:
            return None

        def placed(raw: Tensor, scale: float, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            shares = _shares(attention, cut, places)
            if len(shares) == 1:
                return softmax(raw, scale, values)
            outs = torch.stack([softmax(raw[:, share], scale, values[:, share])[0] for share in shares], 1)
            maxima = torch.stack([raw[:, share].amax(-1) for share in shares], -1)
            sums = torch.stack(
                [
                    torch.exp((raw[:, share] - raw[:, share].amax(-1, keepdim=True)) * scale).sum(-1)
                    for share in shares
                ],
                -1,
            )
            weights = weigh(maxima, sums, scale)
            total = weights.sum(-1, keepdim=True)
            out = ((weights / total).unsqueeze(-1) * outs).sum(1)
            return out, maxima.amax(-1) * scale + torch.log(total.squeeze(-1))

        return _answers(question, attention, placed=placed)

    return apply


def _shares(attention: Attention, cut: _Cut | None, places: Tensor) -> list[slice]:
    """Which of a token's keys are of which split; none without a key."""
    if cut is None or attention.splits in (None, 1):
        return [slice(0, len(places))]
    count = len(places) if attention.entries is None else attention.entries
    ends = torch.tensor([part.stop for part in cut.parts(count, attention.splits or 1)], device=places.device)
    stops = [0, *torch.searchsorted(places, ends).tolist()]
    return [slice(first, last) for first, last in pairwise(stops) if last > first]


def _relative(maxima: Tensor) -> Tensor:
    return maxima - maxima.amax(-1, keepdim=True)


_SPLIT = ("mla_decode", "sparse_decode")


def _splits() -> Iterator[Fault]:
    for cut in CUTS:
        changes: list[tuple[str, str, str, Change]] = [
            (
                "last-split-lost",
                "a row's last split is not merged",
                "B13",
                _keeping(lambda parts, *_: parts[:-1] if len(parts) > 1 else parts, cut),
            ),
            (
                "first-split-lost",
                "a row's first split is not merged",
                "B13",
                _keeping(lambda parts, *_: parts[1:] if len(parts) > 1 else parts, cut),
            ),
            (
                "last-split-lost-if-short",
                "a row's last split is not merged where it is shorter than the others",
                "B13, B03",
                _keeping(lambda parts, *_: _without_short(parts), cut),
            ),
            (
                "splits-rounded-down",
                "a split's share of the keys is rounded down, the last keys belong to no split",
                "B03, E14",
                _keeping(lambda _, keys, splits, cut=cut: _rounded_shares(keys, splits, cut), cut),
            ),
        ]
        for name, summary, source, change in changes:
            yield from _forms(name, summary, source, change, operators=_SPLIT, form=cut.form)
        yield from _forms(
            "last-key-lost",
            "the last key of a list is not seen",
            "O19",
            _last_of_each(cut),
            operators=("sparse_decode",),
            form=f"of every split, {cut.form}",
        )
        for most in (4, 8, 16, 32):
            yield from _forms(
                "splits-limited",
                "as many splits are merged as a program has room for, and no more",
                "L3, E14",
                _keeping(lambda parts, *_, most=most: parts[:most], cut),
                operators=_SPLIT,
                form=f"{most}, {cut.form}",
            )
        for every in (2, 4):
            yield from _forms(
                "part-of-the-splits-lost",
                "what the last of a program's threads have merged is lost: one split of every few",
                "B70",
                _keeping(lambda parts, *_, every=every: _without_every(parts, every), cut),
                operators=("mla_decode",),
                form=f"of {every}, {cut.form}",
            )
        merges: list[tuple[str, str, str, Callable[[Tensor, Tensor, float], Tensor]]] = [
            (
                "splits-merged-without-log2-e",
                "splits are merged with 2^x in the place of e^x",
                "S1, S3",
                lambda maxima, sums, scale: sums * torch.exp(_relative(maxima) * scale * LN_2),
            ),
            (
                "splits-merged-by-maxima",
                "splits are merged by their maxima, without their sums",
                "S4",
                lambda maxima, sums, scale: torch.exp(_relative(maxima) * scale),
            ),
            (
                "splits-merged-evenly",
                "splits count alike, whatever their keys weigh",
                "D6",
                lambda maxima, sums, scale: torch.ones_like(sums),
            ),
        ]
        for name, summary, source, weigh in merges:
            yield Fault(name, _SPLIT, summary, source, _merging(weigh, cut), cut.form)
        for several, rows in ((True, "several splits"), (False, "one split")):
            for of_the_sum, what in ((False, ""), (True, "that of the sum alone, ")):
                yield Fault(
                    "lse-base-2",
                    ("mla_decode",),
                    "the LSE is a logarithm to base 2",
                    "S3, S4",
                    _lse_of(cut, several=several, of_the_sum=of_the_sum),
                    f"{what}rows of {rows}, {cut.form}",
                )
        yield Fault(
            "unused-splits-merged",
            ("mla_decode",),
            "splits that had no key, and wrote nothing, are merged",
            "E16, M9",
            _unmerged(cut, where="unused"),
            cut.form,
        )
        yield Fault(
            "unused-splits-merged",
            ("sparse_decode",),
            "splits that had no key, and wrote nothing, are merged",
            "E16, M9",
            _unmerged(cut, where="without a key"),
            cut.form,
        )
        yield Fault(
            "splits-in-one-place",
            ("mla_decode",),
            "partial results are not stored where they are read: those of other splits, or none",
            "G7",
            _unmerged(cut, where="all"),
            cut.form,
        )


# ---- pages ---------------------------------------------------------------------------------------


def _paging(rows_of: Callable[[Tensor, int, int, Tensor], Tensor]) -> Change:
    """Cached rows found otherwise: (table [B, MB], block size, slot, positions) -> physical rows."""

    def change(question: Question, attention: Attention) -> Attention:
        tables, cache = tensor(question.inputs, "block_tables"), pool(question.inputs)
        block_size = cache.shape[2]
        limit = cache.shape[0] * block_size

        def row_of(slot: int, positions: Tensor) -> Tensor:
            rows = attention.row_of(slot, positions)
            is_paged = rows < limit
            found = rows_of(tables, block_size, slot, positions[is_paged])
            rows[is_paged] = within(found, limit)
            return rows

        return replace(attention, row_of=row_of).seeing(lambda token: token.visible)

    return change


def _pages() -> Iterator[Fault]:
    def fault(
        name: str,
        summary: str,
        source: str,
        rows_of: Callable[[Tensor, int, int, Tensor], Tensor],
        form: str = "",
    ) -> Iterator[Fault]:
        yield from _forms(name, summary, source, _paging(rows_of), operators=PAGED, form=form)

    for size in (16, 32, 64, 128):
        yield from fault(
            "block-size-is-a-literal",
            "the block size is taken for another number",
            "B32, B38, P14",
            lambda tables, block, slot, at, size=size: entry(tables, slot, at // size) * size + at % size,
            f"for {size}",
        )
        for form, rows_of in (
            (
                "in the block alone",
                lambda tables, block, slot, at, size=size: (
                    entry(tables, slot, at // block) * block + at % size
                ),
            ),
            (
                "in the table alone",
                lambda tables, block, slot, at, size=size: (
                    entry(tables, slot, at // size) * block + at % block
                ),
            ),
        ):
            yield from _forms(
                "block-size-is-a-literal",
                "the block size is taken for another number",
                "B32, B38, P14",
                _paging(rows_of),
                operators=("mla_decode",),
                form=f"for {size}, {form}",
            )
    for tile in TILES:
        yield from _forms(
            "table-read-late",
            "a tile of keys has the blocks of the tile before",
            "P6",
            _paging(
                lambda tables, block, slot, at, tile=tile: (
                    entry(tables, slot, torch.where(at < tile, at, at - tile) // block) * block + at % block
                )
            ),
            operators=("mla_decode",),
            form=f"tiles of {tile}",
        )
    yield from fault(
        "token-as-block",
        "the table is looked up at a token's position in the place of its block's number",
        "P6",
        lambda tables, block, slot, at: entry(tables, slot, at) * block + at % block,
    )
    yield from fault(
        "block-size-ignored",
        "the table is followed as if every entry were a token's row",
        "P4",
        lambda tables, block, slot, at: entry(tables, slot, at),
    )
    yield from fault(
        "block-is-a-row",
        "a block's number is taken for the number of its first row",
        "P7",
        lambda tables, block, slot, at: entry(tables, slot, at // block) + at % block,
    )
    yield from fault(
        "blocks-in-a-line",
        "a row's blocks are taken to lie behind its first",
        "P13",
        lambda tables, block, slot, at: entry(tables, slot, at * 0) * block + at,
    )
    yield from fault(
        "table-ignored",
        "positions are taken for rows of the cache, no table is followed",
        "P13",
        lambda tables, block, slot, at: at,
    )
    for step in (1, -1):
        way = "behind" if step == 1 else "before"
        yield from fault(
            "one-page-off",
            "a block's entry is looked for beside its own",
            "P8",
            lambda tables, block, slot, at, step=step: (
                entry(tables, slot, at // block + step) * block + at % block
            ),
            f"the one {way}",
        )
        yield from fault(
            "neighbours-table",
            "a row follows the block table of another slot",
            "B56, P10",
            lambda tables, block, slot, at, step=step: (
                entry(tables, max(slot + step, 0), at // block) * block + at % block
            ),
            f"of the slot {way}",
        )


def _table_of_the_token(question: Question) -> Answers | None:
    attention = of(question)
    tables, cache = tensor(question.inputs, "block_tables"), tensor(question.inputs, "latent_cache")
    block_size = cache.shape[2]
    limit = cache.shape[0] * block_size
    listed = []
    for index, (token, rows) in enumerate(zip(attention.tokens, attention.listed, strict=True)):
        at = torch.arange(token.seen, device=rows.device)
        found = entry(tables, index, at // block_size) * block_size + at % block_size if len(rows) else rows
        listed.append(within(found, limit))
    return _answers(question, replace(attention, listed=tuple(listed)))


def _offsets_wrapped(question: Question) -> Answers | None:
    """Elements found at their offset modulo 2^32."""
    attention, cache = of(question), tensor(question.inputs, "latent_cache")
    width, rank = cache.shape[3], attention.rank or 0
    if cache.numel() <= 2**32:
        return None

    def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
        offsets = (rows * width % 2**32).unsqueeze(1) + torch.arange(width, device=rows.device)
        keys = cache.view(-1)[offsets].double().unsqueeze(0)
        return keys, keys[..., :rank]

    return _answers(question, replace(attention, keys_of=keys_of))


# ---- what a key holds ----------------------------------------------------------------------------


def _query(change: Callable[[Tensor, int], Tensor]) -> Change:
    """Queries changed: ([Tp, H, W], where the rope part begins) -> the same."""

    def changed(question: Question, attention: Attention) -> Attention:
        return replace(attention, query=change(attention.query, rope_begins(question, attention)))

    return changed


def rope_begins(question: Question, attention: Attention) -> int:
    """The column at which the rope part of queries and keys begins."""
    if attention.rank is not None:
        return attention.rank
    if question.operator not in ROPED:
        return attention.query.shape[2]
    if "q_nope" in question.inputs:
        return tensor(question.inputs, "q_nope").shape[2]
    return int(number(question.inputs, "qk_nope_head_dim"))


def _values_from(columns_of: Callable[[Tensor, Attention], Tensor]) -> Change:
    """Values of a latent attention from other columns of its keys."""

    def changed(_: Question, attention: Attention) -> Attention | None:
        if attention.rank is None:
            return None

        def keys_of(rows: Tensor) -> tuple[Tensor, Tensor]:
            keys, _values = attention.keys_of(rows)
            return keys, columns_of(keys, attention)

        return replace(attention, keys_of=keys_of)

    return changed


def _columns(query: Tensor, begin: int, order: Callable[[Tensor], Tensor]) -> Tensor:
    """The rope part's columns in another order."""
    columns = torch.arange(query.shape[2], device=query.device)
    columns[begin:] = begin + order(torch.arange(query.shape[2] - begin, device=query.device))
    return query[..., columns]


def _content() -> Iterator[Fault]:
    yield from _forms(
        "rope-left-out",
        "the rope part of queries and keys does not count",
        "B26",
        _query(
            lambda query, begin: torch.where(
                torch.arange(query.shape[2], device=query.device) < begin, query, 0
            )
        ),
        operators=ROPED,
    )
    for half, form in ((0, "its first half"), (1, "its second half")):
        yield from _forms(
            "rope-left-out",
            "the rope part of queries and keys does not count",
            "B26",
            _query(lambda query, begin, half=half: _without_half(query, begin, half)),
            operators=("mla_decode", "prefill_attention", "sparse_decode", "sparse_prefill"),
            form=form,
        )
    yield from _forms(
        "rope-alone",
        "the rope part of queries and keys alone counts",
        "B26",
        _query(
            lambda query, begin: torch.where(
                torch.arange(query.shape[2], device=query.device) < begin, 0, query
            )
        ),
        operators=ROPED,
    )
    for bit in (1, 2, 4, 8, 16):
        yield from _forms(
            "rope-columns-exchanged",
            "columns of the rope part are read in each other's place",
            "Q1",
            _query(lambda query, begin, bit=bit: _columns(query, begin, lambda at: at ^ bit)),
            form=f"every {bit} with the next" if bit > 1 else "every one with the next",
            operators=ROPED,
        )
    yield from _forms(
        "rope-halves-exchanged",
        "the halves of the rope part are read in each other's place",
        "X3",
        _query(lambda query, begin: _columns(query, begin, lambda at: at.roll(len(at) // 2))),
        operators=ROPED,
    )
    for form, order in (("interleaved for half-split", 0), ("half-split for interleaved", 1)):
        yield from _forms(
            "rope-pairs-reordered",
            "the rope part of queries and that of keys are in different orders",
            "X3, B47",
            _query(lambda query, begin, order=order: _columns(query, begin, lambda at: _paired(at, order))),
            form=form,
            operators=ROPED,
        )
    yield from _forms(
        "query-rope-first",
        "queries have their rope part first, keys have it last",
        "N3, O18",
        _query(lambda query, begin: query.roll(query.shape[2] - begin, 2)),
        operators=ROPED,
    )
    for step in (1, -1):
        way = "behind" if step == -1 else "before"
        yield from _forms(
            "neighbours-query",
            "a head has the query of the head beside it",
            "D6, L40",
            _query(lambda query, _, step=step: query.roll(step, 1)),
            form=f"of the head {way}",
            operators=OPERATORS,
        )
        yield from _forms(
            "neighbours-token-query",
            "a token has the query of the token beside it",
            "B07, B56",
            _query(lambda query, _, step=step: query.roll(step, 0)),
            form=f"of the token {way}",
            operators=OPERATORS,
        )
    yield from _forms(
        "values-from-the-rope-columns",
        "values begin where keys end: the last columns of a row in the place of its first",
        "B49",
        _values_from(lambda keys, attention: keys[..., -attention.value_width :]),
        operators=("mla_decode", *LISTS),
    )
    for step in (1, -1, 8, -8, 64, -64):
        yield from _forms(
            "values-shifted",
            "columns of the values are shifted",
            "B49",
            _values_from(
                lambda keys, attention, step=step: keys[..., : attention.value_width].roll(step, -1)
            ),
            operators=("mla_decode", *LISTS),
            form=f"by {step}",
        )


def _without_half(query: Tensor, begin: int, half: int) -> Tensor:
    width = (query.shape[2] - begin) // 2
    at = torch.arange(query.shape[2], device=query.device) - begin
    return torch.where((at < 0) | (at // max(1, width) != half), query, 0)


def _paired(at: Tensor, order: int) -> Tensor:
    """Columns between the two orders of pairs: (2i, 2i + 1), or (i, i + D / 2)."""
    half = len(at) // 2
    return at // 2 + at % 2 * half if order == 0 else at % half * 2 + at // half


# ---- scale, sums and logarithms ------------------------------------------------------------------


def _scaled(scale_of: Callable[[Question, Attention], float]) -> Change:
    return lambda question, attention: replace(attention, scale=scale_of(question, attention))


def _sums(raw: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Largest of the raw logits, and the sum of their exponentials relative to it: [H, 1] each."""
    largest = raw.amax(-1, keepdim=True)
    return largest, torch.exp((raw - largest) * scale).sum(-1, keepdim=True)


def _log2_e_missing(raw: Tensor, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
    largest = raw.amax(-1, keepdim=True)
    weights = torch.exp((raw - largest) * scale * LN_2)
    total = weights.sum(-1, keepdim=True)
    return weighted(weights / total, values), (largest * scale + torch.log(total)).squeeze(-1)


def _with_lse(lse_of: Callable[[Tensor, Tensor, float], Tensor]) -> Combine:
    """The right output beside another LSE, of largest logit, sum and scale."""

    def combine(raw: Tensor, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
        largest, total = _sums(raw, scale)
        return softmax(raw, scale, values)[0], lse_of(largest, total, scale).squeeze(-1)

    return combine


def _with_out(factor: Callable[[Tensor], Tensor]) -> Combine:
    """The right LSE beside an output multiplied by something that depends on the sum."""

    def combine(raw: Tensor, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = softmax(raw, scale, values)
        return out * factor(_sums(raw, scale)[1]), lse

    return combine


def _sentinel(least: float) -> Combine:
    """A running maximum that begins at a number, in float32: what lies far below it weighs nothing."""

    def combine(raw: Tensor, scale: float, values: Tensor) -> tuple[Tensor, Tensor]:
        largest = raw.amax(-1, keepdim=True).clamp_min(least)
        weights = torch.exp2(((raw - largest) * scale / LN_2).float()).double()
        total = weights.sum(-1, keepdim=True)
        return weighted(weights / total, values), (largest * scale + torch.log(total)).squeeze(-1)

    return combine


def _online(
    tile: int,
    *,
    sums: bool = True,
    outs: bool = True,
    keep: Callable[[Tensor], Tensor] | None = None,
    kept: Callable[[Tensor], Tensor] | None = None,
    stored: Callable[[Tensor], Tensor] | None = None,
    cut: _Cut | None = None,
) -> Callable[[Attention], Placed | None]:
    """An online softmax over tiles of places, split by split.

    Args:
        sums, outs: whether the running sum and output are rescaled where the maximum grows.
        keep, kept, stored: what becomes of the factors of that, of the output with them, and of it with the
            tile's values.
        cut: how keys are divided among splits, where there are several.
    """

    def placed_of(attention: Attention) -> Placed | None:
        if cut is not None and cut.fewest > 1 and attention.splits in (None, 1):
            return None

        def part(raw: Tensor, scale: float, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            maximum = torch.full_like(raw[:, :1], -torch.inf)
            total = torch.zeros_like(maximum)
            out = torch.zeros(len(raw), values.shape[2], dtype=raw.dtype, device=raw.device)
            counts = torch.unique_consecutive(places // tile, return_counts=True)[1].tolist()
            for logits, of_keys in zip(
                torch.split(raw, counts, 1), torch.split(values, counts, 1), strict=True
            ):
                larger = torch.maximum(maximum, logits.amax(-1, keepdim=True))
                factor = torch.exp((maximum - larger) * scale)
                factor = factor if keep is None else keep(factor)
                weights = torch.exp((logits - larger) * scale)
                total = total * (factor if sums else 1.0) + weights.sum(-1, keepdim=True)
                out = out * (factor if outs else 1.0)
                out = (out if kept is None else kept(out)) + weighted(weights, of_keys)
                out = out if stored is None else stored(out)
                maximum = larger
            return out / total, (maximum * scale + torch.log(total)).squeeze(-1)

        def placed(raw: Tensor, scale: float, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
            found = [
                part(raw[:, share], scale, values[:, share], places[share])
                for share in _shares(attention, cut, places)
            ]
            if len(found) == 1:
                return found[0]
            outs_of, lses = (torch.stack(results, 1) for results in zip(*found, strict=True))
            lse = torch.logsumexp(lses, 1)
            return (torch.exp(lses - lse.unsqueeze(1)).unsqueeze(-1) * outs_of).sum(1), lse

        return placed

    return placed_of


def _half(attention: Attention) -> Callable[[Tensor], Tensor] | None:
    """What rounds to the dtype of queries; None where that is float32."""
    dtype = attention.query.dtype
    return None if dtype == torch.float32 else lambda values: values.float().to(dtype).double()


def _rounding(tile: int, what: str, cut: _Cut) -> Callable[[Attention], Placed | None]:
    """An online softmax with something rounded to the dtype of queries, once a tile."""

    def placed_of(attention: Attention) -> Placed | None:
        half = _half(attention)
        return None if half is None else _online(tile, cut=cut, **{what: half})(attention)  # type: ignore[arg-type]

    return placed_of


def _key_width(question: Question) -> float:
    """N + D, where the inputs say so."""
    nope = int(number(question.inputs, "qk_nope_head_dim")) if "qk_nope_head_dim" in question.inputs else None
    if nope is None and "q_nope" in question.inputs:
        nope = tensor(question.inputs, "q_nope").shape[2]
    if nope is None:
        raise NotMade("nothing says how wide a head is")
    attention = of(question)
    return nope + attention.query.shape[2] - rope_begins(question, attention)


def _arithmetic() -> Iterator[Fault]:
    scales: list[tuple[str, str, str, Callable[[Question, Attention], float], Sequence[str]]] = [
        (
            "scale-from-latent-width",
            "the softmax scale is made from the width of a latent row, R + D",
            "S9",
            lambda question, attention: _latent_width(question, attention) ** -0.5,
            ("mla_decode", *LISTS, "mla_step"),
        ),
        (
            "scale-without-mscale",
            "the softmax scale is made from a head's width alone, without YaRN's m squared",
            "S9, L41",
            lambda question, _: _key_width(question) ** -0.5,
            ("prefill_attention", "mla_step"),
        ),
        (
            "scale-from-nope-width",
            "the softmax scale is made from the width of a head's part that is not rotated",
            "S9",
            lambda question, attention: rope_begins(question, attention) ** -0.5,
            ("prefill_attention", "mla_step"),
        ),
        ("scale-left-out", "logits are not scaled", "S9", lambda *_: 1.0, OPERATORS),
        ("scaled-twice", "logits are scaled twice", "S9", lambda _, attention: attention.scale**2, OPERATORS),
        (
            "log2-e-too-much",
            "the factor log2 e is counted twice",
            "S1",
            lambda _, attention: attention.scale / LN_2,
            OPERATORS,
        ),
    ]
    for name, summary, source, scale_of, operators in scales:
        yield from _forms(name, summary, source, _scaled(scale_of), operators=operators)
    yield from _combining(
        "log2-e-missing", "the scale of e^x is given to 2^x: the softmax is too flat", "S1", _log2_e_missing
    )
    yield from _combining(
        "log2-e-missing",
        "the scale of e^x is given to 2^x: the softmax is too flat",
        "S1",
        lambda raw, scale, values: softmax(raw, scale * LN_2, values),
        form="the LSE too",
    )
    logarithms: list[tuple[str, str, str, Callable[[Tensor, Tensor, float], Tensor], str]] = [
        (
            "lse-base-2",
            "the LSE is a logarithm to base 2",
            "S3, S4",
            lambda largest, total, scale: (largest * scale + torch.log(total)) / LN_2,
            "",
        ),
        (
            "lse-base-2",
            "the LSE is a logarithm to base 2",
            "S3, S4",
            lambda largest, total, scale: largest * scale + torch.log2(total),
            "that of the sum alone",
        ),
        (
            "lse-without-the-maximum",
            "the largest logit is not added to the LSE",
            "S4",
            lambda largest, total, scale: torch.log(total),
            "",
        ),
        (
            "lse-without-the-scale",
            "the largest logit is added to the LSE unscaled",
            "S4",
            lambda largest, total, scale: largest + torch.log(total),
            "",
        ),
        (
            "lse-without-the-sum",
            "the largest logit is handed on as the LSE",
            "S4",
            lambda largest, total, scale: largest * scale,
            "",
        ),
        (
            "lse-is-the-sum",
            "the sum of the exponentials is handed on without its logarithm",
            "S4",
            lambda largest, total, scale: largest * scale + total,
            "",
        ),
    ]
    for name, summary, source, lse_of, form in logarithms:
        yield from _forms(
            name,
            summary,
            source,
            lambda _, attention: attention,
            operators=APART,
            combine=_with_lse(lse_of),
            form=form,
        )
    yield from _combining(
        "not-normalised",
        "outputs are not divided by the sum of their weights",
        "E1",
        _with_out(lambda total: total),
    )
    yield from _combining(
        "normalised-twice",
        "outputs are divided by the sum of their weights twice",
        "E1",
        _with_out(lambda total: 1 / total),
    )
    for least in (-5e4, -1e4, 0.0):
        yield from _combining(
            "maximum-begins-at-a-number",
            "the running maximum begins at a number: logits far below it weigh nothing",
            "B14, S8",
            _sentinel(least),
            form=f"at {least:g}",
        )
    for tile in TILES:
        for name, summary, rescales in (
            ("sum-not-rescaled", "the running sum keeps its scale where the maximum grows", {"sums": False}),
            (
                "output-not-rescaled",
                "the running output keeps its scale where the maximum grows",
                {"outs": False},
            ),
        ):
            for cut in (_Cut(tile, 1), _Cut(tile, 256)):
                yield from _forms(
                    name,
                    summary,
                    "B70",
                    lambda _, attention: attention,
                    operators=OPERATORS if cut.fewest == 1 else _SPLIT,
                    placed_of=_online(tile, cut=cut, **rescales),  # type: ignore[arg-type]
                    form=cut.form,
                )
        roundings = (
            (
                "running-output-rounded",
                "kept",
                "the running output is rounded once a tile",
                "before what it adds",
            ),
            (
                "running-output-rounded",
                "stored",
                "the running output is rounded once a tile",
                "with what it adds",
            ),
            ("rescaling-rounded", "keep", "factors of rescaling are rounded", ""),
        )
        for name, what, summary, form in roundings:
            yield from _forms(
                name,
                summary,
                "B70",
                lambda _, attention: attention,
                operators=("mla_decode", "prefill_attention", "sparse_decode", "sparse_prefill"),
                placed_of=_rounding(tile, what, _Cut(tile, 1)),
                form=", ".join(part for part in (form, f"tiles of {tile}") if part),
            )
    for lanes, form in ((4, "the first four of every eight keys"), (2, "the first two of every eight keys")):
        yield from _forms(
            "sum-of-some-lanes",
            "the sum of the exponentials is taken over some of the threads that have a part of it",
            "B34",
            lambda _, attention: attention,
            operators=("mla_decode", "prefill_attention", "sparse_decode", "sparse_prefill"),
            placed_of=lambda _, lanes=lanes: _sum_of_lanes(lanes),
            form=form,
        )


def _sum_of_lanes(lanes: int) -> Placed:
    def placed(raw: Tensor, scale: float, values: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        largest = raw.amax(-1, keepdim=True)
        weights = torch.exp((raw - largest) * scale)
        total = (weights * (places % 8 < lanes)).sum(-1, keepdim=True)
        return weighted(weights / total, values), (largest * scale + torch.log(total)).squeeze(-1)

    return placed


def _latent_width(question: Question, attention: Attention) -> int:
    cache = maybe_tensor(question.inputs, "latent_cache") if "latent_cache" in question.inputs else None
    return attention.query.shape[2] if cache is None else cache.shape[3]


# ---- heads, and tokens without keys --------------------------------------------------------------


def _results(question: Question, change: Callable[[str, Tensor], Tensor | Unwritten]) -> Answers:
    """The right answer with out and, where there is one, LSE changed: (name, [Tp, H, ...]) -> the same."""
    changed = {
        name: change(name, right)
        for name in ("out", "lse")
        if isinstance(right := question.truth.get(name), Tensor)
    }
    return {**question.truth, **changed}


def _of_tokens(
    question: Question, is_changed: Callable[[int, Token], bool], out: float, lse: float | None
) -> Answers:
    """The right answer with other results of some tokens; None leaves the LSE, NaN for both leaves both."""
    tokens = of(question).tokens
    chosen = [is_changed(index, token) for index, token in enumerate(tokens)]

    def change(name: str, right: Tensor) -> Tensor | Unwritten:
        value = out if name == "out" else lse
        mask = torch.tensor(chosen, dtype=torch.bool, device=right.device)
        if lse is not None and isnan(out) and isnan(lse):
            return Unwritten(right, ~mask)
        return right if value is None else right.masked_fill(mask.view(-1, *[1] * (right.dim() - 1)), value)

    return _results(question, change)


def _without_keys(out: float, lse: float | None) -> Callable[[Question], Answers]:
    """Tokens that see no key hold something else, the LSE in float32."""
    lse = None if lse is None else float(torch.tensor(lse, dtype=torch.float32))
    return lambda question: _of_tokens(
        question, lambda index, _: len(of(question).listed[index]) == 0, out, lse
    )


def _divided_without_keys(question: Question) -> Answers:
    """Tokens that see no key are no number, which was computed."""
    listed = of(question).listed

    def change(_: str, right: Tensor) -> Tensor:
        is_empty = torch.tensor([len(rows) == 0 for rows in listed], dtype=torch.bool, device=right.device)
        return right.masked_fill(is_empty.view(-1, *[1] * (right.dim() - 1)), torch.nan)

    return _results(question, change)


def _results_of_the_first(question: Question) -> Answers:
    """Tokens of decode rows hold what the first of their row does."""
    tokens = of(question).tokens
    firsts = [
        index - (0 if token.is_prefill or token.slot < 0 else token.place)
        for index, token in enumerate(tokens)
    ]
    return _results(question, lambda _, right: right[torch.tensor(firsts, device=right.device)])


def _later_heads(heads: int, filling: float) -> Callable[[Question], Answers | None]:
    """Heads behind the first few hold something else, what they held before if that is NaN."""

    def change(_: str, right: Tensor) -> Tensor | Unwritten:
        is_late = torch.arange(right.shape[1], device=right.device) >= heads
        if isnan(filling):
            return Unwritten(right, ~is_late.expand(right.shape[:2]))
        return right.masked_fill(is_late.view(1, -1, *[1] * (right.dim() - 2)), filling)

    return lambda question: _results(question, change)


def _repeated_heads(heads: int) -> Callable[[Question], Answers]:
    """Every tile of heads holds what the first one does."""
    return lambda question: _results(
        question, lambda _, right: right[:, torch.arange(right.shape[1], device=right.device) % heads]
    )


def _chunks_decoded(question: Question) -> Answers | None:
    """Chunks with a history are computed by the decode kernel too, for which they are not."""
    attention = of(question)
    listed = []
    for token, rows in zip(attention.tokens, attention.listed, strict=True):
        positions = torch.arange(token.seen, device=rows.device)
        listed.append(attention.row_of(token.slot, positions) if token.is_prefill else rows)
    return _answers(question, replace(attention, listed=tuple(listed)))


def _shape() -> Iterator[Fault]:
    for heads in (1, 2, 4, 8, 16, 32, 64):
        for filling, what in ((torch.nan, "unwritten"), (0.0, "0")):
            yield Fault(
                "later-heads-lost",
                OPERATORS,
                "heads behind the first tile of them are not computed",
                "D3, D6",
                _later_heads(heads, filling),
                f"{what} behind {heads}",
            )
        yield Fault(
            "head-tile-repeated",
            OPERATORS,
            "every tile of heads has the results of the first",
            "D3, D6",
            _repeated_heads(heads),
            f"tiles of {heads}",
        )
    for step in (1, -1):
        yield Fault(
            "wrong-head",
            OPERATORS,
            "a head has the results of the one beside it",
            "D6",
            lambda question, step=step: _results(question, lambda _, right: right.roll(step, 1)),
            f"of the head {'before' if step == 1 else 'behind'}",
        )
    yield Fault(
        "drafts-get-the-first",
        PAGED,
        "every token of a decode row has the results of its first",
        "B23",
        _results_of_the_first,
    )
    for tokens in (1, 4):
        yield Fault(
            "later-drafts-unwritten",
            ROWS,
            "of a decode row only the first tokens are computed",
            "B12, B21, B23",
            lambda question, tokens=tokens: _of_tokens(
                question,
                lambda _, token: token.place >= tokens and not token.is_prefill,
                torch.nan,
                torch.nan,
            ),
            f"the first {tokens}" if tokens > 1 else "the first",
        )
    yield from _launches()
    yield from _lse_places()
    for tile in TILES:
        for logit in (-1e4, -1e3):
            yield Fault(
                "masked-keys-weigh",
                ("mla_decode", "prefill_attention"),
                "what is masked has a logit, which weighs where others are lower",
                "S8, B11",
                lambda question, tile=tile, logit=logit: _tail_weighs(question, tile, logit),
                f"{logit:g}, tiles of {tile}",
            )
    yield Fault(
        "empty-rows-unwritten",
        APART,
        "tokens that see no key are never written",
        "E2, E4, B22",
        _without_keys(torch.nan, torch.nan),
    )
    yield Fault(
        "empty-rows-divided",
        APART,
        "tokens that see no key are 0 / 0",
        "E1, B27",
        _without_keys(torch.nan, None),
    )
    yield Fault(
        "empty-rows-divided",
        APART,
        "tokens that see no key are 0 / 0",
        "E1, B27",
        _divided_without_keys,
        "the LSE, too",
    )
    for value in (-1e30, -1e9, -1e4, torch.finfo(torch.float32).min, 0.0, torch.inf):
        yield Fault(
            "empty-lse-is-a-number",
            APART,
            "the LSE of tokens that see no key is not minus infinity",
            "S8",
            _without_keys(0.0, value),
            f"but {value:g}",
        )
    yield Fault(
        "padding-unwritten",
        (*ROWS, "static_attention"),
        "tokens of padding are never written",
        "E9, B22",
        lambda question: _of_tokens(question, lambda _, token: token.slot < 0, torch.nan, torch.nan),
    )
    yield Fault(
        "chunks-decoded",
        ("mla_decode",),
        "prefill rows with a cache are taken for decode rows",
        "B20",
        _chunks_decoded,
    )
    yield Fault(
        "table-of-the-token",
        ("mla_decode",),
        "the block table is looked up by a token's number, not by its slot's",
        "B56, P10",
        _table_of_the_token,
    )
    yield Fault(
        "offsets-32-bit-unsigned",
        ("mla_decode",),
        "offsets of elements are kept modulo 2^32",
        "B09",
        _offsets_wrapped,
    )


def _launches() -> Iterator[Fault]:
    """Tokens that no program has."""
    for queries in QUERIES:
        yield Fault(
            "later-drafts-unwritten",
            ("mla_decode",),
            "of a decode row only the first tokens are computed",
            "B12, B21, B23",
            lambda question, queries=queries: _of_tokens(
                question,
                lambda _, token: (
                    token.place >= max(1, queries // of(question).query.shape[1]) and not token.is_prefill
                ),
                torch.nan,
                torch.nan,
            ),
            f"a tile of {queries} tokens and heads",
        )
    yield Fault(
        "one-token-a-slot",
        ("mla_decode", "prefill_attention"),
        "as many tokens are computed as there are slots",
        "M2, B21",
        lambda question: _of_tokens(
            question,
            lambda index, _: index >= len(tensor(question.inputs, "seq_lens_decoder")),
            torch.nan,
            torch.nan,
        ),
    )
    for rows in (32, 64, 128, 256, 512, 1024):
        for more in (0, 1):
            yield Fault(
                "rows-limited",
                ("mla_decode", "prefill_attention"),
                "rows behind a fixed number of them are not looked at",
                "B05",
                lambda question, rows=rows + more: _of_tokens(
                    question,
                    lambda _, token: token.slot >= rows or (token.slot < 0 and _slots(question) >= rows),
                    torch.nan,
                    torch.nan,
                ),
                f"behind {rows + more}",
            )
    for queries in (16, 32, 64, 128):
        for by_row in (True, False):
            yield Fault(
                "launch-rounded-down",
                ("prefill_attention",),
                "the last tokens, which fill no program of their own, are never written",
                "E2",
                lambda question, queries=queries, by_row=by_row: _without_ragged(
                    question, queries, by_row=by_row
                ),
                f"programs of {queries}, those of a row one after another"
                if by_row
                else f"programs of {queries}",
            )


def _slots(question: Question) -> int:
    return len(tensor(question.inputs, "seq_lens_decoder"))


def _without_ragged(question: Question, queries: int, *, by_row: bool) -> Answers:
    """Tokens of tiles that a launch without one more a row does not have.

    Rows have tiles of their own, and padding as well. They are numbered one after another, or so that one is
    found by halving: from first token / queries + row on.
    """
    begins = tensor(question.inputs, "cu_seqlens_q").tolist()
    count = len(of(question).tokens)
    lost: list[bool] = []
    before = 0
    for row, (begin, end) in enumerate(zip(begins, [*begins[1:], count], strict=True)):
        first = before if by_row else begin // queries + row
        most = _ceil_div(count, queries) if by_row else count // queries + 1
        lost += [first + place // queries >= most for place in range(end - begin)]
        before += _ceil_div(end - begin, queries)
    return _of_tokens(question, lambda index, _: lost[index], torch.nan, torch.nan)


def _tail_weighs(question: Question, tile: int, logit: float) -> Answers:
    """Places behind a row's last key, up to a whole tile, have a logit and values of 0."""
    attention = of(question)
    is_prefill = question.operator == "prefill_attention"
    counts = [
        -(token.cached + token.new if is_prefill else token.seen) % tile if len(rows) else 0
        for token, rows in zip(attention.tokens, attention.listed, strict=True)
    ]
    return weighed_down(question, torch.tensor(counts), logit)


def _lse_places() -> Iterator[Fault]:
    """LSEs written to the places of another layout."""
    yield Fault(
        "lse-written-by-head",
        APART,
        "LSEs are written as [heads, tokens]",
        "P17",
        lambda question: {
            **question.truth,
            **{
                name: values.T.contiguous().view(values.shape)
                for name in ("lse", "logit_magnitude")
                if isinstance(values := question.truth[name], Tensor)
            },
        },
    )


FAULTS = (
    *_visibility(),
    *_tiles(),
    *_splits(),
    *_pages(),
    *_content(),
    *_arithmetic(),
    *_shape(),
)
