"""The gate on planted pull requests: what it names, what it lets pass, and by which exit code."""

import datetime as dt
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from harness.commands import gate as gate_command
from harness.coverage.sites import Coverage, FileCoverage, Hits, Site, SiteKind, digest_of
from harness.gate.exemptions import Exemption, expired
from harness.gate.verdict import Share
from harness.plan import UsageError

ROOT = Path(__file__).resolve().parent.parent
APP = typer.Typer()
APP.command()(gate_command.gate)

KERNEL = """\
import triton
import triton.language as tl


@triton.jit
def scale(x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    tl.store(x + offsets, value * 2)
"""
CHANGED_KERNEL = """\
import triton
import triton.language as tl


@triton.jit
def scale(x, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(
        x + offsets,
        mask=offsets < n,
    )
    if n > 7:
        value = value * 3
    tl.store(x + offsets, value * 2)
"""
CUDA = """\
__global__ void fill(float *out, int n) {
    int i = threadIdx.x;
    out[i] = 0;
}
"""
CHANGED_CUDA = """\
__global__ void fill(float *out, int n) {
    int i = threadIdx.x;
    if (i >= n) {
        return;
    }
    out[i] = 0;
}
"""
HOST = """\
def plan(n):
    return n
"""
CHANGED_HOST = """\
def plan(n):
    if n < 0:
        raise ValueError(n)
    splits = n // 64
    splits = max(splits, 1)
    splits = min(splits, 8)
    return splits
"""
NEW_CUDA = "__global__ void extra(int *x) {\n    *x = 1;\n}\n"

STATEMENTS = {
    "kernels/scale.py": [(7, 7), (8, 11), (12, 12), (13, 13), (14, 14)],
    "csrc/fill.cu": [(2, 2), (3, 3), (4, 4), (6, 6)],
    "engine/plan.py": [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7)],
}
ARMS = {
    "kernels/scale.py": [(12, "true"), (12, "false")],
    "csrc/fill.cu": [(3, "true"), (3, "false")],
    "engine/plan.py": [(2, "true"), (2, "false")],
}
LANES = {"kernels/scale.py": [(8, 11, "on"), (8, 11, "off")]}
TEXTS = {
    "kernels/scale.py": CHANGED_KERNEL,
    "csrc/fill.cu": CHANGED_CUDA,
    "engine/plan.py": CHANGED_HOST,
}
LANGUAGES = {"kernels/scale.py": "triton", "csrc/fill.cu": "cuda", "engine/plan.py": "python"}


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(folder, files):
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def commit(folder, files):
    write(folder, files)
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--message", "m")
    return git(folder, "rev-parse", "HEAD").strip()


def measured(file, missed=()):
    """Coverage of a changed file: all hit but (kind, line, label) in `missed`."""
    sites = {Site(a, b, SiteKind.STATEMENT): 1 for a, b in STATEMENTS[file]}
    sites |= {Site(line, line, SiteKind.ARM, label): 1 for line, label in ARMS[file]}
    sites |= {Site(a, b, SiteKind.LANE, label): 1 for a, b, label in LANES.get(file, ())}
    keys = {(site.kind.value, site.first, site.label) for site in sites}
    assert set(missed) <= keys
    hits = {
        site: Hits() if (site.kind.value, site.first, site.label) in missed else Hits(1, {"interpreted"})
        for site in sites
    }
    return FileCoverage(file, LANGUAGES[file], digest_of(TEXTS[file]), hits)


def coverage_of(missed=None, files=tuple(TEXTS)):
    missed = missed or {}
    return Coverage({file: measured(file, missed.get(file, ())) for file in files})


MISSED = {
    "kernels/scale.py": [("statement", 13, ""), ("arm", 12, "true"), ("lane", 8, "off")],
    "csrc/fill.cu": [("statement", 4, ""), ("arm", 3, "true")],
}


@pytest.fixture
def repository(tmp_path):
    """A repository whose branch changes a Triton kernel, a .cu file and host code."""
    folder = tmp_path / "engine"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    commit(folder, {"kernels/scale.py": KERNEL, "csrc/fill.cu": CUDA, "engine/plan.py": HOST})
    git(folder, "checkout", "--quiet", "-b", "change")
    commit(folder, TEXTS)
    return folder


