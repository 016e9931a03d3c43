"""Every changed file judged: what of its touched lines the coverage hit, by policy and exemptions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.coverage.sites import Coverage, CoverageError, FileCoverage, Hits, Site, SiteKind
from harness.gate.change import Change
from harness.gate.diff import ChangedFile
from harness.gate.exemptions import UNMEASURED, Exemption, complaint, expired
from harness.gate.policy import Policy
from harness.gate.source import Source, language_of, read_source
from harness.gate.verdict import FileVerdict, Share
from harness.plan import UsageError


@dataclass(frozen=True)
class Measured:
    """What coverages know of one text: `coverage` None, or why in `unmeasured`.

    Attributes:
        is_asked: whether a coverage has the file at all, of whatever text.
    """

    coverage: FileCoverage | None
    unmeasured: str = ""
    is_asked: bool = True


class Evidence:
    """Coverages by the file they were read from; those of another text of a file do not count for it."""

    def __init__(self, coverages: dict[str, Coverage]) -> None:
        self._coverages = coverages

    def kernels(self) -> list[str]:
        """The kernel files that any of them has, in order."""
        files = (item for coverage in self._coverages.values() for item in coverage.files.values())
        return sorted({item.file for item in files if item.is_kernel})

    def of(self, file: str, source: Source) -> Measured:
        """The union of what is known of a file's present text."""
        union = Coverage()
        stale = []
        for name, coverage in self._coverages.items():
            found = coverage.files.get(file)
            if found is None:
                continue
            known = union.files.get(file)
            if found.digest not in source.digests or (known and known.digest != found.digest):
                stale.append(name)
                continue
            union.merge(Coverage({file: found}))
        known = union.files.get(file)
        if known is None:
            return _unknown(stale)
        return Measured(known, known.unmeasured)


def read_evidence(written: Sequence[Path], elsewhere: Sequence[Path], root: Path) -> Evidence:
    """What `cover` wrote, and checked-in coverage of other machines.

    Args:
        root: what files of a change are relative to; those of `written` may be to the current folder.

    Raises:
        UsageError: a file is missing or is no coverage.
    """
    coverages = {}
    for file in written:
        if not file.exists():
            raise UsageError(
                f"there is no coverage at {file}: run `mla-harness cover` first, or gate with --run"
            )
        coverages[str(file)] = _from_root(read_coverage(file), root)
    for file in elsewhere:
        coverages[str(file)] = read_coverage(file)
    return Evidence(coverages)


def _from_root(coverage: Coverage, root: Path) -> Coverage:
    """The coverage with its files relative to a root, if they were relative to a folder below it."""
    here = Path.cwd()
    if here == root or not here.is_relative_to(root):
        return coverage
    below = here.relative_to(root).as_posix()
    names = {name: f"{below}/{name}" for name in coverage.files if (here / name).exists()}
    return Coverage({names.get(name, name): found for name, found in coverage.files.items()})


def read_coverage(file: Path) -> Coverage:
    """A file of coverage.

    Raises:
        UsageError: it is missing or is no coverage.
    """
    try:
        return Coverage.read(file)
    except CoverageError as error:
        raise UsageError(str(error)) from None


def _unknown(stale: list[str]) -> Measured:
    if not stale:
        return Measured(None, "nothing measured it: no coverage has this file", is_asked=False)
    return Measured(
        None, f"it was measured on another text of the file ({', '.join(stale)}): measure it again"
    )


