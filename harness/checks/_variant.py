"""Metamorphic checks: run a changed case and compare, token by token, with the launch at hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from cases import Case, Row
from cases.contract import Judge
from cases.schedule import sequences
from harness.budgets import Judgement, judge_rows, row_errors
from harness.checks._check import logit_errors, logit_spreads, same_bits, token_where
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status

TokenMap = list[tuple[int, int]]
"""Pairs (token of the launch, token of the variant) that must agree."""


def identity_map(launch: Launch) -> TokenMap:
    """Every token with itself, padding included."""
    return [(token, token) for token in range(launch.batch.metadata.tokens)]


def keyed_rows(launch: Launch) -> list[Row]:
    """The rows with their data keys written out, so that moving them does not change their data."""
    held = sequences(launch.case.steps)[0]
    return [
        row if sequence is None else replace(row, key=sequence.key)
        for row, sequence in zip(launch.case.steps[0], held, strict=True)
    ]


def needs_equal_bits(launch: Launch) -> bool:
    """Whether a changed batch must give the same bits: the path promises it, or the plan is pinned."""
    return launch.path.batch_invariant or launch.case.options.splits is not None


def compare(
    name: str, launch: Launch, variant: Case, tokens: TokenMap, *, bits: bool, what: str
) -> Iterator[CheckResult]:
    """Runs the variant and compares every output on the mapped tokens.

    Args:
        bits: equal bits, else both within budget of one another (twice the floor: each may be off by one).
        what: what was changed, for the reason of a failure.
    """
    changed = Launch.prepare(variant, launch.path, launch.lane)
    changed.run()
    yield from compare_launches(name, launch, changed, tokens, bits=bits, what=what)


def play(launch: Launch, schedule: Case) -> Iterator[Launch]:
    """The steps of a schedule on the launch's path, each launched on the caches the one before left."""
    earlier: Launch | None = None
    for step in range(len(schedule.steps)):
        played = Launch.prepare(schedule, launch.path, launch.lane, step, earlier)
        played.run()
        yield played
        earlier = played


def compare_launches(
    name: str, launch: Launch, changed: Launch, tokens: TokenMap, *, bits: bool, what: str
) -> Iterator[CheckResult]:
    """As `compare`, of two launches that have run."""
    for index in range(len(launch.layers)):
        for spec in launch.operator.outputs:
            base = launch.token_rows(spec.name, index)
            other = changed.token_rows(spec.name, index)
            label = launch.tensor_label(spec.name, index)
            if spec.axes[0] != "tokens" and spec.name not in launch.operator.in_place:
                # Not laid out by token: only a variant that moves no token can be compared with.
                if tokens == identity_map(launch) and base.shape == other.shape:
                    reason = f"{label} changes its bits when {what}"
                    yield same_bits(name, Kind.WRONG, launch, label, other, base, reason)
                continue
            # Of a cache only real tokens have rows; padding has no counterpart.
            pairs = [(a, b) for a, b in tokens if a < len(base) and b < len(other)]
            ours = torch.tensor([a for a, _ in pairs], dtype=torch.int64, device=base.device)
            theirs = torch.tensor([b for _, b in pairs], dtype=torch.int64, device=base.device)
            if bits or spec.judge in (Judge.BITS, Judge.EXACT, Judge.ROTATION, Judge.MERGE):
                expected = base.clone()
                got = base.clone()
                got[ours] = other[theirs]
                reason = f"{label} changes its bits when {what}"
                kind = Kind.NONDETERMINISTIC if name == "repeat" else Kind.WRONG
                yield same_bits(name, kind, launch, label, got, expected, reason)
            else:
                judged = _judge(launch, index, spec.name, base[ours], other[theirs], ours)
                yield _within(name, launch, label, judged, ours, what)


def _judge(launch: Launch, index: int, name: str, base: Tensor, other: Tensor, ours: Tensor) -> Judgement:
    """Errors of the variant's rows against the launch's, with twice the budget."""
    logit_error = logit_errors(launch, index, ours)
    if launch.operator.output(name).judge is Judge.LSE:
        left, right = base.double(), other.double()
        error = torch.where(left == right, 0.0, (left - right).abs())
        budget = torch.as_tensor(2 * logit_error, dtype=torch.float64).expand_as(error)
        return Judgement(error.nan_to_num(nan=torch.inf, posinf=torch.inf), budget)
    errors = row_errors(other, base)
    dtype = launch.layers[index].batch.layer.dtype
    nothing = torch.zeros_like(errors.largest)
    spread = logit_spreads(launch, index, name, ours)
    return judge_rows(dtype, errors, nothing, logit_error=logit_error, times=2, logit_spread=spread)


def _within(name: str, launch: Launch, label: str, judged: Judgement, ours: Tensor, what: str) -> CheckResult:
    error, budget = judged.error, judged.budget
    if not bool(judged.over.any()):
        return CheckResult(name, Status.PASSED, label)
    row = divmod(int((error / budget).argmax()), error.shape[1])
    failing = torch.zeros(
        (launch.batch.metadata.tokens, error.shape[1]), dtype=torch.bool, device=error.device
    )
    failing[ours] = judged.over
    return CheckResult(
        name,
        Status.FAILED,
        label,
        Kind.WRONG,
        f"{label} changes by more than its budget when {what}",
        error=float(error[row]),
        budget=float(budget[row]),
        budget_source="twice the floor: either side may be off by one",
        where=token_where(launch, failing, has_heads=True),
    )
