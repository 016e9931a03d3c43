"""Faults of merging two attention states: what an LSE means, what an empty one leaves, what each is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import log

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question, Unwritten
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


def _in_memory_by_head(lses: Tensor) -> Tensor:
    """The same of what lies in memory, where tokens are farther apart than they have heads."""
    flat = lses.as_strided((lses.numel(),), (1,), lses.storage_offset())
    return flat.view(lses.shape[1], lses.shape[0]).T


def _by_head(lses: Tensor) -> Tensor:
    """[Tp, H] whose numbers are taken for [H, Tp] in the order of memory."""
    return lses.contiguous().view(lses.shape[1], lses.shape[0]).T


def _base_2(question: Question) -> Answers:
    """Both LSEs are of base 2: shares are of powers of 2, and the sum's LSE is of base 2 as well."""
    made = {f"{part}_lse": _lse(question.inputs, part) * LN_2 for part in PARTS}
    answers = question.with_inputs(**made)
    lse, terms = (tensor(answers, name) for name in ("lse", "lse_terms"))  # type: ignore[arg-type]
    return {**answers, "lse": lse / LN_2, "lse_terms": terms / LN_2}


def _smaller(prefix: Tensor, suffix: Tensor) -> Tensor:
    """The smaller LSE; of one that is of no key, -inf, the other."""
    both = ~prefix.isinf() & ~suffix.isinf()
    return torch.where(both, torch.minimum(prefix, suffix), torch.maximum(prefix, suffix))


def _exponentials(question: Question, subtracted: Callable[[Tensor, Tensor], Tensor]) -> Answers:
    """Exponentials of the LSEs less something that is not the larger one, in float32."""
    logs = [_lse(question.inputs, part) for part in PARTS]
    empty = [log.isinf() for log in logs]
    logs = [torch.where(no, -torch.inf, log) for log, no in zip(logs, empty, strict=True)]
    base = torch.where(empty[0] & empty[1], 0.0, subtracted(*logs))
    worth = [torch.exp((log - base).float()) for log in logs]
    total = worth[0] + worth[1]
    out = torch.zeros_like(_truth(question, "out"))
    for part, no, share in zip(PARTS, empty, worth, strict=True):
        values = torch.where(no.unsqueeze(-1), 0.0, tensor(question.inputs, f"{part}_out").double())
        out += (share / total).double().unsqueeze(-1) * values
    out[empty[0] & empty[1]] = 0.0
    return {**question.truth, "out": out, "lse": base + torch.log(total).double()}


