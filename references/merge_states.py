"""Merged attention states by their definition: two shares of the sum of exponentials, and its logarithm.

    lse = ln(exp(lse_p) + exp(lse_s))
    out = exp(lse_p - lse) out_p + exp(lse_s - lse) out_s

A state with an infinite LSE has no share, whatever its output holds; without any, out is 0 and lse -inf.
With a `Precision` the same lines run in float32 and the output is rounded once, as a kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from references.oracle import Inputs, Oracle, Precision, tensor

PARTS = ("prefix", "suffix")


def run(inputs: Inputs, precision: Precision | None = None) -> dict[str, Tensor]:
    """Out [Tp, H, V] and lse [Tp, H], float64, and what their roundings are of, shaped as they are.

    `out_terms` is the sum of (1 + |lse_i - the larger lse|) |share_i out_i| over both states, `lse_terms`
    1 + |lse|; 0 where both states are empty.
    """
    working = torch.float64 if precision is None else torch.float32
    logs = [tensor(inputs, f"{part}_lse").to(working) for part in PARTS]
    logs = [torch.where(log.isinf(), -torch.inf, log) for log in logs]
    # exp(lse_i - lse), without the rounding that lse has had.
    shares = torch.softmax(torch.stack(logs), 0)
    lse, largest = torch.logaddexp(*logs), torch.maximum(*logs)
    out = torch.zeros(tensor(inputs, "prefix_out").shape, dtype=working, device=lse.device)
    terms = torch.zeros_like(out)
    for part, log, share in zip(PARTS, logs, shares, strict=True):
        has_keys = ~log.isneginf()
        share, gap = torch.where(has_keys, share, 0.0), torch.where(has_keys, largest - log, 0.0)
        values = torch.where(has_keys.unsqueeze(-1), tensor(inputs, f"{part}_out").to(working), 0.0)
        out += share.unsqueeze(-1) * values
        terms += ((1 + gap) * share).unsqueeze(-1) * values.abs()
    if precision is not None:
        out = out.to(precision.output)
    return {
        "out": out.to(torch.float64),
        "lse": lse.to(torch.float64),
        "out_terms": terms.to(torch.float64),
        "lse_terms": torch.where(lse.isneginf(), 0.0, 1 + lse.abs()).to(torch.float64),
    }


ORACLE = Oracle(
    name="merge_states",
    operator="merge_states",
    role="definition",
    source="arXiv:2501.01005 section 2.2, the operator on attention states",
    run=run,
)
