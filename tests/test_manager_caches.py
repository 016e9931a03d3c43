"""What a manager allocates: numbers worked by hand from the contracts' layouts, and the same as counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import parse
from cases.cache_layout import cache_bytes
from cases.manager_caches import Allocation, device_caches, host_caches, total_bytes
from cases.models import grouped_model_names, model_names


def layers_of(options):
    return parse(f"mla_step/decode:1/{options}").layers


MIXED = "model=deepseek-v3,layers=4,window=0+128+128+0,cache=same+packed+packed+same"


def test_a_stack_of_full_and_sliding_layers_worked_by_hand():
    # 10 blocks of 64 tokens: rows of 576 numbers in bf16 and of 512 + 4 * 4 + 64 * 2 bytes (L33).
    full = Allocation((10, 1, 64, 576), "bfloat16", 737_280)
    sliding = Allocation((10, 1, 64, 656), "uint8", 419_840)
    caches = device_caches(layers_of(MIXED), 10)
    assert caches == {("key", 0): full, ("key", 1): sliding, ("key", 2): sliding, ("key", 3): full}
    assert list(caches) == [("key", layer) for layer in range(4)]
    assert total_bytes(caches) == 2_314_240


def test_layers_keep_their_own_blocks():
    options = "model=deepseek-v3,layers=3,window=128+0+128,cache=packed+same+packed,block=32+64+16"
    assert device_caches(layers_of(options), 2) == {
        ("key", 0): Allocation((2, 1, 32, 656), "uint8", 41_984),
        ("key", 1): Allocation((2, 1, 64, 576), "bfloat16", 147_456),
        ("key", 2): Allocation((2, 1, 16, 656), "uint8", 20_992),
    }


def test_blocks_of_deepseek_v3_take_what_is_published():
    layers = layers_of("model=deepseek-v3,layers=61")
    assert total_bytes(device_caches(layers, 1)) == 4_497_408
    assert device_caches(layers, 1)["key", 60] == Allocation((1, 1, 64, 576), "bfloat16", 73_728)


def test_sliding_layers_of_1088_columns():
    (layer,) = layers_of("model=dots3-note-sliding,window=513,cache=packed")
    # 1024 + 4 * 8 + 64 * 2 bytes.
    assert device_caches([layer], 3) == {("key", 0): Allocation((3, 1, 64, 1184), "uint8", 227_328)}


def test_an_indexer_has_a_tensor_beside_the_key():
    layers = layers_of("model=deepseek-v3.2,layers=2,cache=packed")
    assert device_caches(layers, 4, layer_offset=30) == {
        ("key", 30): Allocation((4, 1, 64, 656), "uint8", 167_936),
        ("indexer", 30): Allocation((4, 64, 132), "uint8", 33_792),
        ("key", 31): Allocation((4, 1, 64, 656), "uint8", 167_936),
        ("indexer", 31): Allocation((4, 64, 132), "uint8", 33_792),
    }


def test_a_pipeline_stage_counts_its_layers_through_the_whole_model():
    first, second = (device_caches(layers_of(MIXED), 10, layer_offset=offset) for offset in (0, 4))
    assert list(second) == [("key", layer) for layer in range(4, 8)]
    assert list(first.values()) == list(second.values())


def test_host_blocks_are_device_blocks():
    layers = layers_of(MIXED)
    device, host = device_caches(layers, 10), host_caches(layers, 3)
    assert host["key", 1] == Allocation((3, 1, 64, 656), "uint8", 125_952)
    assert host["key", 3] == Allocation((3, 1, 64, 576), "bfloat16", 221_184)
    for key, allocation in device.items():
        assert (host[key].shape[1:], host[key].dtype) == (allocation.shape[1:], allocation.dtype)
        assert 3 * allocation.bytes == 10 * host[key].bytes


@given(
    st.sampled_from(model_names()),
    st.lists(st.sampled_from(["same", "fp8", "packed"]), min_size=1, max_size=5),
    st.integers(0, 1000),
    st.integers(0, 60),
)
def test_all_tensors_together_take_what_is_counted(model, kinds, num_blocks, offset):
    layers = layers_of(f"model={model},layers={len(kinds)},cache={'+'.join(kinds)}")
    caches = device_caches(layers, num_blocks, offset)
    assert total_bytes(caches) == cache_bytes(layers, num_blocks)
    has_values = any(role == "value" for role, _ in caches)
    assert has_values == (model in grouped_model_names())


@pytest.mark.parametrize(("blocks", "offset"), [(-1, 0), (0, -1)])
def test_less_than_nothing_is_refused(blocks, offset):
    with pytest.raises(ValueError, match="counted from 0 on"):
        device_caches(layers_of("layers=2"), blocks, offset)
