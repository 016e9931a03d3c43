"""`GateWriter`: a report format of the gate. One file of this folder holds one and ends in `WRITER`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cases.discovery import discover
from harness.gate.verdict import GateVerdict


@dataclass(frozen=True)
class GateWriter:
    """A report format, as in `gate --report FORMAT:FILE`; `text` is the whole report."""

    name: str
    summary: str
    text: Callable[[GateVerdict], str]


@cache
def gate_writers() -> dict[str, GateWriter]:
    """Every report format of the gate by name."""
    found = discover("reports", Path(__file__).parent, "WRITER")
    return {item.value.name: item.value for item in found if isinstance(item.value, GateWriter)}
