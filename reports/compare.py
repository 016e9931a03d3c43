"""What changed between two runs: `compare` reads their jsonl reports and says it as Markdown.

Verdicts are matched by case, path and lane; where the two runs share no lane, by case and path, as of a run
on a GPU and one without. Worse is what passed and passes no more, what is no longer judged, and an error
that drifted towards its budget. Changed bits and times are told, and are no failure: a kernel may change its
order of summation, and a time is worth a look and not a verdict. Bits are compared within a lane, of paths
that neither run found to change theirs from launch to launch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from harness.plan import UsageError
from harness.verdict import SCHEMA

DRIFT = 1.25
"""An error that grew by less is noise: another order of summation moves it as much."""

DRIFT_FLOOR = 0.25
"""Share of its budget below which an error may grow as it likes."""

TIMED_SECONDS = 1e-3
"""Times below say more of the clock than of the path."""

GOOD = ("passed", "xfailed")
MAX_LINES = 50
"""Lines of a section that are printed; the rest is counted."""

Record = Mapping[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Drift:
    """An error that came nearer to its budget; both as shares of it."""

    key: Key
    check: str
    before: float
    after: float


@dataclass
class Comparison:
    """What is different, each a list of verdicts named by case, path and lane.

    Attributes:
        failing: good before and not now, with the reason. fixed: the other way round.
        lost: judged before, and now skipped or absent. added: judged now only.
        drifts: errors beyond noise. bits: equal inputs, both good, other output bits.
        unsteady: paths whose bits are not compared, because a run saw them change by themselves.
        environment: what the runs were reached with, where it differs: name, before, now.
        inputs: the case has other inputs, so that nothing else can be compared.
        ratios: path -> times now over times before, of cases that took long enough.
        matched: verdicts that both runs have.
    """

    failing: list[tuple[Key, str]] = field(default_factory=list)
    fixed: list[Key] = field(default_factory=list)
    lost: list[tuple[Key, str]] = field(default_factory=list)
    added: list[Key] = field(default_factory=list)
    drifts: list[Drift] = field(default_factory=list)
    bits: list[Key] = field(default_factory=list)
    unsteady: set[str] = field(default_factory=set)
    environment: list[tuple[str, str, str]] = field(default_factory=list)
    inputs: list[Key] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    matched: int = 0

    @property
    def is_worse(self) -> bool:
        """Whether the later run is to be refused."""
        return bool(self.failing or self.lost or self.drifts)


def read(file: Path) -> list[Record]:
    """The verdicts of a jsonl report, in its order.

    Raises:
        UsageError: it cannot be read, is no such report, or is of another schema.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from None
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(f"{file}:{number} is not JSON: {error.msg}; was the run cut off?") from None
        if not isinstance(record, dict):
            raise UsageError(f"{file}:{number} must be an object as `run --report jsonl:FILE` writes it")
        if "end" in record:
            continue
        if record.get("schema") != SCHEMA:
            raise UsageError(f"{file}:{number} must have schema {SCHEMA}, got {record.get('schema')!r}")
        if "run" in record:
            continue
        missing = {"case", "path", "lane", "status"} - record.keys()
        if missing:
            raise UsageError(f"{file}:{number} is no verdict: it has no {min(missing)}")
        records.append(record)
    if not records:
        raise UsageError(f"{file} has no verdicts: write one with `run --report jsonl:FILE`")
    return records


def compare(before: Sequence[Record], after: Sequence[Record]) -> Comparison:
    """What is different in the later run."""
    names: tuple[str, ...] = ("case", "path", "lane")
    if not {record["lane"] for record in before} & {record["lane"] for record in after}:
        names = ("case", "path")
    earlier = {tuple(str(record[name]) for name in names): record for record in before}
    later = {tuple(str(record[name]) for name in names): record for record in after}
    found = Comparison(environment=_environment(before, after))
    found.unsteady = {str(record["path"]) for record in (*before, *after) if _is_unsteady(record)}
    for key, old in earlier.items():
        new = later.get(key)
        if old["status"] == "skipped":
            continue
        if new is None or new["status"] == "skipped":
            reason = "it is not in the later run" if new is None else str(new.get("reason", ""))
            found.lost.append((key, reason))
            continue
        found.matched += 1
        _compare_one(found, key, old, new)
    found.added = [
        key
        for key, new in later.items()
        if new["status"] != "skipped" and (key not in earlier or earlier[key]["status"] == "skipped")
    ]
    return found


