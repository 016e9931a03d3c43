"""How far an attention output may be from float64: the budgets, per dtype of the softmax weights.

A row's budget is min(cap, max(floor, 3 x baseline)), where the baseline is the relative L2 error, on the
same row, of a single-pass emulation with fp32 accumulation whose weights and output are rounded once; in
fp32, where only sums are rounded, twice the budget of the row's LSE if that is more.
It holds for the row's relative L2 error. max|error| / max|row| may be larger by half an ulp: the
largest element alone, if it lies just above a power of two, is off by that much after one rounding,
whatever the kernel (2^-8 = 3.9e-3 in bf16, nearly the whole floor).

A whole step of attention (Judge.LAYER) rounds more often, in either form. One rounding is added to those of
weights and output on the way of the values (v, or the latent output before W_UV): three instead of two, the
budget above times sqrt(3/2). And one before the logits (k_nope, or q_nope W_UK). Its root mean square is
half an ulp / sqrt(6): 1 / sqrt(3) because it is anywhere in the interval, 1 / sqrt(2) over mantissas from 1
to 2. In every product of a logit, it moves the logit by that much of its spread, the root of the sum of
the products' squares, and the weight by the same share. Unlike the other errors, a logit's does not average
over the columns of an output: three deviations are allowed. Independent errors add in squares:

    layer = sqrt(3/2 budget^2 + (3 half_ulp / sqrt(6) x spread)^2)

Both forms, emulated, use at most 0.76 of it in modes `planted` and `randn`; in fp16 `deep` an emulation that
scales before it subtracts reaches 1.11, the path 0.28. At spreads of hundreds (`huge`) it is
more than 1 in bf16, and says no more than that outputs are finite: the two forms differ by that much.

A packed cache adds nothing. What it stores is compared byte for byte, and the oracles attend to what the
stored bytes stand for, those of new tokens too, rounded to bf16 where the path says that it does so: rounding
them to e4m3 is of the question. What a step rounds behind that is as above, in the absorbed form.
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

    `half_ulp` is the largest relative error of rounding to the dtype once; `from_logits` how many times
    a logit's own budget counts.
    """

    floor: float
    cap: float
    half_ulp: float
    from_logits: float


BUDGETS = {
    # Clean noise is 2.0e-3 to 2.5e-3 in bf16 and 3e-4 in fp16, the rounding of weights and output.
    "bf16": Budget(4e-3, 6e-3, 2.0**-8, 0.0),
    "fp16": Budget(6e-4, 8e-4, 2.0**-11, 0.0),
    # Nothing is rounded but sums: a logit that is off by d changes its weight, and the weights' sum, by d.
    # One emulation says little of that: on the row where a kernel is unlucky it need not be. The cap is
    # what logits near 1e3 (data mode `huge`) come to: their fp32 sums were off by up to 1.4e-3 on an H100.
    "fp32": Budget(1e-5, 2e-3, 2.0**-24, 2.0),
}

LAYER_VALUE_ROUNDINGS = 1.5
"""Roundings of values, weights and output in a whole step, for each of an operator's."""

LAYER_DEVIATIONS = 3.0
"""Standard deviations of a logit's own error that a whole step may have."""

LSE_ABSOLUTE = 1e-6
LSE_ULPS = 64
"""Tensor cores round toward zero after every 16 products: 68 such steps in 1088 columns at most."""


@dataclass(frozen=True)
class RowErrors:
    """Two errors of every row, each of any shape, float64."""

    relative_l2: Tensor
    largest: Tensor


@dataclass(frozen=True)
class Judgement:
    """Of every row, the error that uses most of what it may, and what it may."""

    error: Tensor
    budget: Tensor

    @property
    def over(self) -> Tensor:
        """Rows that are over budget, bool."""
        return ~(self.error <= self.budget)


