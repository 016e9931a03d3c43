"""A composed path's failure names the first tensor of its workspace that departs."""

from dataclasses import replace

import pytest

from harness.checks import checks
from harness.checks._parts import first_part
from harness.kernel_path import KernelPath, path_named
from harness.verdict import Status

CASE = "mla_step/hit:30+3,decode:20,idle,draft:9+2,pad:2/model=minicpm3-4b,heads=2,block=16"


@pytest.fixture(scope="module")
def step():
    pytest.importorskip("triton")
    return path_named("triton/mla_step")


def spoiling(path, *names):
    """The path, with one element of these workspace tensors, and one of its output, spoilt afterwards."""

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        for name in names:
            workspace[name].view(-1)[0] += 1
        outputs["out"][0] += 1

    return replace(path, run=run)


@pytest.mark.parametrize(
    ("spoilt", "first"),
    [
        ((), ""),
        (("position_ids",), "position_ids"),
        (("position_ids", "cu_seqlens_q"), "cu_seqlens_q"),
        (("slot_mapping",), "slot_mapping"),
        (("full_k_pe", "full_compressed_kv"), "full_compressed_kv"),
        (("full_k_pe",), "full_k_pe"),
    ],
)
def test_the_first_part_that_departs_is_named(spoilt, first, step, launched):
    launch = launched(CASE, spoiling(step, *spoilt))
    assert first_part(launch, 0) == first
    (failed,) = [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]
    assert ("the first part that departs" in failed.reason) == bool(first)
    assert failed.reason.endswith(first)


def test_a_path_without_a_workspace_has_no_parts(launched):
    def run(inputs, outputs, _):
        outputs["position_ids"].fill_(7)

    path = KernelPath("test/position_ids", "position_ids", ("interpreted",), lambda _: None, run)
    launch = launched("position_ids/decode:5", path)
    assert first_part(launch, 0) == ""


@pytest.mark.parametrize("spoilt", [(), ("position_ids",)])
def test_of_a_packed_cache_no_keys_are_gathered_to_compare(spoilt, step, launched):
    text = "mla_step/hit:30+3,decode:20/model=minicpm3-4b,heads=1,window=5,cache=packed,block=16"
    launch = launched(text, spoiling(step, *spoilt))
    assert first_part(launch, 0) == "".join(spoilt)
    assert any(item.status is Status.FAILED for item in checks()["values"].run(launch))
