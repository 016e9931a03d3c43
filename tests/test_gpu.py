"""What only a GPU can show; every test starts its own workers. Run with `pytest -m gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.startup import cuda_answers

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda_answers(), reason="no CUDA device answers"),
]


def run(tmp_path, *arguments, cwd=ROOT):
    report = tmp_path / "report.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness", "run", "--lane", "compiled", "--workers", "1"]
    result = subprocess.run(
        [*command, *arguments, "--report", f"jsonl:{report}"],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    return result, lines[1:-1], lines[-1]["end"]


def test_lengths_batch_and_cache_sizes_do_not_recompile(tmp_path):
    _, _, once = run(tmp_path, "mla_decode/decode:70x2/heads=16,splits=2", "latent_cache_write/decode:9")
    others = [
        "mla_decode/decode:70x2/heads=16,splits=2",
        "mla_decode/decode:1/heads=16,splits=3",
        "mla_decode/decode:999x17,idle,pad:3/heads=16,splits=8,block=16",
        "mla_decode/draft:64+3,paused:5,decode:256x16/heads=16,splits=16,pool=4096",
        "latent_cache_write/decode:9",
        "latent_cache_write/prefill:1000,pad:7/block=16",
        "latent_cache_write/hit:63+1,decode:5x40/pool=5000",
    ]
    result, found, many = run(tmp_path, *others)
    assert result.returncode == 0, result.stdout
    assert len(found) == len(others)
    assert many["compile_variants"] == once["compile_variants"]


def test_a_captured_graph_replays_with_other_lengths_and_tables(tmp_path):
    case = "mla_decode/draft:30+3,decode:300,decode:5,idle,decode:64,pad:2/heads=16"
    result, (verdict,), _ = run(tmp_path, case, "--check", "graph")
    assert result.returncode == 0, result.stdout
    graph = [check for check in verdict["checks"] if check["name"] == "graph"]
    assert [check["status"] for check in graph].count("passed") == 6


def test_inputs_are_the_same_bytes_as_on_a_processor(tmp_path):
    recorded = json.loads((ROOT / "tests" / "data" / "digests.json").read_text())
    _, found, _ = run(tmp_path, *recorded)
    assert {verdict["case"]: verdict["inputs_digest"] for verdict in found} == recorded


BAD_PATHS = """
from dataclasses import replace

import triton
import triton.language as tl

from harness.paths.triton.mla_decode import PATHS as TRITON

PATH = TRITON[0]


@triton.jit
def _poke(lse, offset):
    tl.store(lse + offset.to(tl.int64) * offset, 1.0)


@triton.jit
def _spin(flag, lse):
    value = tl.load(flag, volatile=True)
    while value >= 0:
        value = tl.load(flag, volatile=True)
    tl.store(lse, value.to(tl.float32))


def on_nine(act):
    def run(inputs, outputs, workspace):
        if inputs["seq_lens_decoder"].tolist() == [9]:
            act(inputs, outputs)
        PATH.run(inputs, outputs, workspace)

    return run


def poke(inputs, outputs):
    _poke[(1,)](outputs["lse"], 1 << 20)


def spin(inputs, outputs):
    _spin[(1,)](inputs["seq_lens_decoder"], outputs["lse"])


PATHS = (
    replace(PATH, name="bad/poking", run=on_nine(poke)),
    replace(PATH, name="bad/spinning", run=on_nine(spin)),
)
"""


@pytest.mark.parametrize(("path", "kind"), [("bad/poking", "crash"), ("bad/spinning", "timeout")])
def test_a_broken_device_or_an_endless_kernel_costs_its_own_verdict_only(make_house, tmp_path, path, kind):
    house = make_house({"harness/paths/bad/__init__.py": "", "harness/paths/bad/paths.py": BAD_PATHS})
    cases = [f"mla_decode/decode:{length}/heads=2" for length in (5, 9, 7, 8)]
    arguments = [*cases, "--path", path, "--timeout", "5"]
    result, found, _ = run(tmp_path, *arguments, cwd=house)
    by_case = {verdict["case"]: verdict for verdict in found}
    assert "Traceback" not in result.stdout + result.stderr
    assert by_case[cases[1]]["kind"] == kind, by_case[cases[1]]
    assert [by_case[case]["status"] for case in cases if case != cases[1]] == ["passed"] * 3
    assert result.returncode == 1
