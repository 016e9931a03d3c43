"""`mla-harness gate`."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer

from harness.commands._options import default_workers
from harness.gate import change as changes
from harness.gate.change import Change, NothingToCompare
from harness.gate.exemptions import read_exemptions
from harness.gate.failures import failed_cases
from harness.gate.judge import Evidence, judge_change, read_coverage, read_evidence
from harness.gate.mutants import try_mutants
from harness.gate.policy import Policy, read_policy
from harness.gate.source import read_source
from harness.gate.verdict import GateVerdict, WholeShare
from harness.gate.whole import every_kernel, shares_of
from harness.plan import UsageError
from harness.progress import RunProgress
from harness.run import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PASSED, EXIT_USAGE
from harness.startup import child_environment
from reports import gate_console
from reports.gate_writer import GateWriter, gate_writers

COVERAGE = Path("out/coverage/coverage.json")
STANDARD_OUTPUT = "-"


def gate(
    base: Annotated[
        str, typer.Option(help="Revision to compare with; default where the main branch was left.")
    ] = "",
    diff_file: Annotated[Path | None, typer.Option(help="A unified diff, instead of --base.")] = None,
    coverage: Annotated[
        list[Path] | None, typer.Option(help=f"What `cover` wrote, repeatable; default {COVERAGE}.")
    ] = None,
    base_coverage: Annotated[
        Path | None, typer.Option(help="Coverage of the base, to tell what became of each file.")
    ] = None,
    run: Annotated[bool, typer.Option("--run", help="Run `cover` first.")] = False,
    suite: Annotated[list[str] | None, typer.Option(help="With --run: its suites.")] = None,
    source: Annotated[
        list[str] | None, typer.Option(help="Glob of files to judge; default all. With --run, cover's too.")
    ] = None,
    verdicts: Annotated[
        list[Path] | None, typer.Option(help="A run's jsonl report: its failing cases fail the gate.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="The repository; default the one around here.")] = None,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Judge all kernels and not a change: each miss needs an exemption."),
    ] = False,
    no_mutants: Annotated[bool, typer.Option("--no-mutants", help="Try no mutants.")] = False,
    seed: Annotated[int, typer.Option(help="Which sample of the mutants.")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 picks a number.")] = 0,
    report: Annotated[
        list[str] | None, typer.Option(help="FORMAT:FILE, repeatable; FILE - is standard output.")
    ] = None,
) -> None:
    """Say whether the cases hit what a change touches: lines, arms and lanes, by a policy."""
    if bool(base) + (diff_file is not None) + whole > 1:
        raise UsageError("gate takes one of --base, --diff-file and --whole")
    if suite and not run:
        raise UsageError("--suite says what --run runs: without it gate reads what `cover` wrote")
    outputs = [_output(text) for text in report or []]
    here = root or Path()
    if not here.is_dir():
        raise UsageError(f"--root {here} is not a folder")
    top = _top(here, is_needed=bool(base))
    policy = read_policy(top / "pyproject.toml")
    change = Change("", ()) if whole else _only(_change(top, base, diff_file), source or [], top, here)
    exemptions = read_exemptions(top / policy.exemptions) if policy.exemptions else ()
    failed = tuple(case for file in verdicts or [] for case in failed_cases(file))
    before = read_coverage(base_coverage) if base_coverage else None
    ended = _cover(suite or [], source or [], here) if run else EXIT_PASSED
    written = [*([here / COVERAGE] if run or not coverage else []), *(coverage or [])]
    # Where nothing changed nothing needs to be measured.
    elsewhere = [top / file for file in policy.measured_elsewhere]
    evidence = read_evidence(written, elsewhere, top) if change.files or whole else Evidence({})
    shares: tuple[WholeShare, ...] = ()
    if whole:
        change, policy = every_kernel(top, evidence, policy)
        change = _only(change, source or [], top, here)
        shares = shares_of(change, top, evidence, policy.whole)
    today = dt.datetime.now(dt.UTC).date()
    judged = judge_change(change, top, evidence, policy, exemptions, today, before)
    verdict = GateVerdict(
        against=change.against,
        coverage=tuple(str(file) for file in written),
        changed=change.num_lines,
        files=judged.files,
        expired=judged.expired,
        warnings=judged.warnings,
        notes=(*change.notes, *judged.notes),
        failed=failed,
        run=ended,
        whole=shares,
    )
    if not (no_mutants or whole) and policy.max_mutants:
        verdict = _with_mutants(verdict, change, top, evidence, policy, seed, workers)
    _print(gate_console.text(verdict))
    for writer, target in outputs:
        _write(writer.text(verdict), target)
    raise typer.Exit(verdict.exit_code)


def _top(here: Path, *, is_needed: bool) -> Path:
    """The top folder of the repository around a folder; the folder itself where there is none.

    Raises:
        UsageError: there is none, and one is needed.
    """
    try:
        return changes.repository_root(here)
    except NothingToCompare as reason:
        if is_needed:
            raise UsageError(str(reason)) from None
        return here.absolute()


def _change(top: Path, base: str, diff_file: Path | None) -> Change:
    """What is to be judged; nothing, and why, where nobody named a base and there is none."""
    if diff_file is not None:
        return changes.change_of_diff(top, diff_file)
    if base:
        return changes.change_since(top, base)
    try:
        return changes.change_since_branch(changes.repository_root(top))
    except NothingToCompare as reason:
        # What nobody asked for by name may be missing: a first commit, a clone without history.
        return Change("nothing", (), (str(reason),))


def _only(change: Change, globs: Sequence[str], top: Path, here: Path) -> Change:
    """The files of a change that a glob, from the folder `here`, matches; all if there is none.

    Raises:
        UsageError: a glob matches no file of the repository.
    """
    if not globs:
        return change
    known = [*changes.repository_files(top), *(item.file for item in change.files)]
    patterns: list[str] = []
    for glob in globs:
        # `**/` stands for no folder too, and a folder for what is in it.
        whole = os.path.relpath(here.absolute() / glob, top)
        own = (whole, whole.replace("**/", ""), f"{whole}/*")
        if not any(fnmatchcase(file, pattern) for file in known for pattern in own):
            raise UsageError(f"--source {glob!r} matches no file of {top}")
        patterns += own
    files = (item for item in change.files if any(fnmatchcase(item.file, one) for one in patterns))
    return replace(change, files=tuple(files))


def _cover(suites: Sequence[str], sources: Sequence[str], here: Path) -> int:
    """Runs `cover` in a process of its own, in the folder `here`, and returns its exit code.

    Raises:
        typer.Exit: it wrote no coverage, or was interrupted: nothing can be judged.
    """
    # What an earlier run left must not be judged instead.
    (here / COVERAGE).unlink(missing_ok=True)
    chosen = [word for name in suites for word in ("--suite", name)]
    chosen += [word for glob in sources for word in ("--source", glob)]
    done = subprocess.run(
        [sys.executable, "-m", "harness", "cover", "--out", str(COVERAGE.parent), *chosen],
        cwd=here,
        env=child_environment(),
        check=False,
    )
    if done.returncode in (EXIT_USAGE, EXIT_INTERRUPTED) or not (here / COVERAGE).exists():
        raise typer.Exit(done.returncode)
    return done.returncode


def _with_mutants(
    verdict: GateVerdict,
    change: Change,
    top: Path,
    evidence: Evidence,
    policy: Policy,
    seed: int,
    workers: int,
) -> GateVerdict:
    """The verdict with what became of mutants; Ctrl-C keeps all the rest of it."""
    if verdict.failed or verdict.run == EXIT_FAILED:
        note = "no mutants are tried: cases fail on the kernels as they are"
        return replace(verdict, notes=(*verdict.notes, note))
    measured = {item.file for item in verdict.files if not item.unmeasured}
    kernels = []
    for item in change.files:
        source = read_source(top, item.file) if item.file in measured else None
        found = evidence.of(item.file, source).coverage if source else None
        if found is not None and found.is_kernel:
            kernels.append((item, found))
    with contextlib.ExitStack() as stack:
        bars: list[RunProgress] = []

        def told(total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(RunProgress(total)))
            bars[0].advance(is_bad=False)

        try:
            tried = try_mutants(
                kernels, top, policy, seed, lambda lane: workers or default_workers(lane), told
            )
        except KeyboardInterrupt:
            return replace(verdict, run=EXIT_INTERRUPTED)
    return replace(verdict, mutation=tried)


def _output(text: str) -> tuple[GateWriter, str]:
    name, colon, file = text.partition(":")
    if not colon or not file:
        raise UsageError(f"--report takes FORMAT:FILE, got {text!r}")
    if name not in gate_writers():
        raise UsageError(f"no report format {name!r} of gate; there are: {', '.join(gate_writers())}")
    folder = Path(file).parent
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {text!r}: {folder} is not a folder")
    return gate_writers()[name], file


def _write(text: str, target: str) -> None:
    if target == STANDARD_OUTPUT:
        _print(text)
        return
    file = Path(target)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", errors="replace")


def _print(text: str) -> None:
    """Prints what may quote a source that is not UTF-8."""
    print(text.encode("utf-8", errors="replace").decode("utf-8"))


COMMAND = gate
