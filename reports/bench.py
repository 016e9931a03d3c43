"""What `bench` measured: a table, jsonl, and a plot of every time against its ceilings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from harness.task import Measured, Rates

ADAPTERS = "adapters/"
"""How paths of other projects' kernels begin."""

ROOFLINE_SLACK = 1.05
"""A time may beat the measured ceilings by this: they are measurements themselves."""


@dataclass(frozen=True)
class Ratio:
    """One measurement as shares of the ceilings.

    `of_ours` is of an adapter alone: its time by that of our fastest path on the case, None if there is none.
    """

    measured: Measured
    of_copy: float
    of_matrix: float
    is_impossible: bool
    of_ours: float | None = None


def ratios(measured: Sequence[Measured], rates: Rates) -> list[Ratio]:
    """Shares of copy bandwidth and matrix rate, and whether a time beats what the device can do."""
    found = []
    ours: dict[str, float] = {}
    for item in measured:
        if not item.reason and not item.path.startswith(ADAPTERS):
            ours[item.case] = min(item.seconds, ours.get(item.case, item.seconds))
    fastest_bytes = max(rates.copy_bytes, rates.read_bytes)
    for item in measured:
        if item.reason:
            continue
        bytes_a_second, flops_a_second = item.bytes / item.seconds, item.flops / item.seconds
        beats = max(bytes_a_second / fastest_bytes, flops_a_second / rates.matrix_flops)
        found.append(
            Ratio(
                item,
                bytes_a_second / rates.copy_bytes,
                flops_a_second / rates.matrix_flops,
                beats > ROOFLINE_SLACK,
                _of_ours(item, ours.get(item.case)),
            )
        )
    return found


def _of_ours(item: Measured, fastest: float | None) -> float | None:
    return item.seconds / fastest if fastest is not None and item.path.startswith(ADAPTERS) else None


def table(measured: Sequence[Measured], rates: Rates) -> str:
    """One line a measurement, the ceilings first."""
    copied, read = f"{rates.copy_bytes / 1e9:,.0f}", f"{rates.read_bytes / 1e9:,.0f}"
    matrix = f"{rates.matrix_flops / 1e12:,.0f}"
    lines = [
        f"{rates.device}: copy {copied} GB/s, read {read} GB/s, bf16 matrix {matrix} TFLOP/s",
        f"{'ms':>9} {'GB/s':>7} {'% copy':>7} {'TFLOP/s':>8} {'% matrix':>8} {'x ours':>7}  path, case",
    ]
    for ratio in ratios(measured, rates):
        item = ratio.measured
        of_ours = "" if ratio.of_ours is None else f"{ratio.of_ours:.2f}"
        lines.append(
            f"{item.seconds * 1e3:9.4f} {item.bytes / item.seconds / 1e9:7,.0f} {ratio.of_copy:7.1%} "
            f"{item.flops / item.seconds / 1e12:8.1f} {ratio.of_matrix:8.1%} {of_ours:>7}  "
            f"{item.path} {item.case}"
            + ("  IMPOSSIBLE: faster than the roofline" if ratio.is_impossible else "")
        )
    lines += [f"  skipped {item.path} {item.case}: {item.reason}" for item in measured if item.reason]
    return "\n".join(lines)


def write_jsonl(file: Path, measured: Sequence[Measured], rates: Rates) -> None:
    """The ceilings on the first line, then one object a measurement."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shares = {id(ratio.measured): ratio for ratio in ratios(measured, rates)}
    lines: list[dict[str, object]] = [{"schema": 1, "ceilings": asdict(rates)}]
    for item in measured:
        ratio = shares.get(id(item))
        shares_of = ("of_copy", "of_matrix", "of_ours")
        extra = {name: getattr(ratio, name) for name in shares_of} if ratio else {}
        lines.append({**asdict(item), **extra})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


WIDTH, BAR, LEFT = 900, 18, 20


def write_svg(file: Path, measured: Sequence[Measured], rates: Rates) -> None:
    """Two bars a measurement: share of copy bandwidth and share of the matrix rate."""
    file.parent.mkdir(parents=True, exist_ok=True)
    found = ratios(measured, rates)
    scale = (WIDTH - 2 * LEFT - 60) / max([1.0, *(max(r.of_copy, r.of_matrix) for r in found)])
    step = 3 * BAR + 14
    parts = [
        _text(
            LEFT, 24, f"{rates.device}: share of copy bandwidth (blue) and of the bf16 matrix rate (orange)"
        )
    ]
    for number, ratio in enumerate(found):
        top = 44 + number * step
        parts.append(_text(LEFT, top + 12, f"{ratio.measured.path}  {ratio.measured.case}"))
        bars = ((ratio.of_copy, "#3b6fb6"), (ratio.of_matrix, "#d9822b"))
        for line, (share, colour) in enumerate(bars):
            y = top + BAR + line * BAR
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{share * scale:.1f}" height="{BAR - 4}" fill="{colour}"/>'
            )
            parts.append(_text(LEFT + share * scale + 6, y + 11, f"{share:.1%}"))
    height = 60 + len(found) * step
    full = LEFT + scale
    axis = _text(full - 18, 30, "100 %")
    axis += f'<line x1="{full:.1f}" y1="34" x2="{full:.1f}" y2="{height - 10}" stroke="#888"/>'
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + axis
        + "".join(parts)
        + "</svg>\n",
        encoding="utf-8",
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'
