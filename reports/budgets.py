"""The budgets' table: worst clean error, budget and weakest mutant of every dtype and data mode."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness.margins import CHECKS, CLEAN_MARGIN, MUTANT_MARGIN, Cell
from harness.verdict import plain


def text(cells: Sequence[Cell]) -> str:
    """The table, then every margin that does not hold."""
    heads = " ".join(f"{check + ' error':>12} {'budget':>8} {'share':>6}" for check in CHECKS)
    lines = [f"{'dtype':<5} {'data':<8} {'cases':>6} {heads}  mutants over budget; the weakest due here"]
    lines += [
        f"{cell.dtype:<5} {cell.data:<8} {cell.cases:>6} "
        + " ".join(_margin(cell, check) for check in CHECKS)
        + f"  {cell.caught} of {len(cell.shares)}{_weakest(cell)}"
        for cell in cells
    ]
    complaints = [complaint for cell in cells for complaint in cell.complaints()]
    if complaints:
        return "\n".join([*lines, *complaints])
    lines.append(
        f"the table holds: clean errors at most 1 / {CLEAN_MARGIN:g} of their budgets, "
        f"mutants at least {MUTANT_MARGIN:g} times over theirs"
    )
    return "\n".join(lines)


def write_jsonl(file: Path, cells: Sequence[Cell]) -> None:
    """One object a dtype and data mode, every mutant's share in it; infinities as strings."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = ({**asdict(cell), "due": sorted(cell.due)} for cell in cells)
    file.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows), encoding="utf-8")


def _margin(cell: Cell, check: str) -> str:
    margin = cell.clean.get(check)
    if margin is None:
        return f"{'-':>12} {'-':>8} {'-':>6}"
    return f"{margin.error:12.2e} {margin.budget:8.1e} {margin.share:6.2f}"


def _weakest(cell: Cell) -> str:
    if cell.weakest is None:
        return ""
    name, share = cell.weakest
    return f"; {name} {share:.1f} x"
