"""Faults of attention over lists: which entries are keys, and how packed rows are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from references.faults._attention import LISTS, TILE, Attention, listing, of, weighed_down, within
from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import has_history, read_as_dense
from references.oracle import Inputs, flag, number, tensor

PACKED = ("sparse_decode",)
OF_THE_CACHE = ("sparse_decode", "static_attention")


def _limit(inputs: Inputs) -> Tensor:
    """[Tp or 1, 1, 1] int64: rows, or tokens, that a list may name."""
    lists = tensor(inputs, "indices")
    tokens = torch.full((len(lists), 1, 1), len(lists), device=lists.device)
    if "packed_cache" not in inputs:
        return tokens
    cache = tensor(inputs, "packed_cache")
    rows = torch.full_like(tokens, cache.shape[0] * cache.shape[2])
    return torch.where(has_history(inputs).view(-1, 1, 1), rows, tokens)


def _listed(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Inputs, Tensor], Tensor],
    form: str = "",
    operators: Sequence[str] = LISTS,
) -> Fault:
    """The fault of other lists [Tp, 1, n]."""

    def apply(question: Question) -> Answers:
        lists = change(question.inputs, tensor(question.inputs, "indices").long())
        return _with(question, listing(question, lists))

    return Fault(name, tuple(operators), summary, source, apply, form)


def _with(question: Question, changed: Attention) -> Answers:
    """The right answer with another attention's results."""
    made, answers = changed.answer(), dict(question.truth)
    right = tensor(answers, "logit_magnitude")  # type: ignore[arg-type]
    # Partial sums that a definition looks at by itself are not less with other keys.
    magnitude = torch.maximum(made["logit_magnitude"].nan_to_num(0.0), right)
    return {**answers, **made, "logit_magnitude": magnitude}


def _is_key(inputs: Inputs, lists: Tensor) -> Tensor:
    return (lists >= 0) & (lists < _limit(inputs))


def _within_the_end(inputs: Inputs, lists: Tensor) -> Tensor:
    """Entries up to the last that names a key."""
    places = torch.arange(lists.shape[2], device=lists.device)
    last = torch.where(_is_key(inputs, lists), places, -1).amax(-1, keepdim=True)
    return places <= last


