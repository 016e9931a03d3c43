"""Check `pages`: where the blocks lie does not change a bit."""

from __future__ import annotations

from collections.abc import Iterator

from harness.checks._check import CheckPlugin
from harness.checks._variant import compare, identity_map
from harness.launch import Launch
from harness.verdict import CheckResult


def run(launch: Launch) -> Iterator[CheckResult]:
    """Compares with the same rows on blocks in another order."""
    order = "shuffled" if launch.case.options.pages == "reversed" else "reversed"
    variant = launch.case.with_options(pages=order)
    what = f"blocks are {order}"
    yield from compare("pages", launch, variant, identity_map(launch), bits=True, what=what)


CHECK = CheckPlugin(
    "pages", "equal bits whatever physical blocks the rows have", run, relaunches=True, varies=("pages",)
)
