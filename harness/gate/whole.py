"""The kernels as they stand, whatever a change touches: enough is hit, and every miss has its reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.coverage.sites import SiteKind
from harness.gate.change import Change
from harness.gate.diff import whole
from harness.gate.judge import Evidence
from harness.gate.policy import Limits, Policy, Threshold
from harness.gate.source import read_source
from harness.gate.verdict import Share, WholeShare

ALL = Threshold(("*",), {"lines": 100.0, "arms": 100.0, "lanes": 100.0})


def every_kernel(root: Path, evidence: Evidence, policy: Policy) -> tuple[Change, Policy]:
    """Every kernel that is not excluded, as if its lines were new, and a policy that lets none be missed."""
    files = tuple(whole(root, name) for name in evidence.kernels() if not policy.is_excluded(name))
    return Change("the policy's [whole] and its exemptions", files), replace(policy, thresholds=(ALL,))


def shares_of(change: Change, root: Path, evidence: Evidence, limits: Limits) -> tuple[WholeShare, ...]:
    """How much of the files is hit, exempted or not, beside what must be.

    Args:
        root: where the files are.
    """
    found = []
    for kind, limit in (
        (SiteKind.STATEMENT, limits.lines),
        (SiteKind.ARM, limits.arms),
        (SiteKind.LANE, limits.lanes),
    ):
        hit = total = 0
        for item in change.files:
            source = read_source(root, item.file)
            known = evidence.of(item.file, source).coverage if source else None
            if known is not None and not known.unmeasured:
                total += len(known.of_kind(kind))
                hit += len(known.of_kind(kind)) - len(known.missed(kind))
        found.append(WholeShare(f"{kind.value}s", Share(hit, total), limit))
    return tuple(found)
