"""The split again, in NumPy, head by head: query head after query head asks which rank and KV head it has.

A KV head belongs to every rank with a query head that reads it. A rank's projection is then filled feature by
feature, and offsets are where features were taken from and put.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor

BITS = {2: torch.int16, 4: torch.int32}
"""Values are carried as integers of their size: what is copied is bits."""


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """As the definition, on the host."""
    tensor_parallel = int(number(inputs, "tensor_parallel_size"))
    all_heads = int(number(inputs, "num_attention_heads")) * tensor_parallel
    all_kv_heads = int(number(inputs, "total_num_key_value_heads"))
    key_features, value_features = int(number(inputs, "qk_head_dim")), int(number(inputs, "v_head_dim"))
    query_of: list[list[int]] = [[] for _ in range(tensor_parallel)]
    kv_of: list[list[int]] = [[] for _ in range(tensor_parallel)]
    for head in range(all_heads):
        rank = head * tensor_parallel // all_heads
        query_of[rank].append(head)
        read = head * all_kv_heads // all_heads
        if read not in kv_of[rank]:
            kv_of[rank].append(read)

    # Where each part begins in the checkpoint, counted from one end to the other.
    key_begin = all_heads * key_features
    value_begin = key_begin + all_kv_heads * key_features
    gate_begin = value_begin + all_kv_heads * value_features
    taken, offsets = [], np.zeros((tensor_parallel, 4, 3), np.int32)
    for rank in range(tensor_parallel):
        parts = [
            _features(0, query_of[rank], key_features),
            _features(key_begin, kv_of[rank], key_features),
            _features(value_begin, kv_of[rank], value_features),
            _features(gate_begin, query_of[rank], value_features),
        ]
        for part, features in enumerate(parts):
            before = sum(len(other) for other in parts[:part])
            offsets[rank, part] = (features[0], before, len(features))
        taken.append(parts)

    outputs = {"qkv_offsets": torch.from_numpy(offsets)}
    for layout, feature_axis in (("paddle", 1), ("torch", 0)):
        weight = tensor(inputs, f"qkvg_proj_{layout}")
        array = weight.contiguous().view(BITS[weight.dtype.itemsize]).cpu().numpy()
        for name, count in (("qkv", 3), ("qkvg", 4)):
            ranks = []
            for parts in taken:
                columns = [
                    np.take(array, feature, axis=feature_axis) for part in parts[:count] for feature in part
                ]
                ranks.append(np.stack(columns, axis=1))
            outputs[f"{name}_proj_weight_{layout}"] = torch.from_numpy(np.stack(ranks)).view(weight.dtype)
    return outputs


def _features(begin: int, heads: list[int], width: int) -> list[int]:
    """The checkpoint's features of some heads of a part."""
    return [begin + head * width + column for head in heads for column in range(width)]


ORACLE = Oracle(
    name="qkv_split_by_head",
    operator="qkv_split",
    role="derivation",
    source="HuggingFace's repeat_kv: query head h reads KV head h div (H / G); arXiv:1909.08053 section 3",
    run=run,
)
