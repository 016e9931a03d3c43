"""Faults of a whole step: of the weights that make keys and values, for one kind of rows or for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from references.faults._attention import of, pool, table_rows
from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import read_as_dense
from references.oracle import Inputs, Writes, tensor, text

STEP = ("mla_step",)
KINDS = {"": None, "prefill rows": True, "decode rows": False}


def _fault(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Inputs], Mapping[str, Tensor | float]],
    form: str = "",
) -> Iterator[Fault]:
    """The fault of other inputs, of all rows and of each kind; the cache is written as it should be."""
    for kind, of_prefill in KINDS.items():

        def apply(question: Question, of_prefill: bool | None = of_prefill) -> Answers:
            inputs = question.inputs
            right, made = question.truth, question.with_inputs(**change(inputs))
            is_prefill = tensor(inputs, "seq_lens_encoder") > 0
            of_tokens = is_prefill.repeat_interleave(tensor(inputs, "seq_lens_this_time").long())
            is_kind = torch.zeros(len(tensor(dict(right), "out")), dtype=torch.bool, device=is_prefill.device)  # type: ignore[arg-type]
            is_kind[: len(of_tokens)] = True if of_prefill is None else of_tokens == of_prefill
            out = torch.where(is_kind.view(-1, 1, 1), tensor(dict(made), "out"), tensor(dict(right), "out"))  # type: ignore[arg-type]
            return {**right, "out": out}

        yield Fault(name, STEP, summary, source, apply, ", ".join(part for part in (form, kind) if part))


def _weights() -> Iterator[Fault]:
    for step in (1, -1):
        way = f"of the head {'before' if step == 1 else 'behind'}"
        for weight, what in (("w_uk", "keys"), ("w_uv", "values")):
            yield from _fault(
                f"{what}-of-the-neighbour",
                f"a head's {what} are made with the weights of the one beside it",
                "L40",
                lambda inputs, weight=weight, step=step: {weight: tensor(inputs, weight).roll(step, 0)},
                way,
            )
    yield from _fault(
        "new-tokens-are-zero",
        "keys and values of the new tokens are made from zeros",
        "B02",
        lambda inputs: {name: tensor(inputs, name) * 0 for name in ("compressed_kv", "k_pe")},
    )
    yield from read_as_dense("mla_step", ("q_nope", "q_pe", "compressed_kv", "k_pe", "block_tables"))
    yield from read_as_dense("mla_decode", ("q", "block_tables"))
    yield from read_as_dense("prefill_attention", ("query", "key", "value"))


# ---- decode rows packed beside prefill rows ------------------------------------------------------


def _is_decode(inputs: Inputs) -> Tensor:
    """[Tp] bool: tokens of decode rows."""
    tokens = tensor(inputs, "seq_lens_this_time").long()
    of_tokens = (tensor(inputs, "seq_lens_encoder") == 0).repeat_interleave(tokens)
    found = torch.zeros(len(tensor(inputs, "q_nope")), dtype=torch.bool, device=of_tokens.device)
    found[: len(of_tokens)] = of_tokens
    return found


def _packed(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Question, Tensor, Tensor], Tensor],
    form: str = "",
) -> Fault:
    """The fault of a step with rows of both kinds: (question, output, decode tokens [n]) -> the output."""

    def apply(question: Question) -> Answers | None:
        inputs = question.inputs
        is_decode = _is_decode(inputs)
        count = int(tensor(inputs, "seq_lens_this_time").sum())
        if not bool(is_decode.any()) or bool(is_decode[:count].all()):
            return None
        right = tensor(dict(question.truth), "out")  # type: ignore[arg-type]
        return {**question.truth, "out": change(question, right.clone(), is_decode.nonzero().flatten())}

    return Fault(name, STEP, summary, source, apply, form)


def _places(question: Question) -> Tensor:
    """[Tp] int64: the place of each token in its row."""
    lengths = tensor(question.inputs, "seq_lens_this_time").long()
    found = torch.zeros(len(tensor(question.inputs, "q_nope")), dtype=torch.int64, device=lengths.device)
    begins = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    found[: len(begins)] = torch.arange(len(begins), device=lengths.device) - begins
    return found


def _at_the_front(_: Question, out: Tensor, packed: Tensor) -> Tensor:
    moved = out.clone()
    moved[packed] = 0.0
    moved[: len(packed)] = out[packed]
    return moved


def _by_token(_: Question, out: Tensor, packed: Tensor) -> Tensor:
    """Each decode token with the packed output at its number in the step, 0 behind the last."""
    taken = out.clone()
    taken[packed] = 0.0
    inside = packed[packed < len(packed)]
    taken[inside] = out[packed[inside]]
    return taken


def _all_by_token(_: Question, out: Tensor, packed: Tensor) -> Tensor:
    """Every token with the packed output at its number in the step, behind the last that one."""
    return out[packed[torch.arange(len(out), device=out.device).clamp_max(len(packed) - 1)]]


def _at_the_places_of_the_step(question: Question, out: Tensor, packed: Tensor) -> Tensor:
    """Decode tokens that see as many keys less as tokens of other rows stand before theirs in the step."""
    new = tensor(question.inputs, "seq_lens_this_time").long()
    others = torch.where(tensor(question.inputs, "seq_lens_encoder") > 0, new, 0)
    before = (others.cumsum(0) - others).tolist()
    changed = of(question).seeing(
        lambda token: range(token.first, max(token.seen - before[token.slot], token.first))
    )
    return out.index_copy(0, packed, changed.answer()["out"][packed])


def _merges() -> Iterator[Fault]:
    yield _packed(
        "positions-of-the-step",
        "packed decode tokens are counted from where their row begins in the step: their last keys are lost",
        "B21, T2",
        _at_the_places_of_the_step,
    )
    yield _packed(
        "merged-by-token",
        "a token has the packed output of its number in the step",
        "B25, B56",
        _all_by_token,
        "prefill rows too",
    )
    yield _packed(
        "merged-by-token",
        "a token has the packed output of its number in the step",
        "B56",
        lambda question, out, packed: out.index_copy(0, packed, _all_by_token(question, out, packed)[packed]),
        "the last one behind it",
    )
    yield _packed(
        "prefill-branch-alone",
        "decode rows have what the prefill branch left for them",
        "B22, B23",
        lambda question, out, packed: out.index_fill(0, packed, 0.0),
    )
    for tokens in (1, 4, 8):
        yield _packed(
            "first-tokens-merged",
            "of a decode row only the first tokens are merged",
            "B21, B23",
            lambda question, out, packed, tokens=tokens: out.index_fill(
                0, packed[_places(question)[packed] >= tokens], 0.0
            ),
            f"the first {tokens}" if tokens > 1 else "the first",
        )
    yield _packed(
        "decode-branch-alone",
        "prefill rows have what the decode branch left for them",
        "B22, B25",
        lambda question, out, packed: torch.zeros_like(out).index_copy(0, packed, out[packed]),
    )
    yield _packed(
        "merged-at-the-packed-place", "packed outputs are put at the front of the step", "B56", _at_the_front
    )
    yield _packed(
        "merged-by-token", "a token has the packed output of its number in the step", "B56", _by_token
    )
    parts = (
        ("both", ("q_nope", "q_pe")),
        ("the rotated part alone", ("q_pe",)),
        ("the other part", ("q_nope",)),
    )
    for form, names in parts:

        def of_packed_places(
            question: Question, out: Tensor, packed: Tensor, names: tuple[str, ...] = names
        ) -> Tensor:
            changed: dict[str, Tensor] = {}
            for name in names:
                changed[name] = tensor(question.inputs, name).clone()
                changed[name][packed] = tensor(question.inputs, name)[: len(packed)]
            made = tensor(dict(question.with_inputs(**changed)), "out")  # type: ignore[arg-type]
            return out.index_copy(0, packed, made[packed])

        yield _packed(
            "place-as-token",
            "decode token i has the query of token i of the step",
            "B56",
            of_packed_places,
            form,
        )


# ---- the cache, and steps of one kind ------------------------------------------------------------


def _is_packed(inputs: Inputs) -> bool:
    return tensor(inputs, "latent_cache").dtype == torch.uint8


def _before_the_write(question: Question) -> Tensor:
    """[Tp, H, V]: outputs where the new tokens' keys are what the cache held before the step."""
    cache = pool(question.inputs)
    rows = table_rows(
        tensor(question.inputs, "block_tables"), cache.shape[2], cache.shape[0] * cache.shape[2]
    )
    return replace(of(question), row_of=rows).seeing(lambda token: token.visible).answer()["out"]


