"""CUDA kernels where no batch of a suite leads: any address, any library's tensors, bad arguments."""

import importlib.util
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from cases import parse
from harness.lanes import lanes
from harness.launch import Launch, PathFailure
from harness.paths.cuda import (
    decode_rows,
    gqa_cache_write,
    gqa_step,
    latent_cache_write,
    launch_buffers,
    mla_decode,
    packed_cache_write,
    padding_offset,
    position_ids,
    prefill_attention,
    qkv_split,
    read_cache_interleave,
    rope,
    slot_mapping,
    step_plan,
    swa_indices,
)
from references.oracle import Precision, oracle_for

pytestmark = pytest.mark.usefixtures("cuda_on_the_processor")

MODULES = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        decode_rows,
        gqa_cache_write,
        gqa_step,
        latent_cache_write,
        launch_buffers,
        mla_decode,
        packed_cache_write,
        padding_offset,
        position_ids,
        prefill_attention,
        qkv_split,
        read_cache_interleave,
        rope,
        slot_mapping,
        step_plan,
        swa_indices,
    )
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATE = {path.name: path for path in rope.PATHS}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def same(got, expected):
    """Whether two tensors have one dtype, shape and every bit in common."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    bits = (tensor.contiguous().view(torch.uint8) for tensor in (got, expected))
    return got.numel() == 0 or torch.equal(*bits)


def moved(tensor, offset, gap):
    """A copy `offset` elements behind an aligned address, with `gap` elements between its rows."""
    *rows, width = tensor.shape
    flat = torch.zeros(offset + int(np.prod(rows)) * (width + gap), dtype=tensor.dtype)
    copy = flat[offset:].view(*rows, width + gap)[..., :width]
    copy.copy_(tensor)
    return copy


# ---- addresses -----------------------------------------------------------------------------------

# (elements behind an aligned address, elements between rows): words of 16, 8, 4 and 2 bytes of bf16.
PLACES = [(0, 0), (8, 8), (4, 4), (2, 2), (1, 0), (0, 1), (3, 5)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_new_latents_are_written_from_and_to_any_address(place, dtype):
    latents, keys = torch.randn(5, 24).to(dtype), torch.randn(5, 8).to(dtype)
    cache = moved(torch.zeros(2, 1, 3, 32, dtype=dtype), place[0], 0)
    slots = torch.tensor([4, -1, 0, 5, -7])
    latent_cache_write.KERNELS.latent_cache_write(moved(latents, *place), moved(keys, *place), cache, slots)
    expected = torch.zeros(6, 32, dtype=dtype)
    # A token without a row hides none behind it.
    expected[[4, 0, 5]] = torch.cat([latents, keys], 1)[[0, 2, 3]]
    assert same(cache.view(6, 32), expected)


@pytest.mark.parametrize("is_ue8m0", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("widths", [(512, 64), (256, 32), (384, 50), (640, 2), (128, 130)])
def test_new_latents_are_packed_from_any_address_to_any_multiple_of_4(widths, place, is_ue8m0):
    rank, rope_width = widths
    generator = torch.Generator().manual_seed(rank)
    latents, keys = (torch.randn(9, width, generator=generator).bfloat16() for width in widths)
    width = rank + rank // 32 + 2 * rope_width
    cache = moved(torch.full((6, 1, 2, width), 0xAB, dtype=torch.uint8), place[0] * 4, 0)
    # A token without a row hides none behind it, and two of them share a warp.
    slots = torch.tensor([11, -1, 0, 5, -7, 3, 12, 4, 7])
    packed_cache_write.KERNELS.packed_cache_write(
        moved(latents, *place), moved(keys, *place), cache, slots, is_ue8m0
    )
    inputs = {
        "compressed_kv": latents,
        "k_pe": keys,
        "packed_cache": cache,
        "slot_mapping": slots,
        "scale_fmt": "ue8m0" if is_ue8m0 else "fp32",
    }
    writes = oracle_for("packed_cache_write", "definition").run(inputs)["packed_cache"]
    expected = torch.full((12, width), 0xAB, dtype=torch.uint8)
    expected[writes.rows] = writes.values
    assert same(cache.reshape(12, width), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("widths", [(24, 8), (64, 32), (7, 1), (2056, 6)])
def test_keys_are_gathered_from_and_to_any_address(place, widths):
    rank, width = widths[0], sum(widths)
    cache, new = torch.randn(4, 1, 2, width).bfloat16(), torch.randn(3, width).bfloat16()
    full = [moved(torch.ones(7, columns).bfloat16(), *place) for columns in widths]
    read_cache_interleave.KERNELS.read_cache_interleave(
        moved(cache, place[0], 0),
        int32([3, 0, 9], [9, 9, 9]),
        moved(new[:, :rank], *place),
        moved(new[:, rank:], *place),
        int32(3, 5),
        int32(0, 2, 3),
        int32(0, 5, 5),
        *full,
    )
    rows = cache.view(8, width)[[6, 7, 0]]
    expected = torch.cat([rows, new[:2], torch.zeros(2, width).bfloat16()])
    assert same(torch.cat(full, 1), expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("heads", "width"), [(1, 3), (5, 24), (70, 8), (2, 4104)])
def test_decode_rows_are_packed_and_merged_at_any_address(place, heads, width):
    # A draft of two, a chunk of one, padding.
    query, prefilled = torch.randn(4, heads, width).bfloat16(), torch.randn(4, heads, width).bfloat16()
    decoded = torch.randn(3, heads, width).bfloat16()
    packed, merged = (moved(torch.ones(count, heads, width).bfloat16(), *place) for count in (3, 4))
    sums, packed_sums = int32(0, 2, 3), int32(0, 2, 2)
    decode_rows.KERNELS.gather_decode_rows(moved(query, *place), sums, packed_sums, int32(0, 0, -1), packed)
    assert same(packed, torch.cat([query[:2], torch.zeros_like(query[:1])]))
    outs = (moved(prefilled, *place), moved(decoded, *place))
    decode_rows.KERNELS.merge_decode_rows(*outs, sums, packed_sums, int32(0, 0, 1, -1), merged)
    assert same(merged, torch.cat([decoded[:2], prefilled[2:3], torch.zeros_like(query[:1])]))


def test_merged_in_place_only_decode_tokens_are_written():
    # A chunk, a draft of two of which one has a place, padding.
    merged = torch.arange(1.0, 5).view(4, 1, 1).repeat(1, 2, 3)
    decode_rows.KERNELS.merge_decode_rows(
        None, torch.full((1, 2, 3), 10.0), int32(0, 1, 3), int32(0, 0, 2), int32(0, 1, 1, -1), merged
    )
    assert same(merged, torch.tensor([1.0, 10, 3, 4]).view(4, 1, 1).repeat(1, 2, 3))


# ---- rotation ------------------------------------------------------------------------------------


def rotation(dtype, *, is_neox, table=None, tokens=5, heads=3, width=32):
    """Inputs of a rotation: the last token is padding."""
    angles = torch.rand(40, width // 2, dtype=torch.float64) * 6.28
    return {
        "q_pe_raw": torch.randn(tokens, heads, width).to(dtype),
        "k_pe_raw": torch.randn(tokens, width).to(dtype),
        "position_ids": torch.arange(30, 30 + tokens, dtype=torch.int32),
        "batch_id_per_token": int32(*[0] * (tokens - 1), -1),
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], 1).to(table or dtype),
        "is_neox": is_neox,
    }


def rotated(inputs, name="cuda/rope"):
    outputs = {"q_pe": torch.ones_like(inputs["q_pe_raw"]), "k_pe": torch.ones_like(inputs["k_pe_raw"])}
    ROTATE[name].run(inputs, outputs, {})
    return outputs


TENSORS = ("q_pe_raw", "k_pe_raw", "cos_sin_cache")


@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("is_neox", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_rotation_has_the_same_bits_at_any_address(place, is_neox, dtype):
    inputs = rotation(dtype, is_neox=is_neox)
    aligned = rotated(inputs)
    elsewhere = rotated(inputs | {name: moved(inputs[name], *place) for name in TENSORS})
    outputs = {name: moved(torch.ones_like(tensor), *place) for name, tensor in aligned.items()}
    ROTATE["cuda/rope"].run(inputs, outputs, {})
    for name, expected in aligned.items():
        assert same(elsewhere[name], expected)
        assert same(outputs[name], expected)


@pytest.mark.parametrize("is_neox", [0, 1])
@pytest.mark.parametrize(("name", "weights"), [("cuda/rope", torch.float32), ("cuda/rope@rounded", None)])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("width", [2, 6, 32, 64])
def test_rotations_have_the_bits_of_their_emulations(width, dtype, name, weights, is_neox):
    inputs = rotation(dtype, is_neox=is_neox, width=width)
    emulation = Precision(weights=weights or dtype, output=dtype)
    expected = oracle_for("rope", "definition").run(inputs, emulation)
    for output, tensor in rotated(inputs, name).items():
        assert torch.equal(tensor.double(), expected[output])


@pytest.mark.parametrize("is_neox", [0, 1])
def test_a_table_in_fp32_is_taken_as_it_is(is_neox):
    inputs = rotation(torch.bfloat16, is_neox=is_neox, table=torch.float32)
    expected = oracle_for("rope", "definition").run(inputs, Precision(torch.float32, torch.bfloat16))
    assert torch.equal(rotated(inputs)["q_pe"].double(), expected["q_pe"])
    coarse = inputs | {"cos_sin_cache": inputs["cos_sin_cache"].bfloat16()}
    assert not torch.equal(rotated(coarse)["q_pe"].double(), expected["q_pe"])


@pytest.mark.parametrize("is_neox", [0, 1])
@pytest.mark.parametrize("width", [6, 32])
def test_the_outputs_of_a_rotation_may_be_its_inputs(is_neox, width):
    inputs = rotation(torch.bfloat16, is_neox=is_neox, width=width)
    expected = rotated(inputs)
    ROTATE["cuda/rope"].run(inputs, {"q_pe": inputs["q_pe_raw"], "k_pe": inputs["k_pe_raw"]}, {})
    assert same(inputs["q_pe_raw"], expected["q_pe"])
    assert same(inputs["k_pe_raw"], expected["k_pe"])


# ---- query heads in groups -----------------------------------------------------------------------


def written(place, inputs, caches, *, rope_width, is_neox):
    """(query, k_cache, v_cache) after a write of keys and values that lie `place` apart."""
    qkv, table = inputs
    k_cache, v_cache = (moved(cache, place[0], 0) for cache in caches)
    query = moved(torch.ones(5, 3, k_cache.shape[3], dtype=qkv.dtype), *place)
    gqa_cache_write.KERNELS.write_cache(
        moved(qkv, *place),
        moved(table, *place) if rope_width else None,
        int32([1, 3], [0, 2]),
        int32(2, 3),
        int32(0, 3, 4),
        int32(0, 0, 0, 1, -1),
        query,
        k_cache,
        v_cache,
        is_neox,
    )
    return query, k_cache, v_cache


@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("widths", [(32, 16, 32), (48, 24, 16), (32, 16, 0), (21, 5, 6)])
def test_keys_and_values_have_the_same_bits_at_any_address(widths, dtype, is_neox, place):
    width, v_width, rope_width = widths
    angles = torch.rand(9, rope_width // 2, dtype=torch.float64) * 6.28
    table = torch.cat([angles.cos(), angles.sin()], 1).to(dtype)
    qkv = torch.randn(5, 5 * width + 2 * v_width).to(dtype)
    caches = [torch.zeros(4, 2, 4, columns, dtype=dtype) for columns in (width, v_width)]
    given = {"rope_width": rope_width, "is_neox": is_neox}
    query, k_cache, v_cache = written((0, 0), (qkv, table), caches, **given)
    # Row 0 has positions 2 to 4, in blocks 1 and 3; row 1 position 3, in block 0.
    values = qkv[:, 5 * width :].reshape(5, 2, v_width)
    assert same(v_cache[[1, 1, 3, 0], :, [2, 3, 0, 3]], values[:4])
    assert int((v_cache != 0).any(-1).sum()) == int((k_cache != 0).any(-1).sum()) == 8
    assert bool((query[4] == 0).all())
    keys = qkv[:, 3 * width : 5 * width].reshape(5, 2, width)
    assert same(k_cache[[1, 1, 3, 0], :, [2, 3, 0, 3], rope_width:], keys[:4, :, rope_width:])
    if dtype is torch.bfloat16:
        exact = written((0, 0), (qkv, table.float()), caches, **given)
        assert [same(*pair) for pair in zip(exact, (query, k_cache, v_cache), strict=True)] == [True] * 3
    elsewhere = written(place, (qkv, table), caches, **given)
    assert [same(*pair) for pair in zip(elsewhere, (query, k_cache, v_cache), strict=True)] == [True] * 3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_projections_are_split_from_and_to_any_address(dtype, inputs_first, place):
    # Two ranks, each one query head and a copy of the one KV head.
    width, v_width, num_inputs = 40, 24, 72
    weight = torch.randn(num_inputs, 3 * width + 3 * v_width).to(dtype)
    projection = moved(torch.ones(num_inputs, 2 * width + 2 * v_width, dtype=dtype), *place)
    given = weight if inputs_first else weight.T.contiguous()
    offsets = torch.zeros(4, 3, dtype=torch.int32)
    qkv_split.KERNELS.split_qkv_proj(
        moved(given, *place), projection, offsets, inputs_first, 1, 2, 1, 1, width, v_width
    )
    parts = [(40, 0, 40), (80, 40, 40), (120, 80, 24), (168, 104, 24)]
    assert offsets.tolist() == [list(part) for part in parts]
    assert same(projection, torch.cat([weight[:, first : first + size] for first, _, size in parts], 1))


# ---- any library's tensors -----------------------------------------------------------------------

STEP = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2"
GROUPS = "model=ernie-4.5-21b-a3b,heads=6,kv_heads=2"
CASES = {
    "decode_rows": f"decode_rows/{STEP}/heads=2,dtype=fp32",
    "gqa_cache_write": f"gqa_cache_write/{STEP}/{GROUPS},dtype=fp32",
    "gqa_step": f"gqa_step/{STEP}/{GROUPS},dtype=fp32,splits=2",
    "latent_cache_write": f"latent_cache_write/{STEP}/dtype=fp32",
    "launch_buffers": f"launch_buffers/{STEP}/{GROUPS}",
    "mla_decode": f"mla_decode/{STEP}/heads=2,dtype=fp32,splits=2",
    "packed_cache_write": f"packed_cache_write/{STEP}/model=minicpm3-4b",
    "padding_offset": f"padding_offset/{STEP}",
    "position_ids": f"position_ids/{STEP}",
    "prefill_attention": "prefill_attention/hit:17+4,prefill:5/heads=2,dtype=fp32",
    "qkv_split": f"qkv_split//{GROUPS},dtype=fp32",
    "read_cache_interleave": f"read_cache_interleave/{STEP}/dtype=fp32",
    "rope": f"rope/{STEP}/heads=2,dtype=fp32",
    "slot_mapping": f"slot_mapping/{STEP}",
    "step_plan": f"step_plan/{STEP}",
    "swa_indices": f"swa_indices/{STEP}/window=17",
}


def prepared(operator, **changes):
    """A launch of the operator's case, what its path is given changed by name."""
    (path, *_) = MODULES[operator].PATHS

    def run(*given):
        path.run(*({name: changed(name, value) for name, value in tensors.items()} for tensors in given))

    def changed(name, value):
        change = changes.get(name, changes.get("every"))
        return value if change is None else change(value)

    return Launch.prepare(parse(CASES[operator]), replace(path, run=run), lanes()["host"])


