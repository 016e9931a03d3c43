"""Merged attention states again, in NumPy, from the middle of the two LSEs: a mean and half a difference.

With c = (lse_p + lse_s) / 2 and h = (lse_p - lse_s) / 2, the sum of exponentials is e^c (e^h + e^-h), and the
prefix has (1 + tanh h) / 2 of it:

    lse = c + ln(2 cosh h)
    out = (out_p + out_s) / 2 + tanh(h) (out_p - out_s) / 2

Where a state is empty nothing is computed: the other one is the result as it stands.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor

Float64 = npt.NDArray[np.float64]


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, V] and lse [Tp, H], float64, on the host.

    Raises:
        ValueError: a precision other than float64 is asked for.
    """
    if precision is not None:
        raise ValueError("the derivation by halves exists in float64 only, got a Precision")
    prefix, prefix_log = _array(inputs, "prefix_out"), _array(inputs, "prefix_lse")
    suffix, suffix_log = _array(inputs, "suffix_out"), _array(inputs, "suffix_lse")
    has_prefix, has_suffix = ~np.isinf(prefix_log), ~np.isinf(suffix_log)
    out, lse = np.zeros(prefix.shape), np.full(prefix_log.shape, -np.inf)
    for alone, values, logs in (
        (has_prefix & ~has_suffix, prefix, prefix_log),
        (has_suffix & ~has_prefix, suffix, suffix_log),
    ):
        out[alone], lse[alone] = values[alone], logs[alone]

    both = has_prefix & has_suffix
    middle = (prefix_log[both] + suffix_log[both]) / 2
    half = (prefix_log[both] - suffix_log[both]) / 2
    # cosh overflows where the two are far apart: its larger exponential is taken out.
    apart = np.abs(half)
    lse[both] = middle + apart + np.log1p(np.exp(-2 * apart))
    mean, tilt = (prefix[both] + suffix[both]) / 2, np.tanh(half)[:, None]
    out[both] = mean + tilt * (prefix[both] - suffix[both]) / 2
    return {"out": torch.from_numpy(out), "lse": torch.from_numpy(lse)}


def _array(inputs: Inputs, name: str) -> Float64:
    return tensor(inputs, name).to(torch.float64).cpu().numpy()


ORACLE = Oracle(
    name="merge_states_halved",
    operator="merge_states",
    role="derivation",
    source="arXiv:1805.02867 section 3, the sums of two parts, written by hyperbolic functions",
    run=run,
)
