"""`pytest --mla-suite`: the plugin as a user meets it, in processes of its own."""

from functools import partial

import pytest

GOOD = "mla_decode/decode:5/heads=2"
SKIPPED = "mla_decode/decode:5/heads=2,block=48"

BAD_PATHS = """
import os
from dataclasses import replace

from harness.paths.triton.mla_decode import PATHS as TRITON

PATH = TRITON[0]


def double(inputs, outputs, workspace):
    PATH.run(inputs, outputs, workspace)
    outputs["out"].mul_(2)


def kill(inputs, outputs, workspace):
    os.kill(os.getpid(), 9)


PATHS = (replace(PATH, name="bad/wrong", run=double), replace(PATH, name="bad/killed", run=kill))
"""


@pytest.fixture(scope="module")
def house(make_house):
    """A copy of the packages with a wrong path and a deadly one."""
    files = {"harness/paths/bad/__init__.py": "", "harness/paths/bad/paths.py": BAD_PATHS}
    return make_house(files)


@pytest.fixture(scope="module")
def mla(command, house):
    """(arguments) -> a finished pytest with the plugin, in that copy."""
    arguments = ("-p", "harness.pytest_plugin", "-p", "no:cacheprovider", "--mla-lane", "interpreted")
    return partial(command, "pytest", *arguments, cwd=house)


def test_items_are_named_by_case_path_and_lane(mla):
    result = mla("--mla-case", GOOD, "--mla-path", "triton/*", "-v")
    assert result.returncode == 0, result.stdout
    assert f"{GOOD}[triton/mla_decode-interpreted] PASSED" in result.stdout


def test_a_wrong_path_fails_its_item_and_prints_how_to_run_it_again(mla):
    result = mla("--mla-case", GOOD, "--mla-path", "bad/wrong")
    assert result.returncode == 1
    assert "kind=wrong" in result.stdout
    assert f"--mla-case '{GOOD}' --mla-path bad/wrong --mla-lane interpreted" in result.stdout


def test_a_path_that_kills_its_process_fails_its_own_item_only(mla):
    result = mla("--mla-case", GOOD, "-v")
    assert f"{GOOD}[bad/killed-interpreted] FAILED" in result.stdout
    assert f"{GOOD}[triton/mla_decode-interpreted] PASSED" in result.stdout
    assert "signal 9" in result.stdout


def test_a_known_failure_is_xfailed(mla, tmp_path):
    known = tmp_path / "known.txt"
    known.write_text("* bad/wrong # out is doubled\n")
    arguments = ["--mla-case", GOOD, "--mla-path", "bad/wrong", "--mla-known-failures", str(known)]
    result = mla(*arguments)
    assert result.returncode == 0, result.stdout
    assert "1 xfailed" in result.stdout


def test_an_unsupported_case_is_skipped_with_the_reason(mla):
    result = mla("--mla-case", SKIPPED, "--mla-path", "triton/*", "-rs")
    assert result.returncode == 0, result.stdout
    assert "block_size must be a power of two, got 48" in result.stdout


def test_workers_of_xdist_share_the_items(mla):
    arguments = ["--mla-case", GOOD, "--mla-case", "mla_decode/decode:9/heads=2", "--mla-path", "triton/*"]
    result = mla(*arguments, "-n", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout


@pytest.mark.parametrize("arguments", [["--mla-case", "mla_decode/foo"], ["--mla-suite", "nope"]])
def test_bad_input_is_a_usage_error(mla, arguments):
    result = mla(*arguments)
    assert result.returncode == 4
    assert "Traceback" not in result.stdout + result.stderr
