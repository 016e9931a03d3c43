"""Which layers of a model slide, from the two lists of its config: FastDeploy's, and Megatron's beside it.

`window_attn_skip_freq` has an entry a layer: 1, the layer slides over a packed cache; 0, it is full, in the
model dtype. Layers behind the list's end, as those that speculate are, are full. `sliding_window` begins with
how many keys a token of a sliding layer sees, itself included; what else is in the list is not looked at.

Megatron writes (left, right) instead, keys before the token and behind it, which it does not count itself:
`window_of_sides` turns these into the number that option `window` takes.

Source: FastDeploy #8060, B57 and B58; Megatron's `window_size`, as Transformer Engine has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cases.case import Case


@dataclass(frozen=True)
class SlidingLayers:
    """What a stack's layers see and how they store it, one value a layer; 0 is no window."""

    windows: tuple[int, ...]
    caches: tuple[str, ...]

    def of_case(self, case: Case) -> Case:
        """The case on these layers.

        Raises:
            RuleError: another option of the case has a list of another length.
        """
        return case.with_options(layers=len(self.windows), window=self.windows, cache=self.caches)


def sliding_layers(
    window_attn_skip_freq: Sequence[int], sliding_window: Sequence[int], num_layers: int
) -> SlidingLayers:
    """The layers of a stack of so many; what the list has beyond them is not looked at.

    Raises:
        ValueError: an entry is neither 0 nor 1, or a layer slides and no window of at least one key is given.
    """
    unknown = [entry for entry in window_attn_skip_freq if entry not in (0, 1)]
    if unknown:
        raise ValueError(
            f"window_attn_skip_freq has 1 for a sliding layer and 0 for a full one, got {unknown[0]!r}"
        )
    behind = max(0, num_layers - len(window_attn_skip_freq))
    slides = [*map(bool, window_attn_skip_freq[:num_layers]), *[False] * behind]
    if any(slides) and (not sliding_window or sliding_window[0] < 1):
        raise ValueError(
            f"sliding_window begins with how many keys are seen, at least 1, got {list(sliding_window)}"
        )
    return SlidingLayers(
        windows=tuple(sliding_window[0] if slide else 0 for slide in slides),
        caches=tuple("packed" if slide else "same" for slide in slides),
    )


def window_of_sides(left: int, right: int) -> int:
    """Keys that a token sees, itself included, of so many before it; -1 before it is all, and the window 0.

    Raises:
        ValueError: the window looks ahead, or `left` is below -1.
    """
    if right != 0 or left < -1:
        raise ValueError(f"a causal window has (left, 0) with left at least -1, got ({left}, {right})")
    return left + 1
