"""Logits of a whole model by its definition: each row alone, one forward over all of its tokens, unabsorbed.

    x    = scale_emb * embed_tokens[ids]
    layer:
      y    = norm(x, input_layernorm)
      q    = norm(y q_a_proj^T, q_a_layernorm) q_b_proj^T, or y q_proj^T
             [n, H, N + D]: the last D of each head are q_pe, turned by position
      c, r = norm(a, kv_a_layernorm) and b turned by position, of y kv_a_proj_with_mqa^T = [a | b]
      k, v = [k_nope | r] and v of each head, of c kv_b_proj^T  [n, H, N + V]
      s    = softmax_scale * query_scale(position) * q k^T  over j <= i
      x    = x + residual_scale * (softmax(s) v) o_proj^T
      y    = norm(x, post_attention_layernorm)
      x    = x + residual_scale * (silu(y gate_proj^T) * y up_proj^T) down_proj^T
    logits = norm(x, norm) / logits_divisor lm_head^T

All of it in float64 from the weights as stored. The cache is not read: cached tokens are computed again from
their ids, so that a row's logits do not depend on how it was cut into steps. With a `Precision` the same
lines run in float32, and what a path keeps in memory is rounded: outputs of linear layers, of norms, of the
rotation, of attention, of the activation, and the residual stream; and the softmax weights before their
product with values.

Not: a row is computed with [n, n] logits of a head at a time, meant for n of some thousands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cases.models import Model, load_model
from references.oracle import Inputs, Oracle, Outputs, Precision, Writes, maybe_tensor, number, tensor, text

WEIGHTS = (
    *("embed_tokens", "input_layernorm", "q_a_proj", "q_a_layernorm", "q_b_proj", "q_proj"),
    *("kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj", "post_attention_layernorm"),
    *("gate_proj", "up_proj", "down_proj", "norm", "lm_head"),
)

LATENT_NORM_EPS = 1e-6
"""Of q_a_layernorm and kv_a_layernorm: DeepSeek's own code leaves their norm's default, whatever the config's
rms_norm_eps, and so does every architecture in transformers that took the layer over."""


def run(inputs: Inputs, precision: Precision | None = None) -> Outputs:
    """Logits [Tp, vocab], the stages [L, Tp, ...] and the cache rows written, float64; padding 0.

    Stages: `q` [H (N + D)] before the rotation; `q_pe` [H, D] and `k_pe` [D] after it, without the query
    scale, pairs where the model has them; `compressed_kv` [R] after its norm; `attention` [H V];
    `o_proj_out` [hidden], not yet scaled for the residual stream; `hidden` [hidden], the layer's output.

    Raises:
        ValueError: the model's layers are more than this file computes.
    """
    model = load_model(text(inputs, "model"))
    if model.model_type is None:
        raise ValueError(f"{model.name} has no model_type: nothing says that its layers are of this form")
    arithmetic = _Arithmetic(precision)
    weights = {name: maybe_tensor(inputs, name) for name in WEIGHTS}
    network = _Network(
        model,
        {name: arithmetic.widened(weight) for name, weight in weights.items() if weight is not None},
        number(inputs, "softmax_scale"),
        arithmetic,
    )
    ids, starts = tensor(inputs, "history_ids").to(torch.int64), tensor(inputs, "cu_seqlens_k").tolist()
    new_tokens = tensor(inputs, "seq_lens_this_time").tolist()
    rows = [
        (new, network.forward(ids[starts[slot] : starts[slot + 1]]))
        for slot, new in enumerate(new_tokens)
        if new > 0
    ]
    # A step without a row has outputs too: as wide as those of any token.
    sizes = rows[0][1] if rows else network.forward(ids.new_zeros(1))
    outputs = {
        name: values.new_zeros(len(values), len(tensor(inputs, "token_ids")), *values.shape[2:]).double()
        for name, values in sizes.items()
    }
    first = 0
    for new, computed in rows:
        for name, values in computed.items():
            outputs[name][:, first : first + new] = values[:, -new:].to(torch.float64)
        first += new
    written = torch.cat([outputs["compressed_kv"], outputs["k_pe"]], dim=-1)[:, :first].flatten(0, 1)
    outputs["logits"] = outputs["logits"].squeeze(0)
    return {**outputs, "latent_cache": Writes(_rows_written(inputs), written)}


def _rows_written(inputs: Inputs) -> Tensor:
    """[L T] rows of the flattened [L nb bs] ones: layer after layer, in each the new tokens in order."""
    layers, blocks, _, block_size, _ = tensor(inputs, "latent_cache").shape
    tables = tensor(inputs, "block_tables").to(torch.int64)
    cached = tensor(inputs, "seq_lens_decoder").tolist()
    of_slots = [torch.empty(0, dtype=torch.int64, device=tables.device)]
    for slot, new in enumerate(tensor(inputs, "seq_lens_this_time").tolist()):
        positions = torch.arange(cached[slot], cached[slot] + new, device=tables.device)
        of_slots.append(tables[slot, positions // block_size] * block_size + positions % block_size)
    rows = torch.cat(of_slots)
    return torch.cat([layer * blocks * block_size + rows for layer in range(layers)])


@dataclass(frozen=True)
class _Arithmetic:
    """What is rounded, and to what."""

    precision: Precision | None

    def widened(self, values: Tensor) -> Tensor:
        """As they are computed with: float64, or float32 in an emulation."""
        return values.to(torch.float64 if self.precision is None else torch.float32)

    def stored(self, values: Tensor) -> Tensor:
        """After they were kept in a tensor of the path."""
        return values if self.precision is None else values.to(self.precision.output).to(values.dtype)

    def stored_weights(self, values: Tensor) -> Tensor:
        """Softmax weights as they are multiplied with values."""
        return values if self.precision is None else values.to(self.precision.weights).to(values.dtype)

    def linear(self, values: Tensor, weight: Tensor) -> Tensor:
        """Values [..., i] times weight [o, i] transposed."""
        return self.stored(values @ weight.mT)

    def norm(self, values: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last axis."""
        return self.stored(values * (values.square().mean(-1, keepdim=True) + eps).rsqrt() * weight)


