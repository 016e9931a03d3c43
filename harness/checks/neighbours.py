"""Check `neighbours`: the contents of other rows do not change a bit of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from harness.checks._check import CheckPlugin
from harness.checks._variant import compare, keyed_rows
from harness.launch import Launch
from harness.verdict import CheckResult, Status

OTHER_KEYS = 1_000_003
"""Added to a row's data key to give it other contents."""


def run(launch: Launch) -> Iterator[CheckResult]:
    """Gives every second row other data and compares the rows between; then the other way round."""
    rows = keyed_rows(launch)
    if sum(row.key is not None for row in rows) < 2:
        yield CheckResult("neighbours", Status.SKIPPED, reason="no row has a neighbour here")
        return
    batch_ids = launch.batch.metadata.batch_id_per_token.tolist()
    for parity in (0, 1):
        changed = tuple(
            replace(row, key=row.key + OTHER_KEYS) if row.key is not None and slot % 2 != parity else row
            for slot, row in enumerate(rows)
        )
        variant = replace(launch.case, steps=(changed,))
        kept = [(t, t) for t, slot in enumerate(batch_ids) if slot < 0 or slot % 2 == parity]
        what = "its neighbours hold other data"
        yield from compare("neighbours", launch, variant, kept, bits=True, what=what)


CHECK = CheckPlugin("neighbours", "equal bits whatever the other rows hold", run, relaunches=True)
