"""`Fault`: one mistake under a name, and the answer that an operator gives with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from references.oracle import Inputs, Outputs, Writes


@dataclass(frozen=True)
class Unwritten:
    """An output that is written in parts alone.

    Attributes:
        values: what is there where it is written.
        written: bool, leading axes of values; elsewhere stands what stood there before the launch.
    """

    values: Tensor
    written: Tensor


Answers = Mapping[str, Tensor | Writes | Unwritten]


@dataclass(frozen=True)
class Question:
    """What an operator is asked, and how it answers.

    Attributes:
        operator: its name. inputs: as its oracles get them.
        define: the definition, in float64.
        asked: of attention, the tokens whose answers are wanted; what is said of others means nothing. None
            for all.
        memory: what faults have worked out of the inputs, for those tried after them.
        first: the inputs of the layer that is launched first, where there are several; else none.
    """

    operator: str
    inputs: Inputs
    define: Callable[[Inputs], Outputs]
    asked: frozenset[int] | None = None
    memory: dict[str, object] = field(default_factory=dict, compare=False)
    first: Inputs = field(default_factory=dict)

    @cached_property
    def truth(self) -> Outputs:
        """The right answer."""
        return self.define(self.inputs)

    def with_inputs(self, **changes: Tensor | float | str | None) -> Outputs:
        """The right answer to another question: these inputs in the place of those of the same name."""
        return self.define({**self.inputs, **changes})


class NotMade(Exception):
    """The inputs have nothing to make a mistake with."""


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
        name: several faults of one name are forms of one mistake: tiles of other widths, other neighbours.
        operators: those that can make it.
        summary: what is done wrong, in one sentence without its end.
        source: who shipped it: numbers of the catalogue of bugs, or an issue.
        apply: the answer with the mistake. None, or `NotMade`, where the inputs have nothing to make it with;
            an IndexError where the mistake would leave a tensor.
        form: which of several forms; empty if there is one.
    """

    name: str
    operators: tuple[str, ...]
    summary: str
    source: str
    apply: Callable[[Question], Answers | None]
    form: str = ""
