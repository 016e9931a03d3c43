"""What the gate says of a change: by file, of its mutants, of exemptions, and as one exit code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness.coverage.sites import Site, SiteKind
from harness.gate.exemptions import Exemption
from harness.gate.policy import Limits
from harness.run import EXIT_FAILED, EXIT_HARNESS, EXIT_INTERRUPTED, EXIT_NOTHING_JUDGED, EXIT_PASSED
from harness.verdict import ranges

EXIT_TESTS_FAILED = 8
EXIT_BELOW = 9
EXIT_UNMEASURED = 10
PRECEDENCE = (
    EXIT_INTERRUPTED,
    EXIT_HARNESS,
    EXIT_TESTS_FAILED,
    EXIT_UNMEASURED,
    EXIT_BELOW,
    EXIT_FAILED,
    EXIT_NOTHING_JUDGED,
    EXIT_PASSED,
)
"""The first of these that applies is the exit code."""


@dataclass(frozen=True)
class Share:
    """How many of how many are hit."""

    hit: int = 0
    total: int = 0

    @property
    def percent(self) -> int:
        """Rounded down, so that 79.9 is below 80; 100 of nothing."""
        return math.floor(100 * self.hit / self.total) if self.total else 100

    def holds(self, percent: float) -> bool:
        """Whether it reaches so many percent; of nothing it does."""
        return 100 * self.hit >= percent * self.total

    def __str__(self) -> str:
        return f"{self.hit} of {self.total}" if self.total else "-"


@dataclass(frozen=True)
class WholeShare:
    """How many of all statements, arms or lanes of the kernels are hit, and the percent that must be."""

    what: str
    share: Share
    limit: float

    @property
    def is_below(self) -> bool:
        """Whether too few are."""
        return not self.share.holds(self.limit)

    def __str__(self) -> str:
        hit, percent = f"{self.share} {self.what} of the kernels are hit", f"{self.share.percent} %"
        return f"{hit}, {percent}, and it must be {self.limit:g} %" if self.is_below else f"{hit}, {percent}"


@dataclass(frozen=True)
class Finding:
    """One thing that a reader of the change is shown, at its lines.

    Attributes:
        kind: line, arm, lane, unmeasured, mutant or exemption.
        text: one sentence. is_failure: whether the gate fails for it, or only tells it.
    """

    file: str
    first: int
    last: int
    kind: str
    text: str
    is_failure: bool


@dataclass(frozen=True)
class FileVerdict:
    """What is said of one changed file.

    Attributes:
        changed: lines that the change adds or rewrites, whatever stands on them.
        limits: percent that it is held to.
        covered_lines, missing_lines: numbers of touched lines on which statements stand, all hit or not all.
        arms, lanes: shares of those on touched lines. missing_arms, missing_lanes: the others.
        exempted: statements, arms and lanes that are not counted because an exemption names them.
        unmeasured: why nothing is known of it, one sentence; empty if it is measured.
        is_required: whether it must be measured, as kernels must. is_exempt: whether an exemption names it.
        is_asked: whether any coverage was asked about it: where not, a host file is told, not judged.
        whole, base: shares of all its statements, now and where the change began; None if not known.
        text: its touched lines as they read, by number.
    """

    file: str
    language: str
    changed: int
    limits: Limits
    covered_lines: tuple[int, ...] = ()
    missing_lines: tuple[int, ...] = ()
    arms: Share = Share()
    missing_arms: tuple[Site, ...] = ()
    lanes: Share = Share()
    missing_lanes: tuple[Site, ...] = ()
    exempted: int = 0
    unmeasured: str = ""
    is_required: bool = False
    is_exempt: bool = False
    is_asked: bool = True
    whole: Share | None = None
    base: Share | None = None
    text: dict[int, str] = field(default_factory=dict)

    @property
    def lines(self) -> Share:
        """Touched lines with statements: those hit of all."""
        return Share(len(self.covered_lines), len(self.covered_lines) + len(self.missing_lines))

    @property
    def is_unmeasured(self) -> bool:
        """Whether it is a file that must be measured, and nothing measured it."""
        return bool(self.unmeasured) and self.is_required and not self.is_exempt

    @property
    def is_below(self) -> bool:
        """Whether less of it is hit than must be; of a host file that was asked about in vain, it is."""
        if self.unmeasured:
            return self.is_asked and not self.is_required and not self.is_exempt and self.limits.lines > 0
        return any(not share.holds(limit) for _, share, limit in self._measures())

    def complaints(self) -> list[str]:
        """Why it fails, one sentence each; nothing if it passes."""
        if self.unmeasured:
            return [self.unmeasured] if self.is_unmeasured or self.is_below else []
        return [
            f"{share} {what} hit, {share.percent} %, and it must be {limit:g} %"
            for what, share, limit in self._measures()
            if not share.holds(limit)
        ]

    def findings(self) -> Iterator[Finding]:
        """Everything that is missing, at its lines."""
        if self.unmeasured:
            first = min(self.text, default=1)
            failing = self.is_unmeasured or self.is_below
            yield Finding(self.file, first, first, "unmeasured", self.unmeasured, failing)
            return
        failing = not self.lines.holds(self.limits.lines)
        for run in runs(self.missing_lines):
            text = f"no case runs {'this line' if run[0] == run[1] else 'these lines'}"
            yield Finding(self.file, *run, "line", text, failing)
        failing = not self.arms.holds(self.limits.arms)
        for site in self.missing_arms:
            yield Finding(self.file, site.first, site.last, "arm", said_of(site), failing)
        failing = not self.lanes.holds(self.limits.lanes)
        for site in self.missing_lanes:
            yield Finding(self.file, site.first, site.last, "lane", said_of(site), failing)

    def _measures(self) -> tuple[tuple[str, Share, float], ...]:
        return (
            ("changed lines are", self.lines, self.limits.lines),
            ("arms on them are", self.arms, self.limits.arms),
            ("lanes on them are", self.lanes, self.limits.lanes),
        )


@dataclass(frozen=True)
class Survivor:
    """A mutant on changed lines that no case noticed; `cases` is how many ran on it."""

    file: str
    line: int
    why: str
    old: str
    new: str
    cases: int


@dataclass(frozen=True)
class MutationVerdict:
    """What became of mutants on changed kernel lines.

    Attributes:
        eligible: how many there are, accepted ones left out. accepted: those.
        caught, survivors, stillborn: of those that were tried; the stillborn cannot be imported.
        seed: of the sample, if not all were tried. limit: percent to be caught.
        files: those whose mutants could be tried. notes: one sentence for each whose could not.
    """

    eligible: int = 0
    accepted: int = 0
    caught: int = 0
    survivors: tuple[Survivor, ...] = ()
    stillborn: int = 0
    seed: int = 0
    limit: float = 0.0
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def tried(self) -> int:
        """How many were tried."""
        return self.caught + len(self.survivors) + self.stillborn

    @property
    def score(self) -> Share:
        """Caught of those that could be."""
        return Share(self.caught, self.caught + len(self.survivors))

    @property
    def is_below(self) -> bool:
        """Whether too few were caught."""
        return not self.score.holds(self.limit)

    def findings(self) -> Iterator[Finding]:
        """Every survivor at its line."""
        for item in self.survivors:
            what = (
                "no case runs the line" if not item.cases else f"{item.cases} cases that run it do not notice"
            )
            text = f"a mutant survives: {item.why}; {what}"
            yield Finding(item.file, item.line, item.line, "mutant", text, self.is_below)


@dataclass(frozen=True)
class FailedCase:
    """A failing verdict of a run, with the line that runs it again."""

    case: str
    path: str
    lane: str
    status: str
    reason: str
    repro: str


@dataclass(frozen=True)
class GateVerdict:
    """What is said of a change.

    Attributes:
        against: what it is compared with, in words. coverage: the files that say what was hit.
        changed: lines that the change adds or rewrites, in files of every kind.
        files: those that are judged. mutation: None if no mutants were asked for.
        expired: exemptions past their last day; each fails the gate.
        warnings, notes: one sentence each: what ought to be put right, and what was left out and why.
        failed: failing cases of the runs that were given.
        run: exit code of the run that the gate began, if it did.
        whole: shares of the kernels as a whole, where that was asked for.
    """

    against: str
    coverage: tuple[str, ...] = ()
    changed: int = 0
    files: tuple[FileVerdict, ...] = ()
    mutation: MutationVerdict | None = None
    expired: tuple[Exemption, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    failed: tuple[FailedCase, ...] = ()
    run: int = EXIT_PASSED
    whole: tuple[WholeShare, ...] = ()

    @property
    def lines(self) -> Share:
        """Touched lines with statements in all judged files: those hit of all."""
        shares = [item.lines for item in self.files]
        return Share(sum(item.hit for item in shares), sum(item.total for item in shares))

    @property
    def exit_code(self) -> int:
        """The exit code, by `PRECEDENCE`."""
        found = {EXIT_PASSED, self._run_exit()}
        if self.failed:
            found.add(EXIT_TESTS_FAILED)
        if self.expired or any(item.is_unmeasured for item in self.files):
            found.add(EXIT_UNMEASURED)
        below = [*(item.is_below for item in self.files), *(item.is_below for item in self.whole)]
        if any(below) or (self.mutation and self.mutation.is_below):
            found.add(EXIT_BELOW)
        return min(found, key=PRECEDENCE.index)

    def findings(self) -> list[Finding]:
        """Everything that is missing, by file and line, failures and what is only told alike."""
        found = [finding for item in self.files for finding in item.findings()]
        if self.mutation is not None:
            found += self.mutation.findings()
        return sorted(found, key=lambda item: (item.file, item.first, item.last, item.kind, item.text))

    def reasons(self) -> list[str]:
        """Why the gate fails, one sentence each, in the order of precedence; nothing if it passes."""
        found = []
        if self._run_exit() == EXIT_TESTS_FAILED:
            found.append("a case of the run failed")
        if self._run_exit() in (EXIT_INTERRUPTED, EXIT_HARNESS, EXIT_NOTHING_JUDGED):
            found.append(f"the run ended with exit code {self.run}")
        if self.failed:
            found.append(f"{len(self.failed):,} {'case fails' if len(self.failed) == 1 else 'cases fail'}")
        found += [f"{item} expired on {item.expires}" for item in self.expired]
        files = sorted(self.files, key=lambda item: not item.is_unmeasured)
        found += [f"{item.file}: {complaint}" for item in files for complaint in item.complaints()]
        found += [str(item) for item in self.whole if item.is_below]
        if self.mutation is not None and self.mutation.is_below:
            score = self.mutation.score
            found.append(
                f"{score} mutants on changed kernel lines are caught, {score.percent} %, "
                f"and it must be {self.mutation.limit:g} %"
            )
        return found

    def _run_exit(self) -> int:
        """What the run's exit code is as one of the gate's."""
        return EXIT_TESTS_FAILED if self.run == EXIT_FAILED else self.run


def said_of(site: Site) -> str:
    """What it means that an arm or a lane was never hit, one sentence."""
    if site.kind is SiteKind.LANE:
        return f"no lane of this mask was ever {site.label}"
    return {
        "true": "the condition was never true",
        "false": "the condition was never false",
        "no trip": "the loop was never left out",
        "trips": "the loop never ran",
        "ends": "the loop never came to its end",
    }.get(site.label, f"arm {site.label!r} was never taken")


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Distinct numbers as ranges, both ends inclusive: [1, 2, 7] -> [(1, 2), (7, 7)]."""
    parts = [part.split("-") for part in ranges(numbers).split(",") if part]
    return [(int(part[0]), int(part[-1])) for part in parts]