@pytest.fixture
def gate(repository, tmp_path):
    """(coverage, further arguments) -> exit code and output of the gate on the repository."""

    def run(coverage, *arguments):
        file = tmp_path / "coverage.json"
        coverage.write(file)
        result = CliRunner().invoke(
            APP, ["--root", str(repository), "--coverage", str(file), "--no-mutants", *map(str, arguments)]
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return run


EXPIRED = """\
[[exemption]]
file = "csrc/fill.cu"
function = "fill"
kind = "arm"
reason = "needs a batch of nothing"
owner = "the cache team"
expires = 2026-01-31
"""
POLICY = '[tool.mla-harness.gate]\nexemptions = "gate.toml"\n'


def test_a_planted_change_is_named_with_every_line_and_is_unmeasured_before_it_is_below(gate, repository):
    commit(repository, {"csrc/extra.cu": NEW_CUDA, "pyproject.toml": POLICY, "gate.toml": EXPIRED})
    code, said = gate(coverage_of(MISSED), "--base", "main")
    assert code == 10, said
    for line in (
        "kernels/scale.py:13: line: no case runs this line",
        "kernels/scale.py:12: arm: the condition was never true",
        "kernels/scale.py:8: lane: no lane of this mask was ever off",
        "csrc/fill.cu:4: line: no case runs this line",
        "csrc/fill.cu:3: arm: the condition was never true",
        "csrc/extra.cu:1: unmeasured: nothing measured it: no coverage has this file",
    ):
        assert line in said
    assert (
        "FAIL exemption 1 (csrc/fill.cu, arm fill; the cache team: needs a batch of nothing) expired" in said
    )


@pytest.mark.parametrize(
    ("files", "code"),
    [({"csrc/extra.cu": NEW_CUDA}, 10), ({"pyproject.toml": POLICY, "gate.toml": EXPIRED}, 10), ({}, 9)],
)
def test_an_unmeasured_kernel_or_an_expired_exemption_goes_before_a_threshold(gate, repository, files, code):
    if files:
        commit(repository, files)
    assert gate(coverage_of(MISSED), "--base", "main")[0] == code


@pytest.mark.parametrize("file", MISSED)
def test_one_kernel_below_its_thresholds_is_enough(gate, file):
    code, said = gate(coverage_of({file: MISSED[file]}), "--base", "main")
    assert code == 9
    assert re.findall("^FAIL (.*?):", said, re.MULTILINE) == [file] * len(
        {kind for kind, _, _ in MISSED[file]}
    )


@pytest.mark.parametrize("site", MISSED["kernels/scale.py"])
def test_a_line_an_arm_and_a_lane_of_a_kernel_each_fail_alone(gate, site):
    assert gate(coverage_of({"kernels/scale.py": [site]}), "--base", "main")[0] == 9


def test_the_same_change_passes_once_cases_hit_it_all(gate):
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 0, said
    # Six lines of the kernel, four of them one call; two of the .cu file, no brace; six of host code.
    assert said.splitlines()[-1] == "14 of 14 changed lines with statements are hit (100 %): passed"


def test_host_code_is_held_to_lines_alone_and_to_less_of_them(gate):
    missed = [("statement", 3, ""), ("arm", 2, "true")]
    code, said = gate(coverage_of({"engine/plan.py": missed}), "--base", "main")
    assert code == 0
    assert "engine/plan.py:3: line: no case runs this line (told only)" in said
    two = [*missed, ("statement", 4, "")]
    code, said = gate(coverage_of({"engine/plan.py": two}), "--base", "main")
    assert code == 9
    assert "FAIL engine/plan.py: 4 of 6 changed lines are hit, 66 %, and it must be 80 %" in said


def test_a_failing_case_goes_before_everything_and_comes_with_the_line_that_reruns_it(
    gate, repository, tmp_path
):
    commit(repository, {"csrc/extra.cu": NEW_CUDA})
    report = tmp_path / "smoke.jsonl"
    base = {"case": "mla_decode/decode:1", "path": "triton/mla_decode", "lane": "interpreted"}
    lines = [
        {"schema": 1, "run": {}},
        {"schema": 1, **base, "status": "passed", "reason": "", "repro": "no"},
        {"schema": 1, **base, "status": "failed", "reason": "off", "repro": "python3 -m harness repro X"},
        {"end": {}, "interrupted": False},
    ]
    report.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, said = gate(coverage_of(), "--base", "main", "--verdicts", report)
    assert code == 8
    assert (
        "failed: mla_decode/decode:1 on triton/mla_decode [interpreted]\n    python3 -m harness repro X"
        in said
    )
    assert "FAIL 1 case fails\n" in said
    report.write_text("".join(json.dumps(line) + "\n" for line in lines[:2] + lines[3:]))
    assert gate(coverage_of(), "--base", "main", "--verdicts", report)[0] == 10


# ---- what counts as measured ---------------------------------------------------------------------


def test_coverage_of_another_text_is_none(gate, repository):
    commit(repository, {"csrc/fill.cu": CHANGED_CUDA + "// a note\n"})
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 10
    assert re.search(r"csrc/fill\.cu:3: unmeasured: it was measured on another text of the file", said)


def test_a_file_that_coverage_calls_unmeasured_is_so_for_its_reason(gate):
    coverage = coverage_of()
    found = coverage.files["csrc/fill.cu"]
    found.sites.clear()
    found.unmeasured = "no build of it is known"
    code, said = gate(coverage, "--base", "main")
    assert code == 10
    assert "csrc/fill.cu:3: unmeasured: no build of it is known" in said


@pytest.mark.parametrize(
    ("suffix", "code"), [(".py", 10), (".cuh", 10), (".CU", 10), (".md", 0), (".hpp", 0)]
)
def test_a_new_kernel_must_be_measured_and_other_files_need_not(gate, repository, suffix, code):
    commit(repository, {f"kernels/more{suffix}": KERNEL})
    assert gate(coverage_of(), "--base", "main")[0] == code


def test_host_code_that_coverage_was_not_asked_about_is_told_and_passes(gate, repository):
    commit(repository, {"tools/convert.py": HOST})
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 0
    assert "note: tools/convert.py: nothing measured it" in said


def test_host_code_that_was_asked_about_in_vain_is_below_its_threshold(gate, repository):
    commit(repository, {"engine/plan.py": CHANGED_HOST + "\n# a note\n"})
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 9
    assert "FAIL engine/plan.py: it was measured on another text" in said


def test_files_that_must_be_measured_are_held_to_it_as_kernels_are(gate, repository):
    policy = '[tool.mla-harness.gate]\nmust_be_measured = ["tools/*"]\n'
    commit(repository, {"tools/convert.py": HOST, "pyproject.toml": policy})
    assert gate(coverage_of(), "--base", "main")[0] == 10


def test_checked_in_coverage_of_another_machine_counts_while_the_text_is_the_same(gate, repository):
    policy = '[tool.mla-harness.gate]\nmeasured_elsewhere = ["gate/gpu.json"]\n'
    (repository / "gate").mkdir()
    coverage_of(files=["csrc/fill.cu"]).write(repository / "gate/gpu.json")
    commit(repository, {"pyproject.toml": policy})
    here = coverage_of(files=["kernels/scale.py", "engine/plan.py"])
    assert gate(here, "--base", "main")[0] == 0
    # What is missed here and hit there is hit.
    assert gate(coverage_of({"csrc/fill.cu": MISSED["csrc/fill.cu"]}), "--base", "main")[0] == 0
    commit(repository, {"csrc/fill.cu": CHANGED_CUDA.replace("= 0", "= 1")})
    code, said = gate(here, "--base", "main")
    assert code == 10
    assert "gpu.json): measure it again" in said


def test_line_ends_of_windows_do_not_make_coverage_stale(gate, repository):
    windows = CHANGED_CUDA.replace("\n", "\r\n")
    commit(repository, {"csrc/fill.cu": windows})
    for text in (windows, CHANGED_CUDA):
        coverage = coverage_of()
        coverage.files["csrc/fill.cu"].digest = digest_of(text)
        code, said = gate(coverage, "--base", "main")
        assert code == 0, said


# ---- which lines count ---------------------------------------------------------------------------


def test_a_changed_line_within_a_statement_of_several_lines_counts_for_it(gate, repository):
    text = CHANGED_KERNEL.replace("mask=offsets < n", "mask=offsets <= n")
    git(repository, "checkout", "--quiet", "main")
    commit(repository, {"kernels/scale.py": CHANGED_KERNEL})
    commit(repository, {"kernels/scale.py": text})
    coverage = coverage_of({"kernels/scale.py": [("statement", 8, ""), ("lane", 8, "off")]})
    coverage.files["kernels/scale.py"].digest = digest_of(text)
    code, said = gate(coverage, "--base", "HEAD^")
    assert code == 9
    assert "kernels/scale.py:10: line: no case runs this line" in said
    assert "kernels/scale.py:8: lane: no lane of this mask was ever off" in said


def test_a_line_taken_out_of_a_statement_changes_it(gate, repository):
    text = CHANGED_KERNEL.replace("        mask=offsets < n,\n", "")
    commit(repository, {"kernels/scale.py": text})
    sites = {Site(8, 10, SiteKind.STATEMENT): Hits(), Site(13, 13, SiteKind.STATEMENT): Hits()}
    coverage = Coverage(
        {"kernels/scale.py": FileCoverage("kernels/scale.py", "triton", digest_of(text), sites)}
    )
    code, said = gate(coverage, "--base", "HEAD^")
    assert code == 9
    assert "kernels/scale.py:9: line: no case runs this line" in said
    assert "kernels/scale.py:13" not in said


def test_a_statement_taken_out_leaves_no_line_to_hit(gate, repository):
    text = CHANGED_KERNEL.replace("    if n > 7:\n        value = value * 3\n", "")
    commit(repository, {"kernels/scale.py": text})
    sites = {Site(8, 11, SiteKind.STATEMENT): Hits(), Site(12, 12, SiteKind.STATEMENT): Hits()}
    coverage = Coverage(
        {"kernels/scale.py": FileCoverage("kernels/scale.py", "triton", digest_of(text), sites)}
    )
    code, said = gate(coverage, "--base", "HEAD^")
    assert code == 0
    assert "0 of 0 changed lines with statements are hit (100 %)" in said


def test_the_inner_of_two_statements_speaks_for_its_lines(gate):
    coverage = coverage_of({"engine/plan.py": [("statement", 3, "")]})
    coverage.files["engine/plan.py"].sites[Site(1, 7, SiteKind.STATEMENT, column=1)] = Hits()
    code, said = gate(coverage, "--base", "main")
    assert code == 0
    assert "engine/plan.py:3: line" in said


def test_every_statement_of_a_line_must_be_hit(gate):
    coverage = coverage_of()
    coverage.files["kernels/scale.py"].sites[Site(14, 14, SiteKind.STATEMENT, column=30)] = Hits()
    coverage.files["kernels/scale.py"].sites[Site(12, 12, SiteKind.STATEMENT, column=30)] = Hits()
    code, said = gate(coverage, "--base", "main")
    assert code == 9
    assert "kernels/scale.py:12: line" in said
    # The change did not touch the last line.
    assert "kernels/scale.py:14" not in said


def test_a_percentage_is_rounded_down_and_nothing_is_all():
    assert [Share(799, 1000).percent, Share(1, 3).percent, Share(0, 0).percent] == [79, 33, 100]
    assert not Share(799, 1000).holds(80)
    assert Share(4, 5).holds(80)
    assert Share(0, 0).holds(100)


# ---- exemptions and policy -----------------------------------------------------------------------


def exemption(**changes):
    entry = {
        "file": "kernels/scale.py",
        "kind": "any",
        "lines": "8-13",
        "reason": "no batch is that long",
        "owner": "kernels",
        **changes,
    }
    day = entry.pop("expires", dt.date(9999, 12, 31))
    texts = "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items() if value)
    return f"[[exemption]]\n{texts}expires = {day}\n"


@pytest.mark.parametrize(
    "places",
    [
        [{"lines": "8-13"}],
        [{"lines": "", "text": "value = value * 3", "kind": "statement"}, {"lines": "8,12"}],
        [{"lines": "", "text": "value = value * 3"}, {"kind": "arm"}, {"kind": "lane"}],
    ],
)
def test_what_is_exempt_is_not_counted(gate, repository, places):
    text = "".join(exemption(**place) for place in places)
    commit(repository, {"pyproject.toml": POLICY, "gate.toml": text})
    missed = {"kernels/scale.py": MISSED["kernels/scale.py"]}
    code, said = gate(coverage_of(missed), "--base", "main")
    assert code == 0, said
    assert "warning" not in said


def test_a_function_is_exempt_by_its_name(gate, repository):
    coverage = coverage_of({"kernels/scale.py": MISSED["kernels/scale.py"]})
    found = coverage.files["kernels/scale.py"]
    found.sites = {Site(s.first, s.last, s.kind, s.label, 0, "scale"): h for s, h in found.sites.items()}
    commit(repository, {"pyproject.toml": POLICY, "gate.toml": exemption(lines="", function="scale")})
    assert gate(coverage, "--base", "main")[0] == 0
    commit(repository, {"gate.toml": exemption(lines="", function="cale")})
    code, said = gate(coverage, "--base", "main")
    assert code == 9
    assert "warning: exemption 1 (kernels/scale.py, any cale; " in said
    assert "names nothing that can be hit" in said


def test_an_exemption_of_another_kind_does_not_help(gate, repository):
    commit(repository, {"pyproject.toml": POLICY, "gate.toml": exemption(kind="lane")})
    code, said = gate(coverage_of(MISSED), "--base", "main")
    assert code == 9
    assert "mask" not in said


# ---- the kernels as a whole ------------------------------------------------------------------------


def whole(lines, arms):
    return f"{POLICY}\n[tool.mla-harness.gate.whole]\nlines = {lines}\narms = {arms}\nlanes = 0\n"


def test_as_a_whole_every_miss_of_a_kernel_is_named_whether_the_change_touches_it_or_not(gate, repository):
    git(repository, "checkout", "--quiet", "-b", "nothing-changes", "change")
    commit(repository, {"pyproject.toml": whole(0, 0), "gate.toml": exemption(lines="12-13")})
    code, said = gate(coverage_of({**MISSED, "engine/plan.py": []}), "--whole")
    assert code == 9
    for line in (
        "kernels/scale.py:8: lane: no lane of this mask was ever off",
        "csrc/fill.cu:3: arm: the condition was never true",
        "csrc/fill.cu:4: line: no case runs this line",
    ):
        assert line in said
    assert "kernels/scale.py:1" not in said
    assert "engine/plan.py" not in said


def test_as_a_whole_exempted_misses_pass_while_enough_is_hit_with_them_counted_too(gate, repository):
    reasons = exemption() + exemption(file="csrc/fill.cu", lines="3-4")
    coverage = coverage_of(MISSED)
    kernels = [found for found in coverage.files.values() if found.is_kernel]
    arms = sum(len(found.of_kind(SiteKind.ARM)) for found in kernels)
    commit(repository, {"pyproject.toml": whole(0, 100 * (arms - 2) / arms), "gate.toml": reasons})
    code, said = gate(coverage, "--whole")
    assert code == 0, said
    assert f"{arms - 2} of {arms} arms of the kernels are hit" in said
    commit(repository, {"pyproject.toml": whole(0, 100 * (arms - 1) / arms)})
    code, said = gate(coverage, "--whole")
    assert code == 9
    assert f"FAIL {arms - 2} of {arms} arms of the kernels are hit" in said


def test_as_a_whole_a_kernel_that_nothing_measured_fails_and_a_stale_exemption_is_told(gate, repository):
    commit(repository, {"pyproject.toml": whole(0, 0), "gate.toml": exemption()})
    coverage = coverage_of()
    coverage.files["csrc/fill.cu"].unmeasured = "nobody built it"
    code, said = gate(coverage, "--whole")
    assert code == 10
    assert "csrc/fill.cu:1: unmeasured: nobody built it" in said
    assert (
        "warning: exemption 1 (kernels/scale.py, any 8-13; kernels: no batch is that long) is not needed"
        in said
    )


def test_an_exemption_holds_through_its_last_day():
    item = Exemption(1, "csrc/a.cu", "any", "why", "who", dt.date(2026, 3, 1), text="x")
    assert expired([item], dt.date(2026, 3, 1)) == ()
    assert expired([item], dt.date(2026, 3, 2)) == (item,)


def test_what_an_expired_exemption_named_counts_again(gate, repository):
    past = dt.date(2020, 1, 1)
    commit(repository, {"pyproject.toml": POLICY, "gate.toml": exemption(expires=past)})
    code, said = gate(coverage_of({"kernels/scale.py": MISSED["kernels/scale.py"]}), "--base", "main")
    assert code == 10
    assert "kernels/scale.py:13: line: no case runs this line" in said


def test_an_unmeasured_kernel_can_be_exempt(gate, repository):
    entry = exemption(file="csrc/extra.cu", lines="", kind="unmeasured")
    commit(repository, {"csrc/extra.cu": NEW_CUDA, "pyproject.toml": POLICY, "gate.toml": entry})
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 0
    assert "note: csrc/extra.cu: nothing measured it" in said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "is not needed: all of it is hit; remove it"),
        ({"lines": "3"}, "names nothing that can be hit"),
        ({"file": "gone.py"}, "names a file that is not there"),
        ({"lines": "", "kind": "unmeasured"}, "is not needed: the file is measured"),
    ],
)
def test_an_exemption_that_is_not_needed_is_told_and_does_not_fail(gate, repository, changes, said):
    commit(repository, {"pyproject.toml": POLICY, "gate.toml": exemption(**changes)})
    code, output = gate(coverage_of(), "--base", "main")
    assert code == 0
    assert re.search(f"^warning: exemption 1 .*{re.escape(said)}", output, re.MULTILINE)


