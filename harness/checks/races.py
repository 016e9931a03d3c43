"""Check `races`: CUDA kernels give the same bits in whatever order their threads and blocks run.

The launch at hand ran forward. It runs again in reverse and in two random orders: a kernel that lacks a
barrier, or whose blocks depend on one another, gives other bits in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin, same_bits
from harness.cuda import build
from harness.launch import Launch, PathFailure
from harness.verdict import CheckResult, Kind, Status

FORWARD, REVERSE, RANDOM = range(3)
SCHEDULES = (
    ("in reverse", REVERSE, 0),
    ("in a random order, seed 1", RANDOM, 1),
    ("in a random order, seed 2", RANDOM, 2),
)


def run(launch: Launch) -> Iterator[CheckResult]:
    """Launches under every other schedule, outputs poisoned anew, and compares with the first."""
    if not launch.path.is_cuda:
        yield CheckResult("races", Status.SKIPPED, reason="threads have a schedule in CUDA paths alone")
        return
    first = {
        (index, name): (launch.token_rows(name, index).clone(), buffer.snapshot())
        for index, layer in enumerate(launch.layers)
        for name, buffer in layer.outputs.items()
    }
    try:
        for order, kind, seed in SCHEDULES:
            build.set_schedule(kind, seed)
            launch.reset()
            try:
                launch.run()
            except PathFailure as failure:
                reason = f"when threads run {order}, {failure}"
                yield CheckResult("races", Status.FAILED, "", Kind.NONDETERMINISTIC, reason)
                return
            for (index, name), (rows, bytes_) in first.items():
                if launch.layers[index].outputs[name].equals(bytes_):
                    continue
                label = launch.tensor_label(name, index)
                reason = f"{label} changes its bits when threads run {order}: the kernel has a race"
                got = launch.token_rows(name, index)
                found = same_bits("races", Kind.NONDETERMINISTIC, launch, label, got, rows, reason)
                if found.status is Status.PASSED:
                    # It is elsewhere: in a guard, a gap, or a row of the cache that is no token's.
                    found = CheckResult("races", Status.FAILED, label, Kind.NONDETERMINISTIC, reason)
                yield found
                return
    finally:
        build.set_schedule(FORWARD)
    yield CheckResult("races", Status.PASSED)


CHECK = CheckPlugin(
    "races",
    "CUDA kernels give equal bits under every schedule of their threads",
    run,
    lanes=("host",),
    by_default=True,
    relaunches=True,
)
