"""Check `permute`: the order of the slots does not matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from harness.checks._check import CheckPlugin
from harness.checks._variant import TokenMap, compare, keyed_rows, needs_equal_bits
from harness.launch import Launch
from harness.verdict import CheckResult


def run(launch: Launch) -> Iterator[CheckResult]:
    """Reverses the slots and compares each row with itself."""
    rows = keyed_rows(launch)
    slots = [row for row in rows if row.is_slot]
    padding = [row for row in rows if not row.is_slot]
    variant = replace(launch.case, steps=((*reversed(slots), *padding),))
    starts = launch.batch.metadata.cu_seqlens_q.tolist()
    total = starts[-1]
    tokens: TokenMap = []
    for start, end in pairwise(starts):
        tokens += [(start + i, total - end + i) for i in range(end - start)]
    yield from compare(
        "permute",
        launch,
        variant,
        tokens,
        bits=needs_equal_bits(launch),
        what="the slots are reversed",
    )


CHECK = CheckPlugin("permute", "every row gives the same in another slot", run, relaunches=True)
