"""Rotation and cache write again, in NumPy: row after row of the batch, head after head, in complex numbers.

A pair of columns is one complex number, and its rotation a product with cos + i sin. Positions and rows of
the caches come from lengths and block tables: neither `batch_id_per_token` nor `cu_seqlens_q` is read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, Writes, number, tensor

Float64 = npt.NDArray[np.float64]


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor | Writes]:
    """`query` [Tp, H, K] in float64; the rows of k_cache in float64 and of v_cache as they are. On the host.

    Raises:
        ValueError: an emulation is asked for; the budget of a rotation needs none.
    """
    if precision is not None:
        raise ValueError("the rotation head by head is float64 only, got a Precision")
    qkv = tensor(inputs, "qkv").cpu()
    _, kv_heads, block_size, key_width = tensor(inputs, "k_cache").shape
    value_width = tensor(inputs, "v_cache").shape[-1]
    group_columns = key_width + value_width
    heads = (qkv.shape[1] - kv_heads * group_columns) // key_width
    tables = tensor(inputs, "block_tables").tolist()
    lengths = zip(
        tensor(inputs, "seq_lens_decoder").tolist(),
        tensor(inputs, "seq_lens_this_time").tolist(),
        strict=True,
    )
    query = np.zeros((len(qkv), heads, key_width))
    rows: list[int] = []
    keys: list[Float64] = []
    values: list[Tensor] = []
    token = 0
    for slot, (cached, new) in enumerate(lengths):
        for position in range(cached, cached + new):
            wide = qkv[token].to(torch.float64).numpy()
            for head in range(heads):
                query[token, head] = _turned(wide[head * key_width :][:key_width], inputs, position)
            block, offset = tables[slot][position // block_size], position % block_size
            for head in range(kv_heads):
                rows.append(block * kv_heads * block_size + head * block_size + offset)
                keys.append(_turned(wide[(heads + head) * key_width :][:key_width], inputs, position))
                first = (heads + kv_heads) * key_width + head * value_width
                values.append(qkv[token, first : first + value_width])
            token += 1
    physical = torch.tensor(rows, dtype=torch.int64)
    written = torch.stack(values) if values else qkv.new_empty(0, value_width)
    stacked = torch.from_numpy(np.array(keys).reshape(-1, key_width))
    return {
        "query": torch.from_numpy(query),
        "k_cache": Writes(physical, stacked),
        "v_cache": Writes(physical, written),
    }


def _turned(head: Float64, inputs: Inputs, position: int) -> Float64:
    """[K]: one head's columns with the first of them rotated by the angles of a position."""
    turned = head.copy()
    if inputs["cos_sin_cache"] is None:
        return turned
    row = tensor(inputs, "cos_sin_cache")[position].to(torch.float64).cpu().numpy()
    pairs = len(row) // 2
    # Pairs lie next to each other, or half of the rotated columns apart.
    step, first = (1, pairs) if number(inputs, "is_neox") == 1 else (2, 1)
    real = slice(0, pairs * step, step)
    imaginary = slice(first, first + pairs * step, step)
    numbers = (head[real] + 1j * head[imaginary]) * (row[:pairs] + 1j * row[pairs:])
    turned[real], turned[imaginary] = numbers.real, numbers.imag
    return turned


ORACLE = Oracle(
    name="gqa_cache_write_by_head",
    operator="gqa_cache_write",
    role="derivation",
    source="arXiv:2104.09864 equation 12 (complex form); FastDeploy rope_and_cache_write (O24), REQUIRED",
    run=run,
)
