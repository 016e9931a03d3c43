"""How far an element of a merged attention state may be off: the roundings of a merge, each at its largest.

An output is the sum of two products, w_p p + w_s s, with weights w_i = e_i / (e_p + e_s) and
e_i = exp(lse_i - the larger lse). With u = 2^-24, relative to a product and in the order of the arithmetic:

- the difference d of two LSEs is off by u |d|; taken to base 2, its product and the rounded constant make
  that 3 u |d|, and e_i is off by as much;
- the exponential, within two units in the last place, 4 u;
- the sum, u and what its larger addends bring along: 4 u, and 3 u |d| exp(-|d|) < 2 u;
- a division within two units in the last place, 4 u; the product with p or s, u.

That is 16 u (1 + |d|) of each product at most, u of their sum for the last addition included, and half an ulp
of the output's dtype where the sum is rounded to it, once. An LSE is the larger one plus ln(e_p + e_s), which
is off by less than 16 u; a path that goes to base 2 and back has rounded the larger one four times: 16 u of
1 + |lse|, and half an ulp.

This is a bound and not a measurement: there is no floor and no factor, a clean kernel may reach it, and one
rounding of an output to half precision more does not fit. What underflows is not worth a product: weights
below 2^-126 may be taken for 0, of numbers below 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harness.rope_budgets import FP32_HALF_ULP, half_ulps

ROUNDINGS = 16
UNDERFLOW = 2.0**-120


def merge_budgets(expected: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """[...] float64: the budget of each element of a merged state; 0 where both are empty, or one is NaN.

    Args:
        expected: [...] float64, the elements.
        terms: [...] float64, what sixteen roundings are of: the sum of (1 + |d|) |w x| over both products,
            1 + |lse| of a log-sum-exp; 0 where there is nothing.
        dtype: what the elements are rounded to.
    """
    budget = ROUNDINGS * FP32_HALF_ULP * terms + UNDERFLOW
    magnitude = expected.nan_to_num(neginf=0.0).abs() + budget
    return torch.where(terms == 0, 0.0, budget + half_ulps(magnitude, dtype)).nan_to_num(nan=0.0)


def merge_budget_source(dtype: torch.dtype) -> str:
    """How an element's budget came about, in words."""
    name = str(dtype).removeprefix("torch.")
    return f"{ROUNDINGS} roundings of its terms in float32 + one of the result to {name}"
