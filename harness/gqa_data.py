"""What layers hold whose query heads share keys and values in groups: queries, caches, projections, sinks.

Keys of a KV head are made like the rows of a latent cache, as wide as a key; values are independent of them
and end in the code of their position. A query stands out to keys of its own KV head: the newest visible, the
oldest visible (where the window begins, if there is one) and the first forbidden, see `harness/data.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases import Case, Row
from cases.blocks import blocks_needed
from cases.contract import Fill, Operator
from cases.layers import Layer
from harness.buffers import GAP_COLUMNS, GAP_HEADS, SPARSE_BYTES
from harness.data import CODE_COLUMNS, HEAD_STREAM, UNIT, OneHead, Source, position_code, tiny_factor
from harness.hashing import bits, normal_integers, row_seeds
from harness.model_data import HIDDEN_SIZE
from harness.tensors import DTYPES

GROUP_FILLS = (
    Fill.QKV,
    Fill.QKV_WEIGHT,
    Fill.GROUP_QUERY,
    Fill.KEYS_BEFORE,
    Fill.VALUES_BEFORE,
    Fill.KEYS_SEEN,
    Fill.VALUES_SEEN,
    Fill.SINK,
)

SINK_UNIT = 1.0 / 8.0
SINK_STEPS = 64
"""Sinks are multiples of 1/8 from -2 to 6: next to the LSE of ten to several hundred keys."""


@dataclass(frozen=True)
class GroupSource:
    """Queries, keys and values of one layer with KV heads; modes as in `Source`."""

    layer: Layer
    mode: str
    seed: int

    def keys(self, row_keys: Tensor, positions: Tensor) -> Tensor:
        """[n, G, K] float32: each KV head's keys of n tokens; row_keys, positions: [n] int64."""
        heads = self.layer.num_key_value_heads
        flat = self._source.cache_rows(
            self._by_kv_head(row_keys).flatten(), positions.repeat_interleave(heads)
        )
        return flat.view(len(positions), heads, -1)

    def values(self, row_keys: Tensor, positions: Tensor) -> Tensor:
        """[n, G, V] float32: each KV head's values of n tokens."""
        heads, width = self.layer.num_key_value_heads, self.layer.v_head_dim
        repeated = positions.repeat_interleave(heads)
        seeds = row_seeds(
            self.seed, f"value.{self.layer.index}", self._by_kv_head(row_keys).flatten(), repeated
        )
        rows = normal_integers(seeds, width).to(torch.float32) * UNIT
        if self.mode == "planted":
            code = position_code(repeated)[:, :width]
            rows[:, max(0, width - CODE_COLUMNS) :] = code
        if self.mode == "tiny":
            rows = rows * tiny_factor(self.layer.dtype)
        return rows.view(len(positions), heads, width)

    def queries(self, keys: Tensor, row_keys: Tensor, positions: Tensor, oldest_keys: Tensor) -> Tensor:
        """[n, H, K] float32: queries of n tokens; arguments as in `Source.queries`."""
        layer = self.layer
        visible = positions + 1
        if layer.window:
            visible = visible.clamp_max(layer.window)
        per_head = layer.num_attention_heads
        # A query's own stream is its head's, its keys are its KV head's.
        own = keys.unsqueeze(1) * HEAD_STREAM + self._heads(keys.device) + 1
        flat = self._source.queries(
            own.flatten(),
            self._by_head(row_keys),
            positions.repeat_interleave(per_head),
            self._by_head(oldest_keys),
            oldest=(positions + 1 - visible).repeat_interleave(per_head),
            visible=visible.repeat_interleave(per_head),
        )
        return flat.view(len(keys), per_head, -1)

    def projected(self, keys: Tensor, row_keys: Tensor, positions: Tensor, oldest_keys: Tensor) -> Tensor:
        """[n, qkv_width] float32: queries, keys and values of n tokens side by side; arguments likewise.

        No attention is computed from them before they are rotated: that is another operator's input.
        """
        parts = (
            self.queries(keys, row_keys, positions, oldest_keys),
            self.keys(row_keys, positions),
            self.values(row_keys, positions),
        )
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def sinks(self, device: torch.device) -> Tensor:
        """[H] float32: logits of no key."""
        heads = self._heads(device)
        drawn = bits(row_seeds(self.seed, f"sink.{self.layer.index}", heads, torch.zeros_like(heads)), 1)
        steps = (drawn[:, 0] >> 8) % (SINK_STEPS + 1)
        return (steps - SINK_STEPS // 4).to(torch.float32) * SINK_UNIT

    @property
    def _source(self) -> Source:
        """A head's keys: three quarters of the columns are marks and free ones, the rest as a rope part."""
        layer = self.layer
        rest = layer.qk_head_dim // 4
        head = OneHead(layer.index, layer.dtype, layer.qk_head_dim - rest, rest, layer.softmax_scale)
        return Source(head, self.mode, self.seed)

    def _heads(self, device: torch.device) -> Tensor:
        return torch.arange(self.layer.num_attention_heads, device=device)

    def _by_kv_head(self, keys: Tensor) -> Tensor:
        """[n] -> [n, G] int64: a data key for each KV head of a token."""
        heads = torch.arange(1, self.layer.num_key_value_heads + 1, device=keys.device)
        return keys.unsqueeze(1) * HEAD_STREAM + heads

    def _by_head(self, keys: Tensor) -> Tensor:
        """[n] -> [n * H] int64: of each query head, the data key of the KV head that it reads."""
        groups = self._heads(keys.device) // self.layer.group_size
        return self._by_kv_head(keys)[:, groups].flatten()


def group_bytes(case: Case, operator: Operator, rows: tuple[Row, ...], device: str) -> int:
    """About how much memory judging a step takes: tensors with gaps, snapshots, float64 copies."""
    tokens = sum(row.new for row in rows)
    longest = max((row.length for row in rows if row.seq_lens_this_time), default=0)
    pairs = max((row.new * row.length for row in rows), default=0)
    total = (1 << 24) * 8 * 6
    for layer in case.layers:
        item = DTYPES[layer.dtype].itemsize
        if any(spec.fill is Fill.QKV_WEIGHT for spec in operator.inputs):
            # Both layouts and what is made of each, with gaps, snapshots, two references and bytes compared.
            made = 2 * layer.qkvg_width * layer.tensor_parallel_size
            total += (layer.qkvg_checkpoint_width + made) * HIDDEN_SIZE * item * 30
            continue
        widths = layer.qk_head_dim + layer.v_head_dim
        needed = blocks_needed(case.steps, layer.block_size)
        block = layer.block_size * layer.num_key_value_heads * widths * item
        cache = (case.options.pool or needed + needed // 2 + 3) * block
        if cache > SPARSE_BYTES:
            # Each used block with its two neighbours, and two snapshots of them.
            total += 9 * needed * block + (cache if device == "cuda" else 0)
        else:
            total += 3 * cache
        heads = layer.num_attention_heads + GAP_HEADS
        # Inputs, outputs and a copy of each with their gaps, both references, products and bounds in float64.
        total += tokens * heads * (widths + GAP_COLUMNS) * (4 * item + 12 * 8)
        total += longest * layer.num_key_value_heads * widths * 8 * 2
        if any(spec.fill is Fill.GROUP_QUERY for spec in operator.inputs):
            total += pairs * layer.num_attention_heads * 8 * 4
    return total
