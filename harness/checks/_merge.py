"""How check `values` judges merged attention states: element by element, within the roundings of a merge."""

from __future__ import annotations

import torch

from harness.checks._comparison import merge as compare_merge
from harness.checks._elements import by_element, expected_tensor
from harness.launch import Launch
from harness.merge_budgets import merge_budget_source
from harness.verdict import CheckResult, Status


def merge(launch: Launch, index: int, name: str) -> CheckResult:
    """The result for one output that is judged as a merge.

    Raises:
        TypeError: the oracle has no tensor of the output or of its terms.
    """
    expected = expected_tensor(launch, index, name)
    terms = expected_tensor(launch, index, f"{name}_terms")
    output = launch.layers[index].outputs[name].view
    if output.numel() == 0:
        return CheckResult("values", Status.PASSED, launch.tensor_label(name, index))
    return by_element(
        launch,
        index,
        name,
        output.to(expected.device, torch.float64),
        expected,
        compare_merge(launch, index, name, expected, terms),
        source=merge_budget_source(output.dtype),
        source_of_none="both states are empty here: it must be exact",
    )
