"""The models: one TOML file each, named after the model, keys as in HuggingFace's configs.

Adding a model is adding a file. `softmax_scale` is stated in the file as published and must equal what
the dimensions give (a test holds them together).
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class RopeScaling:
    """YaRN or longrope parameters, named as in HuggingFace's `rope_scaling`.

    Attributes:
        short_factor, long_factor: of longrope, what each pair's frequency is divided by in a model that is
            served up to its original length, and in one that is served beyond it.
        llama_4_scaling_beta: of Mistral-4, whose queries are multiplied by 1 + beta ln(1 + floor(position /
            original length)).
    """

    type: str
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    llama_4_scaling_beta: float = 0.0


@dataclass(frozen=True)
class Model:
    """Dimensions of one published model.

    A model that keeps keys and values instead of latents has a kv_lora_rank of 0. Its file says `head_dim`,
    of which `partial_rotary_factor` is rotated: qk_rope_head_dim columns, the first of a head, where a
    latent model's are the last.

    Attributes:
        num_key_value_heads: heads of keys and values; None of a latent model, where every head has its own.
        rope: how the D rope columns pair up: `interleaved`, `half-split` or `none` (not rotated).
        stated_softmax_scale: the softmax scale as the file states it.
        note: what a reader of the dimensions should know.
        model_type: what HuggingFace calls the architecture; None where a layer is more than latent attention
            and an MLP, or is not known well enough, so that no logits can be computed from this file.
        rms_norm_eps: of the norms of the residual stream; those of the latents have 1e-6 in every model.
        scale_emb, scale_depth, dim_model_base: MiniCPM's factors, see `residual_scale` and `logits_divisor`.
        index_head_dim: width of the keys of a sparse indexer; None where the model has none.
        sliding_window: of layers that slide, what their config says: first how many keys a token sees, itself
            included. Empty where they are full.
        The rest: as in HuggingFace's config; `q_lora_rank` None where the query is not compressed.
    """

    name: str
    hidden_size: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    num_hidden_layers: int
    rope: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    stated_softmax_scale: float
    note: str
    model_type: str | None = None
    rms_norm_eps: float = 1e-6
    scale_emb: float = 1.0
    scale_depth: float | None = None
    dim_model_base: int | None = None
    index_head_dim: int | None = None
    sliding_window: tuple[int, ...] = ()
    num_key_value_heads: int | None = None

    @property
    def has_latents(self) -> bool:
        """Whether its caches hold latents, from which keys and values are made."""
        return self.kv_lora_rank > 0

    @property
    def qk_head_dim(self) -> int:
        """N + D: width of a head's query and key, unabsorbed. Never R + D in the softmax scale."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def yarn_mscale(self) -> float:
        """M = 0.1 * mscale_all_dim * ln(factor) + 1 for YaRN with factor > 1, else 1.

        Source: arXiv:2309.00071 section 3.4, as DeepSeek applies it (m squared on the logits).
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.type != "yarn" or scaling.factor <= 1:
            return 1.0
        return 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0

    @property
    def softmax_scale(self) -> float:
        """(N + D)^-0.5 * m^2: what q.k is multiplied by before a natural-log softmax."""
        return float(self.qk_head_dim**-0.5 * self.yarn_mscale**2)

    @property
    def residual_scale(self) -> float:
        """What the output of attention and of the MLP is multiplied by before the residual stream takes it.

        By the published number of layers, so that a shorter stack of them is scaled as in the model.
        """
        return 1.0 if self.scale_depth is None else self.scale_depth / math.sqrt(self.num_hidden_layers)

    @property
    def logits_divisor(self) -> float:
        """What the last norm's output is divided by before lm_head; by the published hidden size."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base


@cache
def model_names() -> tuple[str, ...]:
    """Every model there is a file for, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


@cache
def latent_model_names() -> tuple[str, ...]:
    """Those of the models whose caches hold latents, sorted."""
    return tuple(name for name in model_names() if load_model(name).has_latents)


@cache
def grouped_model_names() -> tuple[str, ...]:
    """Those of the models whose query heads share heads of keys and values, sorted."""
    return tuple(name for name in model_names() if not load_model(name).has_latents)


@cache
def load_model(name: str) -> Model:
    """The model of that name.

    Raises:
        ValueError: there is no file for it.
    """
    if name not in model_names():
        raise ValueError(f"model takes one of {', '.join(model_names())}, got {name!r}")
    data = tomllib.loads((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    scaling = data.pop("rope_scaling", None)
    if "head_dim" in data:
        data = {**_without_latents(data), **data}
    return Model(
        name=name,
        q_lora_rank=data.pop("q_lora_rank", None),
        rope_scaling=_rope_scaling(scaling) if scaling else None,
        stated_softmax_scale=data.pop("softmax_scale"),
        note=data.pop("note", ""),
        sliding_window=tuple(data.pop("sliding_window", ())),
        **data,
    )


def _without_latents(data: dict[str, Any]) -> dict[str, Any]:
    """What a model that keeps keys and values has in the place of latent dimensions; takes what says so."""
    width = data.pop("head_dim")
    rotated = int(width * data.pop("partial_rotary_factor", 1.0))
    return {
        "kv_lora_rank": 0,
        "qk_nope_head_dim": width - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": width,
    }


def _rope_scaling(table: dict[str, Any]) -> RopeScaling:
    """The parameters in a model's table; its lists as tuples."""
    lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
    return RopeScaling(**{**table, **lists})
