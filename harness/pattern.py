"""Which boundary failing rows follow: a rule that all of them obey and no passing row does, or nothing.

A row is one token, or one (token, head). A rule is said only where it separates the rows of a case without an
exception and there are rows on both sides: of a case without a passing row nothing is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILES = (64, 128, 32, 16, 256, 512)
"""Keys, tokens, heads or slots that kernels work on at a time, the commonest first."""

OFFSETS = ((2**32, "2^32"), (2**31, "2^31"))

MOST = 3
"""Rules that are told where several separate the rows."""


@dataclass(frozen=True)
class Place:
    """Where a token stands.

    Attributes:
        slot: of the batch, -1 for padding. place: in its row, from 0.
        cached, new: of its row. is_prefill: whether the row is a first or later chunk of a prompt.
        last_element: the largest offset of an element that it reads or writes in a cache; 0 without one.
        splits: into how many its keys are divided, as far as that is known; 0 if not.
    """

    slot: int
    place: int = 0
    cached: int = 0
    new: int = 0
    is_prefill: bool = False
    last_element: int = 0
    splits: int = 0

    @property
    def seen(self) -> int:
        """Keys that it sees, itself included; padding sees none."""
        return self.cached + self.place + 1 if self.slot >= 0 else 0


@dataclass(frozen=True)
class Boundaries:
    """Lengths of a case that kernels divide by; 0 where there is none.

    Attributes:
        block_size: of the cache, in tokens. window: keys that are visible.
    """

    block_size: int = 0
    window: int = 0


def pattern(failing: Tensor, places: Sequence[Place], boundaries: Boundaries) -> str:
    """The rule that failing rows follow, such as `where a token sees more than 64 keys`; empty without one.

    Args:
        failing: [tokens] or [tokens, heads] bool. places: of each token.
    """
    if failing.dim() == 1:
        failing = failing.unsqueeze(1)
    if bool(failing.all()) or not bool(failing.any()):
        return ""
    tokens, heads = failing.any(1), failing.any(0)
    # Anything but all failing tokens on all failing heads follows no rule of one or the other.
    if not torch.equal(failing, tokens.unsqueeze(1) & heads):
        return ""
    parts = []
    if not bool(tokens.all()):
        parts.append(_joined(_token_rules(places, boundaries), tokens))
    if not bool(heads.all()):
        parts.append(_joined(_head_rules(len(heads)), heads))
    return ", ".join(parts) if all(parts) else ""


def _joined(rules: Iterator[tuple[str, list[bool]]], failing: Tensor) -> str:
    """The first rules that separate, each a way to say the same on this case."""
    wanted = failing.tolist()
    found = [said for said, holds in rules if holds == wanted]
    return " or ".join(found[:MOST])


def _head_rules(heads: int) -> Iterator[tuple[str, list[bool]]]:
    numbers = range(heads)
    for size in sorted({1, 2, 4, 8, *TILES}, reverse=True):
        yield f"on heads from {size} on", [head >= size for head in numbers]
        yield f"on the heads that fill no {size}", [head >= heads // size * size for head in numbers]
    yield "on head 0", [head == 0 for head in numbers]
    yield "on the last head", [head == heads - 1 for head in numbers]
    yield "on odd heads", [head % 2 == 1 for head in numbers]


def _token_rules(places: Sequence[Place], boundaries: Boundaries) -> Iterator[tuple[str, list[bool]]]:
    """Rules by which tokens may be told apart, the likeliest cause first."""
    yield from _kinds(places)
    for offset, name in OFFSETS:
        yield (
            f"where an element of the cache lies {name} or more from its first",
            [item.last_element >= offset for item in places],
        )
    yield from _lengths(places, boundaries)
    yield from _numbers(places)


def _kinds(places: Sequence[Place]) -> Iterator[tuple[str, list[bool]]]:
    yield "at padding", [item.slot < 0 for item in places]
    yield "at real tokens", [item.slot >= 0 for item in places]
    real = [item.slot >= 0 for item in places]
    rules = {
        "in rows that continue a prompt": [item.is_prefill and item.cached > 0 for item in places],
        "in first chunks of prompts": [item.is_prefill and item.cached == 0 for item in places],
        "in prefill rows": [item.is_prefill for item in places],
        "in decode rows": [not item.is_prefill for item in places],
        "in rows with cached tokens": [item.cached > 0 for item in places],
        "in rows of several new tokens": [item.new > 1 for item in places],
        "in decode rows of several new tokens": [item.new > 1 and not item.is_prefill for item in places],
    }
    for said, holds in rules.items():
        yield said, [a and b for a, b in zip(holds, real, strict=True)]


def _lengths(places: Sequence[Place], boundaries: Boundaries) -> Iterator[tuple[str, list[bool]]]:
    """Rules of how many keys a token sees, and where its row begins and ends."""
    units = [("the window", boundaries.window), ("a block", boundaries.block_size)]
    units += [
        (f"a tile of {size}", size)
        for size in TILES
        if size not in (boundaries.window, boundaries.block_size)
    ]
    for name, size in units:
        if size <= 1:
            continue
        seen = [item.seen for item in places]
        yield f"where a token sees more than {size} keys, {name}", [keys > size for keys in seen]
        yield f"where a token sees at most {size} keys, {name}", [0 < keys <= size for keys in seen]
        yield (
            f"where a token's keys do not fill whole parts of {size}, {name}",
            [keys % size > 0 for keys in seen],
        )
        yield (
            f"where a token's keys fill whole parts of {size}, {name}",
            [keys > 0 and keys % size == 0 for keys in seen],
        )
        yield (
            f"where a row has cached tokens that fill whole parts of {size}, {name}",
            [item.slot >= 0 and item.cached > 0 and item.cached % size == 0 for item in places],
        )
        yield (
            f"where a row has cached tokens that do not fill whole parts of {size}, {name}",
            [item.slot >= 0 and item.cached % size > 0 for item in places],
        )
    yield "where a token's keys are divided into several splits", [item.splits > 1 for item in places]


def _numbers(places: Sequence[Place]) -> Iterator[tuple[str, list[bool]]]:
    """Rules of the numbers of tokens, rows and places."""
    count, slots = len(places), max((item.slot for item in places), default=-1) + 1
    yield "at the first token of a row", [item.slot >= 0 and item.place == 0 for item in places]
    yield "at the last token of a row", [item.slot >= 0 and item.place == item.new - 1 for item in places]
    for size in sorted({1, 2, 4, 8, *TILES}):
        yield (
            f"behind the first {f'{size} tokens' if size > 1 else 'token'} of a row",
            [item.place >= size for item in places],
        )
    for size in sorted({2, 4, 8, *TILES, 1024}, reverse=True):
        yield f"in rows from {size} on", [item.slot >= size for item in places]
        yield f"at tokens from {size} on", [token >= size for token in range(count)]
        yield (
            f"at the last tokens, which fill no {size}",
            [token >= count // size * size for token in range(count)],
        )
    yield "in the first row", [item.slot == 0 for item in places]
    yield "in the last row", [item.slot == slots - 1 >= 0 for item in places]