@dataclass(frozen=True)
class Judgement:
    """What came of the files of a change; the parts are those of `GateVerdict`."""

    files: tuple[FileVerdict, ...]
    expired: tuple[Exemption, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def judge_change(
    change: Change,
    root: Path,
    evidence: Evidence,
    policy: Policy,
    exemptions: Sequence[Exemption],
    today: dt.date,
    base: Coverage | None = None,
) -> Judgement:
    """Every changed file that is code and not excluded, and what is to be said of exemptions.

    Args:
        root: where the files are. base: coverage where the change began, to compare with.
    """
    past = expired(exemptions, today)
    valid = [item for item in exemptions if item not in past]
    files, excluded, other = [], 0, 0
    for changed in change.files:
        source = read_source(root, changed.file)
        language = source.language if source else language_of(changed.file, "")
        if policy.is_excluded(changed.file):
            excluded += 1
        elif not language and not policy.is_required(changed.file, is_kernel=False):
            other += 1
        elif changed.lines or changed.cuts or changed.is_binary:
            files.append(_judge_file(changed, source, evidence, policy, valid, base))
    return Judgement(
        tuple(files),
        past,
        tuple(_complaints(valid, root, evidence)),
        tuple(_notes(files, excluded, other)),
    )


def _judge_file(
    changed: ChangedFile,
    source: Source | None,
    evidence: Evidence,
    policy: Policy,
    exemptions: Sequence[Exemption],
    base: Coverage | None,
) -> FileVerdict:
    file = changed.file
    own = [item for item in exemptions if item.file == file]
    if source is None:
        source = Source(language_of(file, ""), (), frozenset())
        measured = Measured(None, "it is not there: the diff is of another tree")
    elif changed.is_binary:
        measured = Measured(None, "git takes it for binary, so nobody knows which of its lines changed")
    else:
        measured = evidence.of(file, source)
    found = measured.coverage
    is_kernel = source.is_kernel or bool(found and found.is_kernel)
    verdict = FileVerdict(
        file,
        source.language,
        changed=len(changed.lines),
        limits=policy.limits(file, is_kernel=is_kernel),
        unmeasured=measured.unmeasured,
        is_required=policy.is_required(file, is_kernel=is_kernel),
        is_exempt=any(item.kind == UNMEASURED for item in own),
        is_asked=measured.is_asked,
        base=_base_share(base, file),
        text=_texts(source, changed.lines),
    )
    if found is None or found.unmeasured:
        return verdict
    sites = {site: hits for site, hits in found.sites.items() if not _is_exempt(site, source, own)}
    lines = _touched_lines(changed, sites)
    arms = _touched(SiteKind.ARM, changed, sites)
    lanes = _touched(SiteKind.LANE, changed, sites)
    counted = len(_every_touched(changed, sites))
    return replace(
        verdict,
        covered_lines=tuple(line for line, is_hit in lines.items() if is_hit),
        missing_lines=tuple(line for line, is_hit in lines.items() if not is_hit),
        arms=_share(arms),
        missing_arms=_missing(arms),
        lanes=_share(lanes),
        missing_lanes=_missing(lanes),
        exempted=len(_every_touched(changed, found.sites)) - counted,
        whole=_share(found.of_kind(SiteKind.STATEMENT)),
        text=_texts(source, (*changed.lines, *lines)),
    )


def _touched_lines(changed: ChangedFile, sites: dict[Site, Hits]) -> dict[int, bool]:
    """Touched lines on which statements stand, in order, and whether all that stand there are hit.

    A line within a statement of several lines is a line of it. Where one statement lies within another,
    as in the body of a compound one, the inner one speaks for its lines. A line was also touched if, within
    a statement, the line behind it was taken out.
    """
    statements = [(site, bool(hits.count)) for site, hits in sites.items() if site.kind is SiteKind.STATEMENT]
    cuts = {cut for cut in changed.cuts for site, _ in statements if site.first <= cut < site.last}
    found = {}
    for line in sorted(changed.lines | cuts):
        there = [
            (site.last - site.first, is_hit) for site, is_hit in statements if site.first <= line <= site.last
        ]
        if there:
            inner = min(size for size, _ in there)
            found[line] = all(is_hit for size, is_hit in there if size == inner)
    return found


def _touched(kind: SiteKind, changed: ChangedFile, sites: dict[Site, Hits]) -> dict[Site, Hits]:
    return {site: hits for site, hits in _every_touched(changed, sites).items() if site.kind is kind}


def _every_touched(changed: ChangedFile, sites: dict[Site, Hits]) -> dict[Site, Hits]:
    return {site: sites[site] for site in sorted(sites) if changed.touches(site.first, site.last)}


def _is_exempt(site: Site, source: Source, exemptions: Sequence[Exemption]) -> bool:
    return any(item.covers(site, source) for item in exemptions)


def _share(sites: dict[Site, Hits]) -> Share:
    return Share(sum(bool(hits.count) for hits in sites.values()), len(sites))


def _missing(sites: dict[Site, Hits]) -> tuple[Site, ...]:
    return tuple(site for site, hits in sites.items() if not hits.count)


def _base_share(base: Coverage | None, file: str) -> Share | None:
    before = base.files.get(file) if base is not None else None
    return None if before is None or before.unmeasured else _share(before.of_kind(SiteKind.STATEMENT))


def _texts(source: Source, numbers: Sequence[int] | frozenset[int]) -> dict[int, str]:
    return {line: source.lines[line - 1] for line in sorted(set(numbers)) if line <= len(source.lines)}


def _complaints(exemptions: Sequence[Exemption], root: Path, evidence: Evidence) -> list[str]:
    """What is to be said of exemptions that are not needed."""
    found = []
    for item in exemptions:
        source = read_source(root, item.file)
        known = evidence.of(item.file, source).coverage if source else None
        said = complaint(item, source, known)
        if said:
            found.append(said)
    return found


def _notes(files: Sequence[FileVerdict], excluded: int, other: int) -> list[str]:
    """What was left out, and why."""
    notes = [f"{item.file}: {item.unmeasured}" for item in files if item.unmeasured and not item.complaints()]
    if excluded:
        notes.append(f"{excluded:,} changed files are excluded by the policy")
    if other:
        notes.append(f"{other:,} changed files are neither Python nor CUDA")
    return notes
