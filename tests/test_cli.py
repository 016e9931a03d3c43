"""The command line as a user meets it: separate processes, exit codes, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from harness.run import uninterrupted

ROOT = Path(__file__).resolve().parent.parent
CASE = "mla_decode/decode:5,idle,pad:2/heads=2"
OTHER = "mla_decode/decode:9/heads=2"
ONE = ("--lane", "interpreted", "--workers", "1")
"""One worker: further ones would start, which takes longer than a case, and have nothing to do."""

BAD_PATHS = '''
"""Paths that misbehave, each on the case with nine cached tokens only."""

import os
import signal
import time
from dataclasses import replace

from harness.paths.triton.mla_decode import PATHS as GOOD

GOOD_PATH = GOOD[0]


def misbehaving(name, act):
    def run(inputs, outputs, workspace):
        if inputs["seq_lens_decoder"].tolist() == [9]:
            act(outputs)
        GOOD_PATH.run(inputs, outputs, workspace)

    return replace(GOOD_PATH, name=f"bad/{name}", run=run)


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_):
    while True:
        time.sleep(0.01)


def raise_error(_):
    raise ValueError("no such tile")


def exhaust(_):
    raise MemoryError("no room")


def meddle(inputs, outputs, workspace):
    GOOD_PATH.run(inputs, outputs, workspace)
    inputs["seq_lens_decoder"].add_(1)


def dislike_idle_slots(inputs, outputs, workspace):
    if len(inputs["seq_lens_decoder"]) > 1:
        raise ValueError("no idle slots, please")
    GOOD_PATH.run(inputs, outputs, workspace)


def double(inputs, outputs, workspace):
    GOOD_PATH.run(inputs, outputs, workspace)
    outputs["out"].mul_(2)


def follow_padding(inputs, outputs, workspace):
    if bool((inputs["batch_id_per_token"] < 0).any()):
        os.kill(os.getpid(), signal.SIGKILL)
    GOOD_PATH.run(inputs, outputs, workspace)


PATHS = (
    replace(GOOD_PATH, name="bad/padded", run=follow_padding),
    replace(GOOD_PATH, name="bad/wrong", run=double),
    replace(GOOD_PATH, name="bad/meddling", run=meddle),
    replace(GOOD_PATH, name="bad/fragile", run=dislike_idle_slots),
    misbehaving("killed", kill),
    misbehaving("hanging", hang),
    misbehaving("raising", raise_error),
    misbehaving("greedy", exhaust),
)
'''

MISSING = "import a_library_that_is_not_there\n\nPATHS = ()\n"


@pytest.fixture(scope="module")
def run(command):
    """(arguments) -> a finished `python3 -m harness`."""
    return partial(command, "harness")


def verdicts(file):
    lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
    return lines[0], lines[1:-1], lines[-1]


@pytest.fixture(scope="module")
def house(make_house):
    """A copy of the packages with paths that crash, hang, raise and cannot be imported."""
    return make_house(
        {
            "harness/paths/bad/__init__.py": "",
            "harness/paths/bad/misbehaving.py": BAD_PATHS,
            "harness/paths/bad/mla_decode.py": MISSING,
            "harness/paths/bad/mla_decode_fast.py": MISSING,
        }
    )


def assert_one_sentence(result, code):
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.startswith("mla-harness: ")


def test_a_passing_run_exits_zero_and_reports_it(run, tmp_path):
    jsonl, junit = tmp_path / "r.jsonl", tmp_path / "deep" / "r.xml"
    result = run(
        *("run", CASE, "--path", "triton/*", "--workers", "1"),
        *("--report", f"jsonl:{jsonl}", "--report", f"junit:{junit}"),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("1 passed, 0 failed, 0 skipped in ")
    first, found, last = verdicts(jsonl)
    assert first["schema"] == 1
    assert [verdict["case"] for verdict in found] == [CASE]
    assert last["interrupted"] is False
    assert 'tests="1"' in junit.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", CASE, "--path", "nope/*", *ONE], "no path matches 'nope/*'"),
        (["run", CASE, "--operator", "moe_*"], "no operator matches 'moe_*'"),
        (["run", CASE, "--check", "nope"], "no check matches 'nope'"),
        (["run", CASE, "--lane", "quantum"], "no lane matches 'quantum'"),
        (["run", "--suite", "nope"], "the suites are"),
        (["run", "mla_decode/decode:0"], "^^^^^^^^"),
        (
            ["run", "no_operator/decode:5"],
            "the operators are decode_rows, gqa_cache_write, gqa_step, kv_b_split",
        ),
        (["run", "mla_decode/decode:5/window=4"], "mla_decode has no option window"),
        (["run", CASE, "--report", "yaml:x"], "no report format 'yaml'"),
        (["run", CASE, "--report", "jsonl"], "--report takes FORMAT:FILE"),
        (["run", CASE, "--known-failures", "/no/such/file"], "cannot read known failures"),
        (["show", "mla_decode/foo"], "a row begins with a kind"),
        (["list", "nope"], "no listing matches 'nope'"),
        (["repro", CASE, "--path", "nope", "--lane", "host", "--no-reduce"], "no path matches 'nope'"),
        (["fuzz", "--path", "nope", *ONE], "no path matches 'nope'"),
        (["fuzz", "--operator", "nope"], "no operator matches 'nope'"),
        (
            ["fuzz", "--path", "triton/rope", "--operator", "mla_decode", *ONE],
            "no path matches 'triton/rope' whose",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(main_here, arguments, said):
    result = main_here(*arguments)
    assert_one_sentence(result, 2)
    assert said in result.stderr


def test_a_refusal_ends_the_process_with_its_exit_code(run):
    assert_one_sentence(run("run", "mla_decode/decode:0"), 2)


def test_a_case_larger_than_memory_is_skipped_and_nothing_was_judged(main_here):
    result = main_here("run", "mla_decode/decode:2000000000/heads=1", *ONE)
    assert result.returncode == 4, result.stderr
    assert "too_large" in result.stdout
    assert "GiB" in result.stdout


def test_an_unavailable_lane_is_said_and_nothing_was_judged(main_here):
    result = main_here("run", CASE, "--lane", "compiled", "--workers", "1")
    if "no CUDA device answers" not in result.stdout:
        pytest.skip("a CUDA device answers here")
    assert result.returncode == 4


@pytest.mark.parametrize(
    ("path", "status", "kind", "reason"),
    [
        ("bad/killed", "error", "crash", "signal 9 (SIGKILL)"),
        ("bad/hanging", "error", "timeout", "did not return within 3 s"),
        ("bad/raising", "error", "crash", "ValueError: no such tile"),
        ("bad/greedy", "skipped", "too_large", "no room"),
    ],
)
def test_a_path_that_misbehaves_costs_its_own_verdict_only(run, house, tmp_path, path, status, kind, reason):
    report = tmp_path / "r.jsonl"
    arguments = ["run", CASE, OTHER, "mla_decode/decode:7/heads=2", "--path", path, *ONE]
    result = run(*arguments, "--timeout", "3", "--report", f"jsonl:{report}", cwd=house)
    assert "Traceback" not in result.stdout + result.stderr
    found = {verdict["case"]: verdict for verdict in verdicts(report)[1]}
    assert found[OTHER]["status"] == status
    assert found[OTHER]["kind"] == kind
    assert reason in found[OTHER]["reason"]
    assert [found[case]["status"] for case in found if case != OTHER] == ["passed", "passed"]
    assert result.returncode == (1 if status == "error" else 0)


@pytest.mark.parametrize("lanes", [["interpreted"], ["interpreted", "host"]])
def test_a_run_that_reduces_tells_failures_with_their_smallest_case(run, house, tmp_path, lanes):
    jsonl, page = tmp_path / "r.jsonl", tmp_path / "page.html"
    arguments = ["run", CASE, "mla_decode/decode:30/heads=2", "--path", "bad/wrong", "--reduce", "20"]
    reports = ["--report", f"jsonl:{jsonl}", "--report", f"conformance:{page}"]
    chosen = [word for lane in lanes for word in ("--lane", lane)]
    result = run(*arguments, *reports, *chosen, "--workers", "1", cwd=house)
    assert result.returncode == 1, result.stderr
    first, found, _ = verdicts(jsonl)
    smallest = "mla_decode/decode:1/heads=1"
    assert [verdict["smallest"]["case"] for verdict in found] == [smallest, smallest]
    assert f"  reduced {smallest}" in result.stdout
    assert f"python3 -m harness repro &#x27;{smallest}&#x27; --path bad/wrong" in page.read_text()
    # A path without a lane that ran is told.
    elsewhere = {"interpreted": {}, "host": {"bad/wrong": ["interpreted", "compiled"]}}
    assert first["run"]["elsewhere"] == {lane: elsewhere[lane] for lane in lanes}


def test_a_path_that_changes_its_inputs_is_blamed_and_not_the_oracles(run, house):
    result = run("run", OTHER, "--path", "bad/meddling", *ONE, cwd=house)
    assert result.returncode == 1, result.stdout
    assert "kind=input_changed" in result.stdout


def test_a_path_that_raises_on_a_variant_of_the_case_is_blamed_for_it(run, house):
    result = run("run", OTHER, "--path", "bad/fragile", "--check", "idle", *ONE, cwd=house)
    assert result.returncode == 1, result.stdout
    assert "kind=crash" in result.stdout
    assert "ValueError: no idle slots, please" in result.stdout


def test_a_path_that_cannot_be_imported_is_unavailable_with_its_reason(run, house):
    result = run("run", CASE, "--path", "bad/mla_decode*", *ONE, cwd=house)
    assert result.returncode == 4, result.stderr
    listed = run("list", "paths", "--json", cwd=house)
    states = {row["name"]: row["lanes"].get("interpreted") for row in json.loads(listed.stdout)}
    assert states["triton/mla_decode"] == "available"
    for path in ("bad/mla_decode", "bad/mla_decode@fast"):
        assert f"unavailable: {path}: ModuleNotFoundError: No module named" in result.stdout
        assert states[path].startswith("ModuleNotFoundError")


def test_a_known_failure_that_passes_or_matches_nothing_fails_the_run(main_here, tmp_path):
    known = tmp_path / "known.txt"
    known.write_text(f"# a comment\n{CASE} triton/mla_decode # passes by now\n")
    result = main_here("run", CASE, "--path", "triton/*", "--known-failures", str(known), *ONE)
    assert result.returncode == 1
    assert "1 xpassed" in result.stdout
    known.write_text("no/such* triton/* # gone\n")
    result = main_here("run", CASE, "--path", "triton/*", "--known-failures", str(known), *ONE)
    assert result.returncode == 1
    assert "stale known failure" in result.stdout


def test_a_known_failure_that_fails_is_xfailed_and_the_run_passes(run, house, tmp_path):
    known = tmp_path / "known.txt"
    known.write_text("*/heads=3 bad/wrong # out is doubled, see issue 1\n")
    arguments = ["run", "mla_decode/decode:9/heads=3", "--path", "bad/wrong", *ONE]
    result = run(*arguments, "--known-failures", str(known), cwd=house)
    assert result.returncode == 0, result.stdout
    assert "1 xfailed" in result.stdout


def test_a_wrong_path_fails_with_the_place_the_budget_and_the_line_that_reruns_it(run, house):
    result = run("run", "mla_decode/decode:9,decode:7/heads=3", "--path", "bad/wrong", *ONE, cwd=house)
    assert result.returncode == 1
    for word in (
        "FAIL mla_decode/decode:9",
        "kind=wrong",
        "worst ",
        "budget ",
        "rows 0-1",
        "heads 0-2",
        "rerun ",
    ):
        assert word in result.stdout


def test_a_known_failures_line_without_a_reason_is_refused(main_here, tmp_path):
    known = tmp_path / "known.txt"
    known.write_text("mla_decode/* triton/*\n")
    assert_one_sentence(main_here("run", CASE, "--known-failures", str(known)), 2)


def test_repro_prints_every_check_and_the_digests(main_here):
    arguments = ["repro", CASE, "--path", "triton/mla_decode", "--lane", "interpreted", "--no-reduce"]
    result = main_here(*arguments, "--check", "repeat")
    assert result.returncode == 0, result.stderr
    for word in ("passed", "values of out", "lse of lse", "bounds", "repeat", "inputs ", "outputs "):
        assert word in result.stdout


# Every worker that dies is started anew.
@pytest.mark.slow
@pytest.mark.parametrize("reducing", ["--reduce", "--no-reduce"])
def test_repro_says_what_a_path_that_ends_its_process_follows(command, house, reducing):
    asked = ["mla_decode/decode:9,pad:2/heads=1", "--path", "bad/padded", "--lane", "interpreted", reducing]
    result = command("harness", "repro", *asked, cwd=house, timeout=300)
    assert result.returncode == 1, result.stderr
    (cause,) = (line for line in result.stdout.splitlines() if line.startswith("  cause "))
    assert cause.startswith("  cause   likely padding-followed: ")


def test_show_draws_rows_blocks_and_metadata(main_here):
    result = main_here("show", "mla_decode/draft:30+5,hit:130+4@s,decode:140@s,idle,pad:4/heads=4")
    assert result.returncode == 0, result.stderr
    fields = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert fields["seq_lens_decoder"] == ["30", "130", "140", "0"]
    for word in ("slot_mapping", "draft:30+5", "@", "+"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("text", "caches"),
    [
        (
            "mla_decode/decode:9/model=deepseek-v3.2,pool=4,heads=2",
            {
                "latent_cache": "[4, 1, 64, 576] bfloat16, 1,152 bytes a token, 73,728 a block",
                "indexer_cache": "[4, 64, 132] uint8, 132 bytes a token, 8,448 a block",
            },
        ),
        (
            "packed_cache_write/decode:9/pool=4",
            {"packed_cache": "[4, 1, 64, 656] uint8, 656 bytes a token, 41,984 a block"},
        ),
    ],
)
def test_show_says_what_a_layer_keeps(main_here, text, caches):
    drawn = main_here("show", text).stdout
    lines = [line.split(maxsplit=1) for line in drawn.splitlines() if "_cache " in line]
    assert dict(lines) == caches


@pytest.mark.parametrize("what", ["operators", "suites", "cases", "models", "oracles", "checks"])
def test_listings_have_json_with_name_and_summary(main_here, what):
    rows = json.loads(main_here("list", what, "--json").stdout)
    assert rows
    assert all(row["name"] and row["summary"] for row in rows)


def test_ctrl_c_leaves_a_complete_report_of_what_ran(tmp_path):
    report = tmp_path / "r.jsonl"
    arguments = ["run", "--suite", "smoke", "--workers", "1", "--lane", "interpreted"]
    process = subprocess.Popen(
        [sys.executable, "-m", "harness", *arguments, "--report", f"jsonl:{report}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (report.exists() and len(report.read_text().splitlines()) > 3):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in output + errors
    _, found, last = verdicts(report)
    assert last["interrupted"] is True
    assert len(found) == sum(last["end"]["counts"].values()) >= 2


def test_ctrl_c_waits_for_what_belongs_together():
    done = []

    def report():
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append("reported")

    with pytest.raises(KeyboardInterrupt):
        report()
    assert done == ["reported"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_shadowed_sibling_package_is_said_in_one_sentence(tmp_path):
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(
        [sys.executable, "-c", "from harness.startup import shadowed_package; print(shadowed_package())"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'cases' must be the one in" in result.stdout


def test_a_missing_dependency_is_said_in_one_sentence():
    code = "import sys, runpy; sys.modules['pebble'] = None; runpy.run_module('harness', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert_one_sentence(result, 3)
    assert "pip install" in result.stderr