def _followed(inputs: Inputs, lists: Tensor, read_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Lists with what is read of entries that name no key, -1 where nothing is.

    Raises:
        IndexError: a row that is not there.
    """
    limit = _limit(inputs)
    read = torch.where(_is_key(inputs, lists) | ~_within_the_end(inputs, lists), -1, read_of(lists, limit))
    if bool((read >= limit).any()):
        raise IndexError("a row behind the last")
    return torch.where(read >= 0, read, lists)


def _cut(lists: Tensor, entries: int) -> Tensor:
    return torch.where(torch.arange(lists.shape[2], device=lists.device) < entries, lists, -1)


def _as_many_as_keys(inputs: Inputs, lists: Tensor) -> Tensor:
    """As many entries as the list has keys, though some between them name none."""
    count = _is_key(inputs, lists).sum(-1, keepdim=True)
    return torch.where(torch.arange(lists.shape[2], device=lists.device) < count, lists, -1)


def _which() -> Iterator[Fault]:
    for where, word in (("to the last key", True), ("in the whole list", False)):
        yield _listed(
            "minus-one-is-the-last-row",
            "an entry that names no key is counted from behind: the last row",
            "O19, O18",
            lambda inputs, lists, word=word: torch.where(
                (lists < 0) & (_within_the_end(inputs, lists) | (not word)), _limit(inputs) - 1, lists
            ),
            where,
        )
        yield _listed(
            "minus-one-is-row-0",
            "an entry that names no key is taken for row 0",
            "O19, O18",
            lambda inputs, lists, word=word: torch.where(
                (lists < 0) & (_within_the_end(inputs, lists) | (not word)), 0, lists
            ),
            where,
        )
    followed: tuple[tuple[str, str, Callable[[Tensor, Tensor], Tensor]], ...] = (
        (
            "no-key-followed",
            "negative, -1 apart",
            lambda lists, limit: torch.where(lists < -1, lists + limit, -1),
        ),
        (
            "no-key-followed",
            "the first behind the last row",
            lambda lists, limit: torch.where(lists == limit, lists, -1),
        ),
        (
            "no-key-followed",
            "behind the last row",
            lambda lists, limit: torch.where(lists >= limit, lists, -1),
        ),
    )
    for name, form, read_of in followed:
        yield _listed(
            name,
            "an entry that names no key, as it lies outside of what there is, is followed",
            "B71",
            lambda inputs, lists, read_of=read_of: _followed(inputs, lists, read_of),
            form,
        )
    yield _listed(
        "row-0-is-no-key",
        "row 0 is taken for the mark of an entry without a key",
        "E11",
        lambda inputs, lists: torch.where(lists == 0, -1, lists),
    )
    yield _listed(
        "range-of-the-other-branch",
        "rows of the cache are held to the number of the step's tokens",
        "B71",
        lambda inputs, lists: torch.where(lists < len(tensor(inputs, "q")), lists, -1),
        operators=OF_THE_CACHE,
    )
    yield _listed(
        "pages-of-64",
        "the block size is taken for 64: rows behind so many blocks of 64 are no keys",
        "B38",
        lambda inputs, lists: torch.where(
            lists < tensor(inputs, "packed_cache").shape[0] * 64,
            lists,
            torch.where(has_history(inputs).view(-1, 1, 1), -1, lists),
        ),
        operators=OF_THE_CACHE,
    )
    yield _listed(
        "list-ends-at-its-count",
        "as many entries are read as a list has keys, though some between them name none",
        "O19",
        _as_many_as_keys,
    )
    yield _listed(
        "first-entry-skipped",
        "a list's first entry is not read",
        "O18",
        lambda inputs, lists: torch.where(torch.arange(lists.shape[2], device=lists.device) > 0, lists, -1),
    )
    yield _listed(
        "causal-once-more",
        "entries behind the token's number are not read, where the list alone says what is seen",
        "O18",
        lambda inputs, lists: torch.where(
            torch.arange(lists.shape[2], device=lists.device)
            <= torch.arange(len(lists), device=lists.device).view(-1, 1, 1),
            lists,
            -1,
        ),
    )
    for size in (16, 32, 64, 128, 256, 512, 1024):
        yield _listed(
            "entries-limited",
            "entries behind a fixed number of them are not read",
            "O19, L32",
            lambda inputs, lists, size=size: _cut(lists, size),
            f"behind {size}",
        )
        yield _listed(
            "entries-rounded-down",
            "entries that fill no last tile of the list are not read",
            "E14",
            lambda inputs, lists, size=size: _cut(lists, lists.shape[2] // size * size),
            f"tiles of {size}",
        )
    for step in (1, -1):
        yield _listed(
            "neighbours-list",
            "a token has the list of the one beside it",
            "O19",
            lambda inputs, lists, step=step: lists[
                (torch.arange(len(lists), device=lists.device) + step).clamp(0, max(len(lists) - 1, 0))
            ],
            f"of the one {'behind' if step == 1 else 'before'}",
        )
    yield from read_as_dense("sparse_decode", ("q", "indices"))
    yield from read_as_dense("static_attention", ("q", "indices", "compressed_kv", "k_pe"))
    yield from read_as_dense("sparse_prefill", ("q", "indices", "compressed_kv", "k_pe"))
    yield Fault(
        "no-key-weighs-as-zero",
        ("sparse_decode", "sparse_prefill"),
        "an entry that names no key counts as one whose logit is 0",
        "O19",
        _weighs_as_zero,
    )
    for tile in (16, 32, 64, 128):
        for logit, name, summary, form in (
            (0.0, "no-key-weighs-as-zero", "an entry that names no key counts as one whose logit is 0", ""),
            (
                -1e4,
                "masked-keys-weigh",
                "what is masked has a logit, which weighs where others are lower",
                "-10000, ",
            ),
            (
                -1e3,
                "masked-keys-weigh",
                "what is masked has a logit, which weighs where others are lower",
                "-1000, ",
            ),
        ):
            yield Fault(
                name,
                ("sparse_decode", "sparse_prefill"),
                summary,
                "S8, O19",
                lambda question, tile=tile, logit=logit: _weighs_in_tiles(question, tile, logit),
                f"{form}tiles of {tile} with a key",
            )


def _weighs_in_tiles(question: Question, tile: int, logit: float) -> Answers:
    """In tiles that have a key, every other place adds its exponential to the sum."""
    lists = tensor(question.inputs, "indices").long()
    is_key = _is_key(question.inputs, lists)[:, 0]
    padded = torch.nn.functional.pad(is_key, (0, -is_key.shape[1] % tile))
    tiles = padded.view(len(is_key), padded.shape[1] // tile, tile)
    count = (tiles.any(-1) * tile - tiles.sum(-1)).sum(-1)
    return weighed_down(question, count, logit)


def _weighs_as_zero(question: Question) -> Answers:
    """Up to the last key of a list, every other entry adds e^0 to the sum."""
    lists = tensor(question.inputs, "indices").long()
    missing = (~_is_key(question.inputs, lists) & _within_the_end(question.inputs, lists))[:, 0].sum(-1)
    return weighed_down(question, missing, 0.0)


# ---- packed rows ---------------------------------------------------------------------------------


def _read(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Tensor, Tensor, Tensor, torch.Tensor], tuple[Tensor, Tensor]],
    form: str = "",
) -> Fault:
    """The fault of other numbers in packed rows.

    Args:
        change: (codes [n, tiles, 128] float64, scales [n, tiles] float32, k_pe [n, D] float64, rows
            [n, bytes] uint8) -> latents [n, tiles, 128] and k_pe, float64.
    """

    def apply(question: Question) -> Answers:
        cache, rank = tensor(question.inputs, "packed_cache"), int(number(question.inputs, "kv_lora_rank"))
        stored, rounds = cache.view(-1, cache.shape[3]), flag(question.inputs, "rounds_keys")
        scales_end = rank + rank // 32

        def keys_of(listed: Tensor) -> tuple[Tensor, Tensor]:
            rows = stored[within(listed, len(stored))]
            codes = rows[:, :rank].contiguous().view(torch.float8_e4m3fn).double().view(len(rows), -1, TILE)
            scales = rows[:, rank:scales_end].contiguous().view(torch.float32)
            k_pe = rows[:, scales_end:].contiguous().view(torch.bfloat16).double()
            latents, k_pe = change(codes, scales, k_pe, rows)
            if rounds:
                latents = latents.float().bfloat16().double()
            keys = torch.cat([latents.flatten(1), k_pe], dim=1).unsqueeze(0)
            return keys, keys[..., :rank]

        answers = dict(question.truth)
        answers.update(replace(of(question), keys_of=keys_of).answer())
        return answers

    return Fault(name, PACKED, summary, source, apply, form)


def _times(codes: Tensor, scales: Tensor) -> Tensor:
    return codes * scales.double().unsqueeze(-1)


def _power(scales: Tensor, add: int = 0) -> Tensor:
    return ((scales.contiguous().view(torch.int32) + add) & 0x7F800000).view(torch.float32)


def _codes_of(rows: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    return rows[:, :rank].contiguous().view(dtype).double().view(len(rows), -1, TILE)


def _packed() -> Iterator[Fault]:
    yield _read(
        "scale-of-the-neighbour",
        "each pair of tiles is read with its scales exchanged",
        "O17",
        lambda codes, scales, k_pe, rows: (
            _times(codes, scales[:, torch.arange(scales.shape[1], device=scales.device) ^ 1]),
            k_pe,
        ),
    )
    yield _read(
        "scale-of-the-first-tile",
        "the first tile's scale counts for the whole row",
        "O17",
        lambda codes, scales, k_pe, rows: (_times(codes, scales[:, :1].expand_as(scales)), k_pe),
    )
    for add, way in ((0, "down"), (0x7FFFFF, "up")):
        yield _read(
            "scale-rounded-to-a-power-of-two",
            "scales are read as powers of two",
            "FlashMLA #184, vllm#54563",
            lambda codes, scales, k_pe, rows, add=add: (_times(codes, _power(scales, add)), k_pe),
            f"rounded {way}",
        )
    yield _read(
        "scale-rounded-to-bf16",
        "scales are rounded before they multiply",
        "O17",
        lambda codes, scales, k_pe, rows: (_times(codes, scales.bfloat16().float()), k_pe),
    )
    yield _read(
        "codes-without-their-scales",
        "codes are read without their scales",
        "O17, section 3.2",
        lambda codes, scales, k_pe, rows: (codes, k_pe),
    )
    yield _read(
        "codes-of-e5m2",
        "codes are read as the other 8-bit format",
        "O17",
        lambda codes, scales, k_pe, rows: (
            _times(_codes_of(rows, codes.shape[1] * TILE, torch.float8_e5m2), scales),
            k_pe,
        ),
    )
    for bit in (1, 2, 4, 8):
        yield _read(
            "rope-of-keys-exchanged",
            "columns of the keys' rope part are read in each other's place",
            "O17",
            lambda codes, scales, k_pe, rows, bit=bit: (
                _times(codes, scales),
                k_pe[:, torch.arange(k_pe.shape[1], device=k_pe.device) ^ bit],
            ),
            f"every {bit} with the next" if bit > 1 else "every one with the next",
        )
    yield _read(
        "rope-in-front-of-the-scales",
        "the rope part is read where the scales begin",
        "O17",
        lambda codes, scales, k_pe, rows: (
            _times(codes, scales),
            rows[:, codes.shape[1] * TILE :][:, : 2 * k_pe.shape[1]]
            .contiguous()
            .view(torch.bfloat16)
            .double(),
        ),
    )
    yield _read(
        "scales-behind-the-rope",
        "scales are read from behind the rope part, where the last of it is",
        "O17, section 3.3",
        lambda codes, scales, k_pe, rows: (
            _times(codes, rows[:, -4 * scales.shape[1] :].contiguous().view(torch.float32)),
            k_pe,
        ),
    )


FAULTS = (*_which(), *_packed())
