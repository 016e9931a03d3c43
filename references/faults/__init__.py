"""Named faults: what an operator's definition would answer if it made one of the mistakes that kernels make.

One file of this folder holds the faults of a group of operators and ends in `FAULTS`. A path whose wrong
output is a fault's has, most likely, made that mistake.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cases.discovery import discover
from references.faults._fault import Answers, Fault, NotMade, Question, Unwritten

__all__ = ["Answers", "Fault", "NotMade", "Question", "Unwritten", "faults"]


@cache
def faults() -> tuple[Fault, ...]:
    """Every fault there is, in the order of files and in each as written.

    Raises:
        ImportError: a file of faults cannot be imported; a diagnosis without it would say too much.
    """
    found: list[Fault] = []
    for item in discover("references.faults", Path(__file__).parent, "FAULTS"):
        if not isinstance(item.value, tuple):
            raise ImportError(f"{item.module} must end in FAULTS = (Fault(...), ...): {item.reason}")
        found += item.value
    return tuple(found)
