"""Check `repeat`: five launches on the same tensors give the same bits."""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin, same_bits
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status

LAUNCHES = 5


def run(launch: Launch) -> Iterator[CheckResult]:
    """Launches four times more, outputs poisoned anew, and compares with the first."""
    first = {
        (index, spec.name): launch.token_rows(spec.name, index).clone()
        for index in range(len(launch.layers))
        for spec in launch.operator.outputs
    }
    for _ in range(LAUNCHES - 1):
        launch.reset()
        launch.run()
        for (index, name), expected in first.items():
            label = launch.tensor_label(name, index)
            reason = f"{label} differs between launches on the same tensors"
            got = launch.token_rows(name, index)
            result = same_bits("repeat", Kind.NONDETERMINISTIC, launch, label, got, expected, reason)
            if result.status is Status.FAILED:
                yield result
                return
    yield CheckResult("repeat", Status.PASSED)


CHECK = CheckPlugin("repeat", f"{LAUNCHES} launches give equal bits", run, relaunches=True)
