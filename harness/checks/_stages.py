"""How check `values` judges a whole model: stage by stage in the order they are computed, row by row.

The unit is one token's row in one layer. What it may be off by is `FACTOR` times what an emulation of the
definition in the path's dtypes is off by at that stage, in the mean of its rows or in this row if that is
more: errors of the stages before are in both. A rounding before a softmax moves one logit and with it the
whole row, by chance much or little: of clean runs the worst rows are some 4 times as far off as the mean of
an emulation's. Never less than `FLOORS`: where next to nothing is rounded, one emulation says little. The
first result that fails names the stage that was broken; those behind it inherit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from harness.budgets import row_errors
from harness.launch import Launch
from harness.tensors import DTYPES
from harness.verdict import CheckResult, Kind, Status, Where, Worst, ranges
from references.oracle import Precision, Writes, oracle_for

FACTOR = 8.0
FLOORS = {"bf16": 4e-3, "fp16": 6e-4, "fp32": 4e-5}
"""Relative L2 error of a row that is never held against a path: of half precision about one rounding of its
elements. In fp32 nothing is rounded but sums, whose order an emulation does not share: over several seeds
the worst clean row of suite logits was 1.9e-5 off on an H100. With `FACTOR`, bf16 used 0.54 and fp16 0.21."""


def first_stage(launch: Launch, index: int) -> tuple[str, int] | None:
    """Name and layer of the first stage that departs, in the order they are computed; None if none does."""
    for result in stages(launch, index):
        if result.status is Status.FAILED:
            name, _, number = result.tensor.partition("[")
            return name, int(number.rstrip("]") or 0)
    return None


def stage_departs(launch: Launch, index: int, name: str, number: int, answer: Tensor | Writes) -> Tensor:
    """[T] bool: real tokens of one layer's stage that an answer, right or a fault's, does not give."""
    per_layer = "num_layers" in launch.operator.output(name).axes
    num_layers = launch.layers[index].batch.axes["num_layers"]
    right = launch.expected(index)[name]
    values = (launch.token_rows(name, index), answer, right, launch.emulated(index)[name])
    rows = (_rows(value, number, num_layers) if per_layer else _tensor(value) for value in values)
    real = int(launch.batch.metadata.cu_seqlens_q[-1])
    got, told, exact, emulated = (
        value[:real].to(answer.values.device if isinstance(answer, Writes) else answer.device, torch.float64)
        for value in rows
    )
    budget = _budgets(launch, row_errors(emulated.flatten(1), exact.flatten(1)).relative_l2)
    return ~(row_errors(got.flatten(1), told.flatten(1)).relative_l2 <= budget)


def _budgets(launch: Launch, baseline: Tensor) -> Tensor:
    """[T] float64: what rows of a stage may be off by, of what an emulation's are off by."""
    floor = FLOORS[launch.layers[0].batch.layer.dtype]
    return (FACTOR * torch.maximum(baseline, baseline.mean())).clamp_min(floor)


def stages(launch: Launch, index: int) -> Iterator[CheckResult]:
    """One result a layer and stage, in the order they are computed."""
    operator, layer = launch.operator, launch.layers[index]
    dtype = DTYPES[layer.batch.layer.dtype]
    emulated = oracle_for(operator.name, "definition").run(layer.inputs, Precision(dtype, dtype))
    exact = launch.expected(index)
    num_layers = layer.batch.axes["num_layers"]
    for number in range(num_layers):
        for spec in operator.outputs:
            if "num_layers" in spec.axes:
                name, got = spec.name, launch.token_rows(spec.name, index)
                three = (_rows(values, number, num_layers) for values in (got, exact[name], emulated[name]))
                yield _judged(launch, f"{name}[{number}]", *three)
    for spec in operator.outputs:
        if "num_layers" not in spec.axes:
            values = (launch.token_rows(spec.name, index), exact[spec.name], emulated[spec.name])
            yield _judged(launch, spec.name, *(_tensor(value) for value in values))


def _tensor(values: Tensor | Writes) -> Tensor:
    return values.values if isinstance(values, Writes) else values


def _rows(values: Tensor | Writes, number: int, num_layers: int) -> Tensor:
    """One layer's rows: of a stage, or of what was written to the caches, layer after layer."""
    if isinstance(values, Writes) or values.dim() == 2:
        return _tensor(values).chunk(num_layers)[number]
    return values[number]


def _judged(launch: Launch, label: str, got: Tensor, expected: Tensor, emulated: Tensor) -> CheckResult:
    real = int(launch.batch.metadata.cu_seqlens_q[-1])
    not_finite = ~got[real:].flatten(1).isfinite().all(1)
    if bool(not_finite.any()):
        where = Where(tokens=ranges(real + index for index in not_finite.nonzero().flatten().tolist()))
        reason = (
            f"{label} is not finite at padding, where quantisation behind it would take its largest value"
        )
        return CheckResult("values", Status.FAILED, label, Kind.WRONG, reason, where=where)
    if real == 0:
        return CheckResult("values", Status.PASSED, label)
    got, expected, emulated = (
        values[:real].to(expected.device, torch.float64).flatten(1) for values in (got, expected, emulated)
    )
    baseline = row_errors(emulated, expected).relative_l2
    mean = baseline.mean()
    floor = FLOORS[launch.layers[0].batch.layer.dtype]
    budget = _budgets(launch, baseline)
    error = row_errors(got, expected).relative_l2
    over = ~(error <= budget)
    token = int((error / budget).nan_to_num(torch.inf).argmax())
    dim = int((got[token] - expected[token]).abs().nan_to_num(torch.inf).argmax())
    measured = {
        "error": float(error[token]),
        "budget": float(budget[token]),
        "budget_source": (
            f"{FACTOR:.0f} x the emulation's error, {float(baseline[token]):.1e} in this row and "
            f"{float(mean):.1e} in the mean, at least {floor:.0e}"
        ),
        "worst": Worst((token, dim), float(got[token, dim]), float(expected[token, dim])),
    }
    if not bool(over.any()):
        return CheckResult("values", Status.PASSED, label, **measured)  # type: ignore[arg-type]
    tokens = over.nonzero().flatten().tolist()
    slots = launch.batch.metadata.batch_id_per_token
    return CheckResult(
        "values",
        Status.FAILED,
        label,
        Kind.WRONG,
        f"{label} departs: {len(tokens):,} of {real:,} tokens are over budget, the worst by "
        f"{float(error[token] / budget[token]):.1f} x",
        where=Where(rows=ranges(int(slots[index]) for index in tokens), tokens=ranges(tokens)),
        **measured,  # type: ignore[arg-type]
    )
