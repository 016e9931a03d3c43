"""Faults of attention over lists of both kinds: which is read as what, what is merged, what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._attention import Attention, Token, histories_from_the_cache, of, static
from references.faults._fault import Answers, Fault, Question, Unwritten
from references.faults._tokens import has_history
from references.oracle import Inputs, Outputs, Writes, tensor

STATIC = ("static_attention",)
RESULTS = ("out", "lse")


def _with(question: Question, changed: Attention) -> Answers:
    """The right answer with another attention's results."""
    return {**question.truth, **changed.answer()}


def _reading(
    name: str, summary: str, source: str, read_of: Callable[[Inputs, Token], bool], form: str = ""
) -> Fault:
    """The fault of taking lists for rows of the cache where read_of(inputs, token), else for tokens."""

    def apply(question: Question) -> Answers:
        return _with(question, static(question.inputs, question.asked, read_of=read_of))

    return Fault(name, STATIC, summary, source, apply, form)


def _kinds() -> Iterator[Fault]:
    yield _reading(
        "lists-read-as-the-step",
        "lists of rows of the cache are followed as tokens of the step",
        "B39, B71",
        lambda _, token: False,
    )
    yield _reading(
        "lists-read-as-the-cache",
        "lists of tokens of the step are followed as rows of the cache",
        "B71",
        lambda _, token: True,
    )
    for name, summary, read, alone in (
        (
            "lists-read-as-the-step",
            "lists of rows of the cache are followed as tokens of the step",
            False,
            True,
        ),
        (
            "lists-read-as-the-cache",
            "lists of tokens of the step are followed as rows of the cache",
            True,
            False,
        ),
    ):

        def where_alone(question: Question, read: bool = read, alone: bool = alone) -> Answers:
            if not _has_one_kind(question.inputs, histories=alone):
                return question.truth
            return _with(question, static(question.inputs, question.asked, read_of=lambda *_: read))

        yield Fault(name, STATIC, summary, "B39, B71", where_alone, "where rows are of one kind")
    yield _reading(
        "history-ignored",
        "chunks with a history count as first chunks: their lists are followed as tokens of the step",
        "B39",
        lambda inputs, token: token.cached > 0 and not int(tensor(inputs, "seq_lens_encoder")[token.slot]),
    )
    for size in (16, 32, 64, 128):
        yield Fault(
            "block-size-is-a-literal",
            STATIC,
            "the block size is taken for another number",
            "B38",
            lambda question, size=size: question.with_inputs(indices=_repaged(question.inputs, size)),
            f"for {size}",
        )


def _has_one_kind(inputs: Inputs, *, histories: bool) -> bool:
    """Whether there are rows with a history, or first chunks, and none of the other kind."""
    real, history = tensor(inputs, "batch_id_per_token") >= 0, has_history(inputs)
    chosen, others = (history, ~history) if histories else (~history, history)
    return bool((real & chosen).any()) and not bool((real & others).any())


def _repaged(inputs: Inputs, size: int) -> Tensor:
    """Lists whose rows of the cache are looked for in blocks of another size."""
    lists, block_size = tensor(inputs, "indices").long(), tensor(inputs, "packed_cache").shape[2]
    paged = lists // block_size * size + lists % block_size
    return torch.where((lists >= 0) & has_history(inputs).view(-1, 1, 1), paged, lists)


# ---- the cache -----------------------------------------------------------------------------------


