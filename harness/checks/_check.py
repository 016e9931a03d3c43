"""`CheckPlugin`: one question asked of a launch. One file of this folder holds one and ends in `CHECK`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cases.contract import Judge, Operator
from harness.budgets import lse_budgets
from harness.buffers import bytes_of
from harness.checks._rows import failing_blocks, failing_splits, row_pattern
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status, Where, Worst, ranges
from references.oracle import Writes


@dataclass(frozen=True)
class CheckPlugin:
    """One check.

    Attributes:
        name: as in `--check` and in suites.
        summary: one sentence.
        run: the results for a launch that has run. May launch again; leaves the launch's outputs as
            they were found only if it says so, hence checks that relaunch come last.
        lanes: lanes in which it makes sense.
        by_default: whether it applies to every operator unasked.
        relaunches: whether it launches again; it is then asked of cases of one step alone.
        plays: whether it makes schedules, which not every operator plays.
        varies: options that it changes; an operator without one of them is not asked.
        comes_first: whether it needs no oracle and, failing, makes the oracle's answer meaningless.
        explains: whether it explains what others found: asked last, where something failed, and also of a
            launch that did not come to its end. It does not fail.
    """

    name: str
    summary: str
    run: Callable[[Launch], Iterator[CheckResult]]
    lanes: tuple[str, ...] = ("interpreted", "host", "compiled")
    by_default: bool = False
    relaunches: bool = False
    plays: bool = False
    varies: tuple[str, ...] = ()
    comes_first: bool = False
    explains: bool = False

    def applies(self, operator: Operator, lane: str) -> bool:
        """Whether the check is part of every run of an operator in a lane."""
        return lane in self.lanes and (self.by_default or self.name in operator.checks)

    def exemption(self, launch: Launch) -> str | None:
        """Why the check says nothing of a launch, or None."""
        operator = launch.operator
        if self.relaunches and len(launch.case.steps) > 1:
            return "it launches again, which is asked of cases of one step"
        if self.plays and not operator.plays_schedules:
            return f"{operator.name} is judged on one step"
        missing = [option for option in self.varies if option not in operator.options]
        if missing:
            return f"{operator.name} has no option {missing[0]}: nothing to vary"
        return operator.exempt.get(self.name)


def bits_differ(got: Tensor, expected: Tensor) -> Tensor:
    """[..., n] -> [..., n] bool: elements whose bits differ. NaN equals NaN of the same bits."""
    if got.numel() == 0:
        return torch.zeros(got.shape, dtype=torch.bool, device=got.device)
    left, right = bytes_of(got.contiguous()), bytes_of(expected.contiguous())
    differs: Tensor = (left != right).view(*got.shape, got.dtype.itemsize).any(-1)
    return differs


def logit_errors(launch: Launch, index: int, tokens: Tensor | None = None) -> Tensor | float:
    """What the LSE of every (token, head) may be off by, of all tokens or some; 0 without logits.

    Raises:
        TypeError: the oracle's `logit_magnitude` is not a tensor.
    """
    magnitude = launch.expected(index).get("logit_magnitude")
    if magnitude is None:
        return 0.0
    if isinstance(magnitude, Writes):
        raise TypeError(f"the oracle of {launch.operator.name} must return logit_magnitude as a tensor")
    return lse_budgets(magnitude if tokens is None else magnitude[tokens])


def logit_spreads(launch: Launch, index: int, name: str, tokens: Tensor | None = None) -> Tensor | None:
    """How far roundings may move the logits of every (token, head), in units of one; None of one operator.

    Raises:
        TypeError: the oracle of a whole step has no `logit_spread`.
    """
    if launch.operator.output(name).judge is not Judge.LAYER:
        return None
    spread = launch.expected(index).get("logit_spread")
    if not isinstance(spread, Tensor):
        raise TypeError(f"the oracle of {launch.operator.name} must return logit_spread as a tensor")
    return spread if tokens is None else spread[tokens]


def token_where(launch: Launch, failing: Tensor, *, has_heads: bool, index: int = 0) -> Where:
    """Where a layer's failing elements lie. failing: [tokens], [tokens, heads], [tokens, dims] or both."""
    batch_ids = launch.batch.metadata.batch_id_per_token
    tokens = failing.reshape(len(failing), -1).any(1).nonzero().flatten().tolist()
    slots = [int(batch_ids[token]) for token in tokens]
    heads = dims = ""
    if has_heads:
        heads = ranges(failing.movedim(1, 0).flatten(1).any(1).nonzero().flatten().tolist())
    if failing.dim() == 3 or (failing.dim() == 2 and not has_heads):
        dims = ranges(failing.flatten(0, -2).any(0).nonzero().flatten().tolist())
    failing_rows = failing.reshape(*failing.shape[: 1 + has_heads], -1).any(-1)
    return Where(
        rows=ranges(slot for slot in slots if slot >= 0),
        tokens=ranges(tokens),
        heads=heads,
        dims=dims,
        splits=failing_splits(launch, index, failing_rows),
        blocks=failing_blocks(launch, index, failing_rows),
        pattern=row_pattern(launch, index, failing_rows),
    )


def same_bits(
    name: str, kind: Kind, launch: Launch, tensor: str, got: Tensor, expected: Tensor, reason: str
) -> CheckResult:
    """Passed if two results are the same bits, else failed with `reason` and the first place."""
    differs = bits_differ(got, expected)
    if not bool(differs.any()):
        return CheckResult(name, Status.PASSED, tensor)
    index = tuple(int(i) for i in differs.nonzero()[0].tolist())
    worst = Worst(index, float(got[index]), float(expected[index]))
    output, _, rest = tensor.partition("[")
    spec, layer = launch.operator.output(output), int(rest.rstrip("]") or 0)
    where = Where()
    if spec.axes[0] == "decode_tokens":
        # Told by the tokens that are packed there.
        metadata = launch.batch.metadata
        by_token = differs.new_zeros((metadata.tokens, *differs.shape[1:]))
        by_token[torch.from_numpy(metadata.packed_tokens).to(differs.device)] = differs
        where = token_where(launch, by_token, has_heads="num_attention_heads" in spec.axes, index=layer)
    elif spec.axes[0] == "tokens" or spec.name in launch.operator.in_place:
        where = token_where(launch, differs, has_heads="num_attention_heads" in spec.axes, index=layer)
    return CheckResult(name, Status.FAILED, tensor, kind, reason, worst=worst, where=where)
