"""Lists of keys for sparse attention: which keys of those that a token sees, and where among entries of none.

A token that sees n keys gets min(n, index_topk) of them: always the newest and, if there is room for two, the
oldest; a hash of (seed, key, position, layer) chooses the others. Where they stand it chooses too:

| way         | the list                                                             |
|-------------|----------------------------------------------------------------------|
| `ascending` | keys by their position, behind them no key: as sliding windows do    |
| `first`     | keys in any order, behind them no key: as a top-k does               |
| `last`      | no key first, keys in any order behind them                          |
| `scattered` | keys and entries that are no key in any order                        |

Three of four entries that are no key are -1, the others numbers that a missing comparison takes for a row:
-2, -64, -2^31, the number of rows, a little more, and 2^31 - 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.hashing import bits, row_seeds

WAYS = 4
ASCENDING, FIRST, LAST, SCATTERED = range(WAYS)


def listed_keys(
    seen: Sequence[int],
    topk: int,
    keys: Tensor,
    positions: Tensor,
    *,
    seed: int,
    layer: int,
    ascending: bool = False,
) -> tuple[Tensor, Tensor]:
    """[n, topk] int64, bool: which of its keys, oldest 0, an entry names, and whether it names any.

    Args:
        seen: [n], how many keys each token sees; the newest is number seen - 1.
        keys, positions: [n] int64 each, data key and position of each token.
        ascending: all lists are so, as a window's are.
    """
    numbers = torch.zeros(len(seen), topk, dtype=torch.int64, device=keys.device)
    names = torch.zeros(len(seen), topk, dtype=torch.bool, device=keys.device)
    choices = row_seeds(seed, f"listed.{layer}", keys, positions)
    places = row_seeds(seed, f"places.{layer}", keys, positions)
    drawn = (bits(places, 1)[:, 0] >> 8) % WAYS
    ways = torch.full_like(drawn, ASCENDING) if ascending else drawn
    for token, count in enumerate(seen):
        if count == 0:
            continue
        chosen = _chosen(choices[token], count, topk)
        at = _places(places[token], len(chosen), topk, int(ways[token]))
        numbers[token, at] = chosen
        names[token, at] = True
    return numbers, names


def no_keys(
    shape: tuple[int, int], rows: int | Tensor, positions: Tensor, *, seed: int, layer: int
) -> Tensor:
    """[n, topk] int64: entries that name no key of so many rows; positions: [n] int64, distinct.

    `rows` is one number for all lists, or [n] int64.
    """
    words = bits(row_seeds(seed, f"no_key.{layer}", torch.zeros_like(positions), positions), shape[1])
    behind = torch.as_tensor(rows, device=words.device).expand(shape[0])
    others = torch.tensor([-2, -64, -(2**31), 0, 0, 2**31 - 1], device=words.device).repeat(shape[0], 1)
    others[:, 3], others[:, 4] = behind, (behind + 7).clamp(max=2**31 - 1)
    return torch.where((words & 3) == 0, others.gather(1, (words >> 8) % others.shape[1]), -1)


def _chosen(choice: Tensor, seen: int, topk: int) -> Tensor:
    """[min(seen, topk)] int64, ascending: numbers of the keys that one token's list names."""
    if seen <= topk:
        return torch.arange(seen, device=choice.device)
    order = bits(choice, seen)
    # Before all others, whatever the hash says.
    order[0], order[-1] = -1, -2
    return order.argsort(stable=True)[:topk].sort().values


def _places(place: Tensor, count: int, topk: int, way: int) -> Tensor:
    """[count] int64: where in a list the keys of one token stand."""
    if way == ASCENDING:
        return torch.arange(count, device=place.device)
    if way == SCATTERED:
        return bits(place, topk).argsort(stable=True)[:count]
    order = bits(place, count).argsort(stable=True)
    return order if way == FIRST else order + topk - count
