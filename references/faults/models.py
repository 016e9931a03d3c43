"""Faults of a whole model: scales and norms left out, weights read in another order, wrong rotations.

Of a model the first stage that departs is compared, for those behind it inherit. So a fault may say that
stage alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import places
from references.oracle import Inputs, maybe_tensor, number, tensor

MODEL = ("mla_logits",)
NORMS = ("input_layernorm", "q_a_layernorm", "kv_a_layernorm", "post_attention_layernorm", "norm")


def _asked(
    name: str,
    summary: str,
    source: str,
    change: Callable[[Inputs], dict[str, Tensor | float] | None],
    form: str = "",
) -> Fault:
    """The fault of a model with other weights or scales; none where they are the same."""

    def apply(question: Question) -> Answers | None:
        changed = change(question.inputs)
        return None if changed is None else question.with_inputs(**changed)

    return Fault(name, MODEL, summary, source, apply, form)


def _divided(weights: tuple[str, ...], scale: str) -> Callable[[Inputs], dict[str, Tensor | float] | None]:
    """Weights divided by a scale that is multiplied with what they give."""

    def change(inputs: Inputs) -> dict[str, Tensor | float] | None:
        by = number(inputs, scale)
        return None if by == 1.0 else {name: tensor(inputs, name).double() / by for name in weights}

    return change


def _heads(inputs: Inputs) -> tuple[int, int, int]:
    """H, N and N + V of kv_b_proj's rows."""
    nope = int(number(inputs, "qk_nope_head_dim"))
    rotated = nope + _rope_width(inputs)
    query = maybe_tensor(inputs, "q_b_proj")
    heads = (tensor(inputs, "q_proj") if query is None else query).shape[1] // rotated
    return heads, nope, tensor(inputs, "kv_b_proj").shape[1] // heads


def _rope_width(inputs: Inputs) -> int:
    return tensor(inputs, "latent_cache").shape[4] - tensor(inputs, "kv_b_proj").shape[2]


def _of_rows(
    change: Callable[[Tensor, int], Tensor],
) -> Callable[[Inputs], dict[str, Tensor | float]]:
    """kv_b_proj with its rows in another order: ([L, H, N + V, R], N) -> the same."""

    def changed(inputs: Inputs) -> dict[str, Tensor | float]:
        weight = tensor(inputs, "kv_b_proj")
        heads, nope, width = _heads(inputs)
        rows = weight.view(len(weight), heads, width, weight.shape[2])
        return {"kv_b_proj": change(rows, nope).reshape(weight.shape)}

    return changed


def _without_weight(name: str) -> Callable[[Inputs], dict[str, Tensor | float] | None]:
    """A norm's weight of ones; nothing where the model has no such norm."""

    def change(inputs: Inputs) -> dict[str, Tensor | float] | None:
        weight = maybe_tensor(inputs, name)
        return None if weight is None else {name: torch.ones_like(weight)}

    return change


def _weights() -> Iterator[Fault]:
    yield _asked(
        "embedding-not-scaled",
        "what embeddings are multiplied by is left out",
        "P1",
        _divided(("embed_tokens",), "scale_emb"),
    )
    for form, weights in (
        ("behind attention", ("o_proj",)),
        ("behind the MLP", ("down_proj",)),
        ("both", ("o_proj", "down_proj")),
    ):
        yield _asked(
            "residual-not-scaled",
            "a branch is added to the residual stream without the model's scale",
            "B68",
            _divided(weights, "residual_scale"),
            form,
        )
    yield _asked(
        "logits-not-divided",
        "the divisor of the last norm's output is left out",
        "P1",
        lambda inputs: (
            None
            if number(inputs, "logits_divisor") == 1.0
            else {"lm_head": tensor(inputs, "lm_head").double() * number(inputs, "logits_divisor")}
        ),
    )
    yield _asked(
        "mlp-reads-the-attention-norm",
        "the MLP's input has the weight of the layer's first norm",
        "P1",
        lambda inputs: {"post_attention_layernorm": tensor(inputs, "input_layernorm")},
    )
    for name in NORMS:
        yield _asked(
            "norm-without-its-weight",
            "what is normalised is not multiplied by the norm's weight",
            "P1, B68",
            _without_weight(name),
            name,
        )
    scales: list[tuple[str, str, Callable[[Inputs], int]]] = [
        (
            "scale-without-mscale",
            "the softmax scale is made from a head's width alone, without YaRN's m squared",
            lambda inputs: int(number(inputs, "qk_nope_head_dim")) + _rope_width(inputs),
        ),
        (
            "scale-from-latent-width",
            "the softmax scale is made from the width of a latent row, R + D",
            lambda inputs: tensor(inputs, "latent_cache").shape[4],
        ),
    ]
    for name, summary, width_of in scales:
        yield _asked(
            name,
            summary,
            "L41, S9",
            lambda inputs, width_of=width_of: {"softmax_scale": width_of(inputs) ** -0.5},
        )
    for step in (1, -1):
        yield _asked(
            "values-shifted",
            "rows of the values are shifted",
            "B49, L40",
            _of_rows(
                lambda rows, nope, step=step: torch.cat(
                    [rows[:, :, :nope], rows[:, :, nope:].roll(step, 2)], dim=2
                )
            ),
            f"by {step}",
        )
        yield _asked(
            "neighbours-head",
            "a head has the weights of the one beside it",
            "O22, L40",
            _of_rows(lambda rows, nope, step=step: rows.roll(step, 1)),
            f"of the head {'before' if step == 1 else 'behind'}",
        )
    yield _asked(
        "halves-exchanged",
        "a head's block is taken to hold values before keys",
        "L40",
        _of_rows(lambda rows, nope: rows.roll(nope, 2)),
    )
    yield _asked(
        "layout-ignored",
        "a checkpoint is read as the other layout's",
        "L40",
        lambda inputs: {
            "kv_b_proj": (weight := tensor(inputs, "kv_b_proj")).mT.reshape(weight.shape),
        },
    )


