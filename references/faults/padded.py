"""Faults of padding values to the width of keys, for kernels that take no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._attention import valued
from references.faults._fault import Answers, Fault, Question
from references.oracle import tensor

PADDED = ("prefill_attention",)


def _is_padded(question: Question) -> bool:
    """Whether keys are wider than values."""
    return tensor(question.inputs, "value").shape[2] < tensor(question.inputs, "key").shape[2]


def _shifted(columns: Tensor, by: int, filling: float) -> Tensor:
    """Columns with others in front of them, those behind the last are gone."""
    front = torch.full_like(columns[..., :by], filling)
    return torch.cat([front, columns], dim=-1)[..., : columns.shape[-1]]


def _valued(change: Callable[[Question, Tensor, int], Tensor]) -> Callable[[Question], Answers | None]:
    """The answer with other values: (question, values [Tk, H, V], the width of keys) -> the same shape."""

    def apply(question: Question) -> Answers | None:
        value, keys = tensor(question.inputs, "value"), tensor(question.inputs, "key").shape[2]
        if not _is_padded(question):
            return None
        made = valued(question, change(question, value, keys)).answer()
        return {**question.truth, "out": made["out"]}

    return apply


def _sliced(change: Callable[[Tensor, int, int], Tensor]) -> Callable[[Question], Answers | None]:
    """The answer with another part of the padded output: (out, its width, the width of keys) -> the same."""

    def apply(question: Question) -> Answers | None:
        width, keys = (tensor(question.inputs, name).shape[2] for name in ("value", "key"))
        if not _is_padded(question):
            return None
        return {**question.truth, "out": change(tensor(dict(question.truth), "out"), width, keys)}  # type: ignore[arg-type]

    return apply


def _new_alone(question: Question, value: Tensor, _: int) -> Tensor:
    """Values of as many tokens as are new, behind them what memory held."""
    count = len(tensor(question.inputs, "query"))
    is_padded = torch.arange(len(value), device=value.device) < count
    return torch.where(is_padded.view(-1, 1, 1), value, torch.nan)


def _behind_the_heads(_: Question, value: Tensor, keys: int) -> Tensor:
    """A token's heads follow one another, zeros behind the last, and are read as if each had its own."""
    tokens, heads, width = value.shape
    flat = torch.zeros(tokens, heads * keys, dtype=value.dtype, device=value.device)
    flat[:, : heads * width] = value.reshape(tokens, heads * width)
    return flat.view(tokens, heads, keys)[..., :width]


def _dense(_: Question, value: Tensor, keys: int) -> Tensor:
    """Values are written without padding and read with the strides of keys; behind them what memory held."""
    tokens, heads, width = value.shape
    flat = torch.full((tokens * heads * keys,), torch.nan, dtype=value.dtype, device=value.device)
    flat[: value.numel()] = value.reshape(-1)
    read = flat.view(tokens, heads, keys)
    read[..., width:] = 0.0
    return read[..., :width]


def _dense_output(out: Tensor, width: int, keys: int) -> Tensor:
    """The padded output read from its front on."""
    padded = torch.cat([out, torch.zeros_like(out[..., :1]).expand(*out.shape[:2], keys - width)], dim=-1)
    return padded.reshape(-1)[: out.numel()].view(out.shape)


def _right_end(out: Tensor, width: int, keys: int) -> Tensor:
    padded = torch.cat([out, torch.zeros_like(out[..., :1]).expand(*out.shape[:2], keys - width)], dim=-1)
    return padded[..., keys - width :]


def _faults() -> Iterator[Fault]:
    for filling, form in ((0.0, "zeros before them"), (torch.nan, "before them what memory held")):
        yield Fault(
            "values-padded-on-the-left",
            PADDED,
            "values are padded in front, and the output is sliced as if it were behind",
            "O07",
            _valued(
                lambda _, value, keys, filling=filling: _shifted(
                    value, min(keys - value.shape[2], value.shape[2]), filling
                )
            ),
            form,
        )
    values: list[tuple[str, str, str, Callable[[Question, Tensor, int], Tensor]]] = [
        (
            "padded-values-zeroed",
            "padding is zeroed together with the values",
            "O07",
            lambda _, value, keys: torch.zeros_like(value),
        ),
        (
            "padded-behind-the-last-head",
            "zeros stand behind a token's last head, not behind each",
            "O07",
            _behind_the_heads,
        ),
        (
            "history-not-padded",
            "as many values are padded as there are new tokens",
            "B02, O07",
            _new_alone,
        ),
        (
            "padded-values-read-as-dense",
            "values are stored as if they were not padded",
            "B49, O07",
            _dense,
        ),
    ]
    for name, summary, source, change in values:
        yield Fault(name, PADDED, summary, source, _valued(change))
    outputs: list[tuple[str, str, str, Callable[[Tensor, int, int], Tensor]]] = [
        (
            "padded-output-sliced-on-the-right",
            "the last columns of the padded output are kept",
            "O07",
            _right_end,
        ),
        (
            "padded-output-read-as-dense",
            "the padded output is read as if it were not padded",
            "B49, O07",
            _dense_output,
        ),
        (
            "padded-output-left",
            "the output stays where it was padded",
            "O07",
            lambda out, *_: torch.full_like(out, torch.nan),
        ),
    ]
    for name, summary, source, slicing in outputs:
        yield Fault(name, PADDED, summary, source, _sliced(slicing))


FAULTS = tuple(_faults())
