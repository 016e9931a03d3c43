"""The split by its definition: rank after rank and head after head, a slice of keys and one of values."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Of each layout k_b_proj_weight [TP, H, N, R] and v_b_proj_weight [TP, H, R, V].

    Copies, so precision changes nothing.
    """
    # Linear in torch is y = x w^T: its weight is the transpose of Paddle's.
    by_layout = {
        "paddle": tensor(inputs, "kv_b_proj_paddle"),
        "torch": tensor(inputs, "kv_b_proj_torch").T,
    }
    ranks, heads = int(number(inputs, "tensor_parallel_size")), int(number(inputs, "num_attention_heads"))
    nope, width = int(number(inputs, "qk_nope_head_dim")), int(number(inputs, "v_head_dim"))
    outputs = {}
    for layout, weight in by_layout.items():
        keys, values = [], []
        for head in range(ranks * heads):
            first = head * (nope + width)
            keys.append(weight[:, first : first + nope].T)
            values.append(weight[:, first + nope : first + nope + width])
        rank = len(weight)
        outputs[f"k_b_proj_weight_{layout}"] = torch.stack(keys).view(ranks, heads, nope, rank)
        outputs[f"v_b_proj_weight_{layout}"] = torch.stack(values).view(ranks, heads, rank, width)
    return outputs


ORACLE = Oracle(
    name="kv_b_split",
    operator="kv_b_split",
    role="definition",
    source="FastDeploy KVBatchLinear (O22); torch.nn.Linear and paddle.nn.Linear for the layouts",
    run=run,
)
