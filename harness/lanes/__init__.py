"""The lanes, found by listing this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cases.discovery import discover
from harness.lanes._lane import Lane
from harness.startup import cuda_answers

__all__ = ["Lane", "default_lanes", "lanes"]


@cache
def lanes() -> dict[str, Lane]:
    """Every lane by name."""
    found = discover("harness.lanes", Path(__file__).parent, "LANE")
    return {item.value.name: item.value for item in found if isinstance(item.value, Lane)}


def default_lanes() -> list[str]:
    """Compiled where a CUDA device answers, else every other lane."""
    if cuda_answers():
        return ["compiled"]
    return [name for name in lanes() if name != "compiled"]