def _from_the_cache(question: Question) -> Tensor:
    """[Tp] bool: tokens that find the step's own in the cache: all of a packed one, else decode rows'."""
    is_decode = _is_decode(question.inputs)
    return torch.ones_like(is_decode) if _is_packed(question.inputs) else is_decode


def _with_out(question: Question, changed: Tensor, is_changed: Tensor) -> Answers:
    right = tensor(dict(question.truth), "out")  # type: ignore[arg-type]
    return {**question.truth, "out": torch.where(is_changed.view(-1, 1, 1), changed, right)}


def _nothing_written(question: Question, of_prefill: bool) -> Answers | None:
    """The cache as it was, in a step without rows of a kind."""
    is_kind = (tensor(question.inputs, "seq_lens_encoder") > 0) == of_prefill
    writes = question.truth["latent_cache"]
    if bool((is_kind & (tensor(question.inputs, "seq_lens_this_time") > 0)).any()):
        return None
    if not isinstance(writes, Writes):
        raise TypeError("latent_cache is written")
    answers = _with_out(question, _before_the_write(question), _from_the_cache(question))
    return {**answers, "latent_cache": Writes(writes.rows[:0], writes.values[:0])}


def _unrotated_in_the_cache(question: Question) -> Answers:
    """New tokens whose rotated part is 0 in the cache; prefill rows find their own beside it."""
    made = question.with_inputs(k_pe=tensor(question.inputs, "k_pe") * 0)
    answers = _with_out(question, tensor(dict(made), "out"), _from_the_cache(question))  # type: ignore[arg-type]
    return {**answers, "latent_cache": made["latent_cache"]}