def _compare_one(found: Comparison, key: Key, old: Record, new: Record) -> None:
    was_good, is_good = old["status"] in GOOD, new["status"] in GOOD
    if was_good and not is_good:
        found.failing.append((key, str(new.get("reason", ""))))
    if is_good and not was_good:
        found.fixed.append(key)
    if old.get("inputs_digest") != new.get("inputs_digest"):
        found.inputs.append(key)
        return
    if not (was_good and is_good):
        return
    is_comparable = old["lane"] == new["lane"] and key[1] not in found.unsteady
    if is_comparable and old.get("outputs_digest") != new.get("outputs_digest"):
        found.bits.append(key)
    shares = _shares(old)
    for check, after in _shares(new).items():
        before = shares.get(check)
        if before is not None and after > DRIFT_FLOOR and after > DRIFT * before:
            found.drifts.append(Drift(key, check, before, after))
    seconds = [record.get("seconds", {}).get("run", 0.0) for record in (old, new)]
    if min(seconds) >= TIMED_SECONDS:
        found.ratios.setdefault(key[1], []).append(seconds[1] / seconds[0])


def _is_unsteady(record: Record) -> bool:
    """Whether a path gave other bits for the same inputs, launch after launch."""
    kinds = [record.get("kind"), *(check.get("kind") for check in record.get("checks", ()))]
    return "nondeterministic" in kinds


def _environment(before: Sequence[Record], after: Sequence[Record]) -> list[tuple[str, str, str]]:
    """Versions and devices that one run has and the other has not."""

    def seen(records: Sequence[Record]) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for record in records:
            for name, value in record.get("environment", {}).items():
                found.setdefault(name, set()).add(str(value))
        return found

    earlier, later = seen(before), seen(after)
    names = (name for name in earlier if name in later and earlier[name] != later[name])
    return [(name, ", ".join(sorted(earlier[name])), ", ".join(sorted(later[name]))) for name in names]


def _shares(record: Record) -> dict[str, float]:
    """Check and tensor -> the error as a share of its budget, of checks that have both."""
    found = {}
    for check in record.get("checks", ()):
        error, budget = check.get("error"), check.get("budget")
        if isinstance(error, int | float) and isinstance(budget, int | float) and budget > 0:
            found[f"{check['name']} of {check['tensor']}"] = error / budget
    return found


def markdown(found: Comparison) -> str:
    """The comparison as Markdown: the worst first, nothing that is empty."""
    verdict = "worse" if found.is_worse else "not worse"
    lines = [f"**{verdict}**: {found.matched:,} verdicts in both runs"]
    lines += [f"\n{name}: {before} before, {now} now" for name, before, now in found.environment]
    lines += _section("New failures", [_with_reason(*one) for one in found.failing])
    lines += _section("No longer judged", [_with_reason(*one) for one in found.lost])
    drifts = sorted(found.drifts, key=lambda drift: -drift.after)
    told = [
        f"{_told(drift.key)}: {drift.check}, {drift.before:.0%} -> {drift.after:.0%} of the budget"
        for drift in drifts
    ]
    lines += _section(f"Errors that grew by more than {DRIFT:g}", told)
    lines += _section("Other inputs: nothing else was compared", [_told(key) for key in found.inputs])
    lines += _section("Other output bits", [_told(key) for key in found.bits])
    unsteady = [f"{path}: a run saw its bits change by themselves" for path in sorted(found.unsteady)]
    lines += _section("Output bits not compared", unsteady)
    lines += _section("Fixed", [_told(key) for key in found.fixed])
    lines += _section("Judged for the first time", [_told(key) for key in found.added])
    if found.ratios:
        lines += ["", "## Times, now over before", "", "| path | cases | median | largest |"]
        lines += ["|------|------:|-------:|--------:|"]
        for path, ratios in sorted(found.ratios.items()):
            largest = max(ratios, key=lambda ratio: abs(math.log(ratio)))
            lines.append(f"| {path} | {len(ratios):,} | {median(ratios):.2f} | {largest:.2f} |")
    return "\n".join(lines)


def _section(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = [f"- ... and {len(entries) - MAX_LINES:,} more"] if len(entries) > MAX_LINES else []
    return ["", f"## {title} ({len(entries):,})", "", *(f"- {entry}" for entry in entries[:MAX_LINES]), *more]


def _with_reason(key: Key, reason: str) -> str:
    return f"{_told(key)}: {' '.join(reason.split())}"


def _told(key: Key) -> str:
    case, path, *lane = key
    return " ".join([f"`{case}`", path, *lane])
