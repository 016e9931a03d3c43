"""Check `lse`: natural-log LSE within its budget, -inf exactly where no key is visible."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cases.contract import Judge
from harness.checks._check import CheckPlugin, token_where
from harness.checks._comparison import log_sums
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status, Worst
from references.oracle import Writes


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result an LSE output."""
    for index in range(len(launch.layers)):
        for spec in launch.operator.outputs:
            if spec.judge is Judge.LSE:
                yield _lse(launch, index, spec.name)


def _lse(launch: Launch, index: int, name: str) -> CheckResult:
    label = launch.tensor_label(name, index)
    outputs = launch.expected(index)
    expected, logit_magnitude = outputs[name], outputs["logit_magnitude"]
    if isinstance(expected, Writes) or isinstance(logit_magnitude, Writes):
        raise TypeError(f"the oracle of {launch.operator.name} must return tensors for {name}")
    got = launch.layers[index].outputs[name].view.to(expected.device, torch.float64)
    if got.numel() == 0:
        return CheckResult("lse", Status.PASSED, label)
    judged = log_sums(launch, index, name, expected, logit_magnitude)
    error, budget = judged.error, judged.budget
    row = divmod(int((error / budget).argmax()), error.shape[1])
    measured = {
        "error": float(error[row]),
        "budget": float(budget[row]),
        "budget_source": f"1e-6 + 64 * 2^-23 * magnitude of its logits {float(logit_magnitude[row]):.3g}",
        "worst": Worst(row, float(got[row]), float(expected[row])),
    }
    over = error > budget
    if not bool(over.any()):
        return CheckResult("lse", Status.PASSED, label, **measured)  # type: ignore[arg-type]
    reason = f"{int(over.sum()):,} of {over.numel():,} values of {label} are over budget"
    return CheckResult(
        "lse",
        Status.FAILED,
        label,
        Kind.WRONG,
        reason,
        where=token_where(launch, over, has_heads=True, index=index),
        **measured,  # type: ignore[arg-type]
    )


CHECK = CheckPlugin("lse", "LSE is natural-log, within budget, -inf exactly where no key is visible", run)
