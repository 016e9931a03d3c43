"""`Case`: what is asked, as a value. Its text is its id and its reproducer."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import groupby

from cases import schedule
from cases.blocks import blocks_needed
from cases.errors import RuleError
from cases.layers import Layer, resolve_layers
from cases.models import load_model, model_names
from cases.options import Options, specs
from cases.rows import Row

MAX_SLOTS = 65_536
"""Rows of one step. Engines run a few thousand at most; the limit keeps `x` counts from exhausting memory."""

_DEFAULTS = Options()


@dataclass(frozen=True)
class Case:
    """An operator, the steps of rows it runs on, and options.

    `parse(str(case)) == case` for every case: construction brings the value into canonical form (keys
    and options equal to their default dropped, lists of equal values collapsed).

    Raises:
        RuleError: the steps or options break a rule of the language.
    """

    operator: str
    steps: tuple[tuple[Row, ...], ...] = ((),)
    options: Options = field(default_factory=Options)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.operator):
            raise RuleError(f"an operator is a lower-case name like mla_decode, got {self.operator!r}")
        if not self.steps:
            raise RuleError("a case has at least one step; a step of zero slots is written as nothing")
        for index, step in enumerate(self.steps):
            if len(step) > MAX_SLOTS:
                raise RuleError(f"a step has at most {MAX_SLOTS:,} rows, got {len(step):,}", step=index)
        object.__setattr__(self, "steps", schedule.canonical_steps(self.steps))
        object.__setattr__(self, "options", _canonical_options(self.options))
        _check_pool(self)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """One `Layer` for each layer, with every dimension resolved."""
        return resolve_layers(self.options)

    def one_layer(self, index: int) -> Case:
        """The case of one layer alone: what a path, which runs layer by layer, is asked."""
        changes = {
            key: (values[index],) if len(values) > 1 else values
            for key, spec in specs().items()
            if spec.per_layer
            for values in [getattr(self.options, key)]
        }
        return self.with_options(layers=1, **changes)

    def one_step(self, index: int) -> Case:
        """The case of one step alone, with the data keys of its sequences: what a path is asked.

        Tags are left out, and so is the pool: what depends on other steps cannot be said in one.
        """
        if len(self.steps) == 1:
            return self
        held = schedule.sequences(self.steps)[index]
        rows = (
            row if sequence is None else replace(row, tag=None, key=sequence.key)
            for row, sequence in zip(self.steps[index], held, strict=True)
        )
        return replace(self, steps=(tuple(rows),), options=replace(self.options, pool=None))

    def with_options(self, **changes: object) -> Case:
        """The same steps under other options."""
        return replace(self, options=replace(self.options, **changes))  # type: ignore[arg-type]

    def __str__(self) -> str:
        steps = "..".join(
            ",".join(row.text(len(list(equal))) for row, equal in groupby(step)) for step in self.steps
        )
        options = self.options.texts()
        return "/".join([self.operator, steps, *([",".join(options)] if options else [])])


def _canonical_options(options: Options) -> Options:
    changes: dict[str, object] = {}
    for key, spec in specs().items():
        value = getattr(options, key)
        if value == getattr(_DEFAULTS, key):
            continue
        for one in value if spec.per_layer else (value,):
            if not spec.accepts(one):
                raise RuleError(f"{key} takes {spec.form}, got {one!r}", option=key)
        if spec.per_layer:
            changes[key] = _collapsed(key, value, options.layers)
    options = replace(options, **changes)  # type: ignore[arg-type]
    if options.model not in model_names():
        raise RuleError(f"model takes one of {', '.join(model_names())}", option="model")
    model = load_model(options.model)
    if model.num_attention_heads % options.tp:
        raise RuleError(
            f"tp={options.tp} does not divide the {model.num_attention_heads} heads of {model.name}",
            option="tp",
        )
    derived = {"heads": model.num_attention_heads // options.tp}
    if not model.has_latents:
        derived |= {"kv_heads": model.num_key_value_heads or 0, "v_dim": model.v_head_dim}
    said: dict[str, object] = {key: () for key, value in derived.items() if getattr(options, key) == (value,)}
    return replace(options, **said)  # type: ignore[arg-type]


def _collapsed(key: str, values: tuple[object, ...], layers: int) -> tuple[object, ...]:
    if len(values) not in (1, layers):
        raise RuleError(
            f"{key} has {len(values)} values for {layers} layers: write one value, or one a layer",
            option=key,
        )
    return values[:1] if len(set(values)) == 1 else values


def _check_pool(case: Case) -> None:
    pool = case.options.pool
    if pool is None:
        return
    for block_size in dict.fromkeys(case.options.block):
        needed = blocks_needed(case.steps, block_size)
        if pool < needed:
            raise RuleError(
                f"the rows need {needed:,} blocks of {block_size} tokens, got pool={pool} (rule V3)",
                option="pool",
            )
