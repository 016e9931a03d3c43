"""What operator `rope` is given beyond the other operators' data: positions and the table of the step."""

from __future__ import annotations

import numpy as np
import torch

from cases import Case, Row
from cases.contract import TensorSpec
from cases.layers import Layer
from harness.buffers import GAP_COLUMNS, GAP_HEADS, SPARSE_BYTES, Buffer
from harness.metadata import Int32, Int64, StepMetadata
from harness.rope_tables import rotation_rows

FAR_POSITION = 2**31 - 1
"""A stale position that, followed, lands far outside any allocation."""


def table_positions(metadata: StepMetadata) -> int:
    """Rows of the step's table: it ends right behind the last position in use. At least 1."""
    return int(used_positions(metadata).max(initial=0)) + 1


def used_positions(metadata: StepMetadata) -> Int64:
    """Every position that a real token has, sorted."""
    return np.unique(metadata.position_ids[metadata.batch_id_per_token >= 0].astype(np.int64))


def stale_positions(metadata: StepMetadata) -> Int32:
    """[Tp] int32: positions; of padding, in turn past the table, negative, far off, and the last real one."""
    positions = metadata.position_ids.copy()
    padding = metadata.batch_id_per_token < 0
    last = table_positions(metadata) - 1
    positions[padding] = np.resize(np.array([last + 1, -1, FAR_POSITION, last], np.int32), int(padding.sum()))
    return positions


def rope_table(
    spec: TensorSpec,
    layer: Layer,
    metadata: StepMetadata,
    dtype: torch.dtype,
    device: torch.device,
    *,
    strided: bool,
    poison: float | None,
) -> Buffer:
    """The table: rows of positions in use rounded to the dtype, all others NaN or another poison."""
    used = used_positions(metadata)
    rows = torch.from_numpy(used)
    shape = [table_positions(metadata), layer.qk_rope_head_dim]
    buffer = Buffer.allocate(shape, dtype, device, strided=strided and spec.strided, used_rows=rows)
    if poison is not None and not buffer.sparse:
        buffer.view.fill_(poison)
    values = torch.from_numpy(rotation_rows(layer.model, used))
    buffer.view[rows.to(device)] = values.to(device, dtype)
    return buffer


def is_neox(layer: Layer) -> int:
    """1 where pairs are (i, i + D / 2), 0 where they are (2i, 2i + 1)."""
    return int(layer.model.rope == "half-split")


def rope_bytes(case: Case, rows: tuple[Row, ...], device: str, itemsize: int) -> int:
    """About how much memory judging a step takes: tensors with gaps, snapshots, float64 copies."""
    tokens = sum(row.new for row in rows)
    longest = max((row.length for row in rows if row.seq_lens_this_time), default=1)
    total = 0
    for layer in case.layers:
        width = layer.qk_rope_head_dim
        table = longest * (width + GAP_COLUMNS) * itemsize
        if table > SPARSE_BYTES:
            # Up to three watched rows and their snapshots for each token.
            watched = 9 * tokens * (width + GAP_COLUMNS) * itemsize
            total += watched + (table if device == "cuda" else 0)
        else:
            total += 3 * table
        heads = layer.num_attention_heads + 1 + GAP_HEADS
        # Inputs, outputs and a copy of each with their gaps; both references, products and bounds in float64.
        total += tokens * heads * (4 * (width + GAP_COLUMNS) * itemsize + 12 * width * 8)
        # Queries are cut from a draw of whole ones, made a chunk at a time.
        total += min(tokens * heads * layer.qk_head_dim, 1 << 24) * 8 * 6
    return total
