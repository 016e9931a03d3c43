"""Probes in Triton kernels tell what coverage.py tells, change no bit, and are nothing when left out."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("coverage")

from harness.coverage.python_sites import python_file
from harness.coverage.sites import text_of

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "harness" / "paths" / "triton"
SMALL = "model=minicpm3-4b"
GROUPED = "model=ernie-4.5-21b-a3b,heads=3,kv_heads=1,v_dim=64"

CASES = (
    f"mla_decode/draft:30+3,prefill:5,idle,pad:1/{SMALL},heads=2,block=16,splits=2",
    f"latent_cache_write/hit:5+3,decode:5,idle,pad:2/{SMALL}",
    f"decode_rows/prefill:5,decode:5,draft:3+2,idle,pad:1/{SMALL},heads=2",
    "kv_b_split//model=mistral-small-4,heads=1",
    f"prefill_attention/prefill:5,hit:17+4,decode:3,pad:1/{SMALL},heads=2",
    f"read_cache_interleave/prefill:3,hit:5+2,decode:4,pad:1/{SMALL}",
    f"rope/prefill:3,decode:5,pad:1/{SMALL},heads=2",
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


def script(name, *arguments, folder):
    """The JSON objects that a script of this folder prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / name), *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- interpreted ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(mode) -> what became of all the cases."""
    folder = tmp_path_factory.mktemp("cache")
    return {mode: script("probe_kernels.py", mode, *CASES, folder=folder)[0] for mode in MODES}


MODES = ("plain", "traced", "probes")
RAN = pytest.mark.xdist_group("coverage by probes")
"""Tests that share what became of the cases."""


@RAN
def test_neither_probes_nor_tracing_change_a_bit(ran):
    assert len(ran["plain"]["digests"]) >= len(CASES)
    assert ran["probes"]["digests"] == ran["plain"]["digests"]
    assert ran["traced"]["digests"] == ran["plain"]["digests"]


@RAN
def test_the_cases_run_some_of_every_kernel(ran):
    kernels = {
        (file.name, name) for file in KERNELS.glob("*.py") for name in python_file(text_of(file)).kernels
    }
    run = {(file, site[5]) for file, sites in ran["probes"]["sites"].items() for site in sites}
    assert run == kernels
    kinds = {site[2] for sites in ran["probes"]["sites"].values() for site in sites}
    assert kinds == {"statement", "arm", "lane"}


@RAN
def test_probes_tell_the_sites_that_coverage_py_and_the_interpreter_tell(ran):
    # File after file: a difference is then short enough to read.
    assert sorted(ran["probes"]["sites"]) == sorted(ran["traced"]["sites"])
    for file, sites in ran["probes"]["sites"].items():
        assert sites == ran["traced"]["sites"][file], file


# ---- compiled ------------------------------------------------------------------------------------


def same_ptx(names, folder, *arguments):
    plain = script("compile_probes.py", "plain", names, *arguments, folder=folder)
    probed = script("compile_probes.py", "probes", names, *arguments, folder=folder)
    elided, flags = ([item for item in probed if item["mode"] == mode] for mode in ("elided", "flags"))
    assert plain
    assert [item["kernel"] for item in elided] == [item["kernel"] for item in plain]
    for one, other in zip(plain, elided, strict=True):
        assert other["ptx"] == one["ptx"], one["kernel"]
    for one, other in zip(plain, flags, strict=True):
        # Flags are stored, and the kernel's own work is still there.
        assert other["ptx"].count("st.global") > one["ptx"].count("st.global"), one["kernel"]
        assert other["cubin_bytes"] > one["cubin_bytes"]
        for instruction in ("wgmma.mma_async", "mma.sync"):
            assert (instruction in other["ptx"]) == (instruction in one["ptx"])


def test_without_a_buffer_probes_leave_the_ptx_as_it_was(tmp_path):
    # One with loops and helpers of its own.
    same_ptx("_combine_splits", tmp_path, "256", "32", "bf16", "4")


@pytest.mark.slow
def test_without_a_buffer_probes_leave_the_ptx_of_every_kernel_as_it_was(tmp_path):
    same_ptx("*", tmp_path, "512", "64", "bf16", "4", "128")


BINDING = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from harness.coverage.probes import FLAGS, Probes
from pathlib import Path
# The kernels that probes call are among them, as they are where all of harness is measured.
files = {str(file) for file in Path("harness").resolve().rglob("*.py")}
probes = Probes(files, "cpu")
probes.install()
from harness.paths.triton.position_ids import _place_tokens as kernel
backend = make_backend(GPUTarget("cuda", 90, 32))
bind = create_function_from_signature(kernel.signature, kernel.params, backend)
tensor = torch.zeros(16, dtype=torch.int32)
pointers = ("seq_lens_decoder", "cu_seqlens_q", "batch_id_per_token", "position_ids")
names = [parameter.name for parameter in kernel.params if parameter.name != FLAGS]
values = [tensor if name in pointers else 16 for name in names]
for given in ({}, {FLAGS: probes._buffer}):
    bound, specialization, _ = bind(*values, debug=False, **given)
    print(bound[FLAGS] is None, specialization[-1][0])
"""


