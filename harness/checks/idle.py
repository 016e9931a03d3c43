"""Check `idle`: empty slots between the rows change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cases import Kind, Row
from harness.checks._check import CheckPlugin
from harness.checks._variant import compare, identity_map, keyed_rows, needs_equal_bits
from harness.launch import Launch
from harness.verdict import CheckResult


def run(launch: Launch) -> Iterator[CheckResult]:
    """Puts an idle slot before every row and compares."""
    spread: list[Row] = []
    for row in keyed_rows(launch):
        spread += [Row(Kind.IDLE), row] if row.is_slot else [row]
    variant = replace(launch.case, steps=(tuple(spread),))
    yield from compare(
        "idle",
        launch,
        variant,
        identity_map(launch),
        bits=needs_equal_bits(launch),
        what="idle slots are inserted",
    )


CHECK = CheckPlugin("idle", "idle slots between the rows change nothing", run, relaunches=True)