def _written() -> Iterator[Fault]:
    yield Fault(
        "nothing-written",
        STATIC,
        "new tokens never reach the cache",
        "B66, B37",
        lambda question: {
            **_before_the_write(question),
            "packed_cache": Writes(_rows(question).rows[:0], _rows(question).values[:0]),
        },
    )
    yield Fault(
        "nothing-written",
        STATIC,
        "new tokens never reach the cache",
        "B66, B37",
        lambda question: (
            {**question.truth, "packed_cache": Writes(_rows(question).rows[:0], _rows(question).values[:0])}
            if _has_one_kind(question.inputs, histories=False)
            else question.truth
        ),
        "where no row has a history",
    )
    yield Fault(
        "padding-unwritten",
        STATIC,
        "tokens of padding are never written",
        "E9, B22",
        lambda question: (
            _padding_left(question) if _has_one_kind(question.inputs, histories=True) else question.truth
        ),
        "where every row has a history",
    )
    yield Fault(
        "read-before-the-write",
        STATIC,
        "lists name this step's tokens, and the cache does not have them yet",
        "B66",
        _before_the_write,
    )
    for word in ("fp32", "ue8m0"):
        yield Fault(
            "scales-of-the-other-convention",
            STATIC,
            "scales are made as another cache's are: any number, or powers of two",
            "L34",
            lambda question, word=word: question.with_inputs(scale_fmt=word),
            f"always {word}",
        )


def _padding_left(question: Question) -> Answers:
    is_real = tensor(question.inputs, "batch_id_per_token") >= 0
    return {
        **question.truth,
        **{
            name: Unwritten(values, is_real)
            for name in RESULTS
            if isinstance(values := question.truth[name], Tensor)
        },
    }


def _rows(question: Question) -> Writes:
    writes = question.truth["packed_cache"]
    if not isinstance(writes, Writes):
        raise TypeError("packed_cache is written")
    return writes


def _before_the_write(question: Question) -> Answers:
    cache = tensor(question.inputs, "packed_cache")
    return _with(
        question, static(question.inputs, question.asked, read_of=histories_from_the_cache, cache=cache)
    )


# ---- two branches in one step --------------------------------------------------------------------


def _packed_tokens(inputs: Inputs) -> Tensor:
    """[n] int64: tokens of rows with a history, which are packed where there are first chunks beside them."""
    return has_history(inputs).nonzero().flatten()


def _is_mixed(inputs: Inputs) -> bool:
    """Whether a step has rows of both kinds: with one kind alone nothing is packed."""
    real = tensor(inputs, "batch_id_per_token") >= 0
    history = has_history(inputs)
    return bool(history.any()) and bool((real & ~history).any())


def _mixed(
    name: str, summary: str, source: str, change: Callable[[Question, Outputs], Answers], form: str = ""
) -> Fault:
    """The fault of a step with rows of both kinds: (question, its right answer) -> the answer."""

    def apply(question: Question) -> Answers | None:
        return change(question, question.truth) if _is_mixed(question.inputs) else None

    return Fault(name, STATIC, summary, source, apply, form)


def _emptied(
    question: Question,
    is_lost: Callable[[Token], bool],
    names: tuple[str, ...] = RESULTS,
    *,
    of_histories: bool = True,
) -> Answers:
    """Tokens of rows with a history for which the branch of first chunks has the last word: no key."""
    lost = [
        token.slot >= 0 and (token.cached > 0) is of_histories and is_lost(token)
        for token in of(question).tokens
    ]
    answers = dict(question.truth)
    for name in names:
        right = tensor(dict(question.truth), name)  # type: ignore[arg-type]
        mask = torch.tensor(lost, dtype=torch.bool, device=right.device)
        empty = 0.0 if name == "out" else -torch.inf
        answers[name] = right.masked_fill(mask.view(-1, *[1] * (right.dim() - 1)), empty)
    return answers


