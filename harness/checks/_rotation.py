"""How check `values` judges a rotation: element by element, within the roundings of the path's arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from harness.checks._check import token_where
from harness.checks._comparison import rotation as compare_rotation
from harness.launch import Launch
from harness.rope_budgets import rotation_budget_source
from harness.verdict import CheckResult, Kind, Status, Worst
from references.oracle import Writes


def rotation(launch: Launch, index: int, name: str) -> CheckResult:
    """The result for one output that is judged as a rotation.

    Raises:
        TypeError: the oracle has no tensor of the output's products.
    """
    label = launch.tensor_label(name, index)
    layer = launch.layers[index]
    products, expected = _tensor(launch, index, f"{name}_products"), launch.expected(index)[name]
    got = layer.outputs[name].view
    has_heads = "num_attention_heads" in launch.operator.output(name).axes
    if isinstance(expected, Writes):
        # [token, head of the cache, width]: a token's rows stand one after another.
        heads, width = got.shape[-3], got.shape[-1]
        has_heads, shape = True, (len(expected.rows) // heads, heads, width)
        got = got.view(-1, width)[expected.rows].view(shape)
        expected, products = expected.values.reshape(shape), products.reshape(*shape, 2)
    got = got.to(expected.device, torch.float64)
    if got.numel() == 0:
        return CheckResult("values", Status.PASSED, label)
    dtype, rounds_products = layer.batch.layer.dtype, launch.path.rounds_products
    judged = compare_rotation(launch, index, got, expected, products)
    error, budget, over = judged.error, judged.budget, judged.over
    # What must be exact has no share of a budget: 0 / 0 is nothing, more than 0 / 0 is the worst there is.
    share = torch.where(error == 0, 0.0, error / budget)
    place = torch.unravel_index(share.argmax(), share.shape)
    element = tuple(int(part) for part in place)
    worst, allowed = float(error[element]), float(budget[element])
    source = rotation_budget_source(dtype, rounds_products=rounds_products)
    measured = {
        "error": worst,
        "budget": allowed,
        "budget_source": source if allowed else "nothing is rotated here: it must be exact",
        "worst": Worst(element, float(got[element]), float(expected[element])),
    }
    if not bool(over.any()):
        return CheckResult("values", Status.PASSED, label, **(measured if allowed else {}))  # type: ignore[arg-type]
    reason = f"{int(over.sum()):,} of {over.numel():,} elements of {label} are over budget"
    if allowed:
        reason += f", the worst by {worst / allowed:.1f} x"
    return CheckResult(
        "values",
        Status.FAILED,
        label,
        Kind.WRONG,
        reason,
        where=token_where(launch, over, has_heads=has_heads, index=index),
        **measured,  # type: ignore[arg-type]
    )


def _tensor(launch: Launch, index: int, name: str) -> Tensor:
    value = launch.expected(index).get(name)
    if not isinstance(value, Tensor):
        raise TypeError(f"the oracle of {launch.operator.name} must return {name} as a tensor")
    return value
