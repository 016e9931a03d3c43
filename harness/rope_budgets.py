"""How far an element of a rotation may be off: the roundings that its arithmetic makes, each at its largest.

An element is the sum of two products, p + q. With u = 2^-24, and the half ulp h(v) of the model dtype at a
number of magnitude v:

- products and their sum in fp32: u |p| + u |q|, then u |p + q|, together at most 2 u (|p| + |q|), the second
  order included (each rounding is by at most u / (1 + u)); fused into one operation, less;
- products rounded to the model dtype before they are added, as FastDeploy does: h(p) + h(q) more;
- the output rounded: h at what the sum may have become.

This is a bound and not a measurement: a kernel keeps it on any numbers, and one that rounds once more, or
toward zero, does not. So there is no floor and no factor, and a clean kernel may reach it. What is not
rotated has no product, and its budget is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP32_HALF_ULP = 2.0**-24
FP32_SMALLEST = 2.0**-149


def half_ulps(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to the dtype may change numbers of these magnitudes by, or smaller ones. float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(magnitude.to(torch.float64).clamp_min(info.tiny))
    # A magnitude is at least 2^(exponent - 1); below the smallest normal number the spacing is that of it.
    return torch.ldexp(torch.full_like(magnitude, info.eps / 2, dtype=torch.float64), exponent - 1)


def rotation_budgets(
    expected: Tensor, products: Tensor, dtype: torch.dtype, *, rounds_products: bool
) -> Tensor:
    """[...] float64: the budget of each element of a rotation; 0 of NaN.

    Args:
        expected: [...] float64, the elements.
        products: [..., 2] float64, magnitudes of the two products that each is the sum of; 0 where none is.
        rounds_products: whether they are rounded to the dtype before they are added.
    """
    magnitude = products.sum(-1)
    budget = 2 * FP32_HALF_ULP * magnitude + FP32_SMALLEST
    if dtype is not torch.float32:
        if rounds_products:
            budget = budget + half_ulps(products, dtype).sum(-1)
        budget = budget + half_ulps(expected.abs() + budget, dtype)
    return torch.where(magnitude == 0, 0.0, budget).nan_to_num(nan=0.0)


def rotation_budget_source(dtype: str, *, rounds_products: bool) -> str:
    """How an element's budget came about, in words."""
    roundings = ["two roundings of its products' sum in fp32"]
    if dtype != "fp32":
        roundings += [f"one of each product to {dtype}"] if rounds_products else []
        roundings.append(f"one of the output to {dtype}")
    return " + ".join(roundings)
