"""What a small whole model is made of: sizes, weights and token ids, from the case's seed.

Weights are bell-shaped numbers, normal_integers / 128 times a power of two next to what keeps
each stage of unit size: 1 / sqrt(inputs) for linear layers, and for queries what makes logits of attention
spread by about two: softmax is not flat then, and HuggingFace's, in float32, agrees to well within 1e-5.
Norms' weights are near 1 and differ by column.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cases.layers import Layer
from harness.data import UNIT
from harness.hashing import normal_integers, row_seeds

HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 256
VOCAB_SIZE = 512
Q_LORA_RANK = 128
"""Of models that compress their queries. These sizes are small; heads, ranks and widths are the model's."""

LOGIT_STD = 2.5
"""What logits of attention should spread by; the nearest power of two is taken: 1.8 to 3.2."""

NORM_UNIT = 2.0**-11
"""Norms' weights are 1 + normal_integers * NORM_UNIT: 1 +- 0.07."""


def model_sizes(layer: Layer, num_layers: int) -> dict[str, int]:
    """Sizes of the axes that only a whole model has."""
    heads = layer.num_attention_heads
    return {
        "num_layers": num_layers,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "vocab_size": VOCAB_SIZE,
        "q_lora_rank": Q_LORA_RANK,
        "q_width": heads * layer.qk_head_dim,
        "attention_width": heads * layer.v_head_dim,
    }


def withheld_weights(layer: Layer) -> set[str]:
    """Weights that the architecture does not have: queries are compressed, or they are not."""
    compressed = {"q_a_proj", "q_a_layernorm", "q_b_proj"}
    return compressed if layer.model.q_lora_rank is None else {"q_proj"}


def model_weight(name: str, shape: tuple[int, ...], layer: Layer, seed: int, device: torch.device) -> Tensor:
    """A weight by its name, float32: rows are the last axis."""
    rows = torch.arange(math.prod(shape[:-1]), device=device)
    integers = normal_integers(row_seeds(seed, f"model.{name}", torch.zeros_like(rows), rows), shape[-1])
    if name.endswith("norm"):
        return (1.0 + integers.to(torch.float32) * NORM_UNIT).view(shape)
    size = 1.0 if name == "embed_tokens" else shape[-1] ** -0.5
    if name in ("q_b_proj", "q_proj"):
        size *= LOGIT_STD / layer.model.yarn_mscale**2
    return (integers.to(torch.float32) * (UNIT * 2.0 ** round(math.log2(size)))).view(shape)


def token_ids(keys: Tensor, positions: Tensor, seed: int) -> Tensor:
    """[n] int64: the id of each token, by its row's data key and its position."""
    return row_seeds(seed, "token_ids", keys, positions) % VOCAB_SIZE


def model_numbers(layer: Layer) -> dict[str, float | str]:
    """Scalars of the architecture, which an engine reads from the model's config."""
    model = layer.model
    scaling = model.rope_scaling
    return {
        "model": model.name,
        "rms_norm_eps": model.rms_norm_eps,
        "scale_emb": model.scale_emb,
        "residual_scale": model.residual_scale,
        "logits_divisor": model.logits_divisor,
        "query_scale_beta": scaling.llama_4_scaling_beta if scaling else 0.0,
        "query_scale_length": float(scaling.original_max_position_embeddings if scaling else 1),
    }
