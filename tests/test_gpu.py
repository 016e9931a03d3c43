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


def run(tmp_path, *arguments):
    report = tmp_path / "report.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "harness", "run", "--lane", "compiled", "--workers", "1"]
    result = subprocess.run(
        [*command, *arguments, "--report", f"jsonl:{report}"],
        cwd=ROOT,
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
