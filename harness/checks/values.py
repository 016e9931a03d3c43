"""Check `values`: outputs equal the oracle's, bit for bit or within the budget of each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from cases.contract import Judge
from harness.budgets import budget_source
from harness.checks._check import (
    CheckPlugin,
    bits_differ,
    same_bits,
    token_where,
)
from harness.checks._comparison import attention
from harness.checks._merge import merge
from harness.checks._parts import first_part
from harness.checks._rotation import rotation
from harness.checks._stages import stages
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status, Where, Worst, ranges
from references.oracle import Writes


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result an output that is judged by bits, as attention, by element, or one a stage."""
    for index in range(len(launch.layers)):
        if launch.operator.is_stack:
            yield from stages(launch, index)
            continue
        for result in _outputs(launch, index):
            part = first_part(launch, index) if result.status is Status.FAILED else ""
            told = f"{result.reason}; the first part that departs is {part}"
            yield replace(result, reason=told) if part else result


def _outputs(launch: Launch, index: int) -> Iterator[CheckResult]:
    for spec in launch.operator.outputs:
        if spec.judge is Judge.BITS:
            yield _bits(launch, index, spec.name)
        elif spec.judge is Judge.EXACT:
            yield _exact(launch, index, spec.name)
        elif spec.judge in (Judge.ATTENTION, Judge.LAYER):
            yield _attention(launch, index, spec.name)
        elif spec.judge is Judge.ROTATION:
            yield rotation(launch, index, spec.name)
        elif spec.judge is Judge.MERGE:
            yield merge(launch, index, spec.name)


def _exact(launch: Launch, index: int, name: str) -> CheckResult:
    label = launch.tensor_label(name, index)
    expected = launch.expected(index)[name]
    if isinstance(expected, Writes):
        raise TypeError(f"the oracle of {launch.operator.name} must return a tensor for {name}")
    got = launch.layers[index].outputs[name].view
    if got.numel() == 0:
        return CheckResult("values", Status.PASSED, label)
    differs = bits_differ(got, expected.to(got.device, got.dtype))
    count = int(differs.sum())
    reason = f"{count:,} of {differs.numel():,} elements of {label} differ"
    return same_bits("values", Kind.WRONG, launch, label, got, expected.to(got.device, got.dtype), reason)


def _bits(launch: Launch, index: int, name: str) -> CheckResult:
    label = launch.tensor_label(name, index)
    writes = launch.expected(index)[name]
    if not isinstance(writes, Writes):
        raise TypeError(f"the oracle of {launch.operator.name} must return Writes for {name}")
    view = launch.layers[index].outputs[name].view
    got = view.view(-1, view.shape[-1])[writes.rows]
    differs = bits_differ(got, writes.values)
    if not bool(differs.any()):
        return CheckResult("values", Status.PASSED, label)
    place = tuple(int(i) for i in differs.nonzero()[0].tolist())
    worst = Worst(place, float(got[place]), float(writes.values[place]))
    rows = writes.rows[differs.any(1)]
    # A token has a row for every head of the cache, one after another.
    heads = view.shape[-3]
    written = differs.any(1).nonzero().flatten()
    tokens = (written // heads).tolist()
    where = Where(
        rows=ranges(int(launch.batch.metadata.batch_id_per_token[token]) for token in tokens),
        tokens=ranges(tokens),
        heads=ranges((written % heads).tolist()) if heads > 1 else "",
        dims=ranges(differs.any(0).nonzero().flatten().tolist()),
        blocks=ranges((rows // (heads * view.shape[-2])).tolist()),
    )
    reason = f"{int(differs.sum()):,} of {differs.numel():,} elements of {label} differ in their bits"
    return CheckResult("values", Status.FAILED, label, Kind.WRONG, reason, worst=worst, where=where)


def _attention(launch: Launch, index: int, name: str) -> CheckResult:
    label = launch.tensor_label(name, index)
    layer = launch.layers[index]
    dtype = layer.batch.layer.dtype
    expected = launch.expected(index)[name]
    if isinstance(expected, Writes):
        raise TypeError(f"the oracle of {launch.operator.name} must return a tensor for {name}")
    got = layer.outputs[name].view.to(expected.device)
    if got.numel() == 0:
        return CheckResult("values", Status.PASSED, label)
    compared = attention(launch, index, name, expected)
    judged, baseline, spread = compared.judged, compared.baseline, compared.spread
    row = divmod(int((judged.error / judged.budget).argmax()), baseline.shape[1])
    row_error, row_budget = float(judged.error[row]), float(judged.budget[row])
    measured = {
        "error": row_error,
        "budget": row_budget,
        "budget_source": budget_source(
            dtype,
            row_budget,
            float(baseline[row]),
            float(compared.logit_error[row]),
            None if spread is None else float(spread[row]),
        ),
        "worst": _worst_element(got, expected, row),
    }
    if row_error <= row_budget:
        return CheckResult("values", Status.PASSED, label, **measured)  # type: ignore[arg-type]
    over = judged.over
    failing = over.unsqueeze(-1) & _elements_over(got, expected, judged.budget)
    reason = (
        f"{int(over.sum()):,} of {over.numel():,} (token, head) rows of {label} are over budget, "
        f"the worst by {row_error / row_budget:.1f} x"
    )
    return CheckResult(
        "values",
        Status.FAILED,
        label,
        Kind.WRONG,
        reason,
        where=token_where(launch, failing, has_heads=True, index=index),
        **measured,  # type: ignore[arg-type]
    )


def _worst_element(got: torch.Tensor, expected: torch.Tensor, row: tuple[int, int]) -> Worst:
    difference = (got[row].to(torch.float64) - expected[row]).abs().nan_to_num(torch.inf)
    dim = int(difference.argmax())
    return Worst((*row, dim), float(got[row][dim]), float(expected[row][dim]))


def _elements_over(got: torch.Tensor, expected: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Elements that are off by more than the budget allows of their row's largest; at least the worst."""
    difference = (got.to(torch.float64) - expected).abs().nan_to_num(torch.inf)
    allowed = budget * expected.abs().amax(-1)
    return (difference > allowed.unsqueeze(-1)) | (difference == difference.amax(-1, keepdim=True))


CHECK = CheckPlugin("values", "outputs equal the oracle's within budget, copies bit for bit", run)
