"""Every kernel compiles for compute capability 9.0 and fits into its shared memory, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_kernels.py"
SHARED_BYTES = 227 * 1024
"""What a block may have of a multiprocessor's 228 KiB."""

OTHER_KERNELS = (
    "_combine_splits",
    "_write_rows",
    *["_pack_rows"] * 2,
    *["_attend_list"] * 3,
    "_combine_lists",
    *["_attend_step"] * 3,
    "_gather_keys",
    *["_merge_tokens"] * 2,
    *["_split_heads"] * 2,
    "_gather_tokens",
    "_list_tokens",
    "_count_tokens",
    *["_merge_rows"] * 2,
    "_find_slots",
    "_sum_lengths",
    "_place_tokens",
    "_map_tokens",
    "_list_tiles",
    "_list_keys",
    "_plan",
    *["_attend_prefill"] * 5,
    *["_rotate_tokens"] * 5,
    *["_attend_rows", "_combine_splits", *["_write_heads"] * 2] * 3,
    *["_gather_features"] * 2,
    *["_count_tiles", "_write_tiles"] * 3,
)

BF16_HEADS = (4, 20, 128)
"""A head count for each tile."""


def compiled(tmp_path, *arguments):
    """What `compile_kernels.py` tells of each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *(str(argument) for argument in arguments)],
        cwd=SCRIPT.parent.parent,
        env={**environment, "PYTHONPATH": str(SCRIPT.parent.parent), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("rank", "rope", "dtype"),
    [
        pytest.param(256, 32, "bf16", id="288-bf16", marks=pytest.mark.slow),
        pytest.param(256, 64, "bf16", id="320-bf16", marks=pytest.mark.slow),
        pytest.param(512, 64, "bf16", id="576-bf16", marks=pytest.mark.slow),
        # One tile for all head counts: quick enough for every run.
        pytest.param(1024, 64, "bf16", id="1088-bf16"),
        pytest.param(256, 32, "fp32", id="288-fp32", marks=pytest.mark.slow),
        pytest.param(1024, 64, "fp32", id="1088-fp32", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_within_the_shared_memory_of_a_multiprocessor(rank, rope, dtype, tmp_path):
    results = compiled(tmp_path, rank, rope, dtype, *BF16_HEADS)
    names = [result["kernel"] for result in results]
    assert names == [*["_attend_split"] * len(BF16_HEADS), *OTHER_KERNELS]
    for result in results:
        assert result["cubin_bytes"] > 0
        assert result["shared"] <= SHARED_BYTES, result
    # Products of 16-bit operands go through the tensor cores; those of fp32 must not lose bits there.
    for kernel, expected in (
        ("_attend_split", dtype != "fp32"),
        ("_attend_rows", dtype != "fp32"),
        ("_attend_list", True),
    ):
        uses = {result["tensor_cores"] for result in results if result["kernel"] == kernel}
        assert uses == {expected}
