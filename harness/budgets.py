"""How far an attention output may be from float64: the budgets, per dtype of the softmax weights.

A row's budget is min(cap, max(floor, 3 x baseline)), where the baseline is the error, on the same row,
of a single-pass emulation with fp32 accumulation whose weights and output are rounded once. It holds for
the row's relative L2 error and for max|error| / max|row|.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 3.0
"""A kernel may be three times as far off as one rounding of weights and output makes it."""


@dataclass(frozen=True)
class Budget:
    """Bounds of the budget of one dtype of the softmax weights.

    `clean` is the range of worst clean errors it was derived from.
    """

    floor: float
    cap: float
    clean: str


BUDGETS = {
    "bf16": Budget(4e-3, 6e-3, "clean noise 2.0e-3 to 2.5e-3"),
    "fp16": Budget(6e-4, 8e-4, "clean noise 3e-4"),
    "fp32": Budget(1e-5, 5e-4, "clean noise 2e-6, up to 1e-4 where logits reach 1e3"),
}

LSE_ABSOLUTE = 1e-6
LSE_ULPS = 64
"""Tensor cores round toward zero after every 16 products: 68 such steps in 1088 columns at most."""


def row_budgets(dtype: str, baseline: Tensor) -> Tensor:
    """The budget of each row from its baseline error. Any shape, float64."""
    bounds = BUDGETS[dtype]
    return (FACTOR * baseline).clamp(bounds.floor, bounds.cap)


def lse_budgets(logit_absmax: Tensor) -> Tensor:
    """The budget of each LSE: 1e-6 + 64 * 2^-23 * max(1, largest |logit| of the row)."""
    return LSE_ABSOLUTE + LSE_ULPS * 2.0**-23 * logit_absmax.clamp_min(1.0)


def budget_source(dtype: str, budget: float, baseline: float) -> str:
    """How a row's budget came about, in words."""
    bounds = BUDGETS[dtype]
    if budget >= bounds.cap:
        return f"the {dtype} cap; 3 x the emulation's error {baseline:.1e} in this row is more"
    if budget <= bounds.floor:
        return f"the {dtype} floor; 3 x the emulation's error {baseline:.1e} in this row is less"
    return f"3 x the {dtype} emulation's error {baseline:.1e} in this row"


def row_errors(got: Tensor, expected: Tensor) -> Tensor:
    """[..., n] -> [...]: the larger of relative L2 error and max|error| / max|row|, float64.

    0 where both are all zero; infinite where something is not finite that should be, or the other way
    round, and where a row that should be zero is not.
    """
    got, expected = got.to(torch.float64), expected.to(torch.float64)
    same_class = (got == expected) | (got.isnan() & expected.isnan())
    both_finite = got.isfinite() & expected.isfinite()
    error = torch.where(both_finite, got - expected, torch.zeros_like(got))
    reference = torch.where(both_finite, expected, torch.zeros_like(expected))
    relative = _ratio(error.norm(dim=-1), reference.norm(dim=-1))
    largest = _ratio(error.abs().amax(-1), reference.abs().amax(-1))
    mismatch = ~(both_finite | same_class).all(-1)
    return torch.where(mismatch, torch.inf, torch.maximum(relative, largest))


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(error == 0, torch.zeros_like(error), error / size)
