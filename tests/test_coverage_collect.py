"""What processes collect: statements, arms, lanes and cases, in host code and in interpreted kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("coverage")

from harness.coverage.collect import Measure, chosen_files
from harness.coverage.recording import NEVER_BUILT, NEVER_IMPORTED, Recording
from harness.coverage.sites import PROCESS, Coverage, SiteKind
from harness.plan import UsageError, asked_cases, make_plan
from harness.pool import Pool

ROOT = Path(__file__).resolve().parent.parent

DRIVER = """
import os, sys
from pathlib import Path
from harness.coverage.collect import Collector, chosen_files
from harness.coverage.recording import Recording
from harness.lanes import lanes
folder, is_kernel = Path(sys.argv[1]), sys.argv[2] == "kernel"
sys.path.insert(0, str(folder))
if is_kernel:
    lane = lanes()["interpreted"]
    os.environ.update({name: value for name, value in lane.environment.items() if value is not None})
import early
measure = chosen_files(folder, ["*"])
collector, recording = Collector(measure), Recording(measure)
collector.start()
if is_kernel:
    lane.start()
    collector.watch_interpreter()
import subject
recording.add(collector.take(), "interpreted")
for case in sys.argv[3:]:
    subject.run(case)
    recording.add(collector.take(), "interpreted", case)
recording.add(collector.stop(), "interpreted")
recording.coverage().write(folder / "coverage.json")
recording.write_data_file(folder / ".coverage")
"""

EARLY = """import os

class Early:
    name = os.name

if os.name == "nt":
    print()

def never():
    return 1
"""


def collected(folder, subject, *cases, kind="host"):
    """The coverage of `subject.py` and `early.py`, the latter imported before collecting begins."""
    (folder / "early.py").write_text(EARLY)
    (folder / "subject.py").write_text(subject)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), kind, *cases],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Coverage.read(folder / "coverage.json")


def hit(file, kind):
    return [(s.first, s.label) for s, hits in file.of_kind(kind).items() if hits.count]


def missed(file, kind):
    return [(site.first, site.label) for site in file.missed(kind)]


HOST = """def run(case):
    if case == "a":
        first = (
            1
        )
    elif case == "b":
        first = 2
    for letter in case:
        if letter == "x":
            break
    try:
        if case == "raises" and int(case):
            pass
    except ValueError:
        second = 3
    while (case
           and len(case) > 1):
        case = case[1:]
    return [item
            for item in case]
"""


def test_statements_and_arms_of_host_code_are_those_that_ran(tmp_path):
    file = collected(tmp_path, HOST, "a", "raises").files["subject.py"]
    assert missed(file, SiteKind.STATEMENT) == [(7, ""), (10, ""), (13, "")]
    # An exception leaves a condition by neither arm; "raises" leaves `elif` and the loops by their ends.
    assert missed(file, SiteKind.ARM) == [(6, "true"), (9, "true"), (12, "true")]


def test_every_site_names_the_cases_and_the_lane_that_hit_it(tmp_path):
    file = collected(tmp_path, HOST, "a", "b", "xx").files["subject.py"]
    cases = {(site.first, site.label): hits.cases for site, hits in file.sites.items()}
    assert cases[2, ""] == {"a", "b", "xx"}
    assert cases[3, ""] == cases[2, "true"] == {"a"}
    assert cases[6, "true"] == {"b"}
    assert cases[8, "ends"] == {"a", "b"}
    assert cases[9, "true"] == {"xx"}
    assert cases[15, ""] == set()
    assert {lane for hits in file.sites.values() for lane in hits.lanes} == {PROCESS}


def test_of_a_module_imported_before_only_what_importing_must_have_run_is_hit(tmp_path):
    file = collected(tmp_path, HOST, "a").files["early.py"]
    assert hit(file, SiteKind.STATEMENT) == [(1, ""), (4, ""), (6, "")]
    assert missed(file, SiteKind.ARM) == [(6, "false"), (6, "true")]


KERNEL = """import triton
import triton.language as tl
import torch


@triton.jit
def larger(
    left, right
):
    if True:
        result = tl.maximum(left, right)
    return result


