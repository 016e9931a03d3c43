"""How check `values` judges a rotation: element by element, within the roundings of the path's arithmetic."""

from __future__ import annotations

import torch

from harness.checks._comparison import rotation as compare_rotation
from harness.checks._elements import by_element, expected_tensor
from harness.launch import Launch
from harness.rope_budgets import rotation_budget_source
from harness.verdict import CheckResult, Status
from references.oracle import Writes


def rotation(launch: Launch, index: int, name: str) -> CheckResult:
    """The result for one output that is judged as a rotation.

    Raises:
        TypeError: the oracle has no tensor of the output's products.
    """
    layer = launch.layers[index]
    products, expected = expected_tensor(launch, index, f"{name}_products"), launch.expected(index)[name]
    got = layer.outputs[name].view
    if isinstance(expected, Writes):
        # [token, head of the cache, width]: a token's rows stand one after another.
        heads, width = got.shape[-3], got.shape[-1]
        shape = (len(expected.rows) // heads, heads, width)
        got = got.view(-1, width)[expected.rows].view(shape)
        expected, products = expected.values.reshape(shape), products.reshape(*shape, 2)
    got = got.to(expected.device, torch.float64)
    if got.numel() == 0:
        return CheckResult("values", Status.PASSED, launch.tensor_label(name, index))
    dtype, rounds_products = layer.batch.layer.dtype, launch.path.rounds_products
    return by_element(
        launch,
        index,
        name,
        got,
        expected,
        compare_rotation(launch, index, got, expected, products),
        source=rotation_budget_source(dtype, rounds_products=rounds_products),
        source_of_none="nothing is rotated here: it must be exact",
    )
