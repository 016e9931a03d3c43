"""Faults of a whole model: scales and norms left out, weights read in another order, wrong rotations.

Of a model the first stage that departs is compared, for those behind it inherit. So a fault may say that
stage alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn import functional

from references.faults._fault import Answers, Fault, Question
from references.faults._tokens import places
from references.oracle import Inputs, Outputs, Writes, maybe_tensor, number, tensor

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


# ---- single stages -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stages:
    """What the stages of every layer are made of, in float64.

    Attributes:
        hidden: [L, T, hidden], what a layer's first norm is of. eps: of that norm.
    """

    inputs: Inputs
    truth: Outputs
    hidden: Tensor
    eps: float

    def weight(self, name: str) -> Tensor:
        """A weight of all layers."""
        return tensor(self.inputs, name).double()

    def norm(self, values: Tensor, name: str, *, left_out: str, eps: float | None = None) -> Tensor:
        """RMSNorm of [L, T, n] by a norm's weight [L, n]; the values where that is left out."""
        if name == left_out:
            return values
        size = values.square().mean(-1, keepdim=True) + (self.eps if eps is None else eps)
        return values * size.rsqrt() * self.weight(name).unsqueeze(-2)

    def q(self, left_out: str) -> Tensor:
        """Queries [L, T, H (N + D)] without one of the norms before them."""
        normed = self.norm(self.hidden, "input_layernorm", left_out=left_out)
        if maybe_tensor(self.inputs, "q_proj") is not None:
            return normed @ self.weight("q_proj").mT
        compressed = normed @ self.weight("q_a_proj").mT
        compressed = self.norm(compressed, "q_a_layernorm", left_out=left_out, eps=LATENT_NORM_EPS)
        return compressed @ self.weight("q_b_proj").mT

    def latent_and_rope(self, left_out: str) -> Tensor:
        """What the latent and the rotated part of keys are cut out of, [L, T, R + D]."""
        normed = self.norm(self.hidden, "input_layernorm", left_out=left_out)
        return normed @ self.weight("kv_a_proj_with_mqa").mT

    def stage(self, name: str) -> Tensor:
        """A stage as it should be."""
        return tensor(dict(self.truth), name).double()  # type: ignore[arg-type]


LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm, whatever the config's."""


def _stages_of(question: Question) -> _Stages:
    inputs = question.inputs
    hidden = tensor(dict(question.truth), "hidden").double()  # type: ignore[arg-type]
    embedded = tensor(inputs, "embed_tokens")[tensor(inputs, "token_ids").long().clamp_min(0)].double()
    first = embedded * number(inputs, "scale_emb")
    before = torch.cat([first.unsqueeze(0), hidden[:-1]])
    return _Stages(inputs, question.truth, before, number(inputs, "rms_norm_eps"))


def _stage(
    name: str, summary: str, source: str, change: Callable[[_Stages], dict[str, Tensor]], form: str = ""
) -> Fault:
    """The fault of some stages; padding is as it should be."""

    def apply(question: Question) -> Answers | None:
        made = change(_stages_of(question))
        real = tensor(question.inputs, "batch_id_per_token") >= 0
        answers: dict[str, Tensor] = {}
        for stage, values in made.items():
            right = tensor(dict(question.truth), stage)  # type: ignore[arg-type]
            mask = real.view(-1, *[1] * (right.dim() - (1 if right.dim() == 2 else 2)))
            answers[stage] = torch.where(mask, values.reshape(right.shape), right)
        return answers or None

    return Fault(name, MODEL, summary, source, apply, form)


def _without_a_norm(stages: _Stages, name: str) -> dict[str, Tensor]:
    """The first stage behind a norm that is left out."""
    if maybe_tensor(stages.inputs, name) is None:
        return {}
    if name in ("input_layernorm", "q_a_layernorm"):
        return {"q": stages.q(name)}
    if name == "kv_a_layernorm":
        return {"compressed_kv": stages.latent_and_rope(name)[..., : _rank(stages.inputs)]}
    scale = number(stages.inputs, "residual_scale")
    if name == "post_attention_layernorm":
        stream = stages.hidden + stages.stage("o_proj_out") * scale
        gate = functional.silu(stream @ stages.weight("gate_proj").mT)
        active = gate * (stream @ stages.weight("up_proj").mT)
        return {"hidden": stream + active @ stages.weight("down_proj").mT * scale}
    last = stages.stage("hidden")[-1] / number(stages.inputs, "logits_divisor")
    return {"logits": last @ stages.weight("lm_head").mT}


