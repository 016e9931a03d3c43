"""Coverage as a table: of every file its statements, arms and lanes, and what was missed."""

from __future__ import annotations

from collections.abc import Sequence

from harness.coverage.sites import Coverage, FileCoverage, Site, SiteKind

HEADER = ("file", "statements", "arms", "lanes", "missing")


def text(coverage: Coverage, *, with_hosts: bool = True) -> str:
    """Kernels first, and the unmeasured once more last.

    Args:
        with_hosts: lists host files, but for those with nothing missing, which are counted.
    """
    files = [coverage.files[name] for name in sorted(coverage.files)]
    kernels = [file for file in files if file.is_kernel]
    hosts = [file for file in files if not file.is_kernel and file.sites]
    complete = [file for file in hosts if not file.unmeasured and not _missed(file)]
    rows = [HEADER]
    rows += [_row(file) for file in kernels]
    if with_hosts:
        rows += [_row(file) for file in hosts if file not in complete]
    lines = _aligned(rows)
    if complete and with_hosts:
        lines.append(f"{len(complete)} host files more with every statement and arm hit")
    for name, group in (("kernels", kernels), ("host code", hosts)):
        if group:
            totals = ", ".join(f"{share(group, kind)} {kind.value}s" for kind in SiteKind)
            lines.append(f"{name}: {totals}")
    unmeasured = [file for file in kernels if file.unmeasured]
    lines += [f"unmeasured: {file.file}: {file.unmeasured}" for file in unmeasured]
    return "\n".join(lines)


def percent(hit: int, total: int) -> str:
    """With one digit; 100 and 0 only where it is truly so."""
    if hit in (0, total):
        return "0.0 %" if total and not hit else "100.0 %"
    return f"{min(99.9, max(0.1, 100 * hit / total)):.1f} %"


def lines_of(sites: Sequence[Site]) -> str:
    """Lines of sites that are in order, those that follow one another as one range: `7, 9-12`."""
    found: list[tuple[int, int]] = []
    for site in sites:
        if found and site.first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], site.last))
        else:
            found.append((site.first, site.last))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _row(file: FileCoverage) -> tuple[str, str, str, str, str]:
    if file.unmeasured:
        return (file.file, "-", "-", "-", f"unmeasured: {file.unmeasured}")
    shares = [share([file], kind) for kind in SiteKind]
    return (file.file, shares[0], shares[1], shares[2], _missed(file))


def share(files: Sequence[FileCoverage], kind: SiteKind) -> str:
    """`157/160 98.1 %` of what was measured of the files; `none` where they have nothing of the kind."""
    measured = [file for file in files if not file.unmeasured]
    total = sum(len(file.of_kind(kind)) for file in measured)
    hit = total - sum(len(file.missed(kind)) for file in measured)
    return f"{hit}/{total} {percent(hit, total)}" if total else "none"


def _missed(file: FileCoverage) -> str:
    """Lines, then arms and lanes by line and name; of arms whose statement was missed nothing."""
    missed = file.missed(SiteKind.STATEMENT)
    parts = [lines_of(missed)] if missed else []
    lines = {line for site in missed for line in range(site.first, site.last + 1)}
    for kind in (SiteKind.ARM, SiteKind.LANE):
        parts += [f"{site.lines} {site.label}" for site in file.missed(kind) if site.first not in lines]
    return ", ".join(parts)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER) - 1)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