def _weighed(
    question: Question, shares_of: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Answers:
    """Outputs by other shares of the states' exponentials beside the larger one's 1, and of their sum."""
    logs = [torch.where((log := _lse(question.inputs, part)).isinf(), -torch.inf, log) for part in PARTS]
    base = torch.where(logs[0].isinf() & logs[1].isinf(), 0.0, torch.maximum(*logs))
    worth = [torch.exp(log - base) for log in logs]
    total = torch.where(worth[0] + worth[1] == 0.0, 1.0, worth[0] + worth[1])
    out = torch.zeros_like(_truth(question, "out"))
    for part, log, share in zip(PARTS, logs, shares_of(worth[0], worth[1], total), strict=True):
        out += share.unsqueeze(-1) * _values(question, part, log)
    return {**question.truth, "out": out}


def _values(question: Question, part: str, lses: Tensor) -> Tensor:
    """[Tp, H, V] float64: a state's output, 0 where it has no key."""
    return torch.where(lses.isinf().unsqueeze(-1), 0.0, tensor(question.inputs, f"{part}_out").double())


def _of_part(part: str, share: Tensor, prefix: Tensor, suffix: Tensor) -> tuple[Tensor, Tensor]:
    """The shares with another in the place of one state's."""
    return (share, suffix) if part == "prefix" else (prefix, share)


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


def _read_where_minus_infinity(question: Question, part: str, *, alone: bool) -> Answers:
    """Only +inf is of no key: a state of -inf is read, times 0; without a key beside it NaN, or whole."""
    values = tensor(question.inputs, f"{part}_out").double()
    read = _lse(question.inputs, part).isneginf()
    neither = read & _truth(question, "lse").isneginf()
    out = _truth(question, "out") + torch.where(read.unsqueeze(-1), values * 0.0, 0.0)
    lse = _truth(question, "lse")
    if alone:
        return {**question.truth, "out": torch.where(neither.unsqueeze(-1), values, out)}
    out = torch.where(neither.unsqueeze(-1), torch.nan, out)
    return {**question.truth, "out": out, "lse": torch.where(neither, torch.nan, lse)}


def _without_output(question: Question) -> Answers | None:
    """The outputs of tokens without a key are undecided, beside the right LSE."""
    empty = _truth(question, "lse").isneginf()
    if not bool(empty.any()):
        return None
    out = _truth(question, "out").masked_fill(empty.unsqueeze(-1), torch.nan)
    return {**question.truth, "out": out}


def _logarithm_to_base_2(question: Question, *, of_the_sum: bool) -> Answers:
    lse = _truth(question, "lse")
    largest = torch.maximum(
        *(torch.where((log := _lse(question.inputs, part)).isinf(), -torch.inf, log) for part in PARTS)
    )
    base = torch.where(lse.isinf() | (not of_the_sum), 0.0, largest)
    return {**question.truth, "lse": base + (lse - base) / LN_2}


def _base_2_shares(question: Question) -> Answers:
    """Shares are of powers of 2, and the logarithm of their sum is natural."""
    lse = _truth(question, "lse")
    logs = [torch.where((log := _lse(question.inputs, part)).isinf(), -torch.inf, log) for part in PARTS]
    made = question.with_inputs(**{f"{part}_lse": _lse(question.inputs, part) * LN_2 for part in PARTS})
    largest = torch.maximum(*logs)
    merged = torch.where(lse.isinf(), lse, largest + tensor(made, "lse") - largest * LN_2)  # type: ignore[arg-type]
    return {**made, "lse": merged, "lse_terms": question.truth["lse_terms"]}


def _by_rounded_lse(question: Question, part: str) -> Answers:
    """A share is the exponential of its LSE less the merged one, rounded to float32."""
    merged = _truth(question, "lse").float().double()

    def shares_of(prefix: Tensor, suffix: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        log = _lse(question.inputs, part)
        share = torch.where(log.isinf(), 0.0, torch.exp(torch.where(log.isinf(), 0.0, log - merged)))
        return _of_part(part, share, prefix / total, suffix / total)

    return _weighed(question, shares_of)


def _products_rounded(question: Question, parts: tuple[str, ...]) -> Answers:
    """What a state adds is rounded to the dtype of outputs first."""
    right = _truth(question, "lse")
    out = torch.zeros_like(_truth(question, "out"))
    for part in PARTS:
        own = _lse(question.inputs, part)
        share = torch.where(own.isinf(), 0.0, torch.exp(torch.where(own.isinf(), 0.0, own - right)))
        product = share.unsqueeze(-1) * _values(question, part, own)
        if part in parts:
            product = product.float().to(tensor(question.inputs, f"{part}_out").dtype).double()
        out += product
    return {**question.truth, "out": out}


def _rounded(share: Tensor, dtype: torch.dtype) -> Tensor:
    return share.float().to(dtype).double()


def _written_by_head(question: Question) -> Answers:
    """LSEs are put where they lie of [heads, tokens]."""
    moved = {
        name: _truth(question, name).T.contiguous().view(_truth(question, name).shape)
        for name in ("lse", "lse_terms")
    }
    return {**question.truth, **moved}


def _rows_lost(question: Question, size: int) -> Answers:
    """Rows of a token and a head each that fill no program of so many are never written."""
    tokens, heads = _truth(question, "lse").shape
    rows = torch.arange(tokens * heads).view(tokens, heads)
    written = rows < max(size, tokens * heads // size * size)
    return {
        **question.truth,
        **{name: Unwritten(_truth(question, name), written) for name in ("out", "lse")},
    }


def _columns_lost(question: Question, size: int) -> Answers | None:
    """Columns that fill no word, or no program, of so many are never written."""
    out = _truth(question, "out")
    if out.shape[2] <= size or out.shape[2] % size == 0:
        return None
    written = (torch.arange(out.shape[2]) < out.shape[2] // size * size).expand(out.shape)
    return {**question.truth, "out": Unwritten(out, written)}


def _faults() -> Iterator[Fault]:
    yield _answering("base-2-lse", "natural LSEs are taken for base 2", "S3, SGLang #40903", _base_2)
    yield _answering(
        "base-2-lse",
        "natural LSEs are taken for base 2",
        "S3, SGLang #40903",
        _base_2_shares,
        "the sum's logarithm is natural",
    )
    for form, of_the_sum in (("", False), ("that of the sum alone", True)):
        yield _answering(
            "lse-base-2",
            "the LSE is a logarithm to base 2",
            "S3, S4",
            lambda question, of_the_sum=of_the_sum: _logarithm_to_base_2(question, of_the_sum=of_the_sum),
            form,
        )
    subtractions: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
        ("", lambda prefix, _: torch.zeros_like(prefix)),
        ("but the smaller", _smaller),
        ("but the prefix", lambda prefix, suffix: torch.where(prefix.isinf(), suffix, prefix)),
        ("but the suffix", lambda prefix, suffix: torch.where(suffix.isinf(), prefix, suffix)),
    )
    for form, subtracted in subtractions:
        yield _answering(
            "no-largest-subtracted",
            "exponentials of the LSEs themselves overflow or vanish",
            "S8",
            lambda question, subtracted=subtracted: _exponentials(question, subtracted),
            form,
        )
    yield _answering("shares-not-divided", "shares add up to more than 1", "S8", _undivided)
    yield _answering(
        "lse-written-by-head",
        "LSEs are written as [heads, tokens]",
        "P17",
        _written_by_head,
    )
    yield _answering(
        "no-key-is-nan",
        "where neither state has a key stands NaN",
        "vLLM #28181, FlashInfer #4051",
        _without_output,
        "in the output alone",
    )
    for dtype in (torch.float16, torch.bfloat16):
        yield _answering(
            "through-another-dtype",
            "numbers pass through another dtype on their way",
            "D7",
            lambda question, dtype=dtype: {
                **question.truth,
                "out": _rounded(_truth(question, "out"), dtype),
            },
            f"through {str(dtype).removeprefix('torch.')}",
        )
    for parts, form in ((PARTS[:1], PARTS[0]), (PARTS[1:], PARTS[1]), (PARTS, "both")):
        yield _answering(
            "products-rounded",
            "what a state adds is rounded before the sum",
            "D7",
            lambda question, parts=parts: _products_rounded(question, parts),
            form,
        )
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
        yield _asked(
            "lse-by-head",
            "LSEs are read as [heads, tokens]",
            "P17",
            lambda inputs, part=part: {f"{part}_lse": _in_memory_by_head(tensor(inputs, f"{part}_lse"))},
            f"{part}, as it lies in memory",
        )
        yield from _shares(part, other)
    for size in (4, 8, 16, 32, 64, 128):
        yield _answering(
            "launch-rounded-down",
            "the last tokens, which fill no program of their own, are never written",
            "E2",
            lambda question, size=size: _rows_lost(question, size),
            f"programs of {size} heads of tokens",
        )
    for size in (4, 8, 16, 32, 64, 128, 256, 512, 1024):
        yield _answering(
            "columns-rounded-down",
            "the last columns of a head, which fill no word or program of their own, are never written",
            "D3",
            lambda question, size=size: _columns_lost(question, size),
            f"{size} at a time",
        )
    yield from read_as_dense("merge_states", ("prefix_out", "suffix_out", "prefix_lse", "suffix_lse"))
    yield from tokens_unwritten("merge_states", ("out", "lse"), (16, 32, 64))


def _shares(part: str, other: str) -> Iterator[Fault]:
    """Faults of what one state is worth."""
    shares: list[tuple[str, str, str, Callable[[Tensor, Tensor, Tensor], Tensor], str]] = [
        (
            "shares-not-divided",
            "shares add up to more than 1",
            "S8",
            lambda own, _, total: own,
            f"the {part}'s",
        ),
        (
            "shares-exchanged",
            "a state is weighed by the share of the other",
            "S5",
            lambda own, beside, total: beside / total,
            part,
        ),
        (
            "smaller-state-dropped",
            "a state whose LSE is the smaller one is left out, and the other's share stays as it is",
            "S5",
            lambda own, beside, total: torch.where(own < beside, 0.0, own / total),
            part,
        ),
        (
            "lone-state-halved",
            "a state beside an empty one is not taken whole",
            "E4",
            lambda own, beside, total: torch.where(beside == 0.0, 0.5, 1.0) * own / total,
            part,
        ),
        *[
            (
                "shares-rounded",
                "shares are rounded to half precision before they weigh",
                "D7",
                lambda own, beside, total, dtype=dtype: _rounded(own / total, dtype),
                f"the {part}'s, to {str(dtype).removeprefix('torch.')}",
            )
            for dtype in (torch.bfloat16, torch.float16)
        ],
    ]
    for name, summary, source, share_of, form in shares:

        def shares_of(
            prefix: Tensor,
            suffix: Tensor,
            total: Tensor,
            share_of: Callable[[Tensor, Tensor, Tensor], Tensor] = share_of,
        ) -> tuple[Tensor, Tensor]:
            own, beside = (prefix, suffix) if part == "prefix" else (suffix, prefix)
            return _of_part(part, share_of(own, beside, total), prefix / total, suffix / total)

        yield _answering(
            name, summary, source, lambda question, shares_of=shares_of: _weighed(question, shares_of), form
        )
    yield _answering(
        "shares-of-the-rounded-lse",
        "a share is the exponential of the LSE less the merged one, which has been rounded",
        "S4",
        lambda question: _by_rounded_lse(question, part),
        part,
    )
    for alone, form in ((False, "NaN without any key"), (True, "the state itself without any key")):
        yield _answering(
            "empty-state-read",
            "the output of an empty state is read and weighed by 0: NaN stays NaN",
            "B52",
            lambda question, alone=alone: _read_where_minus_infinity(question, part, alone=alone),
            f"{part}, where its LSE is -inf: {form}",
        )
    for least in (-3e4, -1e4, -1e5):
        yield _asked(
            "low-lse-is-no-key",
            "a number stands for minus infinity: LSEs below it are taken for those of no key",
            "S8",
            lambda inputs, least=least: {
                f"{part}_lse": _lse(inputs, part).masked_fill(_lse(inputs, part) <= least, -torch.inf)
            },
            f"{part}, below {least:g}",
        )
    yield _asked(
        "lse-of-the-first-head",
        "a token's heads share the LSE of its first",
        "D6",
        lambda inputs: {f"{part}_lse": _lse(inputs, part)[:, :1].expand_as(_lse(inputs, part))},
        part,
    )


FAULTS = tuple(_faults())