def _merged() -> Iterator[Fault]:
    yield _mixed(
        "prefill-branch-alone",
        "rows with a history have what the branch of first chunks left for them",
        "B25, B22",
        lambda question, _: _emptied(question, lambda token: True),
    )
    for tokens in (1, 8):
        yield _mixed(
            "first-tokens-merged",
            "of a row with a history only the first tokens are merged",
            "B21, B23",
            lambda question, _, tokens=tokens: _emptied(question, lambda token: token.place >= tokens),
            f"the first {tokens}" if tokens > 1 else "the first",
        )
    yield _mixed(
        "lse-not-merged",
        "the LSE of rows with a history is left behind",
        "O20",
        lambda question, _: _emptied(question, lambda token: True, ("lse",)),
    )
    yield _mixed(
        "decode-branch-alone",
        "first chunks have what the branch of histories gives the token of their number",
        "B25",
        _of_the_packed,
    )
    yield _mixed(
        "step-lists-emptied",
        "first chunks' lists are emptied, which those of histories should be",
        "B71",
        lambda question, _: _emptied(question, lambda token: True, of_histories=False),
    )
    yield _mixed(
        "merged-at-the-packed-place",
        "packed outputs are put at the front of the step",
        "B56",
        _at_the_front,
    )
    yield _mixed("branches-added", "both branches' results are added", "B52", _added)
    for form, what in (("queries", ("q",)), ("lists", ("indices",)), ("both", ("q", "indices"))):
        yield _mixed(
            "place-as-token",
            "packed token i has what token i of the step has",
            "B56, B71",
            lambda question, _, what=what: _of_packed_places(question, what),
            form,
        )


def _at_the_front(question: Question, truth: Outputs) -> Answers:
    packed = _packed_tokens(question.inputs)
    answers = dict(_emptied(question, lambda token: True))
    for name in RESULTS:
        values = answers[name]
        if isinstance(values, Tensor):
            moved = values.clone()
            moved[: len(packed)] = tensor(dict(truth), name)[packed]  # type: ignore[arg-type]
            answers[name] = moved
    return answers


def _of_the_packed(question: Question, truth: Outputs) -> Answers:
    packed = _packed_tokens(question.inputs)
    answers: dict[str, object] = dict(truth)
    for name in RESULTS:
        values = tensor(dict(truth), name)  # type: ignore[arg-type]
        answers[name] = values[packed[torch.arange(len(values)).clamp_max(len(packed) - 1)]]
    return answers  # type: ignore[return-value]


def _added(question: Question, truth: Outputs) -> Answers:
    """Of first chunks twice the same; of rows with a history what no key gives beside the right results."""
    is_history = has_history(question.inputs)
    out, lse = (tensor(dict(truth), name) for name in RESULTS)  # type: ignore[arg-type]
    return {
        **truth,
        "out": torch.where(is_history.view(-1, 1, 1), out, 2 * out),
        "lse": torch.where(is_history.view(-1, 1), -torch.inf, 2 * lse),
    }


def _of_packed_places(question: Question, what: tuple[str, ...]) -> Answers:
    packed = _packed_tokens(question.inputs)
    changed: dict[str, Tensor] = {}
    for name in what:
        given = tensor(question.inputs, name).clone()
        given[packed] = tensor(question.inputs, name)[: len(packed)]
        changed[name] = given
    return {**question.truth, **{name: question.with_inputs(**changed)[name] for name in RESULTS}}


# ---- steps without a row -------------------------------------------------------------------------


def _without_rows(change: Callable[[Outputs], Answers]) -> Callable[[Question], Answers | None]:
    def apply(question: Question) -> Answers | None:
        real = tensor(question.inputs, "batch_id_per_token") >= 0
        return None if bool(real.any()) else change(question.truth)

    return apply


def _nothing() -> Iterator[Fault]:
    yield Fault(
        "empty-step-unwritten",
        STATIC,
        "a step without a row of either kind leaves its outputs as memory had them",
        "B36, B51",
        _without_rows(
            lambda truth: {
                **truth,
                **{
                    name: Unwritten(values, torch.zeros(len(values), dtype=torch.bool))
                    for name in RESULTS
                    if isinstance(values := truth[name], Tensor)
                },
            }
        ),
    )
    yield Fault(
        "empty-step-has-an-lse",
        STATIC,
        "a step without a row of either kind has an LSE that says that there is a key",
        "B36, B27",
        _without_rows(lambda truth: {**truth, "lse": _zero(truth)}),
    )


def _zero(truth: Outputs) -> Tensor:
    return torch.zeros_like(tensor(dict(truth), "lse"))  # type: ignore[arg-type]


FAULTS = (*_kinds(), *_written(), *_merged(), *_nothing())
