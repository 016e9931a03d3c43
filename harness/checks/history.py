"""Check `history`: what earlier steps left in a cache is what a recompute of every sequence gives.

Asked before the step is compared with the oracle, which reads the same cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin, bits_differ
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status, Where, Worst, ranges


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result a cache that goes on from the step before; none in a first step."""
    for index, layer in enumerate(launch.layers):
        for name, (carried, recomputed) in layer.history.items():
            label = launch.tensor_label(name, index)
            differs = bits_differ(carried, recomputed)
            if not bool(differs.any()):
                yield CheckResult("history", Status.PASSED, label)
                continue
            rows = layer.batch.carried[differs.any(1)]
            first = tuple(int(i) for i in differs.nonzero()[0].tolist())
            place = (int(layer.batch.carried[first[0]]), first[1])
            reason = f"{len(rows):,} rows of {label} do not hold what the steps before should have left"
            yield CheckResult(
                "history",
                Status.FAILED,
                label,
                Kind.WRONG,
                reason,
                worst=Worst(place, float(carried[first]), float(recomputed[first])),
                where=Where(
                    dims=ranges(differs.any(0).nonzero().flatten().tolist()),
                    blocks=ranges((rows // layer.batch.layer.block_size).tolist()),
                ),
            )


CHECK = CheckPlugin(
    "history", "caches hold what a recompute of every sequence gives", run, by_default=True, comes_first=True
)
