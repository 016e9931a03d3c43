"""The two attention states that `merge_states` merges: outputs and log-sum-exps of each (token, head).

The prefix is what a token sees of its row's cache, the suffix what it sees of the step. A row with nothing
cached has an empty prefix. Beyond that a hash decides, as lists of keys do that name keys of one part alone:
of 16 (token, head) pairs two have an empty prefix, two an empty suffix and one neither part; in mode `flat`
none, so that all tensors are read. An empty LSE is infinite, of a sign that the hash draws too.

Outputs are made like values; in mode `planted` the last columns of both hold the position's code, which
weights that do not add up to 1 would change. LSEs are multiples of 2^-17, rounded to float32 once:

| mode      | LSE of the suffix        | how far the prefix's lies above it                                 |
|-----------|--------------------------|--------------------------------------------------------------------|
| `planted` | -4 to 12                 | -4 to 4, one in eight 0: both parts count                          |
| `randn`   | -4 to 12                 | bell-shaped, of standard deviation 4.6                             |
| `flat`    | -4 to 12                 | 0: both parts count alike                                          |
| `peaked`  | -4 to 12                 | 21 to 29 or -29 to -21: the lesser part is far below a rounding    |
| `huge`    | -512 to 512              | as `planted`, or 64 times as much: exponents overflow and underflow |
| `deep`    | about -6e4               | as `planted`: below any finite stand-in for minus infinity         |
| `tiny`    | -4 to 12                 | as `planted`; outputs are scaled down                              |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases.contract import Fill
from cases.layers import Layer
from harness.data import (
    CODE_COLUMNS,
    DEEP_LOGIT,
    HEAD_STREAM,
    PEAK_LOGIT,
    UNIT,
    position_code,
    tiny_factor,
)
from harness.hashing import bits, normal_integers, row_seeds

STATE_OUTPUTS = (Fill.PREFIX_OUT, Fill.SUFFIX_OUT)
STATE_LSES = (Fill.PREFIX_LSE, Fill.SUFFIX_LSE)
PREFIX = (Fill.PREFIX_OUT, Fill.PREFIX_LSE)

LSE_UNIT = 2.0**-16
"""One step of an LSE; of a gap, half of it."""

LSE_STEPS = 1 << 20
"""Steps that are drawn from: 16 in all."""

LSE_MEAN = 4.0
HUGE_FACTOR = 64.0
NORMAL_GAP_UNIT = 1.0 / 32.0


@dataclass(frozen=True)
class StateSource:
    """States of the tokens of one layer; modes as in the module's docstring."""

    layer: Layer
    mode: str
    seed: int

    def outputs(self, fill: Fill, keys: Tensor, positions: Tensor) -> Tensor:
        """[n, H, V] float32: one part's outputs, of empty states too; keys, positions: [n] int64."""
        width, part = self.layer.v_head_dim, "prefix" if fill in PREFIX else "suffix"
        by_head, repeated = self._by_head(keys), self._repeated(positions)
        seeds = row_seeds(self.seed, f"{part}.{self.layer.index}", by_head, repeated)
        rows = normal_integers(seeds, width).to(torch.float32) * UNIT
        if self.mode == "planted":
            rows[:, max(0, width - CODE_COLUMNS) :] = position_code(repeated)[:, :width]
        if self.mode == "tiny":
            rows = rows * tiny_factor(self.layer.dtype)
        return rows.view(len(positions), self.layer.num_attention_heads, width)

    def lses(self, fill: Fill, keys: Tensor, positions: Tensor, cached: Tensor) -> Tensor:
        """[n, H] float32: one part's log-sum-exps; cached: [n] int64, tokens cached in each token's row."""
        words = self._words(keys, positions)
        suffix = _multiples(words[:, 0]) + LSE_MEAN
        if self.mode == "huge":
            suffix = _multiples(words[:, 0]) * HUGE_FACTOR
        if self.mode == "deep":
            suffix = suffix + DEEP_LOGIT
        lses = suffix + self._gaps(words) if fill in PREFIX else suffix
        # Libraries do not agree on the sign of the infinity that says so.
        infinities = torch.where(words[:, 3] % 2 == 0, torch.inf, -torch.inf).to(lses.dtype)
        lses = torch.where(self._empty(fill, words, self._repeated(cached)), infinities, lses)
        return lses.to(torch.float32).view(len(positions), self.layer.num_attention_heads)

    def _empty(self, fill: Fill, words: Tensor, cached: Tensor) -> Tensor:
        """[n H] bool: which states of one part have seen no key; cached: [n H]."""
        has_history = cached > 0
        drawn = words[:, 2] % 16 if self.mode != "flat" else torch.full_like(cached, 15)
        if fill in PREFIX:
            return ~has_history | (drawn < 2) | (drawn == 4)
        return (has_history & ((drawn == 2) | (drawn == 3))) | (drawn == 4)

    def _gaps(self, words: Tensor) -> Tensor:
        """[n H] float64: how far the prefix's LSE lies above the suffix's."""
        gaps = _multiples(words[:, 1]) / 2
        is_larger = words[:, 3] % 4 < 2
        if self.mode == "randn":
            return normal_integers(words[:, 1], 1)[:, 0].to(torch.float64) * NORMAL_GAP_UNIT
        if self.mode == "flat":
            return torch.zeros_like(gaps)
        if self.mode == "peaked":
            return torch.where(is_larger, gaps + PEAK_LOGIT, gaps - PEAK_LOGIT)
        if self.mode == "huge":
            return torch.where(is_larger, gaps, gaps * HUGE_FACTOR)
        return torch.where(words[:, 3] % 64 < 8, torch.zeros_like(gaps), gaps)

    def _words(self, keys: Tensor, positions: Tensor) -> Tensor:
        """[n H, 4] int64: what each pair's LSEs are made of, the same for both parts."""
        by_head, repeated = self._by_head(keys), self._repeated(positions)
        return bits(row_seeds(self.seed, f"lse.{self.layer.index}", by_head, repeated), 4)

    def _by_head(self, keys: Tensor) -> Tensor:
        """[n] -> [n H] int64: a data key for each head of a token."""
        heads = torch.arange(1, self.layer.num_attention_heads + 1, device=keys.device)
        return (keys.unsqueeze(1) * HEAD_STREAM + heads).flatten()

    def _repeated(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.layer.num_attention_heads)


def _multiples(words: Tensor) -> Tensor:
    """[n] float64 from -8 to 8, from words of 32 bits."""
    return (words % LSE_STEPS - LSE_STEPS // 2).to(torch.float64) * LSE_UNIT


def state_bytes(layer: Layer, tokens: int, item: int) -> int:
    """About how much memory a layer's states take, merged and judged.

    Both states with their snapshots, the merged one and what is compared with it; values, products and terms
    of two references.
    """
    return tokens * layer.num_attention_heads * layer.v_head_dim * (6 * item + 14 * 8)
