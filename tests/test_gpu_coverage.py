"""What only a GPU can show of coverage: compiled kernels tell what others tell, and are what they were."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.startup import child_environment, cuda_answers

pytest.importorskip("triton")
pytest.importorskip("coverage")

from harness.coverage.python_sites import python_file
from harness.coverage.sites import Coverage, SiteKind, text_of

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not cuda_answers(), reason="no CUDA device answers"),
]

SMALL = "model=minicpm3-4b"
GROUPED = "model=ernie-4.5-21b-a3b,heads=3,kv_heads=1,v_dim=64"
# Splits, heads and block sizes are given: what the kernels choose by themselves is the same in every lane.
ALIKE = (
    f"mla_decode/draft:30+3,prefill:5,decode:70,idle,pad:1/{SMALL},heads=2,block=16,splits=2",
    f"latent_cache_write/hit:5+3,decode:5,idle,pad:2/{SMALL}",
    f"decode_rows/prefill:5,decode:5,draft:3+2,idle,pad:1/{SMALL},heads=2",
    f"prefill_attention/prefill:5,hit:17+4,decode:3,pad:1/{SMALL},heads=2",
    f"read_cache_interleave/prefill:3,hit:5+2,decode:4,pad:1/{SMALL}",
    f"rope/prefill:3,decode:5,pad:1/{SMALL},heads=2",
    "rope/prefill:3,decode:5,pad:1/model=kimi-linear-48b,heads=2",
    "padding_offset/prefill:3,decode:5,idle,pad:1",
    "position_ids/prefill:3,decode:5,idle,pad:1",
    "slot_mapping/prefill:3,decode:5,idle,pad:1",
    "step_plan/prefill:3,decode:70,idle",
    f"packed_cache_write/hit:5+3,decode:5,idle,pad:2/{SMALL}",
    "swa_indices/prefill:3,decode:70,idle,pad:1/window=9,block=16",
    f"sparse_decode/draft:30+3,prefill:5,idle,pad:1/{SMALL},heads=2,topk=70,splits=2",
    f"sparse_prefill/hit:5+3,prefill:9,pad:1/{SMALL},heads=2,topk=20",
    f"gqa_cache_write/hit:5+3,decode:5,idle,pad:2/{GROUPED},block=16",
    f"gqa_step/draft:30+3,prefill:5,idle,pad:1/{GROUPED},block=16,splits=2",
    "qkv_split//model=ernie-4.5-21b-a3b,heads=1,kv_heads=2,v_dim=64,tp=2",
    "launch_buffers/prefill:70,decode:5,idle/model=ernie-4.5-21b-a3b",
    f"merge_states/prefill:3,decode:5,hit:4+2,pad:1/{SMALL},heads=2",
)
IN_TRITON = (
    *ALIKE,
    "kv_b_split//model=mistral-small-4,heads=1",
)
TIMED = "mla_decode/decode:4096x32/heads=128"
MOST = 1.05
"""Time with flags over time without them."""


def python(*arguments):
    environment = child_environment()
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def covered(folder, paths, cases, *lanes):
    """What `cover` wrote of the cases in these lanes, and every verdict's digest of its outputs."""
    chosen = [word for lane in lanes for word in ("--lane", lane)]
    report = folder / f"{paths.partition('/')[0]}.jsonl"
    arguments = ("--path", paths, "--report", f"jsonl:{report}", "--out", str(folder))
    done = python("-m", "harness", "cover", *cases, *chosen, *arguments, "--source", "harness/*")
    assert done.returncode == 0, done.stdout + done.stderr
    return Coverage.read(folder / "coverage.json"), digests_of(report)


def digests_of(report):
    """By case and path, of lane compiled."""
    found = [json.loads(line) for line in report.read_text().splitlines()[1:-1]]
    return {
        (item["case"], item["path"]): item["outputs_digest"]
        for item in found
        if item["lane"] == "compiled" and item["status"] == "passed"
    }


@pytest.fixture(scope="module")
def triton(tmp_path_factory):
    return covered(tmp_path_factory.mktemp("triton"), "triton/*", IN_TRITON, "interpreted", "compiled")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return covered(tmp_path_factory.mktemp("cuda"), "cuda/*", ALIKE, "host", "compiled")


def hit_by_one(coverage, first, second, is_asked):
    """Every site that one of two lanes hit and the other did not: (file, lines, kind, label, lane)."""
    return [
        (name, site.lines, site.kind.value, site.label, *(hits.lanes & {first, second}))
        for name, file in coverage.files.items()
        for site, hits in file.sites.items()
        if is_asked(name, site) and len(hits.lanes & {first, second}) == 1
    ]


@pytest.mark.parametrize("kind", list(SiteKind))
def test_compiled_triton_kernels_tell_the_sites_that_interpreted_ones_do(triton, kind):
    coverage, _ = triton
    kernels = {
        name: python_file(text_of(ROOT / name)).kernels
        for name in coverage.files
        if name.startswith("harness/paths/triton/")
    }
    hit = {
        (name, site.function)
        for name in kernels
        for site, hits in coverage.files[name].sites.items()
        if hits.count and site.function in kernels[name]
    }
    assert hit == {(name, function) for name, found in kernels.items() for function in found}

    def is_asked(name, site):
        return site.kind is kind and site.function in kernels.get(name, ())

    assert hit_by_one(coverage, "interpreted", "compiled", is_asked) == []


def test_cuda_kernels_tell_on_the_gpu_the_sites_that_they_tell_on_the_host(cuda):
    coverage, _ = cuda
    # device.h is nvcc's alone, and e4m3.h has an instruction for it and software for all others.
    sources = {name for name, file in coverage.files.items() if file.language == "cuda"}
    sources = {name for name in sources if not name.endswith(("/device.h", "/e4m3.h"))}
    hit = {name for name in sources if any(hits.count for hits in coverage.files[name].sites.values())}
    assert hit == sources
    assert hit_by_one(coverage, "host", "compiled", lambda name, _: name in sources) == []


@pytest.mark.parametrize("family", ["triton", "cuda"])
def test_outputs_are_the_same_bits_with_probes_and_without(family, request, tmp_path):
    _, probed = request.getfixturevalue(family)
    cases = IN_TRITON if family == "triton" else ALIKE
    report = tmp_path / "plain.jsonl"
    arguments = ("--lane", "compiled", "--path", f"{family}/*", "--report", f"jsonl:{report}")
    done = python("-m", "harness", "run", *cases, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    plain = digests_of(report)
    assert {case.partition("/")[0] for case, _ in plain} == {case.partition("/")[0] for case in cases}
    assert probed == plain


def test_flags_cost_mla_decode_little():
    done = python(str(ROOT / "tests" / "time_probes.py"), TIMED)
    assert done.returncode == 0, done.stderr
    times = [json.loads(line) for line in done.stdout.splitlines()]
    assert [item["path"] for item in times] == ["cuda/mla_decode", "triton/mla_decode"]
    assert {item["path"]: item["ratio"] for item in times if item["ratio"] > MOST} == {}
