"""The option keys of the language: one dataclass field each, in the order they are printed.

Defaults are frozen: changing one changes what existing texts mean, and is a breaking release.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from cases.rows import MAX_DIGITS, MAX_LENGTH


@dataclass(frozen=True)
class OptionSpec:
    """How one option's value is written.

    `choices` are the legal words, or None for an integer from `minimum` to `maximum`. `per_layer`
    options take a list `a+b+c` with one value a layer.
    """

    doc: str
    choices: tuple[str, ...] | None = None
    minimum: int = 0
    maximum: int = MAX_LENGTH
    per_layer: bool = False
    is_name: bool = False

    @property
    def form(self) -> str:
        """What a value looks like, for error messages and listings."""
        if self.is_name:
            return "a name"
        if self.choices is not None:
            return "one of " + ", ".join(self.choices)
        return f"an integer from {self.minimum} to {self.maximum:,}"

    def read(self, text: str) -> str | int:
        """The value of one text.

        Raises:
            ValueError: the text is not a legal value; the message is what was expected.
        """
        if self.is_name and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", text):
            return text
        if self.choices is not None and text in self.choices:
            return text
        is_integer = not self.is_name and self.choices is None and re.fullmatch(r"[0-9]+", text)
        if is_integer and self.minimum <= int(text) <= self.maximum:
            return int(text)
        raise ValueError(self.form)

    def accepts(self, value: object) -> bool:
        """Whether a value is what its text is read as."""
        try:
            return self.read(str(value)) == value
        except ValueError:
            return False


def _option(default: Any, doc: str, **spec: Any) -> Any:
    return field(default=default, metadata={"spec": OptionSpec(doc, **spec)})


@dataclass(frozen=True)
class Options:
    """Every option of a case. Per-layer options are tuples: one value for all layers, or one each.

    The empty tuple and None mean "derived": `heads` from the model and `tp`, `pool` from the rows,
    `splits` from the path's own plan, `kv_heads` and `v_dim` from the model (of a latent model, a KV head for
    every query head).
    """

    model: str = _option("deepseek-v3", "dimensions, rope and softmax scale", is_name=True)
    heads: tuple[int, ...] = _option(
        (), "query heads of this rank; default the model's / tp", minimum=1, per_layer=True
    )
    kv_heads: tuple[int, ...] = _option(
        (), "KV heads of all ranks; grouped-query operators only", minimum=1, per_layer=True
    )
    v_dim: tuple[int, ...] = _option(
        (), "value width; grouped-query operators and merge_states only", minimum=1, per_layer=True
    )
    layers: int = _option(1, "how many layers", minimum=1, maximum=1000)
    block: tuple[int, ...] = _option((64,), "tokens a cache block", minimum=1, per_layer=True)
    window: tuple[int, ...] = _option(
        (0,), "visible keys, self included; 0 is all", minimum=0, per_layer=True
    )
    dtype: str = _option("bf16", "model dtype", choices=("bf16", "fp16", "fp32"))
    cache: tuple[str, ...] = _option(
        ("same",), "cache storage", choices=("same", "fp8", "packed"), per_layer=True
    )
    scale_fmt: str = _option(
        "fp32",
        "scales that a packed cache is written with: any float32, or powers of two",
        choices=("fp32", "ue8m0"),
    )
    data: str = _option(
        "planted",
        "data mode",
        choices=("planted", "randn", "flat", "peaked", "huge", "deep", "tiny"),
    )
    seed: int = _option(0, "data seed", maximum=10**MAX_DIGITS - 1)
    pool: int | None = _option(None, "cache blocks; default a little over what is needed", minimum=1)
    pages: str = _option(
        "shuffled",
        "which blocks the rows get",
        choices=("shuffled", "sequential", "reversed", "strided"),
    )
    tail: str = _option(
        "huge", "block-table entries past a row's length", choices=("huge", "-1", "0", "nb+7")
    )
    poison: str = _option("nan", "what unread slots hold", choices=("nan", "finite", "zero"))
    strided: str = _option("1", "1: strided views where the operator allows them", choices=("0", "1"))
    table: str = _option("given", "whether a block table is passed", choices=("given", "none"))
    splits: int | None = _option(None, "pins the split count of a split-KV kernel", minimum=1)
    tp: int = _option(1, "tensor-parallel size", minimum=1)
    topk: int = _option(2048, "entries of a token's list of keys", minimum=1)
    sink: tuple[str, ...] = _option(
        ("none",),
        "whether every head has a learned logit of no key",
        choices=("none", "learned"),
        per_layer=True,
    )

    def texts(self) -> list[str]:
        """`key=value` for every option that differs from its default, in order."""
        return [
            f"{item.name}={_text(getattr(self, item.name))}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        ]


@cache
def specs() -> dict[str, OptionSpec]:
    """Option key -> how its value is written, in printing order."""
    return {item.name: item.metadata["spec"] for item in fields(Options)}


def _text(value: object) -> str:
    return "+".join(str(part) for part in value) if isinstance(value, tuple) else str(value)