def test_thresholds_by_glob_replace_what_they_name_and_excluded_files_are_not_judged(gate, repository):
    policy = """
        [tool.mla-harness.gate]
        exclude = ["csrc/*"]
        [[tool.mla-harness.gate.thresholds]]
        files = ["kernels/*"]
        lanes = 50
        arms = 50
        lines = {lines}
    """
    missed = coverage_of(MISSED)
    for lines, code in ((83, 0), (84, 9)):
        commit(repository, {"pyproject.toml": policy.format(lines=lines)})
        found, said = gate(missed, "--base", "main")
        # Five of the kernel's six touched lines are hit, 83.3 %.
        assert found == code, said
    assert "1 changed files are excluded by the policy" in said


@pytest.mark.parametrize("glob", ["csrc/*.cu", "csrc/**/*.cu", "csrc"])
def test_source_globs_choose_what_is_judged(gate, repository, glob):
    missed = coverage_of({"kernels/scale.py": MISSED["kernels/scale.py"]})
    assert gate(missed, "--base", "main")[0] == 9
    assert gate(missed, "--base", "main", "--source", glob)[0] == 0
    assert gate(missed, "--base", "main", "--source", repository / glob)[0] == 0
    assert gate(missed, "--base", "main", "--source", glob, "--source", "kernels")[0] == 9