# ---- rotations of the query ----------------------------------------------------------------------


def _turned(
    name: str, summary: str, source: str, change: Callable[[Inputs, Tensor, Tensor], Tensor], form: str = ""
) -> Fault:
    """The fault of another q_pe: (inputs, its raw part [L, T, H, D], positions [T]) -> the same."""

    def apply(question: Question) -> Answers | None:
        inputs = question.inputs
        if maybe_tensor(inputs, "cos_sin_cache") is None:
            return None
        right = tensor(dict(question.truth), "q_pe")  # type: ignore[arg-type]
        q = tensor(dict(question.truth), "q").view(*right.shape[:3], -1)  # type: ignore[arg-type]
        made = change(inputs, q[..., -right.shape[3] :], tensor(inputs, "position_ids").long())
        real = tensor(inputs, "batch_id_per_token") >= 0
        return {"q_pe": torch.where(real.view(1, -1, 1, 1), made, right)}

    return Fault(name, MODEL, summary, source, apply, form)


def _rotated(inputs: Inputs, raw: Tensor, positions: Tensor, *, is_neox: bool) -> Tensor:
    """[L, T, H, D] turned by [T] positions. Raises IndexError outside of the table."""
    real = tensor(inputs, "batch_id_per_token") >= 0
    table = tensor(inputs, "cos_sin_cache").double()
    if bool(((positions < 0) | (positions >= len(table)))[real].any()):
        raise IndexError("a position outside of the table")
    cos, sin = table[torch.where(real, positions, 0)].unsqueeze(1).chunk(2, dim=-1)
    low, high = raw.chunk(2, dim=-1) if is_neox else (raw[..., 0::2], raw[..., 1::2])
    turned = (low * cos - high * sin, high * cos + low * sin)
    return torch.cat(turned, dim=-1) if is_neox else torch.stack(turned, dim=-1).flatten(-2)


def _has_history(inputs: Inputs) -> Tensor:
    """[Tp] bool: whose row has cached tokens."""
    ids = tensor(inputs, "batch_id_per_token").long()
    return (tensor(inputs, "seq_lens_decoder")[ids.clamp_min(0)] > 0) & (ids >= 0)


def _neox(inputs: Inputs) -> bool:
    return bool(number(inputs, "is_neox"))


def _rotations() -> Iterator[Fault]:
    yield _turned("unrotated", "a part is handed on as it was projected", "L45", lambda inputs, raw, at: raw)
    yield _turned(
        "pairing-exchanged",
        "pairs are taken half split where the model interleaves them, or the other way round",
        "L45",
        lambda inputs, raw, at: _rotated(inputs, raw, at, is_neox=not _neox(inputs)),
    )
    yield _turned(
        "positions-from-0",
        "positions are counted from the row's first new token",
        "B01",
        lambda inputs, raw, at: _rotated(
            inputs, raw, places(tensor(inputs, "batch_id_per_token").long()), is_neox=_neox(inputs)
        ),
    )
    for step in (1, -1):
        yield _turned(
            "position-off-by-one",
            "tokens of rows with a history turn as if they stood one position beside their own",
            "B01, B69",
            lambda inputs, raw, at, step=step: _rotated(
                inputs, raw, at + step * _has_history(inputs), is_neox=_neox(inputs)
            ),
            f"{'behind' if step == 1 else 'before'} it",
        )


FAULTS = (*_weights(), *_rotations())
