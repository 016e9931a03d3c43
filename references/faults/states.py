"""Faults of merging two attention states: what an LSE means, what an empty one leaves, what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import log

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import changing, read_as_dense, tokens_unwritten
from references.oracle import Inputs, tensor

STATES = ("merge_states",)
PARTS = ("prefix", "suffix")
LN_2 = log(2)


def _asked(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Inputs], Mapping[str, Tensor | float | str | None]],
    form: str = "",
) -> Fault:
    return changing(name, STATES, summary, source, change, form)


def _answering(
    name: str, summary: str, source: str, answer: Callable[[Question], Answers | None], form: str = ""
) -> Fault:
    return Fault(name, STATES, summary, source, answer, form)


def _lse(inputs: Inputs, part: str) -> Tensor:
    return tensor(inputs, f"{part}_lse").to(torch.float64)


def _truth(question: Question, name: str) -> Tensor:
    return tensor({name: question.truth[name]}, name)  # type: ignore[dict-item]


def _by_head(lses: Tensor) -> Tensor:
    """[Tp, H] whose numbers are taken for [H, Tp] in the order of memory."""
    return lses.contiguous().view(lses.shape[1], lses.shape[0]).T


def _base_2(question: Question) -> Answers:
    """Both LSEs are of base 2: shares are of powers of 2, and the sum's LSE is of base 2 as well."""
    made = {f"{part}_lse": _lse(question.inputs, part) * LN_2 for part in PARTS}
    answers = question.with_inputs(**made)
    lse, terms = (tensor(answers, name) for name in ("lse", "lse_terms"))  # type: ignore[arg-type]
    return {**answers, "lse": lse / LN_2, "lse_terms": terms / LN_2}


def _plain_exponentials(question: Question) -> Answers:
    """Exponentials of the LSEs themselves, in float32."""
    logs = [_lse(question.inputs, part) for part in PARTS]
    empty = [log.isinf() for log in logs]
    worth = [torch.exp(torch.where(no, -torch.inf, log).float()) for log, no in zip(logs, empty, strict=True)]
    total = worth[0] + worth[1]
    out = torch.zeros_like(_truth(question, "out"))
    for part, no, share in zip(PARTS, empty, worth, strict=True):
        values = torch.where(no.unsqueeze(-1), 0.0, tensor(question.inputs, f"{part}_out").double())
        out += (share / total).double().unsqueeze(-1) * values
    out[empty[0] & empty[1]] = 0.0
    return {**question.truth, "out": out, "lse": torch.log(total).double()}


def _undivided(question: Question) -> Answers:
    """Outputs weighed by exponentials beside the larger one's 1, not divided by their sum."""
    logs = [_lse(question.inputs, part) for part in PARTS]
    logs = [torch.where(log.isinf(), -torch.inf, log) for log in logs]
    total = torch.exp(_truth(question, "lse") - torch.maximum(*logs)).nan_to_num(0.0)
    return {**question.truth, "out": _truth(question, "out") * total.unsqueeze(-1)}


def _lse_as(question: Question, choose: Callable[[Tensor, Tensor], Tensor]) -> Answers:
    """The LSE of one of the states in the place of the merged one, where there are two."""
    prefix, suffix = (_lse(question.inputs, part) for part in PARTS)
    both = ~prefix.isinf() & ~suffix.isinf()
    return {**question.truth, "lse": torch.where(both, choose(prefix, suffix), _truth(question, "lse"))}


def _sum_without_keys(question: Question) -> Answers | None:
    """What is left undecided where neither state has a key."""
    empty = _truth(question, "lse").isneginf()
    if not bool(empty.any()):
        return None
    lse = torch.where(empty, torch.nan, _truth(question, "lse"))
    out = torch.where(empty.unsqueeze(-1), torch.nan, _truth(question, "out"))
    return {**question.truth, "out": out, "lse": lse}


def _no_keys_weigh_1(question: Question) -> Answers:
    right = _truth(question, "lse")
    return {**question.truth, "lse": torch.where(right.isneginf(), 0.0, right)}


def _empty_read(question: Question, part: str) -> Answers:
    """The output of an empty state times 0: NaN where it holds NaN, 0 else."""
    values = tensor(question.inputs, f"{part}_out").to(torch.float64)
    empty = _lse(question.inputs, part).isinf().unsqueeze(-1)
    return {**question.truth, "out": _truth(question, "out") + torch.where(empty, values * 0.0, 0.0)}


def _sign_kept(question: Question, part: str) -> Answers:
    """+inf is an LSE like any other, and the largest: the state is all there is, and its exponential NaN."""
    infinite = _lse(question.inputs, part).isposinf()
    out = torch.where(infinite.unsqueeze(-1), torch.nan, _truth(question, "out"))
    return {**question.truth, "out": out, "lse": torch.where(infinite, torch.nan, _truth(question, "lse"))}


def _faults() -> Iterator[Fault]:
    yield _answering("base-2-lse", "natural LSEs are taken for base 2", "S3, SGLang #40903", _base_2)
    yield _answering(
        "no-largest-subtracted",
        "exponentials of the LSEs themselves overflow or vanish",
        "S8",
        _plain_exponentials,
    )
    yield _answering("shares-not-divided", "shares add up to more than 1", "S8", _undivided)
    for name, choose in (
        ("the larger", torch.maximum),
        ("the prefix", lambda prefix, _: prefix),
        ("the suffix", lambda _, suffix: suffix),
    ):
        yield _answering(
            "lse-of-one-state",
            "the LSE of one state is handed on",
            "S4",
            lambda question, choose=choose: _lse_as(question, choose),
            name,
        )
    yield _answering(
        "no-key-is-nan",
        "where neither state has a key stands NaN",
        "vLLM #28181, FlashInfer #4051",
        _sum_without_keys,
    )
    yield _answering("no-key-weighs-1", "the LSE of no key is 0", "S8", _no_keys_weigh_1)
    for part, other in (PARTS, PARTS[::-1]):
        yield _answering(
            "empty-state-read",
            "the output of an empty state is read and weighed by 0: NaN stays NaN",
            "B52",
            lambda question, part=part: _empty_read(question, part),
            part,
        )
        yield _answering(
            "plus-infinity-is-an-lse",
            "an LSE of +inf is the largest there is, not that of no key",
            "vLLM #15492",
            lambda question, part=part: _sign_kept(question, part),
            part,
        )
        yield _asked(
            "state-lost",
            "one of the states is left out",
            "B23",
            lambda inputs, part=part: {f"{part}_lse": torch.full_like(_lse(inputs, part), -torch.inf)},
            part,
        )
        yield _asked(
            "one-lse-for-both",
            "both states are weighed by the LSE of one",
            "S4",
            lambda inputs, part=part, other=other: {
                f"{other}_lse": torch.where(
                    _lse(inputs, other).isinf() | _lse(inputs, part).isinf(),
                    _lse(inputs, other),
                    _lse(inputs, part),
                )
            },
            f"the {part}'s",
        )
        yield _asked(
            "lse-by-head",
            "LSEs are read as [heads, tokens]",
            "P17",
            lambda inputs, part=part: {f"{part}_lse": _by_head(tensor(inputs, f"{part}_lse"))},
            part,
        )
    yield from read_as_dense("merge_states", ("prefix_out", "suffix_out", "prefix_lse", "suffix_lse"))
    yield from tokens_unwritten("merge_states", ("out", "lse"), (16, 32, 64))


FAULTS = tuple(_faults())
