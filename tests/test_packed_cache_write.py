"""Packing latents into the fp8 cache: bytes worked by hand, every bf16 number, odd widths, hostile slots."""

import math
import struct
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of, operators
from harness import tile_data
from harness.fill import FINITE_BYTE
from harness.verdict import Status
from references.oracle import oracle_for

ROLES = ("definition", "derivation")
NAN, INF = math.nan, math.inf
LEAST_FP32, LEAST_UE8M0 = 2.0**-126, 2.0**-22
UNTOUCHED = 0xAB


def bf16(values):
    return torch.tensor(values, dtype=torch.bfloat16)


def packed_width(rank, rope):
    return rank + 4 * (rank // 128) + 2 * rope


FAMILIES = ("triton", "cuda")


@pytest.fixture
def run_kernel(request):
    """(family, inputs, cache) -> the cache, written by that family's path."""

    def run(family, inputs, cache):
        if family == "triton":
            pytest.importorskip("triton")
            from harness.paths.triton.packed_cache_write import PATHS
        else:
            request.getfixturevalue("cuda_on_the_processor")
            from harness.paths.cuda.packed_cache_write import PATHS

        (path,) = PATHS
        path.run(inputs, {"packed_cache": cache}, {})
        return cache

    return run


@pytest.fixture(params=[*ROLES, *FAMILIES])
def pack(request, run_kernel):
    """([n, R], [n, D], scale_fmt) -> [n, width] uint8: the rows of n tokens of one slot."""

    def run(latents, k_pe, scale_fmt="fp32"):
        count, width = len(latents), packed_width(latents.shape[1], k_pe.shape[1])
        # Two tokens a block, the blocks in reverse.
        blocks = -(-count // 2)
        table = torch.arange(blocks - 1, -1, -1, dtype=torch.int32)
        tokens = torch.arange(count)
        slots = table[tokens // 2] * 2 + tokens % 2
        inputs = {
            "compressed_kv": latents,
            "k_pe": k_pe,
            "packed_cache": torch.full((blocks, 1, 2, width), UNTOUCHED, dtype=torch.uint8),
            "slot_mapping": slots.long(),
            "block_tables": table.unsqueeze(0),
            "seq_lens_decoder": torch.zeros(1, dtype=torch.int32),
            "seq_lens_this_time": torch.tensor([count], dtype=torch.int32),
            "scale_fmt": scale_fmt,
        }
        if request.param in ROLES:
            writes = oracle_for("packed_cache_write", request.param).run(inputs, None)["packed_cache"]
            assert torch.equal(writes.rows, slots.long())
            return writes.values
        return run_kernel(request.param, inputs, inputs["packed_cache"]).view(-1, width)[slots]

    return run


def one_tile(values):
    """[1, 128] bf16 that begins with these values, zeros behind them."""
    return bf16([*values, *[0.0] * (128 - len(values))]).unsqueeze(0)


def scale_and_codes(row, count):
    """The scale of a row of one tile and its first codes."""
    (scale,) = struct.unpack("<f", bytes(row[128:132].tolist()))
    return scale, row[:count].tolist()


def float32(value):
    return float(np.float32(value))


# ---- by hand -------------------------------------------------------------------------------------


def test_a_row_of_656_bytes_is_codes_scales_and_rope(pack):
    latents = torch.zeros(1, 512, dtype=torch.bfloat16)
    latents[0, 0:4] = bf16([448, 224, -448, 1])
    latents[0, 128:131] = bf16([3, -1.5, 0])
    latents[0, 384] = -6.0
    k_pe = bf16([range(64)])
    (row,) = pack(latents, k_pe).tolist()
    assert len(row) == 656
    # 448 is 1.75 x 2^8, the code before NaN; 1 has the exponent 7, the bias.
    assert row[:5] == [0x7E, 0x76, 0xFE, 0x38, 0]
    assert row[128:131] == [0x7E, 0xF6, 0]
    assert row[384:386] == [0xFE, 0]
    assert bytes(row[512:528]) == struct.pack("<4f", 1.0, 3 / 448, LEAST_FP32, 6 / 448)
    assert bytes(row[528:]) == k_pe.view(torch.int16).numpy().tobytes()
    assert not any(row[131:384])


LARGEST = 255 * 2.0**120
# What a tile begins with, and of either scale format the scale and the codes of these numbers.
TILES = {
    "zeros of both signs": ([0.0, -0.0], (LEAST_FP32, [0, 0x80]), (LEAST_UE8M0, [0, 0x80])),
    # 3 / 2^-7 = 384 = 1.5 x 2^8.
    "amax 3": ([3.0], (float32(3 / 448), [0x7E]), (2.0**-7, [0x7C])),
    # Ties: 17 between 16 and 18, 19 between 18 and 20; 2^-10 is half of the least code.
    "amax 448": (
        [-448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 2.0**-10 * (1 + 2.0**-7), -(2.0**-11)],
        *[(1.0, [0xFE, 0x58, 0x5A, 0, 2, 1, 0x80])] * 2,
    ),
    # 225 is nearest to 224.
    "amax 450, just above a power of two": (
        [450.0],
        (float32(450 / 448), [0x7E]),
        (2.0, [0x76]),
    ),
    "amax 1e-30": ([256 * 2.0**-108], (float32(256 * 2.0**-108 / 448), [0x7E]), (LEAST_UE8M0, [0])),
    # 59904 / 256 = 234, nearer to 240 than to 224.
    "amax 6e4": ([59904.0], (float32(59904 / 448), [0x7E]), (256.0, [0x77])),
    # 255 becomes 256 = 2^8.
    "the largest bf16": (
        [LARGEST, -LARGEST, 1.0],
        (float32(LARGEST / 448), [0x7E, 0xFE, 0]),
        (2.0**120, [0x78, 0xF8, 0]),
    ),
    "one outlier": (
        [448.0, 2.0**-9, -(2.0**-12)],
        *[(1.0, [0x7E, 1, 0x80])] * 2,
    ),
    # 2^-133 / 2^-126 = 2^-7 = 4 / 512.
    "the least subnormal": ([2.0**-133], (LEAST_FP32, [4]), (LEAST_UE8M0, [0])),
    "amax / 448 is subnormal": (
        [2.0**-118],
        (LEAST_FP32, [0x78]),
        (LEAST_UE8M0, [0]),
    ),
    "NaN beside 3": (
        [NAN, 3.0, -NAN, 0.0],
        (float32(3 / 448), [0x7F, 0x7E, 0x7F, 0]),
        (2.0**-7, [0x7F, 0x7C, 0x7F, 0]),
    ),
    "infinities": ([INF, -INF, 1.0, -1.0, NAN], *[(INF, [0x7F, 0x7F, 0, 0x80, 0x7F])] * 2),
    "nothing but NaN": ([NAN] * 128, (LEAST_FP32, [0x7F] * 128), (LEAST_UE8M0, [0x7F] * 128)),
}


@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
@pytest.mark.parametrize("name", TILES)
def test_a_tile_has_the_scale_and_codes_worked_by_hand(pack, name, scale_fmt):
    values, *expected = TILES[name]
    (row,) = pack(one_tile(values), bf16([[1.0, 2.0]]), scale_fmt)
    assert scale_and_codes(row, len(values)) == expected[scale_fmt == "ue8m0"]


def test_a_tile_does_not_change_its_neighbours(pack):
    # NaN, infinity and outliers in one tile; the tiles beside it as without it.
    latents = torch.zeros(4, 384, dtype=torch.bfloat16)
    latents[:, :128], latents[:, 256:] = 3.0, -5.0
    for token, value in enumerate((0.0, NAN, INF, 1e38)):
        latents[token, 200] = value
    rows = pack(latents, torch.zeros(4, 2, dtype=torch.bfloat16))
    # Columns 128 to 255 and the scale behind the first are the tile's own.
    others = [*range(128), *range(256, 384), *range(384, 388), *range(392, 400)]
    assert all(torch.equal(row[others], rows[0][others]) for row in rows)
    assert len({tuple(row.tolist()) for row in rows}) == 4


@pytest.mark.parametrize("value", [NAN, -NAN, -0.0, 2.0**-133])
def test_rope_is_copied_bit_for_bit(pack, value):
    k_pe = bf16([[value, 1.0, value, -2.5]])
    k_pe.view(torch.int16)[0, 1] = 0x7F81
    (row,) = pack(one_tile([1.0]), k_pe)
    assert torch.equal(row[132:].view(torch.int16), k_pe[0].view(torch.int16))


# ---- every number --------------------------------------------------------------------------------


def every_bfloat16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
@pytest.mark.parametrize("is_mixed", [False, True], ids=["a binade a tile", "mixed"])
def test_all_give_the_same_bytes_for_every_bfloat16(scale_fmt, is_mixed, run_kernel):
    values = every_bfloat16()
    if is_mixed:
        # The numbers of 16 binades, of both signs, in any order.
        order = torch.randperm(2**12, generator=torch.Generator().manual_seed(0))
        values = values.view(2, 16, 2**11).transpose(0, 1).reshape(16, 2**12)[:, order].flatten()
    latents, k_pe = values.view(128, 512), values.view(1024, 64)[:128]
    table = torch.randperm(128, generator=torch.Generator().manual_seed(1)).int()
    inputs = {
        "compressed_kv": latents,
        "k_pe": k_pe,
        "packed_cache": torch.zeros(128, 1, 1, 656, dtype=torch.uint8),
        "slot_mapping": table.long(),
        "block_tables": table.unsqueeze(0),
        "seq_lens_decoder": torch.tensor([0], dtype=torch.int32),
        "seq_lens_this_time": torch.tensor([128], dtype=torch.int32),
        "scale_fmt": scale_fmt,
    }
    one, other = (oracle_for("packed_cache_write", role).run(inputs, None)["packed_cache"] for role in ROLES)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.values, other.values)
    for family in FAMILIES:
        cache = torch.zeros_like(inputs["packed_cache"])
        got = run_kernel(family, inputs, cache).view(128, 656)
        assert torch.equal(got[table], one.values)
    # All but the second NaN.
    assert not is_mixed or one.values[:, :512].unique().tolist() == list(range(255))


def mantissas(count):
    """[count] float32 from 1 to 2: all of them, or as many at random."""
    if count == 2**23:
        drawn = np.arange(count, dtype=np.uint32)
    else:
        drawn = np.random.default_rng(0).integers(2**23, size=count, dtype=np.uint32)
    return (drawn | 0x3F800000).view(np.float32)


@pytest.mark.parametrize("count", [2**16, pytest.param(2**23, marks=pytest.mark.slow)])
def test_one_correction_makes_a_product_with_the_reciprocal_the_quotient(count):
    # Why the CUDA kernel divides once a tile. float64 holds the remainder exactly. The last sum it rounds
    # before float32 does, so the few that differ are looked at as fractions.
    scales = mantissas(count)
    reciprocals = np.float32(1) / scales
    for number in np.arange(128, 256, dtype=np.float32):
        products = number * reciprocals
        remainder = (products.astype(np.float64) * scales - number).astype(np.float32)
        corrected = products - remainder.astype(np.float64) * reciprocals
        quotients = number / scales
        for i in np.flatnonzero(corrected.astype(np.float32) != quotients):
            product, over, reciprocal, quotient, unit = (
                Fraction(float(of[i]))
                for of in (products, remainder, reciprocals, quotients, np.spacing(quotients))
            )
            assert abs(product - over * reciprocal - quotient) < unit / 2


def test_no_finite_quotient_is_beyond_448_by_more_than_its_rounding():
    # Why the kernel has nothing to clamp: 448 (1 + 2^-23) is rounded to 448.
    amax = every_bfloat16().float().numpy()
    amax = amax[np.isfinite(amax) & (amax > 0)]
    for scale in (np.maximum(amax / np.float32(448), np.float32(LEAST_FP32)), power_above(amax)):
        assert float((amax.astype(np.float64) / scale).max()) <= 448 * (1 + 2.0**-23)
        assert float((amax / scale).max()) < 464


def power_above(amax):
    """The least powers of two that are not below amax / 448, found one by one."""
    exact = np.maximum(amax, np.float32(1e-4)).astype(np.float64) / 448
    power = np.full_like(exact, 2.0**-30)
    while (power < exact).any():
        power = np.where(power < exact, 2 * power, power)
    return power.astype(np.float32)


def test_powers_of_two_are_the_least_that_are_not_below():
    amax = torch.unique(every_bfloat16()[:0x7F80].float().clamp_min(2.0**-40))
    tiles = torch.zeros(len(amax), 1, 128)
    tiles[:, 0, 5] = amax
    from references._packed_rows import tile_scales

    assert torch.equal(tile_scales(tiles, "ue8m0")[:, 0], torch.from_numpy(power_above(amax.numpy())))


# ---- where rows go -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_that_are_negative_or_beyond_the_cache_are_not_written(family, run_kernel):
    slots = [-1, 5, -63, -64, 6, 7, 2**31, -(2**31) - 1, 2**40, 0]
    latents, k_pe = torch.ones(10, 128, dtype=torch.bfloat16), torch.ones(10, 2, dtype=torch.bfloat16)
    inputs = {
        "compressed_kv": latents,
        "k_pe": k_pe,
        "packed_cache": torch.full((3, 1, 2, 136), UNTOUCHED, dtype=torch.uint8),
        "slot_mapping": torch.tensor(slots),
        "scale_fmt": "fp32",
    }
    writes = oracle_for("packed_cache_write", "definition").run(inputs, None)["packed_cache"]
    assert writes.rows.tolist() == [5, 0]
    cache = run_kernel(family, inputs, inputs["packed_cache"]).view(6, 136)
    assert torch.equal(cache[[5, 0]], writes.values)
    assert bool((cache[1:5] == UNTOUCHED).all())


@pytest.mark.parametrize(("rank", "rope"), [(128, 2), (256, 32), (384, 48), (640, 64), (1024, 64)])
def test_any_whole_number_of_tiles_and_any_even_rope_width_is_packed(pack, rank, rope):
    generator = torch.Generator().manual_seed(rank)
    latents = torch.randn(3, rank, generator=generator).bfloat16() * bf16([1.0, 100.0, 1e-6]).unsqueeze(1)
    k_pe = torch.randn(3, rope, generator=generator).bfloat16()
    rows = pack(latents, k_pe)
    assert rows.shape == (3, packed_width(rank, rope))
    scales = rows[:, rank : rank + rank // 32].contiguous().view(torch.float32)
    largest = latents.float().unflatten(1, (-1, 128)).abs().amax(-1)
    assert torch.equal(scales, largest / torch.full_like(largest, 448.0))
    read = rows[:, :rank].view(torch.float8_e4m3fn).float().unflatten(1, (-1, 128)) * scales.unsqueeze(-1)
    # Half an ulp of three mantissa bits, or of the least code.
    error = (read - latents.float().unflatten(1, (-1, 128))).abs()
    assert bool((error <= (read.abs() * 2.0**-3).maximum(scales.unsqueeze(-1) * 2.0**-10)).all())
    assert torch.equal(rows[:, rank + rank // 32 :].contiguous().view(torch.bfloat16), k_pe)


@pytest.mark.parametrize(
    ("dimension", "value"), [("kv_lora_rank", 320), ("kv_lora_rank", 64), ("qk_rope_head_dim", 33)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_widths_without_whole_tiles_are_refused_with_the_reason(dimension, value, family):
    pytest.importorskip("triton" if family == "triton" else "tvm_ffi")
    supports = import_module(f"harness.paths.{family}.packed_cache_write").supports
    (layer,) = parse("packed_cache_write/decode:5").layers
    case = SimpleNamespace(layers=(replace(layer, model=replace(layer.model, **{dimension: value})),))
    reason = supports(case)
    assert dimension in reason
    assert str(value) in reason


# ---- on the harness's batches --------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5"]),
    st.integers(1, 9).map("prefill:{}".format),
    st.integers(1, 40).map("decode:{}".format),
    st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 40), st.integers(1, 5)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=5).map(",".join), st.sampled_from(["", ",pad:3"])
)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sampled_from(["fp32", "ue8m0"]), st.integers(1, 7), st.integers(0, 9))
def test_the_references_agree(make_batch, rows, scale_fmt, block, seed):
    options = f"model=minicpm3-4b,scale_fmt={scale_fmt},block={block},seed={seed}"
    layer = make_batch(f"packed_cache_write/{rows}/{options}").layers[0]
    inputs = {**layer.tensors, **layer.attributes}
    one, other = (oracle_for("packed_cache_write", role).run(inputs, None)["packed_cache"] for role in ROLES)
    assert torch.equal(one.rows, other.rows)
    assert torch.equal(one.values, other.values)


SMALL = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2/model=minicpm3-4b"


@pytest.mark.parametrize(
    "text",
    [
        f"packed_cache_write/{SMALL},block=16",
        f"packed_cache_write/{SMALL},block=3,scale_fmt=ue8m0,strided=0",
        *(f"packed_cache_write/{rows}" for rows in ("", "idlex3", "paused:5", "pad:3", "idle,pad:9")),
    ],
)
def test_the_kernel_passes_every_check(text, launched, every_result):
    pytest.importorskip("triton")
    from harness.paths.triton.packed_cache_write import PATHS

    results = every_result(launched(text, PATHS[0]))
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {result.name for result in results}


# ---- what the tensors hold -----------------------------------------------------------------------


def tiles_of(count=400, seed=0):
    """[n, 4, 128] bf16 and the bits of the same: the latents of n tokens of rank 512."""
    positions = torch.arange(count)
    latents = tile_data.tiled_latents(torch.full_like(positions, 3), positions, 512, seed, 0)
    return latents.unflatten(1, (-1, 128)), latents.view(torch.int16).unflatten(1, (-1, 128))


def test_among_some_tiles_every_kind_is_found():
    tiles, bits = tiles_of()
    values = tiles.float()
    amax = torch.where(values.isnan(), 0.0, values.abs()).amax(-1)
    assert amax.unique().numel() > 100
    for value in (0.0, 3.0, 448.0, 450 / 512, 512.0, LARGEST, INF):
        assert bool((amax == value).any()), value
    assert bool(((amax > 2.0**-109) & (amax < 2.0**-98)).any())
    assert bool(((amax > 3e4) & (amax < 7e4)).any())
    assert bool(((amax > 2.0**-120) & (amax < 448 * 2.0**-126)).any())
    assert bool(((amax > 0) & (amax < 2.0**-126)).any())
    nans = values.isnan().sum(-1)
    assert {1, 2, 128} <= set(nans.unique().tolist())
    zeros = bits[(amax == 0) & (nans == 0)]
    assert set(zeros.unique().tolist()) == {0, -(2**15)}


def test_tiles_and_their_kinds_depend_on_seed_key_position_and_layer_alone():
    positions = torch.arange(60)

    def bits_of(key, seed, layer, order=slice(None)):
        keys = torch.full_like(positions, key)
        latents = tile_data.tiled_latents(keys[order], positions[order], 512, seed, layer)
        return latents.view(torch.int16).view(-1, 4, 128)

    first = bits_of(3, 0, 0)
    order = torch.tensor([5, 2, 59])
    assert torch.equal(bits_of(3, 0, 0, order), first[order])
    for key, seed, layer in ((4, 0, 0), (3, 1, 0), (3, 0, 1)):
        other = bits_of(key, seed, layer)
        assert not torch.equal(other, first)
        # Which tiles hold equal numbers is their kind's.
        assert not torch.equal(*((bits == bits[:, :, :1]).all(-1) for bits in (first, other)))


def test_rope_keys_hold_numbers_that_only_a_copy_hands_on():
    positions = torch.arange(200)
    keys = tile_data.hard_rope_keys(torch.zeros_like(positions), positions, 64, 0, 0)
    found = set(keys.view(torch.int16).unique().tolist())
    # -0, subnormals of both signs, NaN and NaN of another payload.
    assert {-(2**15), 1, 1 - 2**15, 0x7F, 0x7FC0, 0x7F81 - 2**15} <= found
    assert 0.9 < float(keys.isfinite().double().mean()) < 1


def test_the_cache_holds_what_earlier_steps_have_written_and_poison_elsewhere(make_batch):
    text = "packed_cache_write/hit:3+2,decode:6,pad:1/block=4,model=minicpm3-4b"
    layer = make_batch(text).layers[0]
    cache, tables = layer.tensors["packed_cache"], layer.tensors["block_tables"].tolist()
    held = [tables[0][0] * 4 + p for p in range(3)] + [tables[1][p // 4] * 4 + p % 4 for p in range(6)]
    rows = cache.view(-1, 328)
    is_held = torch.zeros(len(rows), dtype=torch.bool)
    is_held[held] = True
    assert bool((rows[~is_held] == 0xFF).all())
    scales = rows[is_held][:, 256:264].contiguous().view(torch.float32)
    assert bool((scales > 0).all())
    assert bool(rows[is_held][:, :256].view(torch.float8_e4m3fn).float().isfinite().all())
    for poison, byte in (("finite", FINITE_BYTE), ("zero", 0)):
        other = make_batch(f"{text},poison={poison}").layers[0].tensors["packed_cache"].view(-1, 328)
        assert bool((other[~is_held] == byte).all())
        assert torch.equal(other[is_held], rows[is_held])


def test_finite_poison_is_a_number_in_every_part_of_a_row():
    bytes_of_it = torch.full((4,), FINITE_BYTE, dtype=torch.uint8)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        assert bool((bytes_of_it.view(dtype).float().abs() > 3).all())
        assert bool(bytes_of_it.view(dtype).float().isfinite().all())


def test_work_counts_every_byte_once():
    case = parse("packed_cache_write/decode:100,hit:6+2,pad:4")
    assert contract_of(case) is operators()["packed_cache_write"]
    # Three rows of 576 bf16 numbers read and of 656 bytes written, and their slots.
    assert contract_of(case).work(case, case.layers[0]).bytes == 3 * (1152 + 656 + 8)
