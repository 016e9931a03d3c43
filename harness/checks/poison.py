"""Check `poison`: what unread slots hold does not change a bit."""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin
from harness.checks._variant import compare, identity_map
from harness.launch import Launch
from harness.verdict import CheckResult


def run(launch: Launch) -> Iterator[CheckResult]:
    """Compares with the same case under another poison and another table tail."""
    options = launch.case.options
    poison = "zero" if options.poison == "finite" else "finite"
    tail = "-1" if options.tail == "huge" else "huge"
    variant = launch.case.with_options(poison=poison, tail=tail)
    what = f"unread slots are {poison} and unused table entries {tail}"
    yield from compare("poison", launch, variant, identity_map(launch), bits=True, what=what)


CHECK = CheckPlugin(
    "poison", "equal bits whatever unread slots hold", run, relaunches=True, varies=("poison", "tail")
)
