"""Attention states as libraries' merges want them: dense, and 0 where they have seen no key.

Our contract says that nothing is to be read of an empty state's output. Libraries multiply it by 0 instead,
and have their own attention write 0 there, with an LSE of -inf; what is not finite would come out as NaN.
`plan_states` makes states as these leave them, before the merge is timed.
"""

from __future__ import annotations

from torch import Tensor

from cases import Case
from harness.kernel_path import TORCH_NAMES, Tensors, Workspace


def supports_states(case: Case) -> str | None:
    """Every case: any heads and widths, empty states among them."""
    return None


def plan_states(inputs: Tensors) -> Tensors:
    """Both states, dense; outputs of empty ones are 0, their LSEs as they are, of either sign."""
    states: dict[str, Tensor] = {}
    for part in ("prefix", "suffix"):
        lse = inputs[f"{part}_lse"]
        # A dense copy, whatever it is of.
        out = inputs[f"{part}_out"].masked_fill(lse.isinf().unsqueeze(-1), 0)
        states |= {f"{part}_out": out, f"{part}_lse": lse.contiguous()}
    return states


def merge_workspace(case: Case) -> Workspace:
    """A dense output, for a step whose own has gaps."""
    layer, tokens = case.layers[0], sum(row.new for row in case.steps[0])
    return {"merged": ((tokens, layer.num_attention_heads, layer.v_head_dim), TORCH_NAMES[layer.dtype])}


def dense_output(outputs: Tensors, workspace: Tensors) -> Tensor:
    """The step's output where it is dense, else the workspace's."""
    out: Tensor = outputs["out"] if outputs["out"].is_contiguous() else workspace["merged"]
    return out
