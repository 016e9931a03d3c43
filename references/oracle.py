"""`Oracle`: a trusted computation of an operator's outputs, with its source.

One file of this folder holds one oracle and ends in the constant `ORACLE`. Every operator has a
`definition` (float64 Torch, row by row, on the device of its inputs) and a `derivation` that shares no
code with it and reaches the same numbers another way. The two must agree to `AGREEMENT` before any
path is judged by them. An `external` oracle asks somebody else's code, which may be missing and may be
less exact: it says so itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cases.discovery import discover

AGREEMENT = 1e-10
"""Largest relative difference between two derivations in float64."""

Inputs = Mapping[str, Tensor | float | int | str | None]
"""The inputs of an operator's contract by name, and its attributes."""


@dataclass(frozen=True)
class Precision:
    """What an emulation rounds to; budgets come from it.

    Everything accumulates in fp32; the softmax weights and the output are rounded to these dtypes once.
    """

    weights: torch.dtype
    output: torch.dtype


@dataclass(frozen=True)
class Writes:
    """What an operator writes in place: whole rows of a paged cache, and nothing else.

    Attributes:
        rows: [n] int64, physical rows (block * block_size + offset), distinct.
        values: [n, width], what they hold afterwards, bit for bit.
    """

    rows: Tensor
    values: Tensor


Outputs = Mapping[str, Tensor | Writes]


def _always_there(_: Inputs) -> str | None:
    return None


@dataclass(frozen=True)
class Oracle:
    """One oracle.

    Attributes:
        name: file name of the oracle.
        operator: the operator it computes.
        role: `definition`, `derivation` or `external`: a computation by a library that is not ours.
        source: paper and equation, or repository at a commit.
        run: (inputs, precision) -> outputs; precision None means float64 throughout. Outputs may
            hold more than the contract names, such as `logit_magnitude`, which budgets use; those of an
            external oracle may be fewer.
        agreement: the largest relative difference from the definition.
        unavailable: inputs -> why `run` cannot compute these in one sentence, or None.
    """

    name: str
    operator: str
    role: Literal["definition", "derivation", "external"]
    source: str
    run: Callable[[Inputs, Precision | None], Outputs]
    agreement: float = AGREEMENT
    unavailable: Callable[[Inputs], str | None] = _always_there


def tensor(inputs: Inputs, name: str) -> Tensor:
    """The tensor of that name."""
    value = inputs[name]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def maybe_tensor(inputs: Inputs, name: str) -> Tensor | None:
    """The tensor of that name, None where the inputs say that there is none."""
    return None if inputs[name] is None else tensor(inputs, name)


def text(inputs: Inputs, name: str) -> str:
    """The word of that name."""
    value = inputs[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, got {type(value).__name__}")
    return value


def flag(inputs: Inputs, name: str) -> bool:
    """Whether the inputs say so; what they do not speak of is not so."""
    return bool(inputs.get(name, False))


def number(inputs: Inputs, name: str) -> float:
    """The scalar of that name."""
    value = inputs[name]
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def largest_partial_sums(query: Tensor, keys: Tensor, columns: int = 16) -> Tensor:
    """[H, W], [n, W] -> [H, n]: the largest that a sum q . k is on its way, so many columns at a time.

    A sum of a thousand products that ends near 0 has been at two or three times the root of their squares,
    and its rounding errors are of what it was then.
    """
    pieces = [rows.reshape(rows.shape[0], -1, columns) for rows in (query, keys)]
    return torch.einsum("hpc,npc->hnp", *pieces).cumsum(-1).abs().amax(-1)


@cache
def oracles() -> tuple[Oracle, ...]:
    """Every oracle there is a file for.

    Raises:
        ImportError: an oracle's file cannot be imported; nothing can be judged without it.
    """
    found = []
    for item in discover("references", Path(__file__).parent, "ORACLE"):
        if item.module == "references.oracle" or item.module.startswith("references.faults."):
            continue
        if not isinstance(item.value, Oracle):
            raise ImportError(f"{item.module} must end in ORACLE = Oracle(...): {item.reason}")
        found.append(item.value)
    return tuple(found)


def oracle_for(operator: str, role: str) -> Oracle:
    """The oracle of an operator in a role.

    Raises:
        LookupError: there is none.
    """
    for oracle in oracles():
        if oracle.operator == operator and oracle.role == role:
            return oracle
    raise LookupError(f"no {role} of {operator} in references/")
