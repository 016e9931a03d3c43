"""`mla-harness cover` and `pytest --mla-cover`, as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("coverage")

from harness.coverage.sites import Coverage, SiteKind

# What the first test has judged is read by the others.
pytestmark = pytest.mark.xdist_group("cover")

ROOT = Path(__file__).resolve().parent.parent
CASE = "slot_mapping/prefill:3,decode:5,idle,pad:1"
KERNEL = "harness/paths/triton/slot_mapping.py"
ONE = ("--lane", "interpreted", "--workers", "1")


@pytest.fixture(scope="module")
def covered(command, tmp_path_factory):
    """What `cover` printed of one case, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("cover")
    report = f"jsonl:{out}/verdicts.jsonl"
    done = command("harness", "cover", CASE, *ONE, "--report", report, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return done.stdout, out


def test_every_form_is_written(covered):
    _, out = covered
    written = {file.name for file in out.iterdir()}
    assert {"coverage.json", "coverage.xml", ".coverage", "index.html", "verdicts.jsonl"} <= written
    assert '"status": "passed"' in (out / "verdicts.jsonl").read_text()


def test_the_kernel_that_ran_is_told_and_so_are_all_others(covered):
    text, out = covered
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("harness/")}
    kernels = {name for name, file in Coverage.read(out / "coverage.json").files.items() if file.is_kernel}
    assert set(rows) == kernels
    assert len(kernels) > 8
    file = Coverage.read(out / "coverage.json").files[KERNEL]
    total, missed = len(file.of_kind(SiteKind.STATEMENT)), len(file.missed(SiteKind.STATEMENT))
    assert 0 < missed < total / 3
    assert f" {total - missed}/{total} " in rows[KERNEL]
    # What probes call cannot hold probes itself.
    assert "unmeasured: harness/coverage/_probe_kernels.py: nothing that ran imported it" in text
    assert CASE in {case for hits in file.sites.values() for case in hits.cases}


def test_coverage_py_reports_the_data_file(covered, command):
    _, out = covered
    done = command("coverage", "report", "--data-file", str(out / ".coverage"), "--include", f"*/{KERNEL}")
    assert done.returncode == 0, done.stdout
    assert KERNEL in done.stdout


def test_append_adds_to_what_is_there(command, tmp_path):
    for operator in ("position_ids", "slot_mapping"):
        done = command(
            *("harness", "cover", CASE.replace("slot_mapping", operator), *ONE, "--out", str(tmp_path)),
            *("--source", "harness/paths/triton/*_*s.py", "--source", "harness/paths/triton/slot_mapping.py"),
            *(["--append"] if operator == "slot_mapping" else []),
        )
        assert done.returncode == 0, done.stderr
    files = Coverage.read(tmp_path / "coverage.json").files
    assert KERNEL in files
    assert "cases/case.py" not in files
    for name in ("position_ids", "slot_mapping"):
        hit = [hits for hits in files[f"harness/paths/triton/{name}.py"].sites.values() if hits.cases]
        assert len(hit) > 10


def test_nothing_is_added_to_coverage_of_another_text(covered, command, make_house):
    _, out = covered
    house = make_house({KERNEL: (ROOT / KERNEL).read_text() + "# changed\n"})
    chosen = (*ONE, "--source", KERNEL)
    done = command("harness", "cover", CASE, *chosen, "--append", "--out", str(out), cwd=house)
    assert done.returncode == 2
    assert f"--append: {KERNEL} is not the text that" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["--source", "nothing/*"], 2, "--source 'nothing/*' matches no file"),
        (["--suite", "nothing"], 2, "nothing"),
        (["--append", "--out", "nowhere"], 2, "nowhere/coverage.json cannot be read as coverage"),
        (["--path", "nothing", CASE], 2, "no path matches"),
    ],
)
def test_what_does_not_exist_is_refused_in_one_sentence(command, arguments, code, reason):
    done = command("harness", "cover", *ONE, *arguments)
    assert done.returncode == code
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failing_case_fails_the_command_and_coverage_is_written(command, make_house, tmp_path):
    source = (ROOT / KERNEL).read_text()
    changed = source.replace("tl.store(slot_mapping + tokens, ", "tl.store(slot_mapping + tokens, 1 + ")
    assert changed != source
    house = make_house({KERNEL: changed})
    done = command("harness", "cover", CASE, *ONE, "--source", KERNEL, "--out", str(tmp_path), cwd=house)
    assert done.returncode == 1, done.stderr
    assert Coverage.read(tmp_path / "coverage.json").files[KERNEL].missed(SiteKind.STATEMENT) != []