def judge_rows(
    dtype: str,
    errors: RowErrors,
    baseline: Tensor,
    *,
    logit_error: Tensor | float = 0.0,
    times: float = 1.0,
    logit_spread: Tensor | None = None,
) -> Judgement:
    """Errors of rows against their budgets.

    Args:
        baseline: relative L2 error of the emulation, shaped as the errors.
        logit_error: what the row's LSE may be off by, shaped as the errors.
        times: what the budgets are multiplied by, for comparisons where both sides may be off.
        logit_spread: of a whole step, the row's largest root of the sum of a logit's squared products.
    """
    bounds = BUDGETS[dtype]
    noise = torch.maximum(FACTOR * baseline, torch.as_tensor(logit_error) * bounds.from_logits)
    l2_budget = noise.clamp(bounds.floor, bounds.cap)
    if logit_spread is not None:
        l2_budget = layer_budgets(dtype, l2_budget, logit_spread)
    l2_budget = l2_budget * times
    largest_budget = l2_budget + bounds.half_ulp * times
    by_largest = errors.largest / largest_budget > errors.relative_l2 / l2_budget
    return Judgement(
        error=torch.where(by_largest, errors.largest, errors.relative_l2),
        budget=torch.where(by_largest, largest_budget, l2_budget),
    )


def layer_budgets(dtype: str, budget: Tensor, logit_spread: Tensor) -> Tensor:
    """The budgets of rows of a whole step, from those of one operator; see the module's docstring."""
    logits = LAYER_DEVIATIONS * BUDGETS[dtype].half_ulp / 6**0.5 * logit_spread
    return (LAYER_VALUE_ROUNDINGS * budget.square() + logits.square()).sqrt()


def lse_budgets(logit_magnitude: Tensor) -> Tensor:
    """The budget of each LSE: 1e-6 + 64 * 2^-23 * max(1, magnitude of the row's logits).

    The magnitude is what a logit's partial sums reach, not what is left of them: products that cancel to
    a small logit have been rounded at their own size.
    """
    return LSE_ABSOLUTE + LSE_ULPS * 2.0**-23 * logit_magnitude.clamp_min(1.0)


def budget_source(
    dtype: str,
    budget: float,
    baseline: float,
    logit_error: float = 0.0,
    logit_spread: float | None = None,
) -> str:
    """How a row's budget came about, in words."""
    bounds = BUDGETS[dtype]
    if logit_spread is not None:
        allowed = min(bounds.cap, max(bounds.floor, FACTOR * baseline, bounds.from_logits * logit_error))
        operator, spread = torch.tensor([allowed, logit_spread], dtype=torch.float64)
        layer = float(layer_budgets(dtype, operator, spread))
        rounding = f" + half an ulp {bounds.half_ulp:.1e} for the largest element" if budget > layer else ""
        one = budget_source(dtype, allowed, baseline, logit_error)
        return f"a whole step's at logit spread {logit_spread:.1f}, of {allowed:.1e}: {one}{rounding}"
    noise, derived = FACTOR * baseline, f"3 x the emulation's error {baseline:.1e} in this row"
    if bounds.from_logits * logit_error > noise:
        noise, derived = bounds.from_logits * logit_error, f"2 x the budget of its LSE {logit_error:.1e}"
    allowed = min(bounds.cap, max(bounds.floor, noise))
    rounding = f" + half an ulp {bounds.half_ulp:.1e} for the largest element" if budget > allowed else ""
    if allowed == bounds.cap:
        return f"the {dtype} cap {bounds.cap:.1e} ({derived} is more){rounding}"
    if allowed == bounds.floor:
        return f"the {dtype} floor {bounds.floor:.1e} ({derived} is less){rounding}"
    return f"{derived}{rounding}"


def row_errors(got: Tensor, expected: Tensor) -> RowErrors:
    """[..., n] -> [...]: relative L2 error and max|error| / max|row| of every row.

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
    return RowErrors(torch.where(mismatch, torch.inf, relative), torch.where(mismatch, torch.inf, largest))


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    return torch.where(error == 0, torch.zeros_like(error), error / size)
