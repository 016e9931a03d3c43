"""Check `recompute`: a row that finds its history in the cache gives what it gives after computing it.

Every row with cached tokens is first prefilled with them, by the path itself; then comes the step. A prefix
hit, a decode row and a draft must give the same bits as on the history that the harness laid there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cases import Kind, Row
from harness.checks._check import CheckPlugin
from harness.checks._variant import compare_launches, identity_map, keyed_rows, play
from harness.launch import Launch
from harness.verdict import CheckResult, Status


def run(launch: Launch) -> Iterator[CheckResult]:
    """Prefills every history in a step of its own and compares the step after it."""
    rows = keyed_rows(launch)
    if not any(row.cached for row in rows):
        yield CheckResult("recompute", Status.SKIPPED, reason="no row has a history")
        return
    histories = tuple(
        Row(Kind.PREFILL, new=row.cached, tag=row.tag, key=row.key) if row.cached else Row(Kind.IDLE)
        for row in rows
        if row.is_slot
    )
    *_, last = play(launch, replace(launch.case, steps=(histories, tuple(rows))))
    what = "its history was computed in a step before"
    yield from compare_launches("recompute", launch, last, identity_map(launch), bits=True, what=what)


CHECK = CheckPlugin(
    "recompute",
    "equal bits whether a history was found or computed",
    run,
    relaunches=True,
    plays=True,
)
