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


@dataclass(frozen=True)
class Model:
    """Dimensions of one published model.

    Attributes:
        rope: how the D rope columns pair up: `interleaved`, `half-split` or `none` (not rotated).
        stated_softmax_scale: the softmax scale as the file states it.
        note: what a reader of the dimensions should know.
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

    @property
    def qk_head_dim(self) -> int:
        """N + D: query-key width of the unabsorbed form. Never R + D in the softmax scale."""
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


@cache
def model_names() -> tuple[str, ...]:
    """Every model there is a file for, sorted."""
    return tuple(sorted(file.stem for file in _FOLDER.glob("*.toml")))


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
    return Model(
        name=name,
        q_lora_rank=data.pop("q_lora_rank", None),
        rope_scaling=_rope_scaling(scaling) if scaling else None,
        stated_softmax_scale=data.pop("softmax_scale"),
        note=data.pop("note", ""),
        **data,
    )


def _rope_scaling(table: dict[str, Any]) -> RopeScaling:
    """The parameters in a model's table; its lists as tuples."""
    lists = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
    return RopeScaling(**{**table, **lists})