@dataclass(frozen=True)
class _Network:
    """A model's layers with their weights, as they are computed with."""

    model: Model
    weights: Mapping[str, Tensor]
    softmax_scale: float
    arithmetic: _Arithmetic

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Logits [1, n, vocab] and stages [L, n, ...] of all n tokens of a row."""
        model, arithmetic = self.model, self.arithmetic
        embedded = arithmetic.stored(self.weights["embed_tokens"][ids] * model.scale_emb)
        stream, stages = embedded, []
        for layer in range(len(self.weights["input_layernorm"])):
            own = {
                name: weight[layer]
                for name, weight in self.weights.items()
                if name not in {"embed_tokens", "norm", "lm_head"}
            }
            normed = arithmetic.norm(stream, own["input_layernorm"], model.rms_norm_eps)
            stage = self._attention(own, normed)
            stream = self._added(stream, stage["o_proj_out"])
            normed = arithmetic.norm(stream, own["post_attention_layernorm"], model.rms_norm_eps)
            gate = arithmetic.linear(normed, own["gate_proj"])
            active = arithmetic.stored(functional.silu(gate) * arithmetic.linear(normed, own["up_proj"]))
            stream = self._added(stream, arithmetic.linear(active, own["down_proj"]))
            stages.append({**stage, "hidden": stream})
        last = arithmetic.norm(stream, self.weights["norm"], model.rms_norm_eps)
        logits = arithmetic.linear(arithmetic.stored(last / model.logits_divisor), self.weights["lm_head"])
        return {
            "logits": logits[None],
            **{name: torch.stack([s[name] for s in stages]) for name in stages[0]},
        }

    def _added(self, stream: Tensor, branch: Tensor) -> Tensor:
        """The residual stream with a branch's output."""
        return self.arithmetic.stored(stream + self.arithmetic.stored(branch * self.model.residual_scale))

    def _attention(self, own: Mapping[str, Tensor], normed: Tensor) -> dict[str, Tensor]:
        """Stages of a layer's attention over all n tokens, from its normalised input [n, hidden]."""
        model, arithmetic = self.model, self.arithmetic
        count, nope = len(normed), model.qk_nope_head_dim
        if "q_proj" in own:
            q = arithmetic.linear(normed, own["q_proj"])
        else:
            compressed_q = arithmetic.linear(normed, own["q_a_proj"])
            compressed_q = arithmetic.norm(compressed_q, own["q_a_layernorm"], LATENT_NORM_EPS)
            q = arithmetic.linear(compressed_q, own["q_b_proj"])
        q_nope, q_pe = q.view(count, -1, model.qk_head_dim).tensor_split([nope], dim=-1)
        both = arithmetic.linear(normed, own["kv_a_proj_with_mqa"])
        compressed_kv, k_pe = both.tensor_split([model.kv_lora_rank], dim=-1)
        compressed_kv = arithmetic.norm(compressed_kv, own["kv_a_layernorm"], LATENT_NORM_EPS)
        q_pe, k_pe = self._rotated(q_pe), self._rotated(k_pe.unsqueeze(1)).squeeze(1)

        heads = q_nope.shape[1]
        keys_values = arithmetic.linear(compressed_kv, own["kv_b_proj"]).view(count, heads, -1)
        positions = torch.arange(count, device=q.device)
        query = (
            torch.cat([q_nope, q_pe], dim=-1)
            * arithmetic.widened(query_scale(model, positions))[:, None, None]
        )
        query = arithmetic.stored(query)
        hidden = positions[None, :] > positions[:, None]
        attended = []
        for head in range(heads):
            k_nope, values = keys_values[:, head].tensor_split([nope], dim=-1)
            keys = torch.cat([k_nope, k_pe], dim=-1)
            logits = (query[:, head] @ keys.mT * self.softmax_scale).masked_fill(hidden, -torch.inf)
            weights = torch.exp(logits - logits.amax(-1, keepdim=True))
            total = weights.sum(-1, keepdim=True)
            attended.append(arithmetic.stored_weights(weights) @ values / total)
        attention = arithmetic.stored(torch.cat(attended, dim=-1))
        return {
            "q": q,
            "q_pe": q_pe,
            "k_pe": k_pe,
            "compressed_kv": compressed_kv,
            "attention": attention,
            "o_proj_out": arithmetic.linear(attention, own["o_proj"]),
        }

    def _rotated(self, part: Tensor) -> Tensor:
        """[n, heads, D] turned by the n positions from 0 on, pairs where the model has them."""
        if self.model.rope == "none":
            return part
        angles = torch.arange(len(part), device=part.device)[:, None] * frequencies(self.model).to(
            part.device
        )
        scale = table_scale(self.model)
        # A path's table is float32, worked out from exact angles.
        cos, sin = (
            self.arithmetic.widened(table * scale).unsqueeze(1) for table in (angles.cos(), angles.sin())
        )
        if self.model.rope == "half-split":
            low, high = part.chunk(2, dim=-1)
            return self.arithmetic.stored(torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1))
        low, high = part[..., 0::2], part[..., 1::2]
        turned = torch.stack([low * cos - high * sin, high * cos + low * sin], dim=-1)
        return self.arithmetic.stored(turned.flatten(-2))


