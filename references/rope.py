"""Rotation by its definition: each pair of columns times cosine and sine, by the formula of the contract.

Emulations follow the arithmetic of kernels: with `precision`, products are rounded to `weights` and the sum
to fp32 and then to `output`. Weights in fp32 are the usual "fp32 rope"; in the model dtype they are rope as
FastDeploy computes it, in its tensors' type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, number, tensor


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """q_pe [Tp, H, D] and k_pe [Tp, D], float64, and the products that their elements are the sums of.

    `q_pe_products` and `k_pe_products`, [..., D, 2], are magnitudes, 0 where nothing is rotated: budgets
    use them.
    """
    real = tensor(inputs, "batch_id_per_token") >= 0
    outputs = {}
    for name, raw in (("q_pe", "q_pe_raw"), ("k_pe", "k_pe_raw")):
        part = tensor(inputs, raw)[real].to(torch.float64)
        rotated, products = part, torch.zeros(*part.shape, 2, dtype=part.dtype, device=part.device)
        if inputs["cos_sin_cache"] is not None:
            positions = tensor(inputs, "position_ids")[real].to(torch.int64)
            angles = tensor(inputs, "cos_sin_cache")[positions].to(torch.float64)
            # All heads of a token turn alike.
            angles = angles.unsqueeze(1) if part.dim() == 3 else angles
            rotated, products = _rotated(part, angles, bool(number(inputs, "is_neox")), precision)
        outputs[name] = _by_token(rotated, real)
        outputs[f"{name}_products"] = _by_token(products, real)
    return outputs


def _rotated(
    part: Tensor, angles: Tensor, is_neox: bool, precision: Precision | None
) -> tuple[Tensor, Tensor]:
    """[..., D] rotated, and the magnitudes of the products, [..., D, 2]; angles are [cos | sin], [..., D]."""
    cos, sin = angles.chunk(2, dim=-1)
    low, high = part.chunk(2, dim=-1) if is_neox else (part[..., 0::2], part[..., 1::2])
    first = torch.stack([low * cos, -high * sin], dim=-1)
    second = torch.stack([high * cos, low * sin], dim=-1)
    # [..., D / 2, 2 products] each: back to the columns they came from.
    if is_neox:
        products = torch.cat([first, second], dim=-2)
    else:
        products = torch.stack([first, second], dim=-2).flatten(-3, -2)
    if precision is None:
        return products.sum(-1), products.abs()
    # Products of fp32 numbers are exact in float64, so that each is rounded once.
    rounded = products.to(precision.weights).to(torch.float32)
    return rounded.sum(-1).to(precision.output).to(torch.float64), products.abs()


def _by_token(values: Tensor, real: Tensor) -> Tensor:
    """Rows of real tokens at their places among all, 0 at padding."""
    result = torch.zeros(len(real), *values.shape[1:], dtype=values.dtype, device=values.device)
    result[real] = values
    return result


ORACLE = Oracle(
    name="rope",
    operator="rope",
    role="definition",
    source="arXiv:2104.09864 equation 34; FastDeploy fused_rotary_position_encoding",
    run=run,
)
