"""What the tensors hold: cache rows and queries for each data mode, the same bits on every machine.

Everything is a function of (seed, key, position, tensor name). Integers come from the counter hash; they
become floats by single IEEE operations (multiplication, addition, conversion), whose results do not
depend on the machine. No sums of floats, no transcendental functions on tensors.

| mode      | what it is for |
|-----------|----------------|
| `planted` | the default: newest visible, oldest visible and first forbidden key stand out, see below |
| `randn`   | bell-shaped values, logits of standard deviation 3 |
| `flat`    | the same with queries / 64: nearly uniform weights, every key counts alike |
| `peaked`  | the same with one visible key about 25 above the rest |
| `huge`    | the same with queries x 100: one-hot weights, large logits |
| `deep`    | every logit near -6e4: below any finite stand-in for minus infinity |
| `tiny`    | the same with values and queries scaled down: absolute tolerances see nothing |

**planted.** A cache row is [marks | free | code | k_pe]: `marks` (half of R) are +-1, `free` and k_pe
bell-shaped, `code` the sixteen low bits of the position as +-1/2. The value is the row's first R
columns, so each value carries its position. A query is zero on the code columns; on the others it is
random (logits of standard deviation `PLANTED_STD`, half of the variance from k_pe) plus a combination
of the mark columns of three keys, solved for so that their logits are exactly

    newest visible = oldest visible = ln(visible - 2) + std^2 / 2 - ln 2
    first forbidden = max(that, 0) + 3

which gives the two visible ones about half of the softmax mass at every length: more, and a wrong
softmax scale would change nothing; less, and a lost key would change nothing.

Where keys are made from latents by a projection (`ProjectedSource`), the same holds of the projected keys:
the projection hands on some of the mark columns, so that they are +-1 there too. Behind a window there is a
second forbidden key, the newest that it hides: where there is one, a hash of the token chooses which of the
two stands out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cases.layers import Layer
from harness.hashing import NORMAL_STD, bits, normal_integers, row_seeds

CODE_COLUMNS = 16
PLANTED_STD = 0.75
RANDN_LOGIT_STD = 3.0
UNIT = 1.0 / 128.0
"""One step of a cache value: values are normal_integers / 128, of standard deviation 1.15."""

DEEP_LOGIT = -6.0e4
DEEP_COLUMNS = 64
PEAK_LOGIT = 25.0
FORBIDDEN_ABOVE = 3.0


class Dimensions(Protocol):
    """What data are shaped by; a `Layer` is one."""

    @property
    def index(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def latent_width(self) -> int: ...
    @property
    def softmax_scale(self) -> float: ...


@dataclass(frozen=True)
class OneHead:
    """The dimensions of one head's unabsorbed keys, in the place of the latent ones."""

    index: int
    dtype: str
    kv_lora_rank: int
    qk_rope_head_dim: int
    softmax_scale: float
    num_attention_heads: int = 1

    @property
    def latent_width(self) -> int:
        """Width of a key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


HEAD_STREAM = 1 << 20
"""Keys of heads are told apart by this factor: more heads than any model has."""


@dataclass(frozen=True)
class HeadSource:
    """Unabsorbed queries, keys and values of one layer, by (token, head); modes as in `Source`.

    Each head has keys of its own, made like cache rows of width N + D; values are independent of them and
    carry the position's code in their last columns.
    """

    layer: Layer
    mode: str
    seed: int

    def queries(self, keys: Tensor, row_keys: Tensor, positions: Tensor, oldest_keys: Tensor) -> Tensor:
        """[n, H, N + D] float32; arguments as in `Source.queries`."""
        flat = self._source.queries(
            self._by_head(keys),
            self._by_head(row_keys),
            self._repeated(positions),
            self._by_head(oldest_keys),
        )
        return flat.view(len(keys), self.layer.num_attention_heads, -1)

    def keys(self, row_keys: Tensor, positions: Tensor) -> Tensor:
        """[n, H, N + D] float32: the keys of n tokens."""
        flat = self._source.cache_rows(self._by_head(row_keys), self._repeated(positions))
        return flat.view(len(positions), self.layer.num_attention_heads, -1)

    def values(self, row_keys: Tensor, positions: Tensor) -> Tensor:
        """[n, H, V] float32: the values of n tokens."""
        width = self.layer.v_head_dim
        by_head, repeated = self._by_head(row_keys), self._repeated(positions)
        seeds = row_seeds(self.seed, f"value.{self.layer.index}", by_head, repeated)
        rows = normal_integers(seeds, width).to(torch.float32) * UNIT
        if self.mode == "planted":
            rows[:, width - CODE_COLUMNS :] = position_code(repeated)
        if self.mode == "tiny":
            rows = rows * tiny_factor(self.layer.dtype)
        return rows.view(len(positions), self.layer.num_attention_heads, width)

    @property
    def _source(self) -> Source:
        layer = self.layer
        head = OneHead(
            layer.index, layer.dtype, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.softmax_scale
        )
        return Source(head, self.mode, self.seed)

    def _by_head(self, keys: Tensor) -> Tensor:
        """[n] -> [n * H] int64: a data key for each head of a token."""
        heads = torch.arange(1, self.layer.num_attention_heads + 1, device=keys.device)
        return (keys.unsqueeze(1) * HEAD_STREAM + heads).flatten()

    def _repeated(self, positions: Tensor) -> Tensor:
        return positions.repeat_interleave(self.layer.num_attention_heads)


def position_code(positions: Tensor) -> Tensor:
    """[n, CODE_COLUMNS] float32: the low bits of the positions as +-1/2."""
    code = (positions.unsqueeze(-1) >> torch.arange(CODE_COLUMNS, device=positions.device)) & 1
    return code.to(torch.float32) - 0.5


@dataclass(frozen=True)
class Source:
    """What the data of one layer are drawn from."""

    layer: Dimensions
    mode: str
    seed: int

    @property
    def mark_columns(self) -> int:
        """How many of the first columns are +-1 in mode `planted`."""
        return self.layer.kv_lora_rank // 2

    def cache_rows(self, keys: Tensor, positions: Tensor) -> Tensor:
        """The cache rows [latent | k_pe] of n tokens, before rounding to the cache's dtype.

        Args:
            keys: [n] int64 data keys. positions: [n] int64.

        Returns:
            [n, R + D] float32.
        """
        width, rank = self.layer.latent_width, self.layer.kv_lora_rank
        seeds = row_seeds(self.seed, f"cache.{self.layer.index}", keys, positions)
        integers = normal_integers(seeds, width)
        if self.mode == "deep":
            rows = _quarters(integers)
            rows[:, :DEEP_COLUMNS] = 1.0
            return rows
        rows = integers.to(torch.float32) * UNIT
        if self.mode == "planted":
            rows[:, : self.mark_columns] = self.marks(keys, positions).to(torch.float32)
            rows[:, rank - CODE_COLUMNS : rank] = position_code(positions)
        if self.mode == "tiny":
            rows = rows * tiny_factor(self.layer.dtype)
        return rows

    def queries(
        self,
        keys: Tensor,
        row_keys: Tensor,
        positions: Tensor,
        oldest_keys: Tensor,
        oldest: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """The absorbed queries of n tokens, before rounding to the model dtype.

        Args:
            keys: [n] int64, data key of each token's row (the query's own stream).
            row_keys: [n] int64, data key of the cache row at the token's own position.
            positions: [n] int64, the token's position; unless told otherwise it sees positions 0 to its own.
            oldest_keys: [n] int64, data key of the cache row at the oldest position that it sees.
            oldest: [n] int64, that position; default 0.
            visible: [n] int64, how many keys it sees, at least 1; default all up to its own position.

        Returns:
            [n, H, R + D] float32.
        """
        heads, width = self.layer.num_attention_heads, self.layer.latent_width
        seeds = row_seeds(self.seed, f"q.{self.layer.index}", keys, positions)
        integers = normal_integers(seeds, heads * width).view(len(keys), heads, width)
        oldest = torch.zeros_like(positions) if oldest is None else oldest
        visible = positions + 1 if visible is None else visible
        if self.mode == "planted":
            standouts = [(row_keys, positions), (oldest_keys, oldest), (row_keys, positions + 1)]
            return self._planted(integers, standouts, visible)
        if self.mode == "deep":
            queries = _quarters(integers)
            # One value on all columns where the cache rows are 1: the sum is the same for every key. A
            # multiple of four, so that partial sums are exact in fp32 too.
            share = DEEP_LOGIT / (self.layer.softmax_scale * DEEP_COLUMNS)
            queries[..., :DEEP_COLUMNS] = round(share / 4) * 4
            return queries
        spread = self.layer.softmax_scale * NORMAL_STD * NORMAL_STD * UNIT * math.sqrt(width)
        queries = integers.to(torch.float32) * (RANDN_LOGIT_STD / spread)
        if self.mode == "flat":
            queries = queries * (1.0 / 64.0)
        if self.mode == "huge":
            queries = queries * 100.0
        if self.mode == "tiny":
            queries = queries * tiny_factor(self.layer.dtype)
        if self.mode == "peaked":
            queries = queries + self._peak(keys, row_keys, positions, oldest_keys, oldest).unsqueeze(1)
        return queries

    def marks(self, keys: Tensor, positions: Tensor) -> Tensor:
        """[n, mark_columns] int64, +-1."""
        seeds = row_seeds(self.seed, f"marks.{self.layer.index}", keys, positions)
        return (bits(seeds, self.mark_columns) & 1) * 2 - 1

    def _peak(
        self, keys: Tensor, row_keys: Tensor, positions: Tensor, oldest_keys: Tensor, oldest: Tensor
    ) -> Tensor:
        """[n, R + D] float32: what adds about PEAK_LOGIT to the logit of one visible key.

        The key is the newest for every odd query stream, the oldest for the others.
        """
        choose_newest = (row_seeds(self.seed, "peak", keys, positions) & 1) == 1
        peak_keys = torch.where(choose_newest, row_keys, oldest_keys)
        peak_positions = torch.where(choose_newest, positions, oldest)
        rows = self.cache_rows(peak_keys, peak_positions)
        factor = PEAK_LOGIT / (self.layer.softmax_scale * self.layer.latent_width)
        return rows * (factor / (NORMAL_STD * UNIT) ** 2)

    def _planted(self, integers: Tensor, standouts: list[tuple[Tensor, Tensor]], visible: Tensor) -> Tensor:
        rank, marks, scale = self.layer.kv_lora_rank, self.mark_columns, self.layer.softmax_scale
        free = rank - CODE_COLUMNS - marks
        # What one unit of (query integer x cache integer) adds to a logit, so that the free columns and
        # the rope columns each give half of the variance.
        share = PLANTED_STD * math.sqrt(0.5) / (NORMAL_STD * NORMAL_STD)
        free_weight = share / math.sqrt(free)
        rope_weight = share / math.sqrt(self.layer.qk_rope_head_dim)
        queries = integers.to(torch.float32)
        queries[..., :marks] = 0.0
        queries[..., marks : rank - CODE_COLUMNS] *= free_weight / (scale * UNIT)
        queries[..., rank - CODE_COLUMNS : rank] = 0.0
        queries[..., rank:] *= rope_weight / (scale * UNIT)

        # The three keys, their marks, and what the random part of the query already gives them.
        codes = torch.stack([self.marks(*key) for key in standouts], dim=1)
        given = torch.stack(
            [self._given(integers, key, free_weight, rope_weight) for key in standouts], dim=-1
        )
        queries[..., :marks] = _planted_marks(codes.unsqueeze(1), given, visible, scale)
        return queries

    def _given(
        self, integers: Tensor, key: tuple[Tensor, Tensor], free_weight: float, rope_weight: float
    ) -> Tensor:
        """[n, H] float64: the logit of a key under the random part of the query, from integer sums."""
        rank, marks = self.layer.kv_lora_rank, self.mark_columns
        seeds = row_seeds(self.seed, f"cache.{self.layer.index}", *key)
        row = normal_integers(seeds, self.layer.latent_width).unsqueeze(1)
        product = integers * row
        free = product[..., marks : rank - CODE_COLUMNS].sum(-1).to(torch.float64) * free_weight
        return free + product[..., rank:].sum(-1).to(torch.float64) * rope_weight


@dataclass(frozen=True)
class ProjectedSource:
    """Queries of one layer and the projections that make keys and values from the latents of `Source`.

    `w_uk` has two kinds of rows: the first half hands on one mark column each, negated or not; the others
    are +-2^-k on every free column, where 2^-k is next to one over the root of their number. `w_uv` is +-2^-k
    everywhere, but its last columns hand on the position's code. All of them are numbers of every dtype, and
    what they make of a latent is an exact sum of integers.
    """

    layer: Layer
    mode: str
    seed: int

    @property
    def mark_rows(self) -> int:
        """How many of the first columns of a key are +-1 in mode `planted`."""
        return self.layer.qk_nope_head_dim // 2

    def w_uk(self, device: torch.device) -> Tensor:
        """[H, N, R] float32."""
        columns, signs = self._selection(device)
        weight = torch.zeros(self._heads, self.layer.qk_nope_head_dim, self.layer.kv_lora_rank, device=device)
        if self.mode == "deep":
            # Every row hands on one column: keys stay coarse, and logits near -6e4 exact in float32.
            return weight.scatter_(2, columns.unsqueeze(-1), 1.0)
        marks, first, end = self.mark_rows, *self._free
        weight[:, :marks].scatter_(2, columns.unsqueeze(-1), signs.to(torch.float32).unsqueeze(-1))
        weight[:, marks:, first:end] = self._dense(device).to(torch.float32) * self._step
        return weight

    def w_uv(self, device: torch.device) -> Tensor:
        """[H, R, V] float32."""
        rank, width = self.layer.kv_lora_rank, self.layer.v_head_dim
        signs = self._signs("w_uv", rank, width, device).to(torch.float32)
        weight = signs * _power_of_two(1.0 / math.sqrt(rank))
        weight[:, :, width - CODE_COLUMNS :] = 0.0
        for code in range(1, CODE_COLUMNS + 1):
            weight[:, rank - code, width - code] = signs[:, rank - code, width - code]
        return weight

    def queries(
        self,
        keys: Tensor,
        row_keys: Tensor,
        positions: Tensor,
        oldest_keys: Tensor,
        oldest: Tensor | None = None,
        hidden_keys: Tensor | None = None,
    ) -> Tensor:
        """[n, H, N + D] float32: queries [q_nope | q_pe].

        Args:
            keys, row_keys, positions, oldest_keys, oldest: as in `Source.queries`.
            hidden_keys: [n] int64, data key of the cache row before the oldest visible one, any number where
                there is none; default: no token has one.
        """
        layer, marks = self.layer, self.mark_rows
        oldest = torch.zeros_like(positions) if oldest is None else oldest
        width, scale = layer.qk_head_dim, layer.softmax_scale
        seeds = row_seeds(self.seed, f"step_q.{layer.index}", keys, positions)
        integers = normal_integers(seeds, self._heads * width).view(len(keys), self._heads, width)
        if self.mode == "planted":
            forbidden = (row_keys, positions + 1)
            if hidden_keys is not None:
                chosen = (row_seeds(self.seed, "forbidden", keys, positions) & 1 == 1) & (oldest > 0)
                forbidden = (
                    torch.where(chosen, hidden_keys, row_keys),
                    torch.where(chosen, oldest - 1, positions + 1),
                )
            standouts = [(row_keys, positions), (oldest_keys, oldest), forbidden]
            return self._planted(integers, standouts, positions - oldest + 1)
        if self.mode == "deep":
            queries = _quarters(integers)
            queries[..., :marks] = round(DEEP_LOGIT / (scale * marks) / 4) * 4
            return queries
        spread = scale * NORMAL_STD * NORMAL_STD * UNIT * math.sqrt(width)
        queries = integers.to(torch.float32) * (RANDN_LOGIT_STD / spread)
        if self.mode == "flat":
            queries = queries * (1.0 / 64.0)
        if self.mode == "huge":
            queries = queries * 100.0
        if self.mode == "tiny":
            queries = queries * tiny_factor(layer.dtype)
        if self.mode == "peaked":
            newest = (row_seeds(self.seed, "peak", keys, positions) & 1) == 1
            peak_keys = torch.where(newest, row_keys, oldest_keys)
            peak = self._keys(peak_keys, torch.where(newest, positions, oldest))
            queries = queries + peak * (PEAK_LOGIT / (scale * width) / (NORMAL_STD * UNIT) ** 2)
        return queries

    @property
    def _heads(self) -> int:
        return self.layer.num_attention_heads

    @property
    def _free(self) -> tuple[int, int]:
        """The free columns of a latent, first and end."""
        return self.layer.kv_lora_rank // 2, self.layer.kv_lora_rank - CODE_COLUMNS

    @property
    def _step(self) -> float:
        """Size of the dense rows' elements: keys keep about the deviation of the latents."""
        first, end = self._free
        return _power_of_two(1.0 / math.sqrt(end - first))

    @property
    def _source(self) -> Source:
        return Source(self.layer, self.mode, self.seed)

    def _signs(self, name: str, rows: int, columns: int, device: torch.device) -> Tensor:
        """[H, rows, columns] int64, +-1."""
        heads = torch.arange(self._heads, device=device).repeat_interleave(rows)
        places = torch.arange(rows, device=device).repeat(self._heads)
        seeds = row_seeds(self.seed, f"{name}.{self.layer.index}", heads, places)
        return ((bits(seeds, columns) & 1) * 2 - 1).view(self._heads, rows, columns)

    def _dense(self, device: torch.device) -> Tensor:
        """[H, N - M, free columns] int64: signs of the rows of W_UK that mix the free columns."""
        first, end = self._free
        return self._signs("w_uk", self.layer.qk_nope_head_dim - self.mark_rows, end - first, device)

    def _selection(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[H, M] int64 each: the column that a row of W_UK hands on, and its sign. In mode `deep` [H, N]."""
        heads = torch.arange(self._heads, device=device)
        seeds = row_seeds(self.seed, f"selected.{self.layer.index}", heads, torch.zeros_like(heads))
        drawn = bits(seeds, self.layer.kv_lora_rank)
        marks, half = self.mark_rows, self.layer.kv_lora_rank // 2
        signs = (drawn[:, :marks] & 1) * 2 - 1
        if self.mode == "deep":
            near = drawn[:, :DEEP_COLUMNS].argsort(dim=1, stable=True)
            near = near.repeat(1, -(-marks // DEEP_COLUMNS))[:, :marks]
            far = drawn[:, DEEP_COLUMNS:].argsort(dim=1, stable=True) + DEEP_COLUMNS
            return torch.cat([near, far[:, : self.layer.qk_nope_head_dim - marks]], dim=1), signs
        return drawn[:, :half].argsort(dim=1, stable=True)[:, :marks], signs

    def _keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """[n, H, N + D] float32: the projected keys of some cache rows, not in mode `deep`."""
        rows = self._source.cache_rows(keys, positions)
        columns, signs = self._selection(rows.device)
        marked = rows[:, columns] * signs.to(torch.float32)
        # Exact: the sums are of integers below 2^24.
        dense = (self._dense_sums(keys, positions) * (self._step * UNIT)).to(torch.float32)
        rope = rows[:, self.layer.kv_lora_rank :].unsqueeze(1).expand(-1, self._heads, -1)
        return torch.cat([marked, dense, rope], dim=-1)

    def _dense_sums(self, keys: Tensor, positions: Tensor) -> Tensor:
        """[n, H, N - M] float64: the dense rows of W_UK times the latents, in units of both; integers."""
        integers = self._integers(keys, positions)
        first, end = self._free
        free = integers[:, first:end].to(torch.float64)
        return torch.matmul(self._dense(keys.device).to(torch.float64), free.T).permute(2, 0, 1)

    def _integers(self, keys: Tensor, positions: Tensor) -> Tensor:
        """[n, R + D] int64: what cache rows are made of."""
        seeds = row_seeds(self.seed, f"cache.{self.layer.index}", keys, positions)
        return normal_integers(seeds, self.layer.latent_width)

    def _planted(self, integers: Tensor, standouts: list[tuple[Tensor, Tensor]], visible: Tensor) -> Tensor:
        layer, marks, scale = self.layer, self.mark_rows, self.layer.softmax_scale
        nope, dense = layer.qk_nope_head_dim, layer.qk_nope_head_dim - marks
        first, end = self._free
        # As in `Source._planted`; a dense column's deviation is that of all its terms together.
        share = PLANTED_STD * math.sqrt(0.5) / (NORMAL_STD * NORMAL_STD)
        dense_weight = share / (math.sqrt(dense * (end - first)) * self._step)
        rope_weight = share / math.sqrt(layer.qk_rope_head_dim)
        queries = integers.to(torch.float32)
        queries[..., marks:nope] *= dense_weight / (scale * UNIT)
        queries[..., nope:] *= rope_weight / (scale * UNIT)

        columns, signs = self._selection(visible.device)
        codes, given = [], []
        for key in standouts:
            codes.append(self._source.marks(*key)[:, columns] * signs)
            sums = (integers[..., marks:nope].to(torch.float64) * self._dense_sums(*key)).sum(-1)
            rope = (integers[..., nope:] * self._integers(*key)[:, None, layer.kv_lora_rank :]).sum(-1)
            given.append(sums * (dense_weight * self._step) + rope.to(torch.float64) * rope_weight)
        planted = _planted_marks(torch.stack(codes, dim=2), torch.stack(given, dim=-1), visible, scale)
        queries[..., :marks] = planted
        return queries


def _power_of_two(value: float) -> float:
    """The power of two next to a positive number."""
    return float(2.0 ** round(math.log2(value)))


def _planted_marks(codes: Tensor, given: Tensor, visible: Tensor, scale: float) -> Tensor:
    """[n, H, M] float32: what gives the three standing-out keys their logits through their mark columns.

    Args:
        codes: [n, H, 3, M] int64, +-1, or [n, 1, 3, M] where heads share the keys.
        given: [n, H, 3] float64, the logits that the rest of the query gives them.
        visible: [n] int64, how many keys each token sees.
    """
    gram = (codes.unsqueeze(2) * codes.unsqueeze(3)).sum(-1).to(torch.float64)
    # Of one key, newest and oldest are the same: keep the equation of the newest.
    is_alone = visible == 1
    alone = is_alone.view(-1, 1, 1, 1)
    unit = torch.eye(3, dtype=torch.float64, device=gram.device)
    touched = unit[1].view(3, 1) + unit[1].view(1, 3) > 0
    gram = torch.where(alone & touched, unit, gram)
    rest = _targets(visible, codes.shape[-1]).unsqueeze(1) - given
    rest[..., 1] = torch.where(is_alone, 0.0, 1.0).unsqueeze(-1) * rest[..., 1]
    weights = _solve3(gram, rest) * (1.0 / scale)
    planted = torch.zeros(1, device=given.device)
    for index in range(3):
        weight = weights[..., index].to(torch.float32).unsqueeze(-1)
        planted = planted + weight * codes[:, :, index].to(torch.float32)
    return planted


def _targets(seen: Tensor, mark_columns: int) -> Tensor:
    """[n, 3] float64: logits of newest, oldest and first forbidden key. seen: [n] int64, visible keys."""
    rows = []
    distinct, place = torch.unique(seen, return_inverse=True)
    for keys in distinct.tolist():
        others = max(keys - 2, 1)
        visible = math.log(others) - math.log(2.0)
        # The marks of the standing-out keys add to the spread of all others; see the docstring.
        for _ in range(3):
            forbidden = max(visible, 0.0) + FORBIDDEN_ABOVE
            spread = PLANTED_STD**2 + (2 * visible**2 + forbidden**2) / mark_columns
            visible = math.log(others) + spread / 2 - math.log(2.0)
        # Rounded, so that the last bit of a library's logarithm cannot show.
        visible = round(visible * 1024) / 1024
        rows.append([visible, visible, max(visible, 0.0) + FORBIDDEN_ABOVE])
    return torch.tensor(rows, dtype=torch.float64, device=seen.device).view(-1, 3)[place]


def _quarters(integers: Tensor) -> Tensor:
    """Multiples of 1/4 of standard deviation about 1/2, float32.

    With queries of this kind every partial sum of a logit near 1e6 is exact in float32, so mode `deep`
    tests sentinels and not the order of additions.
    """
    return torch.div(integers + 37, 74, rounding_mode="floor").to(torch.float32) * 0.25


def tiny_factor(dtype: str) -> float:
    """What `tiny` scales by: outputs stay normal numbers of the dtype."""
    return 2.0**-5 if dtype == "fp16" else 2.0**-20


def _solve3(matrix: Tensor, right: Tensor) -> Tensor:
    """Solves a 3 x 3 symmetric positive definite system by Cramer's rule, elementwise in float64.

    A library's solver would not give the same bits on every machine. [n, H or 1, 3, 3] and [n, H, 3] ->
    [n, H, 3].
    """
    columns = [matrix[..., j] for j in range(3)]
    determinant = _det3(*columns)
    solution = []
    for j in range(3):
        replaced = [right if k == j else columns[k] for k in range(3)]
        solution.append(_det3(*replaced) / determinant)
    return torch.stack(solution, dim=-1)


def _det3(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Determinant of the matrix with columns a, b, c, each [..., 3]."""
    first = a[..., 0] * (b[..., 1] * c[..., 2] - b[..., 2] * c[..., 1])
    second = a[..., 1] * (b[..., 0] * c[..., 2] - b[..., 2] * c[..., 0])
    third = a[..., 2] * (b[..., 0] * c[..., 1] - b[..., 1] * c[..., 0])
    return first - second + third
