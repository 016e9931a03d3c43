"""The split again, in NumPy, the other way round: every feature of the checkpoint is sent to its place.

Feature f is number f mod (N + V) of head f div (N + V); the head is number h mod H of rank h div H.
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
    per_rank = int(number(inputs, "num_attention_heads"))
    key_features = int(number(inputs, "qk_nope_head_dim"))
    value_features = int(number(inputs, "v_head_dim"))
    outputs = {}
    for layout, feature_axis in (("paddle", 1), ("torch", 0)):
        weight = tensor(inputs, f"kv_b_proj_{layout}")
        array = weight.contiguous().view(BITS[weight.dtype.itemsize]).cpu().numpy()
        latent_columns = array.shape[1 - feature_axis]
        k_b = np.zeros((tensor_parallel, per_rank, key_features, latent_columns), array.dtype)
        v_b = np.zeros((tensor_parallel, per_rank, latent_columns, value_features), array.dtype)
        for feature in range(array.shape[feature_axis]):
            head, place = divmod(feature, key_features + value_features)
            owner, local_head = divmod(head, per_rank)
            column = np.take(array, feature, axis=feature_axis)
            if place < key_features:
                k_b[owner, local_head, place] = column
            else:
                v_b[owner, local_head, :, place - key_features] = column
        outputs[f"k_b_proj_weight_{layout}"] = torch.from_numpy(k_b).view(weight.dtype)
        outputs[f"v_b_proj_weight_{layout}"] = torch.from_numpy(v_b).view(weight.dtype)
    return outputs


ORACLE = Oracle(
    name="kv_b_split_by_feature",
    operator="kv_b_split",
    role="derivation",
    source="HuggingFace modeling_deepseek_v3: kv_b_proj's output viewed as [.., heads, N + V] and split",
    run=run,
)
