"""How check `values` judges an output element by element, each within a bound of its own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from harness.budgets import Judgement
from harness.checks._check import token_where
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status, Worst


def by_element(
    launch: Launch,
    index: int,
    name: str,
    got: Tensor,
    expected: Tensor,
    judged: Judgement,
    *,
    source: str,
    source_of_none: str,
) -> CheckResult:
    """The result for one output of a layer.

    Args:
        got, expected: [Tp, ...] float64, at least one element.
        judged: of each of them; where the budget is 0 it must be exact.
        source, source_of_none: how the budgets came about, and those of 0.
    """
    label = launch.tensor_label(name, index)
    error, budget, over = judged.error, judged.budget, judged.over
    # What must be exact has no share of a budget: 0 / 0 is nothing, more than 0 / 0 is the worst there is.
    share = torch.where(error == 0, 0.0, error / budget)
    # torch's own unravel_index imports sympy.
    element = tuple(int(part) for part in np.unravel_index(int(share.argmax()), share.shape))
    worst, allowed = float(error[element]), float(budget[element])
    measured = {
        "error": worst,
        "budget": allowed,
        "budget_source": source if allowed else source_of_none,
        "worst": Worst(element, float(got[element]), float(expected[element])),
    }
    if not bool(over.any()):
        return CheckResult("values", Status.PASSED, label, **(measured if allowed else {}))  # type: ignore[arg-type]
    reason = f"{int(over.sum()):,} of {over.numel():,} elements of {label} are over budget"
    if allowed:
        reason += f", the worst by {worst / allowed:.1f} x"
    spec = launch.operator.output(name)
    has_heads = "num_attention_heads" in spec.axes or name in launch.operator.in_place
    return CheckResult(
        "values",
        Status.FAILED,
        label,
        Kind.WRONG,
        reason,
        where=token_where(launch, over, has_heads=has_heads, index=index),
        **measured,  # type: ignore[arg-type]
    )


def expected_tensor(launch: Launch, index: int, name: str) -> Tensor:
    """What the oracle returns under a name.

    Raises:
        TypeError: that is no tensor.
    """
    value = launch.expected(index).get(name)
    if not isinstance(value, Tensor):
        raise TypeError(f"the oracle of {launch.operator.name} must return {name} as a tensor")
    return value
