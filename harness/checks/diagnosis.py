"""Check `diagnosis`: which known mistake gives the wrong numbers that a path gave. It fails no verdict."""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin
from harness.diagnosis import diagnose
from harness.launch import Launch
from harness.verdict import CheckResult, Status


def run(launch: Launch) -> Iterator[CheckResult]:
    """One result, whose reason says the name, how sure it is, or that it does not know."""
    try:
        found = diagnose(launch)
    except Exception as error:
        # What others found about a launch must not be lost to what would have explained it.
        reason = f"the diagnosis failed: {type(error).__name__}: {error}"
        yield CheckResult("diagnosis", Status.SKIPPED, reason=reason)
        return
    yield CheckResult("diagnosis", Status.PASSED, reason=found.sentence)


CHECK = CheckPlugin(
    "diagnosis", "names the mistake that gives these wrong numbers, where one is known", run, explains=True
)