def _unwritten_out(question: Question, is_lost: Tensor) -> Answers | None:
    if not bool(is_lost.any()):
        return None
    right = tensor(dict(question.truth), "out")  # type: ignore[arg-type]
    return _with_out(question, torch.full_like(right, torch.nan), is_lost)


def _is_padding(question: Question) -> Tensor:
    tokens = torch.arange(len(tensor(question.inputs, "q_nope")))
    return tokens >= int(tensor(question.inputs, "seq_lens_this_time").sum())


def _steps() -> Iterator[Fault]:
    yield Fault(
        "read-before-the-write",
        STEP,
        "tokens attend before those of the step are in the cache: their keys are what it held",
        "P5, B66",
        lambda question: _with_out(question, _before_the_write(question), _from_the_cache(question)),
    )
    for of_prefill, kind in ((False, "decode"), (True, "prefill")):
        yield Fault(
            "nothing-written",
            STEP,
            "a step without rows of one kind does not write its tokens",
            "P1",
            lambda question, of_prefill=of_prefill: _nothing_written(question, of_prefill),
            f"without {kind} rows",
        )
    yield Fault(
        "rope-is-zero",
        STEP,
        "the rotated part of the new tokens is 0 in the cache",
        "M7, L34",
        _unrotated_in_the_cache,
        "for the tokens of the step, too",
    )
    yield Fault(
        "scales-are-powers-of-two",
        STEP,
        "new tokens are packed with scales that are powers of two, whatever the cache is read with",
        "L34",
        lambda question: (
            question.with_inputs(scale_fmt="ue8m0")
            if _is_packed(question.inputs) and text(question.inputs, "scale_fmt") != "ue8m0"
            else None
        ),
    )
    yield Fault(
        "empty-step-unwritten",
        STEP,
        "a step without a row to compute leaves its output as it was",
        "B51",
        lambda question: (
            _unwritten_out(question, _is_padding(question))
            if int(tensor(question.inputs, "seq_lens_this_time").sum()) == 0
            else None
        ),
    )
    yield Fault(
        "padding-unwritten",
        STEP,
        "tokens of padding are never written",
        "E9, B22",
        lambda question: (
            None
            if _has_prefill(question) or not bool(_is_decode(question.inputs).any())
            else _unwritten_out(question, _is_padding(question))
        ),
        "in a step of decode rows alone",
    )


def _has_prefill(question: Question) -> bool:
    return bool((tensor(question.inputs, "seq_lens_encoder") > 0).any())


FAULTS = (*_weights(), *_merges(), *_steps())
