"""Cosines and sines of a model's rotation angles, the same bits on every machine.

A pair's frequency is worked out in decimal arithmetic, whose results are rounded correctly everywhere, and
kept as an integer: how far the pair turns from one position to the next, in 2^-96 of a whole turn. A
position's angle is a product of integers whose whole turns overflow away, so it is as exact at position
10^6 as at 1. Sine and cosine are polynomials of what is left of an eighth of a turn, by single IEEE
operations; no library's function is asked.

Sources: arXiv:2104.09864 section 3.4 (frequencies theta^(-2i / D)); arXiv:2309.00071 sections 3.2 to 3.4
(YaRN) with the table scaled as DeepSeek does; arXiv:2402.13753 (longrope).
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import cache

import numpy as np
import numpy.typing as npt

from cases.models import Model, RopeScaling
from harness.metadata import Int64

Float64 = npt.NDArray[np.float64]

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")
DIGITS = 60

TURN_BITS = 96
"""Positions below 2^31 lose at most 2^-65 of a turn."""

TERMS = 9
"""Of each polynomial: what the tenth would add, at an eighth of a turn, is below 2^-60."""


def rotation_rows(model: Model, positions: Int64) -> Float64:
    """[n, D] float64: the rows [cos | sin] of a model's table at n positions, before they are rounded.

    Raises:
        ValueError: the model rotates nothing, or its rope_scaling cannot be followed.
    """
    steps = turns(model)
    # A step has 96 bits: the product of its upper 64 overflows by whole turns, that of its lower 32 carries.
    upper = np.array([step >> 32 for step in steps], np.uint64)
    lower = np.array([step & 0xFFFF_FFFF for step in steps], np.uint64)
    places = positions.astype(np.uint64)[:, None]
    phases = places * upper + ((places * lower) >> np.uint64(32))
    cos, sin = _cos_and_sin(phases)
    return np.concatenate([cos, sin], axis=1) * float(table_scale(model))


@cache
def turns(model: Model) -> tuple[int, ...]:
    """What each of the D / 2 pairs turns from one position to the next, in 2^-96 of a whole turn."""
    with localcontext(prec=DIGITS):
        return tuple(int((w / (2 * PI) * 2**TURN_BITS).to_integral_value()) for w in frequencies(model))


def frequencies(model: Model) -> tuple[Decimal, ...]:
    """Radians that each of the D / 2 pairs turns from one position to the next.

    Raises:
        ValueError: the model rotates nothing, or its rope_scaling cannot be followed.
    """
    if model.rope == "none":
        raise ValueError(f"{model.name} rotates nothing: it has no rope table")
    pairs, scaling = model.qk_rope_head_dim // 2, model.rope_scaling
    with localcontext(prec=DIGITS):
        log_theta = Decimal(model.rope_theta).ln()
        plain = [(-log_theta * i / pairs).exp() for i in range(pairs)]
        if scaling is None:
            return tuple(plain)
        if scaling.type == "yarn":
            shares = _interpolated_shares(model, scaling)
            factor = Decimal(scaling.factor)
            return tuple(w / factor * share + w * (1 - share) for w, share in zip(plain, shares, strict=True))
        if scaling.type != "longrope":
            raise ValueError(f"rope_scaling of {model.name} is yarn or longrope, got {scaling.type!r}")
        name = "long_factor" if scaling.factor > 1 else "short_factor"
        factors: tuple[float, ...] = getattr(scaling, name)
        if len(factors) != pairs:
            raise ValueError(
                f"{name} of {model.name} has one number for each of {pairs} pairs, got {len(factors)}"
            )
        return tuple(w / Decimal(factor) for w, factor in zip(plain, factors, strict=True))


def table_scale(model: Model) -> Decimal:
    """What a model's cosines and sines are multiplied by: a ratio of two mscales, never the softmax's m."""
    scaling = model.rope_scaling
    with localcontext(prec=DIGITS):
        if scaling is None or scaling.factor <= 1:
            return Decimal(1)
        log_factor = Decimal(scaling.factor).ln()
        if scaling.type == "longrope":
            return (1 + log_factor / Decimal(scaling.original_max_position_embeddings).ln()).sqrt()
        tenth = log_factor / 10
        return (tenth * Decimal(scaling.mscale) + 1) / (tenth * Decimal(scaling.mscale_all_dim) + 1)


def correction_range(model: Model, scaling: RopeScaling) -> tuple[int, int]:
    """Pairs between which YaRN goes over from keeping a frequency to dividing it by the factor."""
    width = model.qk_rope_head_dim

    def pair(turns_in_context: float) -> Decimal:
        """The pair, not a whole number, that turns so often within the original length."""
        length = Decimal(scaling.original_max_position_embeddings)
        return (
            width
            * (length / (2 * PI * Decimal(turns_in_context))).ln()
            / (2 * Decimal(model.rope_theta).ln())
        )

    with localcontext(prec=DIGITS):
        return max(math.floor(pair(scaling.beta_fast)), 0), min(math.ceil(pair(scaling.beta_slow)), width - 1)


def _interpolated_shares(model: Model, scaling: RopeScaling) -> list[Decimal]:
    """Of each pair, how much of its frequency is divided by the factor: from 0 to 1."""
    low, high = correction_range(model, scaling)
    span = Decimal(high - low) if high != low else Decimal("0.001")
    return [min(max((i - low) / span, Decimal(0)), Decimal(1)) for i in range(model.qk_rope_head_dim // 2)]


def _cos_and_sin(phases: npt.NDArray[np.uint64]) -> tuple[Float64, Float64]:
    """Cosine and sine of phases in 2^-64 of a turn, any shape."""
    quarters = ((phases + np.uint64(1 << 61)) >> np.uint64(62)).astype(np.int64)
    rest = (phases - (quarters.astype(np.uint64) << np.uint64(62))).view(np.int64)
    x = rest.astype(np.float64) * (2 * math.pi * 2.0**-64)
    square = x * x
    cos = _polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(TERMS)])
    sin = x * _polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(TERMS)])
    # A quarter turn on: cos becomes -sin, sin becomes cos.
    return np.choose(quarters, [cos, -sin, -cos, sin]), np.choose(quarters, [sin, cos, -sin, -cos])


def _polynomial(x: Float64, coefficients: list[float]) -> Float64:
    """Their sum times powers of x, the first for x^0, by Horner's rule."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
