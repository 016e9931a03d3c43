"""How an output is compared with an answer, the right one or a fault's: one judge a kind of output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases.contract import Judge
from harness.budgets import Judgement, judge_rows, lse_budgets, row_errors
from harness.checks._check import bits_differ, logit_errors, logit_spreads
from harness.launch import Launch
from harness.merge_budgets import merge_budgets
from harness.rope_budgets import rotation_budgets
from harness.tensors import DTYPES
from references.faults import Answers, Unwritten
from references.oracle import Writes


@dataclass(frozen=True)
class AttentionJudgement:
    """Rows of an attention output against an answer: [Tp, H] each.

    Attributes:
        judged: errors and budgets. baseline: what the emulation is off by.
        logit_error: what the row's LSE may be off by. spread: of a whole step, its logits' spread.
    """

    judged: Judgement
    baseline: Tensor
    logit_error: Tensor
    spread: Tensor | None


def attention(
    launch: Launch, index: int, name: str, answer: Tensor, tokens: Tensor | None = None
) -> AttentionJudgement:
    """The rows of an output of attention against an answer [Tp, H, V] float64, of all tokens or some.

    Raises:
        TypeError: the emulation has no tensor of that name.
    """
    layer = launch.layers[index]
    emulated, exact = launch.emulated(index)[name], launch.expected(index)[name]
    if isinstance(emulated, Writes) or isinstance(exact, Writes):
        raise TypeError(f"the emulation of {launch.operator.name} must return a tensor for {name}")
    got = layer.outputs[name].view.to(answer.device)
    if tokens is not None:
        got, answer, emulated, exact = (values[tokens] for values in (got, answer, emulated, exact))
    baseline = row_errors(emulated, exact).relative_l2
    logit_error = torch.as_tensor(logit_errors(launch, index, tokens)).expand_as(baseline)
    spread = logit_spreads(launch, index, name, tokens)
    judged = judge_rows(
        layer.batch.layer.dtype,
        row_errors(got, answer),
        baseline,
        logit_error=logit_error,
        logit_spread=spread,
    )
    return AttentionJudgement(judged, baseline, logit_error, spread)


def log_sums(launch: Launch, index: int, name: str, answer: Tensor, logit_magnitude: Tensor) -> Judgement:
    """An LSE against an answer [Tp, H] float64, whose logits' magnitudes are [Tp, H]."""
    got = launch.layers[index].outputs[name].view.to(answer.device, torch.float64)
    same = (got == answer) | (got.isnan() & answer.isnan())
    error = torch.where(same, 0.0, (got - answer).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Judgement(error, lse_budgets(logit_magnitude))


def rotation(launch: Launch, index: int, got: Tensor, answer: Tensor, products: Tensor) -> Judgement:
    """The elements of a rotation against an answer [Tp, ..., D] float64 of products [Tp, ..., D, 2]."""
    layer, got = launch.layers[index], got.to(answer.device, torch.float64)
    same = got.isnan() & answer.isnan()
    error = torch.where(same, 0.0, (got - answer).abs()).nan_to_num(nan=torch.inf)
    dtype, rounds_products = DTYPES[layer.batch.layer.dtype], launch.path.rounds_products
    return Judgement(error, rotation_budgets(answer, products, dtype, rounds_products=rounds_products))


def merge(launch: Launch, index: int, name: str, answer: Tensor, terms: Tensor) -> Judgement:
    """The elements of a merged state against an answer float64, whose terms are shaped as it is."""
    view = launch.layers[index].outputs[name].view
    got = view.to(answer.device, torch.float64)
    same = (got == answer) | (got.isnan() & answer.isnan())
    error = torch.where(same, 0.0, (got - answer).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return Judgement(error, merge_budgets(answer, terms, view.dtype))


def departs(launch: Launch, index: int, name: str, answers: Answers, tokens: Tensor | None = None) -> Tensor:
    """Where an output departs from answers, bool: [tokens, heads] of attention, else the output's elements.

    Of a tensor that is written in place, pieces of a row's length of its watched bytes. Of attention these
    `tokens` alone, if they are given.

    Raises:
        IndexError: an answer is written outside of its tensor.
    """
    spec, answer = launch.operator.output(name), answers[name]
    is_written = spec.judge is Judge.BITS
    if spec.judge is Judge.ROTATION and isinstance(answer, Writes):
        answer = _rounded_alike(launch, index, name, answer, _tensor(answers, f"{name}_products"))
        is_written = True
    if is_written:
        return _bytes_depart(launch, index, name, answer)
    if isinstance(answer, Writes):
        raise TypeError(f"{name} of {launch.operator.name} is a tensor, and a fault answers with writes")
    left = None
    if isinstance(answer, Unwritten):
        left, answer = _everywhere(~answer.written.to(answer.values.device), answer.values), answer.values
    if spec.judge is Judge.EXACT:
        return _bits_depart(launch, index, name, answer, left)
    if answer.numel() == 0:
        return torch.zeros(answer.shape[:2], dtype=torch.bool)
    if left is None:
        return _numbers_depart(launch, index, name, answers, answer, tokens)
    over = _numbers_depart(launch, index, name, answers, torch.where(left, torch.nan, answer), tokens)
    # Poison is NaN, but a NaN that was computed is not what was never written.
    held = launch.layers[index].outputs[name].holds_poison().to(left.device)
    written = left & ~held if tokens is None else (left & ~held)[tokens]
    return over | written.flatten(over.dim()).any(-1) if written.dim() > over.dim() else over | written


def _numbers_depart(
    launch: Launch, index: int, name: str, answers: Answers, answer: Tensor, tokens: Tensor | None
) -> Tensor:
    """Where an output departs from numbers that it may be off from by its budget."""
    judge = launch.operator.output(name).judge
    if judge is Judge.LSE:
        over = log_sums(launch, index, name, answer, _tensor(answers, "logit_magnitude")).over
        return over if tokens is None else over[tokens]
    if judge in (Judge.ROTATION, Judge.MERGE):
        return _elements_depart(launch, index, name, answers, answer)
    return attention(launch, index, name, answer, tokens).judged.over


def _elements_depart(launch: Launch, index: int, name: str, answers: Answers, answer: Tensor) -> Tensor:
    if launch.operator.output(name).judge is Judge.MERGE:
        return merge(launch, index, name, answer, _tensor(answers, f"{name}_terms")).over
    got = launch.layers[index].outputs[name].view
    return rotation(launch, index, got, answer, _tensor(answers, f"{name}_products")).over


def _tensor(answers: Answers, name: str) -> Tensor:
    value = answers[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"an oracle or a fault must return {name} as a tensor")
    return value


def _everywhere(mask: Tensor, values: Tensor) -> Tensor:
    """A mask of leading axes, for all elements."""
    return mask.view(*mask.shape, *[1] * (values.dim() - mask.dim())).expand_as(values)


def _bits_depart(launch: Launch, index: int, name: str, answer: Tensor, left: Tensor | None) -> Tensor:
    buffer = launch.layers[index].outputs[name]
    got = buffer.view
    expected = answer.to(got.device, got.dtype)
    if got.shape != expected.shape:
        raise IndexError(f"{name} has another shape with the fault")
    differs = bits_differ(got, expected)
    return differs if left is None else torch.where(left.to(got.device), ~buffer.holds_poison(), differs)


def _rounded_alike(launch: Launch, index: int, name: str, answer: Writes, products: Tensor) -> Writes:
    """Rotated rows [n, W] of a cache, with what the path made of them where that is within its budget."""
    view = launch.layers[index].outputs[name].view
    flat = view.view(-1, view.shape[-1])
    if bool(((answer.rows < 0) | (answer.rows >= len(flat))).any()):
        raise IndexError(f"rows outside of {name}")
    got = flat[answer.rows]
    over = rotation(launch, index, got, answer.values, products).over
    return Writes(answer.rows, torch.where(over, answer.values.to(got.dtype), got))


def _bytes_depart(launch: Launch, index: int, name: str, answer: Tensor | Writes | Unwritten) -> Tensor:
    layer = launch.layers[index]
    buffer = layer.outputs[name]
    flat = buffer.view.view(-1, buffer.view.shape[-1])
    after = buffer.snapshot()
    buffer.restore(layer.before[name])
    try:
        if isinstance(answer, Writes):
            if bool(((answer.rows < 0) | (answer.rows >= len(flat))).any()):
                raise IndexError(f"rows outside of {name}")
            flat[answer.rows] = answer.values.to(flat.dtype)
        elif isinstance(answer, Tensor):
            buffer.view.copy_(answer)
        else:
            raise TypeError(f"a fault says of {name} what is written, or all that is there")
        differs = buffer.snapshot() != after
    finally:
        buffer.restore(after)
    row_bytes = flat.shape[1] * flat.element_size()
    padded = torch.nn.functional.pad(differs, (0, -len(differs) % row_bytes))
    return padded.view(-1, row_bytes).any(1)