def frequencies(model: Model) -> Tensor:
    """[D / 2] float64: radians that each pair turns from one position to the next.

    Raises:
        ValueError: the model's rope_scaling is neither YaRN nor longrope.
    """
    width, scaling = model.qk_rope_head_dim, model.rope_scaling
    pairs = torch.arange(width // 2, dtype=torch.float64)
    plain = model.rope_theta ** (-2 * pairs / width)
    if scaling is None:
        return plain
    if scaling.type == "longrope":
        factors = scaling.long_factor if scaling.factor > 1 else scaling.short_factor
        return plain / torch.tensor(factors, dtype=torch.float64)
    if scaling.type != "yarn":
        raise ValueError(f"rope_scaling of {model.name} is yarn or longrope, got {scaling.type!r}")

    def pair_of(turns: float) -> float:
        """The pair, not a whole number, that turns so often within the original length."""
        length = scaling.original_max_position_embeddings
        return width * math.log(length / (2 * math.pi * turns)) / (2 * math.log(model.rope_theta))

    low = max(math.floor(pair_of(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_of(scaling.beta_slow)), width - 1)
    ramp = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def table_scale(model: Model) -> float:
    """What cosines and sines are multiplied by: YaRN's ratio of two mscales, or longrope's factor."""
    scaling = model.rope_scaling
    if scaling is None or scaling.factor <= 1:
        return 1.0
    log_factor = math.log(scaling.factor)
    if scaling.type == "longrope":
        return math.sqrt(1 + log_factor / math.log(scaling.original_max_position_embeddings))
    return (0.1 * scaling.mscale * log_factor + 1) / (0.1 * scaling.mscale_all_dim * log_factor + 1)


def query_scale(model: Model, positions: Tensor) -> Tensor:
    """[n] float64: 1 + b ln(1 + floor(position / original length)), what Mistral-4 multiplies queries by."""
    scaling = model.rope_scaling
    if scaling is None:
        return torch.ones(len(positions), dtype=torch.float64, device=positions.device)
    lengths = positions // scaling.original_max_position_embeddings
    return 1 + scaling.llama_4_scaling_beta * torch.log1p(lengths.to(torch.float64))


ORACLE = Oracle(
    name="mla_logits",
    operator="mla_logits",
    role="definition",
    source="arXiv:2405.04434 section 2.1 and appendix C; rope: arXiv:2309.00071 section 3, arXiv:2402.13753;"
    " MiniCPM's scales: arXiv:2404.06395",
    run=run,
)
