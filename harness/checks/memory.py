"""Check `memory`: a CUDA kernel touches no byte that is not its own, and does nothing undefined.

The case is launched once more in a process whose kernels are built with AddressSanitizer and
UndefinedBehaviorSanitizer, its tensors in memory of their own between pages that cannot be touched
(harness/cuda/guarded.py). A report says what was done and on which line of the kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin
from harness.cuda import build, sanitized
from harness.launch import Launch
from harness.verdict import CheckResult, Kind, Status

PROCESS = sanitized.SanitizedProcess()


def run(launch: Launch) -> Iterator[CheckResult]:
    """Launches again in the process that is kept for it."""
    lack = sanitized.lacking() if launch.path.is_cuda else "only CUDA paths are built for it"
    if lack is not None:
        yield CheckResult("memory", Status.SKIPPED, reason=lack)
        return
    found = PROCESS.launch(str(launch.case), launch.path.name, build.substituted_last())
    if found is None:
        yield CheckResult("memory", Status.PASSED)
    else:
        yield CheckResult("memory", Status.FAILED, "", Kind.BOUNDS, found)


CHECK = CheckPlugin(
    "memory",
    "under AddressSanitizer and UBSan no kernel leaves its tensors or its shared memory",
    run,
    lanes=("host",),
    relaunches=True,
)
