"""Rotation and cache write by their definition: all tokens at once, pairs of columns by the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, Writes, maybe_tensor, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor | Writes]:
    """`query` [Tp, H, K] in float64; the rows of k_cache in float64 and of v_cache as they are.

    `query_products` [Tp, H, K, 2] and `k_cache_products` [n, K, 2] are magnitudes of the two products that an
    element is the sum of, 0 where nothing is rotated. The rows of a token are those of its KV heads in order.

    Raises:
        ValueError: an emulation is asked for; a rotation's budget needs none.
    """
    if precision is not None:
        raise ValueError("the rotation of gqa_cache_write is float64 only, got a Precision")
    k_cache, v_cache = tensor(inputs, "k_cache"), tensor(inputs, "v_cache")
    kv_heads, block_size, key_width = k_cache.shape[1:]
    value_width = v_cache.shape[3]
    slots = tensor(inputs, "batch_id_per_token").to(torch.int64)
    real = slots >= 0
    slots = slots[real]
    starts = tensor(inputs, "cu_seqlens_q").to(torch.int64)
    tokens = torch.arange(len(slots), device=slots.device)
    positions = tensor(inputs, "seq_lens_decoder")[slots] + tokens - starts[slots]

    # Of a row: queries, then keys, then values.
    rows = tensor(inputs, "qkv")[real]
    heads = (rows.shape[1] - kv_heads * (key_width + value_width)) // key_width
    columns = [heads * key_width, kv_heads * key_width, kv_heads * value_width]
    query_columns, key_columns, value_columns = torch.split(rows, columns, dim=1)
    queries = query_columns.reshape(-1, heads, key_width)
    keys = key_columns.reshape(-1, kv_heads, key_width)
    values = value_columns.reshape(-1, kv_heads, value_width)
    table = maybe_tensor(inputs, "cos_sin_cache")
    angles = None if table is None else table[positions].to(torch.float64).unsqueeze(1)
    is_neox = bool(number(inputs, "is_neox"))
    queries, query_products = _rotated(queries.to(torch.float64), angles, is_neox)
    keys, key_products = _rotated(keys.to(torch.float64), angles, is_neox)

    blocks = tensor(inputs, "block_tables")[slots, positions // block_size].to(torch.int64)
    own_head = torch.arange(kv_heads, device=slots.device)
    offsets = (positions % block_size).unsqueeze(1)
    physical = (blocks.unsqueeze(1) * kv_heads + own_head) * block_size + offsets
    return {
        "query": _by_token(queries, real),
        "query_products": _by_token(query_products, real),
        "k_cache": Writes(physical.flatten(), keys.flatten(0, 1)),
        "k_cache_products": key_products.flatten(0, 1),
        "v_cache": Writes(physical.flatten(), values.flatten(0, 1)),
    }


def _rotated(heads: Tensor, angles: Tensor | None, is_neox: bool) -> tuple[Tensor, Tensor]:
    """[n, heads, K] with the first D columns rotated, and the magnitudes of the products, [n, heads, K, 2].

    angles: [n, 1, D] rows [cos | sin], or None.
    """
    products = torch.zeros(*heads.shape, 2, dtype=heads.dtype, device=heads.device)
    if angles is None:
        return heads, products
    cos, sin = angles.chunk(2, dim=-1)
    pairs = cos.shape[-1]
    columns = torch.arange(pairs, device=heads.device)
    lows, highs = (columns, columns + pairs) if is_neox else (2 * columns, 2 * columns + 1)
    low, high = heads[..., lows], heads[..., highs]
    products[..., lows, :] = torch.stack([low * cos, -high * sin], dim=-1)
    products[..., highs, :] = torch.stack([high * cos, low * sin], dim=-1)
    rotated = heads.clone()
    rotated[..., : 2 * pairs] = products[..., : 2 * pairs, :].sum(-1)
    return rotated, products.abs()


def _by_token(values: Tensor, real: Tensor) -> Tensor:
    """Rows of real tokens at their places among all, 0 at padding."""
    result = torch.zeros(len(real), *values.shape[1:], dtype=values.dtype, device=values.device)
    result[real] = values
    return result


ORACLE = Oracle(
    name="gqa_cache_write",
    operator="gqa_cache_write",
    role="definition",
    source="arXiv:2104.09864 equation 34; FastDeploy write_cache_kernel (O24), REQUIRED form",
    run=run,
)