def _rank(inputs: Inputs) -> int:
    return tensor(inputs, "kv_b_proj").shape[2]


def _rope_first(stages: _Stages) -> dict[str, Tensor]:
    """The rotated part of keys taken from the front, where the latent stands."""
    inputs, both = stages.inputs, stages.latent_and_rope("")
    width, positions = both.shape[-1] - _rank(inputs), tensor(inputs, "position_ids").long()
    raw = both[..., :width].unsqueeze(-2)
    if maybe_tensor(inputs, "cos_sin_cache") is not None:
        raw = _rotated(inputs, raw, positions, is_neox=_neox(inputs))
    latent = stages.norm(both[..., width:], "kv_a_layernorm", left_out="", eps=LATENT_NORM_EPS)
    return {"k_pe": raw.squeeze(-2), "compressed_kv": latent}


def _heads_reordered(stages: _Stages, order: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What o_proj makes of heads in another order: [L, T, H, V] -> the same."""
    attention, heads = stages.stage("attention"), _heads(stages.inputs)[0]
    reordered = order(attention.view(*attention.shape[:2], heads, -1)).flatten(2)
    return {"o_proj_out": reordered @ stages.weight("o_proj").mT}


def _scaled_twice(stages: _Stages, factor: float) -> dict[str, Tensor]:
    """Rotated parts multiplied by what belongs to the softmax scale."""
    if maybe_tensor(stages.inputs, "cos_sin_cache") is None:
        return {}
    return {name: stages.stage(name) * factor for name in ("q_pe", "k_pe")}


def _mscale(stages: _Stages) -> float:
    """YaRN's m, whose square the softmax scale has."""
    width = int(number(stages.inputs, "qk_nope_head_dim")) + _rope_width(stages.inputs)
    return float((number(stages.inputs, "softmax_scale") * width**0.5) ** 0.5)


def _single_stages() -> Iterator[Fault]:
    for name in NORMS:
        yield _stage(
            "norm-left-out",
            "what should be normalised is handed on as it is",
            "P1, B68",
            lambda stages, name=name: _without_a_norm(stages, name),
            name,
        )
    yield _stage(
        "rope-first",
        "the rotated part of keys is taken from the front of the projection, the latent from behind it",
        "L45",
        _rope_first,
    )
    orders: list[tuple[str, Callable[[Tensor], Tensor]]] = [
        ("the other way round", lambda heads: heads.flip(2)),
        ("of the head before", lambda heads: heads.roll(1, 2)),
        ("of the head behind", lambda heads: heads.roll(-1, 2)),
        ("columns before heads", lambda heads: heads.transpose(2, 3)),
    ]
    for form, order in orders:
        yield _stage(
            "heads-in-another-order",
            "the projection behind attention takes heads in another order",
            "P1",
            lambda stages, order=order: _heads_reordered(stages, order),
            form,
        )
    for form, factor_of in (("", _mscale), ("of 40 times the length", lambda stages: 0.1 * log(40) + 1)):
        yield _stage(
            "mscale-in-the-table",
            "cosines and sines are multiplied by YaRN's m, which belongs to the softmax scale",
            "L41",
            lambda stages, factor_of=factor_of: _scaled_twice(stages, factor_of(stages)),
            form,
        )
    yield Fault(
        "one-cache-for-all-layers",
        MODEL,
        "every layer writes to the first one's cache",
        "B61",
        _in_one_cache,
    )


def _in_one_cache(question: Question) -> Answers | None:
    """Rows of the caches where the first layer's hold the last one's, and all others what they held."""
    writes, cache = question.truth["latent_cache"], tensor(question.inputs, "latent_cache")
    layers = len(cache)
    if not isinstance(writes, Writes) or layers == 1:
        return None
    stood = cache.view(-1, cache.shape[-1])[writes.rows].to(writes.values.dtype).chunk(layers)
    values = torch.cat([writes.values.chunk(layers)[-1], *stood[1:]])
    return {"latent_cache": Writes(writes.rows, values)}


FAULTS = (*_weights(), *_rotations(), *_single_stages())