def test_the_hidden_parameter_binds_with_a_buffer_and_without():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", BINDING],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "constexpr", "False", "*u8"]


# ---- where they stand ----------------------------------------------------------------------------


def instrumented(text):
    """The source of the one kernel in a text, with probes, and what each flag stands for."""
    from harness.coverage.probes import _Instrumenter
    from harness.coverage.python_sites import Place

    (function,) = ast.parse(text).body
    flags = []

    def number(*sites):
        flags.append([(site.first, site.label) for site in sites])
        return len(flags) - 1

    _Instrumenter(Place("kernel", is_kernel=True), number, with_lanes=True).kernel(function)
    return ast.unparse(function), flags


def test_every_block_has_a_flag_and_every_arm_and_that_of_a_loops_body_stands_before_it():
    text, flags = instrumented(
        "def kernel(x, n):\n"
        "    a = 1\n"
        "    if a:\n"
        "        return\n"
        "    b = 2\n"
        "    for i in range(n):\n"
        "        b += i\n"
        "    while b:\n"
        "        if n:\n"
        "            b = 0\n"
        "        else:\n"
        "            b = 1\n"
    )
    assert text == (
        "def kernel(x, n, _mla_flags=None):\n"
        "    _mla_probe_hit(_mla_flags, 2)\n"
        "    a = 1\n"
        "    if a:\n"
        "        _mla_probe_hit(_mla_flags, 0)\n"
        "        return\n"
        "    else:\n"
        "        _mla_probe_hit(_mla_flags, 1)\n"
        "    _mla_probe_hit(_mla_flags, 9)\n"
        "    b = 2\n"
        "    _mla_probe_entered(_mla_flags, 4, 3, 0, n, 1)\n"
        "    for i in range(n):\n"
        "        b += i\n"
        "    _mla_probe_tested(_mla_flags, 8, b)\n"
        "    while b:\n"
        "        _mla_probe_hit(_mla_flags, 7)\n"
        "        if n:\n"
        "            _mla_probe_hit(_mla_flags, 5)\n"
        "            b = 0\n"
        "        else:\n"
        "            _mla_probe_hit(_mla_flags, 6)\n"
        "            b = 1"
    )
    assert flags == [
        [(3, "true"), (4, "")],
        [(3, "false")],
        [(2, ""), (3, "")],
        [(6, "trips"), (7, "")],
        [(6, "no trip")],
        [(9, "true"), (10, "")],
        [(9, "false"), (12, "")],
        [(8, "trips"), (9, "")],
        [(8, "no trip")],
        [(5, ""), (6, ""), (8, "")],
    ]


def test_masks_pass_through_the_function_that_looks_at_them():
    text, flags = instrumented(
        "def kernel(x, m):\n"
        "    tl.store(x, tl.where(m, tl.load(x, m), 0), mask=m & 1)\n"
        "    tl.load(x, mask=None)\n"
    )
    first, second = text.splitlines()[2:]
    inner = "tl.load(x, _mla_probe_masked(_mla_flags, 4, 5, m))"
    select = f"tl.where(_mla_probe_masked(_mla_flags, 2, 3, m), {inner}, 0)"
    assert first == f"    tl.store(x, {select}, mask=_mla_probe_masked(_mla_flags, 0, 1, m & 1))"
    assert second == "    tl.load(x, mask=None)"
    assert flags == [*[[(2, "on")], [(2, "off")]] * 3, [(2, ""), (3, "")]]


def test_statements_keep_their_lines():
    from harness.coverage.probes import _Instrumenter
    from harness.coverage.python_sites import Place

    text = text_of(KERNELS / "mla_decode.py")
    for kernel in python_file(text).kernels.values():
        lines = [node.lineno for node in ast.walk(kernel) if isinstance(node, ast.stmt)]
        _Instrumenter(Place(kernel.name, is_kernel=True), lambda *_: 0, with_lanes=True).kernel(kernel)
        kept = [
            node.lineno
            for node in ast.walk(kernel)
            if isinstance(node, ast.stmt) and not ast.unparse(node).startswith("_mla_probe_")
        ]
        assert sorted(kept) == sorted(lines)