@pytest.mark.parametrize(
    ("files", "arguments", "said"),
    [
        ({}, ["--base", "nope"], "--base 'nope' is no revision of"),
        ({}, ["--base", "--output=x"], "--base '--output=x' is no revision of"),
        ({}, ["--base", "main", "--diff-file", "x"], "takes one of --base, --diff-file and --whole"),
        ({}, ["--diff-file", "/no/such.diff"], "cannot read the diff /no/such.diff"),
        ({}, ["--diff-file", str(ROOT / "README.md")], "README.md is no unified diff"),
        ({}, ["--suite", "smoke"], "--suite says what --run runs"),
        ({}, ["--root", "/no/such/folder"], "--root /no/such/folder is not a folder"),
        ({}, ["--coverage", "/no/such.json"], "there is no coverage at /no/such.json"),
        ({}, ["--coverage", str(ROOT / "README.md")], "README.md"),
        ({}, ["--base-coverage", "/no/such.json"], "/no/such.json"),
        ({}, ["--verdicts", "/no/such.jsonl"], "cannot read verdicts from /no/such.jsonl"),
        ({}, ["--source", "no/such/*"], "--source 'no/such/*' matches no file of"),
        (
            {},
            ["--report", "yaml:x"],
            "no report format 'yaml' of gate; there are: console, github, html, json",
        ),
        ({}, ["--report", "json"], "--report takes FORMAT:FILE"),
        ({"pyproject.toml": "a = "}, [], "is not TOML"),
        ({"pyproject.toml": "[tool.mla-harness.gate]\nline = 3"}, [], "got 'line'"),
        ({"pyproject.toml": "[tool.mla-harness.gate]\nmutants = 101"}, [], "0 to 100, got 101"),
        (
            {"pyproject.toml": "[tool.mla-harness.gate]\nmax_mutants = true"},
            [],
            "whole number from 0, got True",
        ),
        ({"pyproject.toml": "[tool.mla-harness.gate]\nexclude = 'a'"}, [], "a list of texts, got 'a'"),
        (
            {"pyproject.toml": "[[tool.mla-harness.gate.thresholds]]\nlines = 3"},
            [],
            "entry 1: files is missing",
        ),
        ({"pyproject.toml": POLICY}, [], "cannot read exemptions from"),
        ({"pyproject.toml": POLICY, "gate.toml": "[exemption]\na = 1"}, [], "takes [[exemption]] entries"),
        ({"pyproject.toml": POLICY, "gate.toml": exemption(owner="")}, [], "owner is missing"),
        ({"pyproject.toml": POLICY, "gate.toml": exemption(why="x")}, [], "got 'why'"),
        (
            {"pyproject.toml": POLICY, "gate.toml": exemption(reason=" ")},
            [],
            "reason must be a text, not empty",
        ),
        ({"pyproject.toml": POLICY, "gate.toml": exemption(kind="row")}, [], "kind is one of statement, arm"),
        ({"pyproject.toml": POLICY, "gate.toml": exemption(lines="")}, [], "is one of lines, function, text"),
        ({"pyproject.toml": POLICY, "gate.toml": exemption(text="x")}, [], "got lines, text"),
        (
            {"pyproject.toml": POLICY, "gate.toml": exemption(lines="0-3")},
            [],
            "such as '12-14,20', got '0-3'",
        ),
        ({"pyproject.toml": POLICY, "gate.toml": exemption(expires='"2027-01-01"')}, [], "expires is a day"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(gate, repository, files, arguments, said):
    write(repository, files)
    with pytest.raises(UsageError) as refusal:
        gate(coverage_of(), *arguments)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


# ---- what is compared ----------------------------------------------------------------------------


def test_the_merge_base_counts_and_not_the_tip_of_the_base(gate, repository):
    git(repository, "checkout", "--quiet", "main")
    # Base goes on: seen from its tip, the branch would take these lines out and the kernel would be new.
    commit(repository, {"csrc/other.cu": NEW_CUDA, "engine/plan.py": "def plan(n):\n    return 2 * n\n"})
    git(repository, "checkout", "--quiet", "change")
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 0
    assert "csrc/other.cu" not in said
    assert "engine/plan.py" in said


def test_uncommitted_and_unknown_files_belong_to_the_change_and_ignored_ones_do_not(gate, repository):
    write(repository, {"csrc/late.cu": NEW_CUDA, ".gitignore": "out/\n", "out/made.cu": NEW_CUDA})
    write(repository, {"csrc/fill.cu": CHANGED_CUDA + "// later\n"})
    code, said = gate(coverage_of(), "--base", "main")
    assert code == 10
    assert "csrc/late.cu:1: unmeasured" in said
    assert "csrc/fill.cu:3: unmeasured: it was measured on another text" in said
    assert "made.cu" not in said


def test_without_a_base_the_change_is_what_left_the_main_branch(gate):
    code, said = gate(coverage_of(MISSED))
    assert code == 9
    assert "the merge base with main" in said


def test_on_the_main_branch_its_last_commit_is_judged(gate, repository):
    git(repository, "checkout", "--quiet", "main")
    git(repository, "merge", "--quiet", "--no-ff", "-m", "m", "change")
    code, said = gate(coverage_of(MISSED))
    assert code == 9
    assert "the commit before HEAD, which is in main" in said


def test_a_clone_without_history_or_main_branch_has_nothing_to_compare_with_and_passes(
    gate, repository, tmp_path
):
    shallow = tmp_path / "shallow"
    git(
        tmp_path, "clone", "--quiet", "--depth", "1", "--branch", "main", f"file://{repository}", str(shallow)
    )
    code, said = gate(coverage_of(), "--root", shallow)
    reason = "HEAD is in origin/main, and the commit before it is not here"
    assert code == 0
    assert f"note: there is nothing to compare with: {reason}\n" in said
    git(repository, "branch", "--quiet", "-D", "main")
    code, said = gate(coverage_of())
    assert code == 0
    assert "note: there is nothing to compare with: HEAD shares no history with any of origin/HEAD" in said
    code, said = gate(coverage_of(), "--root", tmp_path)
    assert code == 0
    assert "is in no git repository; name a change with --diff-file" in said
    with pytest.raises(UsageError, match="is in no git repository"):
        gate(coverage_of(), "--root", tmp_path, "--base", "main")


def test_without_history_no_coverage_is_needed_and_a_failing_case_fails_all_the_same(gate, tmp_path):
    report = tmp_path / "smoke.jsonl"
    keys = ("case", "path", "lane", "reason", "repro")
    report.write_text(json.dumps({"status": "error", **dict.fromkeys(keys, "x")}) + "\n")
    (tmp_path / "empty").mkdir()
    arguments = ["--root", tmp_path / "empty", "--coverage", "/no/such.json"]
    assert gate(coverage_of(), *arguments)[0] == 0
    assert gate(coverage_of(), *arguments, "--verdicts", report)[0] == 8


def test_a_base_without_a_common_ancestor_is_refused(gate, repository):
    git(repository, "checkout", "--quiet", "--orphan", "island")
    commit(repository, {"a.py": HOST})
    with pytest.raises(UsageError, match="main and HEAD have no common ancestor here: fetch more history"):
        gate(coverage_of(), "--base", "main")


def test_a_diff_file_says_what_git_would(gate, repository, tmp_path):
    for context in ("0", "3", "30"):
        diff = tmp_path / "change.diff"
        diff.write_text(git(repository, "diff", f"--unified={context}", "main"))
        code, said = gate(coverage_of(MISSED), "--diff-file", diff)
        assert code == 9
        _, wanted = gate(coverage_of(MISSED), "--base", "main")
        assert said.splitlines()[1:] == wanted.splitlines()[1:]


def test_a_diff_of_another_tree_leaves_its_kernels_unmeasured(gate, repository, tmp_path):
    diff = tmp_path / "change.diff"
    diff.write_text("--- /dev/null\n+++ b/csrc/absent.cu\n@@ -0,0 +1,2 @@\n+int a;\n+int b;\n")
    code, said = gate(coverage_of(), "--diff-file", diff)
    assert code == 10
    assert "csrc/absent.cu:1: unmeasured: it is not there: the diff is of another tree" in said


# ---- the command ---------------------------------------------------------------------------------

FAKE_COVER = '''
"""Writes what it was asked for, and coverage, and fails as the environment says."""
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import typer


def cover(
    out: Annotated[Path, typer.Option()],
    suite: Annotated[list[str] | None, typer.Option()] = None,
    source: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """Stand-in."""
    print("cover", suite, source)
    out.mkdir(parents=True, exist_ok=True)
    if "FAKE_COVERAGE" in os.environ:
        (out / "coverage.json").write_text(Path(os.environ["FAKE_COVERAGE"]).read_text())
    raise typer.Exit(int(os.environ["FAKE_EXIT"]))


COMMAND = cover
'''


@pytest.mark.parametrize(
    ("exit_code", "missed", "writes", "code"),
    [
        (0, False, True, 0),
        (0, True, True, 9),
        (1, True, True, 8),
        (2, True, False, 2),
        (3, True, True, 3),
        (3, True, False, 3),
        (4, False, True, 4),
        (4, True, True, 9),
        (130, True, True, 130),
    ],
)
def test_run_begins_with_cover_and_its_failure_goes_before_thresholds(
    make_house, repository, tmp_path, exit_code, missed, writes, code
):
    house = make_house({"harness/commands/cover.py": FAKE_COVER})
    coverage = tmp_path / "made.json"
    coverage_of(MISSED if missed else {}).write(coverage)
    environment = {**os.environ, "FAKE_EXIT": str(exit_code), "PYTHONPATH": str(house)}
    if writes:
        environment["FAKE_COVERAGE"] = str(coverage)
    # What an earlier run left must not be judged instead.
    write(repository, {"out/coverage/coverage.json": "{}", ".gitignore": "/out/\n"})
    arguments = ["--run", "--base", "main", "--suite", "smoke", "--source", "csrc/*", "--source", "kernels"]
    result = subprocess.run(
        [sys.executable, "-m", "harness", "gate", *arguments, "--no-mutants"],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "cover ['smoke'] ['csrc/*', 'kernels']" in result.stdout
    assert "Traceback" not in result.stderr
    assert ("FAIL a case of the run failed" in result.stdout) == (exit_code == 1)


def test_the_command_refuses_in_one_sentence_and_says_which_dependency_it_lacks(command, tmp_path):
    result = command("harness", "gate", "--base", "no-such-revision")
    assert result.returncode == 2
    assert re.fullmatch(r"mla-harness: --base 'no-such-revision' is no revision of .*\n", result.stderr)
    diff = tmp_path / "change.diff"
    diff.write_text("--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n")
    code = (
        "import sys; sys.modules['unidiff'] = None; sys.modules['unidiff.patch'] = None\n"
        f"sys.argv = ['mla-harness', 'gate', '--diff-file', {str(diff)!r}]\n"
        "from harness.cli import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 3
    reason = "gate reads diffs with unidiff, which is not installed: pip install 'mla-harness[gate]'"
    assert result.stderr == f"mla-harness: {reason}\n"


# ---- this repository's own gate ------------------------------------------------------------------


def test_the_policy_of_this_repository_excludes_and_exempts_only_what_is_there():
    from harness.gate.change import repository_files
    from harness.gate.exemptions import read_exemptions
    from harness.gate.policy import read_policy

    policy = read_policy(ROOT / "pyproject.toml")
    files = repository_files(ROOT)
    idle = [glob for glob in policy.exclude if not any(fnmatchcase(file, glob) for file in files)]
    assert not idle
    assert not [
        file for file in files if file.startswith("harness/paths/triton/") and policy.is_excluded(file)
    ]
    assert all(item.file in files for item in read_exemptions(ROOT / policy.exemptions))


def test_continuous_integration_covers_the_suites_and_gates_the_change():
    run = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "python3 -m nox -s cover" in run
    assert [line for line in run if line.startswith("python3 -m nox -s gate -- ")] == run[-1:]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    actions = re.findall(r"uses: (\S+)", workflow)
    assert actions
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in actions)
    assert ".ci/comment" in workflow


FAKE_GH = """\
#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$GH_LOG"
case "$*" in *--paginate*) printf '%s' "$GH_IDS" ;; esac
"""


@pytest.mark.parametrize(
    ("ids", "sent_as"),
    [
        ("", "api --silent --method POST repos/o/r/issues/7/comments --field body=@{file}"),
        ("12\n34\n", "api --silent --method PATCH repos/o/r/issues/comments/12 --field body=@{file}"),
    ],
)
def test_one_comment_is_posted_and_then_replaced(tmp_path, ids, sent_as):
    from reports.gate_markdown import MARKER

    write(tmp_path, {"gh": FAKE_GH, "gate.md": f"{MARKER}\nx\n"})
    (tmp_path / "gh").chmod(0o755)
    log = tmp_path / "log"
    environment = {**os.environ, "GH_LOG": str(log), "GH_IDS": ids}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"
    file = tmp_path / "gate.md"
    subprocess.run([ROOT / ".ci" / "comment", "o/r", "7", file], env=environment, check=True)
    asked, sent = log.read_text().splitlines()
    assert asked.startswith("api --paginate repos/o/r/issues/7/comments --jq ")
    assert MARKER in asked
    assert sent == sent_as.format(file=file)


def test_the_policy_that_the_readme_shows_is_one(tmp_path):
    from harness.gate.policy import read_policy

    (shown,) = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "pyproject.toml").write_text(shown)
    policy = read_policy(tmp_path / "pyproject.toml")
    assert policy.limits("csrc/fill.cu", is_kernel=True).lines == 95
    assert policy.measured_elsewhere == ("gate/gpu.json",)
