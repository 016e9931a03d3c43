"""Faults of a whole step: of the weights that make keys and values, for one kind of rows or for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import read_as_dense
from references.oracle import Inputs, tensor

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


FAULTS = tuple(_weights())
