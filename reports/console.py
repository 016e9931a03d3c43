"""Report `console`: what a person reads. Failing verdicts as blocks, then one line of counts."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from cases.contract import operators
from harness.run import Summary
from harness.verdict import CheckResult, Status, Verdict, Where
from reports.writer import Writer

MAX_BLOCKS = 20
"""Failing verdicts printed in full; the jsonl report has all of them."""

DIAGNOSIS = "diagnosis"
"""The check that passes with a reason: what the failure of others looks like."""


class ConsoleReport:
    """Prints blocks as verdicts come and the counts at the end."""

    def __init__(self, file: Path | None = None, stream: TextIO | None = None) -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            stream = file.open("w", encoding="utf-8")
        self._stream = stream
        self._blocks = 0
        self._skips: dict[str, int] = {}

    def begin(self, run: dict[str, Any]) -> None:
        self._print(f"mla-harness {run['version']}: {run['tasks']} verdicts to reach, lane {run['lane']}")

    def verdict(self, verdict: Verdict) -> None:
        if verdict.status is Status.SKIPPED:
            reason = f"{verdict.kind.value if verdict.kind else ''}: {verdict.path}: {verdict.reason}"
            self._skips[reason] = self._skips.get(reason, 0) + 1
        if not verdict.is_bad:
            return
        self._blocks += 1
        if self._blocks <= MAX_BLOCKS:
            self._print(failure_block(verdict))

    def end(self, summary: Summary) -> None:
        if self._blocks > MAX_BLOCKS:
            more = self._blocks - MAX_BLOCKS
            self._print(f"... and {more:,} more failing verdicts: see the jsonl report")
        for reason, count in sorted(self._skips.items()):
            self._print(f"skipped {count:,} x {reason}")
        for item in summary.stale:
            self._print(
                f"stale known failure: no verdict matches {item.case} {item.path} {item.lane}; remove it"
            )
        self._print(counts_line(summary))

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def counts_line(summary: Summary) -> str:
    """The last line: every status that occurred, skips always, and how long it took."""
    counts = summary.counts
    parts = [
        f"{count:,} {status.value}"
        for status, count in counts.items()
        if count or status in (Status.PASSED, Status.FAILED, Status.SKIPPED)
    ]
    text = f"{', '.join(parts)} in {summary.seconds:.1f} s"
    if summary.compile_variants:
        text += f", {summary.compile_variants} compiled variants"
    if summary.interrupted:
        text += " - interrupted: this is what ran"
    return text


def failure_block(verdict: Verdict) -> str:
    """Everything about a failing verdict that fits a screen, ending in the line that reruns it."""
    word = {Status.ERROR: "ERROR", Status.XPASSED: "XPASS"}.get(verdict.status, "FAIL")
    kind = f"  kind={verdict.kind.value}" if verdict.kind else ""
    lines = [
        f"{word} {verdict.case}  path={verdict.path}  lane={verdict.lane}{kind}",
        f"  reason  {verdict.reason}",
    ]
    for check in verdict.checks:
        if check.status is Status.FAILED:
            lines += check_lines(check, verdict.operator)
        elif check.name == DIAGNOSIS and check.reason:
            lines.append(f"  cause   {check.reason}")
    if verdict.smallest is not None:
        lines.append(f"  reduced {verdict.smallest.case}")
    lines.append(f"  rerun   {verdict.repro}")
    return "\n".join(lines)


def check_lines(check: CheckResult, operator: str) -> list[str]:
    """One check: what it says, the worst element, the budget and where the failing elements lie."""
    if check.name == DIAGNOSIS:
        return [f"  cause   {check.reason}"]
    lines = [f"  check   {check.name} of {check.tensor}: {check.reason or check.status.value}"]
    if check.worst is not None:
        place = place_text(check, operator)
        lines.append(f"  worst   at {place}: got {check.worst.got:.6g}, expected {check.worst.expected:.6g}")
    if check.error is not None and check.budget is not None:
        lines.append(f"  budget  error {check.error:.2e}, allowed {check.budget:.2e} = {check.budget_source}")
    where = where_text(check.where)
    if where:
        lines.append(f"  where   {where}")
    return lines


def place_text(check: CheckResult, operator: str) -> str:
    """The worst element's index with the axes' names: `token 0, head 2, dim 17`."""
    index = check.worst.index if check.worst else ()
    name = check.tensor.partition("[")[0]
    axes = next((spec.axes for spec in operators()[operator].outputs if spec.name == name), ())
    if len(axes) != len(index):
        # A cache is compared by written row, not by its four axes.
        axes = ("tokens", "kv_lora_rank")[: len(index)]
    return ", ".join(f"{_AXIS.get(axis, axis)} {number}" for axis, number in zip(axes, index, strict=True))


_AXIS = {
    "tokens": "token",
    "decode_tokens": "decode token",
    "num_attention_heads": "head",
    "kv_lora_rank": "dim",
}


def where_text(where: Where) -> str:
    """The axes on which failing elements lie, those that apply."""
    parts = [(item.name, getattr(where, item.name)) for item in fields(where)]
    return "; ".join(f"{name} {value}" for name, value in parts if value)


WRITER = Writer("console", "what a person reads: failing verdicts and counts", ConsoleReport)
