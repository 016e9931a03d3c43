"""The split by its definition: of every rank the slices of its heads, part after part, side by side."""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """`qkv_offsets` [TP, 4, 3] int32 and of each layout qkv_ and qkvg_proj_weight [TP, inputs, outputs].

    Copies, so precision changes nothing.
    """
    # Linear in torch is y = x w^T: its weight is the transpose of Paddle's.
    by_layout = {"paddle": tensor(inputs, "qkvg_proj_paddle"), "torch": tensor(inputs, "qkvg_proj_torch").T}
    ranks, heads = int(number(inputs, "tensor_parallel_size")), int(number(inputs, "num_attention_heads"))
    kv_heads = int(number(inputs, "total_num_key_value_heads"))
    keys, values = int(number(inputs, "qk_head_dim")), int(number(inputs, "v_head_dim"))
    own_kv_heads, copies = max(1, kv_heads // ranks), max(1, ranks // kv_heads)
    offsets = []
    for rank in range(ranks):
        first_kv = rank // copies * own_kv_heads
        # Of q, k, v and gate: the first head of this rank, how many, how wide, and how many there are of all.
        parts = (
            (rank * heads, heads, keys, ranks * heads),
            (first_kv, own_kv_heads, keys, kv_heads),
            (first_kv, own_kv_heads, values, kv_heads),
            (rank * heads, heads, values, ranks * heads),
        )
        source, target, rows = 0, 0, []
        for first, count, width, total in parts:
            rows.append((source + first * width, target, count * width))
            source += total * width
            target += count * width
        offsets.append(rows)
    device = tensor(inputs, "qkvg_proj_paddle").device
    outputs = {"qkv_offsets": torch.tensor(offsets, dtype=torch.int32, device=device)}
    for layout, weight in by_layout.items():
        for name, count in (("qkv", 3), ("qkvg", 4)):
            outputs[f"{name}_proj_weight_{layout}"] = torch.stack(
                [
                    torch.cat([weight[:, first : first + size] for first, _, size in rows[:count]], dim=1)
                    for rows in offsets
                ]
            )
    return outputs


ORACLE = Oracle(
    name="qkv_split",
    operator="qkv_split",
    role="definition",
    source="FastDeploy QKVParallelLinear with one layer's KV heads (P7); torch.nn.Linear for the layouts",
    run=run,
)
