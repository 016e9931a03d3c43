"""What caches take: published numbers, whole stacks of layers, and the same counted on real tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.cache_layout import (
    TILE,
    block_bytes,
    blocks_within,
    cache_bytes,
    layer_caches,
    packed_row_bytes,
)
from cases.models import latent_model_names, load_model


def layers_of(options):
    return parse(f"mla_step/decode:1/{options}").layers


def allocated_bytes(layers, num_blocks):
    """The same by allocating: the bytes of every tensor with that many blocks, on no device."""
    return sum(
        torch.empty(cache.shape(num_blocks), dtype=getattr(torch, cache.dtype), device="meta").nbytes
        for layer in layers
        for cache in layer_caches(layer)
    )


def estimated_bytes(layers):
    """The same by FastDeploy's formulas of a block (section 3.6), from the models' numbers alone."""
    total = 0
    for layer in layers:
        rank, rope = layer.model.kv_lora_rank, layer.model.qk_rope_head_dim
        index = layer.model.index_head_dim or 0
        item = {"bf16": 2, "fp16": 2, "fp32": 4}[layer.dtype]
        latent = {
            "same": item * (rank + rope),
            "fp8": rank + rope,
            "packed": rank + 4 * (rank // 128) + 2 * rope,
        }
        total += (latent[layer.cache] + index + 4 * (index // 128)) * layer.block_size
    return total


# ---- published numbers ---------------------------------------------------------------------------

# Options, bytes of a block in all layers.
PUBLISHED = [
    ("model=deepseek-v3", 73_728),
    ("model=deepseek-v3,layers=61", 4_497_408),
    ("model=deepseek-v3,dtype=fp32", 2 * 73_728),
    ("model=deepseek-v3,cache=fp8", 576 * 64),
    ("model=deepseek-v3,cache=packed", 656 * 64),
    ("model=minicpm3-4b,cache=packed", 328 * 64),
    ("model=mistral-small-4,cache=packed", 392 * 64),
    # The indexer's keys take 132 bytes a token: 788 in all.
    ("model=deepseek-v3.2,cache=packed,layers=61", 788 * 64 * 61),
    ("model=deepseek-v3.2,cache=packed,layers=61,block=32", 788 * 32 * 61),
    ("model=deepseek-v3.2", (1152 + 132) * 64),
    # A full layer in bf16, two packed ones with a window, another full one; and with blocks of their own.
    (
        "model=deepseek-v3,layers=4,cache=same+packed+packed+same,window=0+513+513+0",
        (2 * 1152 + 2 * 656) * 64,
    ),
    ("model=deepseek-v3,layers=2,cache=same+packed,block=64+32", 1152 * 64 + 656 * 32),
]


@pytest.mark.parametrize(("options", "expected"), PUBLISHED)
def test_a_block_takes_what_is_published(options, expected):
    layers = layers_of(options)
    assert block_bytes(layers) == expected
    assert estimated_bytes(layers) == expected
    assert cache_bytes(layers, 7) == allocated_bytes(layers, 7) == 7 * expected


@pytest.mark.parametrize(
    ("rank", "rope", "width"), [(512, 64, 656), (256, 64, 392), (256, 32, 328), (1024, 64, 1184)]
)
def test_a_packed_row_is_as_wide_as_published(rank, rope, width):
    assert packed_row_bytes(rank, rope) == width


@pytest.mark.parametrize("rank", [64, 320, 448])
def test_a_rank_without_whole_tiles_has_no_packed_row(rank):
    with pytest.raises(ValueError, match=f"128 columns, got {rank} columns"):
        packed_row_bytes(rank, 64)


# ---- tensors of a layer --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("model=deepseek-v3", [("latent_cache", "bfloat16", (9, 1, 64, 576))]),
        ("model=minicpm3-4b,dtype=fp16,block=16", [("latent_cache", "float16", (9, 1, 16, 288))]),
        ("model=deepseek-v3,cache=fp8", [("latent_cache", "float8_e4m3fn", (9, 1, 64, 576))]),
        ("model=deepseek-v3,cache=packed,dtype=fp32", [("packed_cache", "uint8", (9, 1, 64, 656))]),
        ("model=dots3-note-sliding,window=513", [("latent_cache", "bfloat16", (9, 1, 64, 1088))]),
        (
            "model=deepseek-v3.2,cache=packed",
            [("packed_cache", "uint8", (9, 1, 64, 656)), ("indexer_cache", "uint8", (9, 64, 132))],
        ),
    ],
)
def test_a_layer_keeps_tensors_of_these_shapes_and_dtypes(options, expected):
    (layer,) = layers_of(options)
    assert [(cache.name, cache.dtype, cache.shape(9)) for cache in layer_caches(layer)] == expected


def test_layers_keep_their_own_shape_and_dtype():
    layers = layers_of("model=deepseek-v3,layers=4,cache=same+packed+fp8+same,block=64+32+16+64")
    shapes = [layer_caches(layer)[0].shape(5) for layer in layers]
    assert shapes == [(5, 1, 64, 576), (5, 1, 32, 656), (5, 1, 16, 576), (5, 1, 64, 576)]


def test_a_packed_row_begins_with_codes_and_ends_with_k_pe():
    (cache,) = layer_caches(layers_of("model=deepseek-v3,cache=packed")[0])
    assert [(part.name, part.dtype, cache.offset(part.name)) for part in cache.parts] == [
        ("latent", "float8_e4m3fn", 0),
        ("scales", "float32", 512),
        ("k_pe", "bfloat16", 528),
    ]
    assert sum(part.bytes for part in cache.parts) == cache.row_bytes == 656
    with pytest.raises(KeyError):
        cache.offset("values")


def test_a_window_frees_no_block():
    assert block_bytes(layers_of("window=1")) == block_bytes(layers_of("window=0"))


@pytest.mark.parametrize(
    "text", ["packed_cache_write/hit:63+2,decode:9", "latent_cache_write/hit:63+2,decode:9"]
)
def test_the_tensors_of_a_batch_are_those_that_are_counted(text, make_batch):
    layer = make_batch(f"{text}/model=minicpm3-4b,block=16").layers[0]
    options = "model=minicpm3-4b,block=16" + (",cache=packed" if text.startswith("packed") else "")
    (cache,) = layer_caches(layers_of(options)[0])
    tensor = layer.tensors[cache.name]
    assert tuple(tensor.shape) == cache.shape(layer.pages.num_blocks)
    assert tensor.dtype is getattr(torch, cache.dtype)


def test_models_with_an_indexer_are_known():
    assert {name for name in latent_model_names() if load_model(name).index_head_dim} == {
        "deepseek-v3.2",
        "glm-5",
    }


# ---- how many fit --------------------------------------------------------------------------------


def test_blocks_of_an_h100_are_counted():
    # 60 GiB for the caches of DeepSeek-V3.
    layers = layers_of("model=deepseek-v3,layers=61")
    assert blocks_within(layers, 60 * 2**30) == 14_324
    assert 14_324 * 4_497_408 <= 60 * 2**30 < 14_325 * 4_497_408


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(latent_model_names()),
    st.lists(
        st.tuples(st.sampled_from(["same", "fp8", "packed"]), st.integers(1, 128)), min_size=1, max_size=5
    ),
    st.integers(0, 1000),
    st.integers(0, 10**9),
)
def test_as_many_blocks_fit_as_take_no_more(model, kinds, num_blocks, spare):
    caches, blocks = ("+".join(str(kind[at]) for kind in kinds) for at in (0, 1))
    layers = layers_of(f"model={model},layers={len(kinds)},cache={caches},block={blocks}")
    one = block_bytes(layers)
    assert one == estimated_bytes(layers)
    assert allocated_bytes(layers, num_blocks) == num_blocks * one
    memory = num_blocks * one + spare % one
    assert blocks_within(layers, memory) == num_blocks
    assert blocks_within(layers, (num_blocks + 1) * one) == num_blocks + 1


@pytest.mark.parametrize("memory", [-1, -(2**40)])
def test_less_than_no_memory_is_refused(memory):
    with pytest.raises(ValueError, match="at least one layer and 0 bytes"):
        blocks_within(layers_of("layers=2"), memory)


def test_a_stack_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least one layer"):
        blocks_within((), 2**30)


def test_tiles_are_those_of_the_references():
    from references._packed_rows import TILE as REFERENCE_TILE

    assert TILE == REFERENCE_TILE
