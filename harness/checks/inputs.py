"""Check `inputs`: what a path only reads holds the same bytes afterwards, guard bands included."""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result an input."""
    for index, layer in enumerate(launch.layers):
        for name, buffer in layer.batch.inputs.items():
            if name in launch.operator.in_place:
                continue
            label = launch.tensor_label(name, index)
            if buffer.equals(layer.before[name]):
                yield CheckResult("inputs", Status.PASSED, label)
            else:
                reason = f"the path changed bytes of its input {label} or of the guards around it"
                yield CheckResult("inputs", Status.FAILED, label, Kind.INPUT_CHANGED, reason)


CHECK = CheckPlugin("inputs", "inputs and the guards around them are unchanged", run, comes_first=True)