def as_numpy(value):
    return value.numpy() if torch.is_tensor(value) else value


def as_paddle(value):
    # The bridge's import of Paddle is the one that leaves the process as it was.
    from harness.paths.paddle._bridge import paddle

    return paddle.utils.dlpack.from_dlpack(value) if torch.is_tensor(value) else value


@pytest.mark.parametrize("convert", [as_numpy, as_paddle])
@pytest.mark.parametrize("operator", CASES)
def test_tensors_of_other_libraries_are_taken_as_they_are(operator, convert):
    if convert is as_paddle and importlib.util.find_spec("paddle") is None:
        pytest.skip("paddle is not installed")
    if convert is as_numpy and operator == "packed_cache_write":
        pytest.skip("NumPy has no bfloat16")
    launches = [prepared(operator), prepared(operator, every=convert)]
    for launch in launches:
        launch.run()
    assert launches[0].outputs_digest() == launches[1].outputs_digest()


# ---- bad arguments -------------------------------------------------------------------------------


def longer(tensor):
    return torch.cat([tensor, tensor[:1]])


def transposed(tensor):
    return tensor.T.contiguous().T


def of(dtype):
    return lambda tensor: tensor.to(dtype)


BAD = [
    ("padding_offset", "seq_lens_encoder", longer, "seq_lens_encoder must be [6], got [7]"),
    ("padding_offset", "cu_seqlens_k", longer, "cu_seqlens_k must be [7], got [8]"),
    ("padding_offset", "seq_lens_this_time", of(torch.int64), "seq_lens_this_time must be int32, got int64"),
    ("step_plan", "max_lens", longer, "max_lens must be [9], got [10]"),
    ("step_plan", "tile_starts", longer, "tile_starts must be [7], got [8]"),
    ("step_plan", "multiprocessors", lambda _: 0, "multiprocessors must be 1 to 2147483647, got 0"),
    (
        "step_plan",
        "block_size",
        lambda _: 2**20,
        "block_size must be 1 to 1048575, so that 2^11 blocks have an int32 of tokens, got 1048576",
    ),
    ("slot_mapping", "block_size", lambda _: 0, "block_size must be 1 to 2147483647, got 0"),
    ("slot_mapping", "position_ids", longer, "position_ids must be [15], got [16]"),
    ("slot_mapping", "slot_mapping", of(torch.int32), "slot_mapping must be int64, got int32"),
    (
        "slot_mapping",
        "block_tables",
        transposed,
        "block_tables must be dense in its last axis, got stride 6 of axis 1",
    ),
    ("read_cache_interleave", "block_tables", longer, "block_tables must be [6, *], got [7, 2]"),
    ("read_cache_interleave", "full_k_pe", of(torch.float16), "full_k_pe must be float32, got float16"),
    ("read_cache_interleave", "full_compressed_kv", longer, "full_k_pe must be [27, *], got [26, 64]"),
    ("read_cache_interleave", "k_pe", longer, "k_pe must be [15, 64], got [16, 64]"),
    ("read_cache_interleave", "cu_seqlens_q", longer, "cu_seqlens_q must be [7], got [8]"),
    ("decode_rows", "cache_seqlens", longer, "seq_lens_encoder must be [7], got [6]"),
    ("decode_rows", "prefill_out", longer, "prefill_out must be [15, 2, 128], got [16, 2, 128]"),
    ("decode_rows", "packed_query", of(torch.bfloat16), "packed_query must be float32, got bfloat16"),
    ("packed_cache_write", "k_pe", longer, "k_pe must be [15, 32], got [16, 32]"),
    ("packed_cache_write", "k_pe", of(torch.float16), "k_pe must be bfloat16, got float16"),
    ("packed_cache_write", "slot_mapping", longer, "slot_mapping must be [15], got [16]"),
    (
        "packed_cache_write",
        "packed_cache",
        lambda tensor: tensor[..., :327],
        "packed_cache must be [*, 1, *, 328], got [10, 1, 64, 327]",
    ),
    (
        "packed_cache_write",
        "packed_cache",
        lambda tensor: moved(tensor, 2, 0),
        "packed_cache must begin at and step by multiples of 4 bytes",
    ),
    (
        "packed_cache_write",
        "packed_cache",
        of(torch.int32),
        "packed_cache must be uint8, got int32",
    ),
    (
        "packed_cache_write",
        "compressed_kv",
        lambda tensor: tensor[:, :192],
        "compressed_kv must have a multiple of 128 columns and k_pe an even number, got 192 and 32",
    ),
    (
        "packed_cache_write",
        "k_pe",
        lambda tensor: tensor[:, :31],
        "compressed_kv must have a multiple of 128 columns and k_pe an even number, got 256 and 31",
    ),
    ("swa_indices", "block_tables", longer, "block_tables must be [6, *], got [7, 2]"),
    ("swa_indices", "cu_seqlens_q", longer, "cu_seqlens_q must be [7], got [8]"),
    ("swa_indices", "swa_indices", longer, "swa_indices must be [15, 1, *], got [16, 1, 128]"),
    ("swa_indices", "swa_indices", of(torch.int64), "swa_indices must be int32, got int64"),
    (
        "swa_indices",
        "block_size",
        lambda _: 0,
        "block_size must be 1 to 2147483647 and window 0 to 2147483647, got 0 and 17",
    ),
    (
        "swa_indices",
        "window",
        lambda _: -1,
        "block_size must be 1 to 2147483647 and window 0 to 2147483647, got 64 and -1",
    ),
    ("launch_buffers", "seq_lens_encoder", longer, "seq_lens_encoder must be [6], got [7]"),
    ("launch_buffers", "tile_starts", longer, "tile_starts must be [3, 7], got [4, 7]"),
    ("launch_buffers", "kv_tile_ids", longer, "kv_batch_ids must be [13], got [12]"),
    ("launch_buffers", "capacity", of(torch.int64), "capacity must be int32, got int64"),
    (
        "launch_buffers",
        "num_key_value_heads",
        lambda _: 4,
        "num_attention_heads must be a multiple of num_key_value_heads, got 6 and 4",
    ),
    ("launch_buffers", "block_size", lambda _: 0, "block_size must be 1 to 2147483647, got 0"),
    (
        "qkv_split",
        "tensor_parallel_size",
        lambda _: 2,
        "weight must be [256, 3584], got [256, 2048]",
    ),
    (
        "qkv_split",
        "qkv_proj_weight_paddle",
        lambda tensor: tensor[..., 1:],
        "projection must have 1280 features, or 2048 with gates, got 1279",
    ),
    (
        "qkv_split",
        "qkv_proj_weight_paddle",
        lambda tensor: tensor[:, 1:],
        "weight must be [255, 2048], got [256, 2048]",
    ),
    (
        "qkv_split",
        "num_attention_heads",
        lambda _: 0,
        "rank must be 0 to ranks - 1 and have heads, got rank 0 of 1, 0 query heads and 2 KV heads",
    ),
    ("qkv_split", "qkvg_proj_torch", of(torch.float16), "projection must be float16, got float32"),
    ("gqa_cache_write", "v_cache", longer, "v_cache must be [10, 2, 64, *], got [11, 2, 64, 128]"),
    ("gqa_cache_write", "qkv", lambda qkv: qkv[:, 1:], "qkv must be [15, 1280], got [15, 1279]"),
    ("gqa_cache_write", "block_tables", longer, "block_tables must be [6, *], got [7, 2]"),
    ("gqa_cache_write", "k_cache", of(torch.bfloat16), "k_cache must be float32, got bfloat16"),
    ("gqa_cache_write", "cos_sin_cache", of(torch.int32), "cos_sin_cache must be float32, got int32"),
    (
        "gqa_cache_write",
        "cos_sin_cache",
        lambda table: table[:, :7],
        "cos_sin_cache must have an even number of columns, at most 128, got 7",
    ),
    ("rope", "q_pe", lambda tensor: tensor[..., :63], "q_pe_raw must be [15, 2, 63], got [15, 2, 64]"),
    ("rope", "k_pe", longer, "k_pe must be [15, 64], got [16, 64]"),
    ("rope", "cos_sin_cache", of(torch.int32), "cos_sin_cache must be float32, got int32"),
]


@pytest.mark.parametrize(("operator", "name", "change", "sentence"), BAD)
def test_bad_arguments_are_one_sentence(operator, name, change, sentence):
    with pytest.raises(PathFailure) as refusal:
        prepared(operator, **{name: change}).run()
    assert str(refusal.value) == f"the path raised ValueError: {sentence}"


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        (
            rotation(torch.bfloat16, is_neox=0, width=7),
            "q_pe must have an even number of columns, at most 2147483646, got 7",
        ),
        (rotation(torch.int8, is_neox=0), "q_pe must be bfloat16, float16 or float32, got int8"),
        (
            rotation(torch.bfloat16, is_neox=0, table=torch.float16),
            "cos_sin_cache must be bfloat16 or float32, got float16",
        ),
    ],
)
def test_rotations_of_other_widths_and_types_are_refused(inputs, sentence):
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        rotated(inputs)