def test_without_coverage_py_one_sentence_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['coverage'] = None; sys.argv = ['mla-harness', 'cover', 'rope/decode:1'];"
        "from harness.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "pip install 'mla-harness[coverage]'" in done.stderr


# ---- pytest --------------------------------------------------------------------------------------

ENGINE = '''"""An engine's kernel."""
import triton
import triton.language as tl


@triton.jit
def scale(x, out, n, factor, CLAMP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < n, other=0.0) * factor
    if CLAMP:
        value = tl.minimum(value, 1.0)
    tl.store(out + index, value, mask=index < n)


def run(x, out, factor):
    if x.numel() == 0:
        return
    scale[(triton.cdiv(x.numel(), 16),)](x, out, x.numel(), factor, CLAMP=False, BLOCK=16)
'''
ENGINE_TESTS = """import pytest
import torch
from engine.kernels import run


@pytest.mark.parametrize("n", [0, 16, 32])
def test_scale(n):
    out = torch.zeros(n)
    run(torch.arange(float(n)), out, 2.0)
    assert torch.equal(out, 2 * torch.arange(float(n)))
"""


@pytest.fixture
def engine(tmp_path):
    """(options) -> pytest run with them on a project of its own, in that project's folder."""
    for name, text in (
        ("engine/kernels.py", ENGINE),
        ("engine/more.cu", ""),
        ("tests/test_e.py", ENGINE_TESTS),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    def run(*options):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "harness.pytest_plugin", "-W", "error", *options],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
            capture_output=True,
            text=True,
            check=False,
        )

    return tmp_path, run


@pytest.mark.parametrize("workers", [0, 1])
def test_an_engines_kernels_are_measured_in_its_own_tests(engine, workers):
    folder, run = engine
    options = ["-n", str(workers)] if workers else []
    done = run("--mla-cover", "out", "--mla-cover-source", "engine/*", *options)
    assert done.returncode == 0, done.stdout
    file = Coverage.read(folder / "out" / "coverage.json").files["engine/kernels.py"]
    assert [site.first for site in file.missed(SiteKind.STATEMENT)] == [11]
    assert [(site.first, site.label) for site in file.missed(SiteKind.ARM)] == [(10, "true")]
    # Whole blocks only: no lane of either mask was ever off.
    assert [(site.first, site.label) for site in file.missed(SiteKind.LANE)] == [(9, "off"), (12, "off")]
    (load,) = (hits for site, hits in file.of_kind(SiteKind.STATEMENT).items() if site.first == 9)
    assert load.cases == {"tests/test_e.py::test_scale[16]", "tests/test_e.py::test_scale[32]"}
    assert "engine/kernels.py" in done.stdout
    assert "unmeasured: engine/more.cu" in done.stdout
    names = {file.name for file in (folder / "out").iterdir()}
    assert {"coverage.json", "coverage.xml", ".coverage", "index.html"} <= names
    assert not [name for name in names if "gw" in name]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--mla-cover", "out"], "name them with --mla-cover-source GLOB"),
        (["--mla-cover", "out", "--mla-cover-source", "no/*"], "--source 'no/*' matches no file"),
    ],
)
def test_nothing_is_measured_where_it_is_not_said_what(engine, options, reason):
    _, run = engine
    done = run(*options)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert reason in done.stderr
