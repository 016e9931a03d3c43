"""Check `bounds`: every active pointer of an interpreted kernel lay within a tensor of its launch.

The watching is done while the kernel runs (`harness/bounds.py`), and a violation ends the launch: a launch
that got here had none.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.bounds import is_installed
from harness.checks._check import CheckPlugin
from harness.launch import Launch
from harness.verdict import CheckResult, Status


def run(launch: Launch) -> Iterator[CheckResult]:
    """Passed if pointers were watched, else skipped."""
    if is_installed():
        yield CheckResult("bounds", Status.PASSED)
    else:
        yield CheckResult("bounds", Status.SKIPPED, reason="pointers are not watched in this process")


CHECK = CheckPlugin(
    "bounds",
    "no active pointer leaves the launch's tensors",
    run,
    lanes=("interpreted",),
    by_default=True,
)