@triton.autotune(
    configs=[triton.Config({"BLOCK": 8})],
    key=[],
)
@triton.jit
def kernel(x, n, limit, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x + start + index, mask=start + index < n) + tl.where(index < limit, 1.0, 2.0)
    while n > 100:
        n -= 100
    if n > 3:
        return
    tl.store(x + index, total, mask=index < n)
    tl.store(
        x,
        tl.reduce(total, 0, larger),
    )
    if n == 3:
        tl.store(x + 1, 0.0)


def run(case):
    for n in case.split(","):
        x = torch.ones(128)
        kernel[(1,)](x, int(n), 20)
"""


def test_arms_and_lanes_of_an_interpreted_kernel_are_those_that_ran(tmp_path):
    pytest.importorskip("triton")
    file = collected(tmp_path, KERNEL, "16", kind="kernel").files["subject.py"]
    assert missed(file, SiteKind.STATEMENT) == [
        *[(10, ""), (11, ""), (12, ""), (26, ""), (29, ""), (30, ""), (34, ""), (35, "")],
    ]
    assert hit(file, SiteKind.ARM) == [
        *[(23, "trips"), (25, "no trip"), (27, "true")],
        *[(39, "ends"), (39, "trips")],
    ]
    # Two whole blocks: no lane is off, in the load nor in the select.
    assert hit(file, SiteKind.LANE) == [(24, "on"), (24, "on")]
    assert missed(file, SiteKind.LANE) == [(24, "off"), (24, "off"), (29, "off"), (29, "on")]


def test_loops_without_a_trip_and_lanes_never_on_show(tmp_path):
    pytest.importorskip("triton")
    file = collected(tmp_path, KERNEL, "0", kind="kernel").files["subject.py"]
    arms = [arm for arm in hit(file, SiteKind.ARM) if arm[0] < 39]
    assert arms == [(23, "no trip"), (25, "no trip"), (27, "false"), (34, "false")]
    assert hit(file, SiteKind.LANE) == [(29, "off")]
    # What a reduction is handed runs too, though the library calls it.
    assert missed(file, SiteKind.STATEMENT) == [(24, ""), (26, ""), (28, ""), (35, "")]


def test_cases_of_one_kernel_add_up(tmp_path):
    pytest.importorskip("triton")
    file = collected(tmp_path, KERNEL, "0", "3", "116", kind="kernel").files["subject.py"]
    assert missed(file, SiteKind.STATEMENT) == []
    assert missed(file, SiteKind.ARM) == []
    assert missed(file, SiteKind.LANE) == [(24, "off")]
    by_line = {site.first: hits for site, hits in file.of_kind(SiteKind.STATEMENT).items()}
    assert by_line[24].cases == {"3", "116"}
    assert by_line[24].lanes == {"interpreted"}
    assert by_line[41].lanes == {PROCESS}


def test_coverage_py_reads_the_data_file_and_misses_no_way_out_of_a_kernel(tmp_path):
    pytest.importorskip("triton")
    import coverage

    collected(tmp_path, KERNEL, "0", "3", "116", kind="kernel")
    library = coverage.Coverage(data_file=str(tmp_path / ".coverage"), config_file=False, branch=True)
    library.load()
    _, statements, _, missing, _ = library.analysis2(str(tmp_path / "subject.py"))
    assert len(statements) > 20
    assert missing == []
    assert library._analyze(str(tmp_path / "subject.py")).missing_branch_arcs() == {}
    assert library.get_data().measured_contexts() >= {"0", "3", "116"}
    library.get_data().set_query_context("0")
    assert 28 not in library.get_data().lines(str(tmp_path / "subject.py"))


# ---- through workers -----------------------------------------------------------------------------

SMALL = "latent_cache_write/decode:5,idle,pad:2/model=minicpm3-4b"
JUDGED = [
    "harness/accesses.py",
    "harness/bench.py",
    "harness/judge.py",
    "harness/paths/triton/latent_cache_write.py",
    "references/latent_cache_write.py",
]
WORKER = pytest.mark.xdist_group("coverage of a worker")
"""Tests that share what one worker has judged."""


@pytest.fixture(scope="module")
def judged():
    """The coverage of one small case, judged by a worker that is ended while it is idle."""
    pytest.importorskip("triton")
    recording = Recording(chosen_files(ROOT, JUDGED))
    with Pool("interpreted", 1, recording) as pool:
        asked = asked_cases([SMALL], [], "*", [])
        plan = make_plan(
            asked,
            pool.describe(),
            "interpreted",
            path_glob="triton/latent_cache_write",
            extra_checks=(),
            timeout=60,
            workers=1,
        )
        (verdict,) = pool.judge(plan.tasks)
    assert verdict.status.value == "passed"
    return recording.coverage()


@WORKER
def test_a_worker_hands_over_what_its_kernels_ran(judged):
    file = judged.files["harness/paths/triton/latent_cache_write.py"]
    in_kernel = {site: hits for site, hits in file.sites.items() if site.function == "_write_rows"}
    assert len(in_kernel) > 10
    statements = [hits for site, hits in in_kernel.items() if site.kind is SiteKind.STATEMENT]
    assert all(hits.lanes == {"interpreted"} and hits.cases == {SMALL} for hits in statements)
    # Three programs' tokens, padding among them, in a block that holds more.
    assert {site.label for site, hits in in_kernel.items() if hits.count and site.kind is SiteKind.LANE} == {
        "on",
        "off",
    }


@WORKER
def test_a_worker_hands_over_what_host_code_ran(judged):
    oracle = judged.files["references/latent_cache_write.py"]
    assert missed(oracle, SiteKind.STATEMENT) == []
    judge = {site.first: hits for site, hits in judged.files["harness/judge.py"].sites.items()}
    assert any(hits.cases == {SMALL} for hits in judge.values())
    # The harness's own eyes on the interpreter are code too, though the library calls them.
    accesses = judged.files["harness/accesses.py"]
    assert {"_tell", "kernel_frame"} <= {site.function for site, hits in accesses.sites.items() if hits.cases}


@WORKER
def test_what_nothing_imported_is_unmeasured_and_says_so(judged):
    assert judged.files["harness/bench.py"].unmeasured == NEVER_IMPORTED
    assert judged.files["harness/judge.py"].unmeasured == ""


# ---- what is measured ----------------------------------------------------------------------------


def test_files_are_chosen_by_globs_from_the_root(tmp_path):
    for name in ("a/k.py", "a/b/k.cu", "a/notes.md", ".venv/k.py", "a/__pycache__/k.py", "other.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert chosen_files(tmp_path, ["a/*"]).files == (str(tmp_path / "a/b/k.cu"), str(tmp_path / "a/k.py"))
    assert chosen_files(tmp_path, ["*.py"]).files == (str(tmp_path / "a/k.py"), str(tmp_path / "other.py"))


def test_a_glob_that_matches_nothing_is_refused(tmp_path):
    (tmp_path / "k.py").write_text("")
    with pytest.raises(UsageError, match="--source 'kernels/\\*' matches no file of"):
        chosen_files(tmp_path, ["*.py", "kernels/*"])


def test_a_file_that_does_not_parse_is_listed_as_unmeasured(tmp_path):
    (tmp_path / "k.py").write_text("import triton\n@triton.jit\ndef k(:\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xff'\n")
    files = Recording(chosen_files(tmp_path, ["*"])).coverage().files
    assert files["k.py"].unmeasured.startswith("it cannot be parsed")
    assert files["k.py"].is_kernel
    assert files["latin.py"].unmeasured.startswith("it cannot be parsed")


def test_a_cuda_file_that_no_lane_built_is_listed_as_unmeasured(tmp_path):
    (tmp_path / "k.cu").write_text("__global__ void k(int* x) { x[0] = 1; }\n")
    (file,) = Recording(Measure(tmp_path, (str(tmp_path / "k.cu"),))).coverage().files.values()
    assert file.is_kernel
    assert file.unmeasured
    try:
        import tree_sitter_cuda  # noqa: F401
    except ImportError:
        return
    assert file.unmeasured == NEVER_BUILT
    assert len(file.of_kind(SiteKind.STATEMENT)) == 1
