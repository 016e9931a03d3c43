"""Operators of step metadata: references and kernels against values worked by hand and each other."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cases import CaseError, parse
from cases.contract import contract_of
from harness.checks import checks
from harness.cuda import build
from harness.verdict import Status
from references.oracle import oracle_for

OPERATORS = ("padding_offset", "position_ids", "slot_mapping", "step_plan")
FAMILIES = ("triton", "cuda") if build.lacking(build.HOST) is None else ("triton",)
KERNELS = {
    (family, operator): import_module(f"harness.paths.{family}.{operator}").PATHS[0]
    for family in FAMILIES
    for operator in OPERATORS
}
PATHS = {operator: KERNELS["triton", operator] for operator in OPERATORS}
ROLES = ("definition", "derivation", *FAMILIES)
POISON = 0x3FFF_FFFF
MULTIPROCESSORS = 132


@pytest.fixture(autouse=True, scope="module")
def _build_cuda(request):
    if "cuda" in FAMILIES:
        request.getfixturevalue("cuda_on_the_processor")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def prefix_sum(values):
    return [sum(values[:end]) for end in range(len(values) + 1)]


def batch_ids(this_time, padding=0):
    return [slot for slot, count in enumerate(this_time) for _ in range(count)] + [-1] * padding


def empty(shape, dtype):
    """A tensor that holds what no kernel would write."""
    return torch.full(shape, POISON, dtype=dtype)


def answer(role, operator, inputs, shapes):
    """What a reference, or a family's kernel, makes of inputs; shapes are the outputs'."""
    if role not in FAMILIES:
        return dict(oracle_for(operator, role).run(inputs, None))
    outputs = {
        name: empty(shape, torch.int64 if name == "slot_mapping" else torch.int32)
        for name, shape in shapes.items()
    }
    slots = len(inputs.get("seq_lens_this_time", ()))
    KERNELS[role, operator].run(inputs, outputs, {"tile_starts": empty((slots + 1,), torch.int32)})
    return outputs


def lengths(encoder, decoder, this_time):
    return {
        "seq_lens_encoder": int32(encoder),
        "seq_lens_decoder": int32(decoder),
        "seq_lens_this_time": int32(this_time),
    }


def positions(role, encoder, decoder, this_time, padding=0):
    ids = batch_ids(this_time, padding)
    inputs = {
        **lengths(encoder, decoder, this_time),
        "cu_seqlens_q": int32(prefix_sum(this_time)),
        "batch_id_per_token": int32(ids),
    }
    return answer(role, "position_ids", inputs, {"position_ids": (len(ids),)})["position_ids"].tolist()


def offsets(role, encoder, decoder, this_time, padding=0):
    sums = (len(this_time) + 1,)
    tokens = sum(this_time) + padding
    inputs = {**lengths(encoder, decoder, this_time), "num_tokens": tokens}
    names = ("cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_prefill")
    shapes = {**dict.fromkeys(names, sums), "batch_id_per_token": (tokens,)}
    got = answer(role, "padding_offset", inputs, shapes)
    return [got[name].tolist() for name in shapes]


def slots(role, tables, ids, where, block_size):
    inputs = {
        "block_tables": torch.as_tensor(tables, dtype=torch.int32),
        "batch_id_per_token": int32(ids),
        "position_ids": int32(where),
        "block_size": block_size,
    }
    return answer(role, "slot_mapping", inputs, {"slot_mapping": (len(ids),)})["slot_mapping"].tolist()


def plan(role, encoder, decoder, this_time, *, block_size=64, plan_tiles=20):
    inputs = {
        **lengths(encoder, decoder, this_time),
        "block_size": block_size,
        "multiprocessors": MULTIPROCESSORS,
        "plan_tiles": plan_tiles,
    }
    shapes = {
        "max_lens": (9,),
        "decoder_batch_ids": (plan_tiles,),
        "decoder_tile_ids": (plan_tiles,),
        "decoder_num_tiles": (1,),
        "decoder_chunk_size": (1,),
    }
    got = {name: tensor.tolist() for name, tensor in answer(role, "step_plan", inputs, shapes).items()}
    (count,), (chunk,) = got["decoder_num_tiles"], got["decoder_chunk_size"]
    assert got["decoder_batch_ids"][count:] == got["decoder_tile_ids"][count:] == [-1] * (plan_tiles - count)
    tiles = list(zip(got["decoder_batch_ids"][:count], got["decoder_tile_ids"][:count], strict=True))
    return SimpleNamespace(max_lens=got["max_lens"], tiles=tiles, chunk=chunk)


# ---- position_ids: FastDeploy O01's golden vectors -------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("encoder", "decoder", "this_time", "expected"),
    [
        pytest.param([4, 0], [6, 9], [4, 1], [6, 7, 8, 9, 9], id="prefix-hit-decode"),
        pytest.param([3, 2], [0, 5], [3, 2], [0, 1, 2, 5, 6], id="prefill-prefix-hit"),
        pytest.param([0, 4, 0], [9, 0, 5], [1, 4, 1], [9, 0, 1, 2, 3, 5], id="no-prefix-hit"),
        pytest.param([0, 0], [7, 11], [3, 3], [7, 8, 9, 11, 12, 13], id="drafts"),
        pytest.param([0, 0, 0], [5, 9, 7], [0, 1, 0], [9], id="paused-around-decode"),
        pytest.param([0, 0], [0, 7], [0, 0], [], id="no-token"),
        pytest.param([], [], [], [], id="no-slot"),
    ],
)
def test_positions_begin_behind_what_is_cached(role, encoder, decoder, this_time, expected):
    assert positions(role, encoder, decoder, this_time) == expected
    assert positions(role, encoder, decoder, this_time, padding=3) == [*expected, -1, -1, -1]


# ---- padding_offset --------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_keys_count_what_is_cached_in_every_slot(role):
    # Prefix hit, decode, first chunk, idle, prefix hit: 6 + 4, 9 + 1, 5, nothing, 64 + 3 keys.
    queries, keys, prefill_keys, ids = offsets(role, [4, 0, 5, 0, 3], [6, 9, 0, 0, 64], [4, 1, 5, 0, 3])
    assert queries == [0, 4, 5, 10, 10, 13]
    assert keys == [0, 10, 20, 25, 25, 92]
    assert prefill_keys == [0, 10, 10, 15, 15, 82]
    assert ids == [0] * 4 + [1] + [2] * 5 + [4] * 3


@pytest.mark.parametrize("role", ROLES)
def test_a_paused_slot_has_keys_and_no_token(role):
    got = offsets(role, [0, 0, 0], [5, 9, 3], [0, 1, 0], padding=2)
    assert got == [[0, 0, 1, 1], [0, 5, 15, 18], [0, 0, 0, 0], [1, -1, -1]]


@pytest.mark.parametrize("role", ROLES)
def test_sums_are_written_without_a_token_and_without_a_slot(role):
    assert offsets(role, [0, 0], [0, 0], [0, 0]) == [[0, 0, 0]] * 3 + [[]]
    assert offsets(role, [], [], []) == [[0]] * 3 + [[]]
    assert offsets(role, [], [], [], padding=2) == [[0]] * 3 + [[-1, -1]]


@pytest.mark.parametrize("role", ROLES)
def test_eleven_hundred_slots_are_counted(role):
    # Every slot decodes behind 2 tokens, but for 10 idle ones in front.
    idle, count = 10, 1090
    queries, keys, prefill_keys, ids = offsets(
        role, [0] * (idle + count), [0] * idle + [2] * count, [0] * idle + [1] * count, padding=1
    )
    assert queries == [0] * idle + list(range(count + 1))
    assert keys == [0] * idle + list(range(0, 3 * count + 1, 3))
    assert prefill_keys == [0] * (idle + count + 1)
    assert ids == [*range(idle, idle + count), -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 2049])
def test_the_kernels_take_any_number_of_slots(count, family):
    # Lengths 0, 1, 2, 0, 1, 2, ...: a slot without a token between any two others.
    this_time = [slot % 3 for slot in range(count)]
    expected = [prefix_sum(this_time)] * 2 + [[0] * (count + 1), batch_ids(this_time, 2)]
    assert offsets(family, [0] * count, [0] * count, this_time, padding=2) == expected


# ---- slot_mapping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_slots_are_found_through_the_block_table(role):
    # Blocks of 4 tokens: position 5 is row 1 of the second block, position 3 the last row of the first.
    assert slots(role, [[7, 2], [0, 9]], [0, 0, 1, 1], [3, 5, 0, 7], 4) == [31, 9, 0, 39]
    assert slots(role, [[7, 2], [0, 9]], [1, 0], [1, 0], 1) == [9, 7]


@pytest.mark.parametrize("role", ROLES)
def test_what_has_no_row_is_mapped_nowhere(role):
    # Padding with a stale position, a position past the table, one on a negative entry, a negative one.
    assert slots(role, [[7, -1], [3, 4]], [-1, 1, 0, 1, 0], [2, 8, 4, -1, 3], 4) == [-1, -1, -1, -1, 31]
    assert slots(role, [[7, -5]], [-64, 0], [0, 7], 4) == [-1, -1]
    # No column at all, and no slot at all.
    assert slots(role, [[]], [0, -1], [0, 0], 4) == [-1, -1]
    assert slots(role, torch.empty(0, 1), [-1, -1], [5, 0], 4) == [-1, -1]
    assert slots(role, [[7]], [], [], 4) == []


@pytest.mark.parametrize("role", ROLES)
def test_slots_pass_32_bits(role):
    largest = 2**31 - 1
    assert slots(role, [[largest]], [0], [63], 64) == [largest * 64 + 63]
    assert slots(role, [[5, 2**20]], [0], [2**20 + 1], 2**20) == [2**40 + 1]


# ---- step_plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_maxima_are_those_of_fastdeploy(role):
    # Prefix hit 6 + 4, decode 9 + 1, first chunk of 5, idle, prefix hit 64 + 3.
    got = plan(role, [4, 0, 5, 0, 3], [6, 9, 0, 0, 64], [4, 1, 5, 0, 3])
    assert got.max_lens == [5, 5, 64, 67, 9, 67, 0, 0, 0]
    # One tile under every candidate: the last wins the tie.
    assert (got.chunk, got.tiles) == (64 * 2**11, [(1, 0)])


@pytest.mark.parametrize("role", ROLES)
def test_a_paused_row_is_of_the_cached_maximum_only(role):
    got = plan(role, [0, 0], [500, 9], [0, 2])
    assert got.max_lens == [2, 0, 500, 11, 9, 11, 0, 0, 0]
    assert got.tiles == [(1, 0)]


@pytest.mark.parametrize("role", ROLES)
def test_the_chunk_leaves_the_most_tiles_in_the_last_wave(role):
    # 1,000, 5,000 and 30,000 keys: 564, 283, 142, 71, 36, 19, 11, 6, 4, 3, 3, 3 tiles of 64 to 131,072
    # tokens; modulo 132 that is 36, 19, 10, 71, 36, ...
    got = plan(role, [0, 0, 0], [999, 4999, 29999], [1, 1, 1], plan_tiles=3 * 469)
    assert got.chunk == 512
    # 2, 10 and 59 tiles.
    assert got.tiles == [(row, tile) for row, count in enumerate((2, 10, 59)) for tile in range(count)]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("block_size", [1, 16, 64, 128])
@pytest.mark.parametrize(("keys", "count"), [(2, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_one_slot_alone_is_cut_into_64(role, block_size, keys, count):
    max_blocks = -(-keys // block_size)
    room = -(-max_blocks * block_size // 64)
    got = plan(role, [0], [keys - 1], [1], block_size=block_size, plan_tiles=room)
    assert (got.chunk, got.tiles) == (64, [(0, tile) for tile in range(count)])


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rows", [([], [], []), ([0], [0], [0]), ([3, 0], [2, 7], [3, 0])])
def test_a_step_without_a_decode_row_has_no_tile(role, rows):
    got = plan(role, *rows, plan_tiles=4 if rows[0] else 0)
    assert got.tiles == []
    assert got.chunk == (64 if len(rows[0]) == 1 else 64 * 2**11)


@pytest.mark.parametrize("role", ROLES)
def test_the_longest_rows_do_not_overflow(role):
    # Three rows of 2^31 - 1 keys have 3 * 2^12 tiles of 2^19 tokens, half as many with each candidate: modulo
    # 132 that is 12, 72, 36, 84, 108, 120, 60, 96, 48, 24, 12, 6.
    longest = 2**31 - 1
    got = plan(role, [0] * 3, [longest - 1] * 3, [1] * 3, block_size=2**19, plan_tiles=3 * 2**12)
    assert got.max_lens == [1, 0, longest - 1, longest, longest - 1, longest, 0, 0, 0]
    assert got.chunk == 2 ** (19 + 5)
    assert got.tiles == [(row, tile) for row in range(3) for tile in range(2**7)]


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_whose_largest_chunk_is_no_int32_are_refused_with_the_reason(family):
    path = KERNELS[family, "step_plan"]
    assert path.supports(parse(f"step_plan/decode:5/block={2**20 - 1}")) is None
    reason = path.supports(parse(f"step_plan/decode:5/block={2**20}"))
    assert reason is not None
    assert "block_size" in reason


# ---- random steps ----------------------------------------------------------------------------------

SMALL = st.integers(0, 5) | st.sampled_from([62, 63, 64, 65, 127, 128, 129, 700])
ROW = st.one_of(
    st.tuples(SMALL, st.integers(1, 70)).map(lambda row: (row[1], row[0], row[1])),
    st.tuples(SMALL.map(lambda cached: cached + 1), st.integers(0, 9)).map(lambda row: (0, *row)),
    st.just((0, 0, 0)),
)
"""(seq_lens_encoder, seq_lens_decoder, seq_lens_this_time) of any slot."""

STEPS = st.lists(ROW, max_size=12)


def columns(rows):
    return [[row[i] for row in rows] for i in range(3)]


@settings(max_examples=40, deadline=None)
@given(STEPS, st.integers(0, 3))
def test_positions_and_offsets_agree_on_random_steps(rows, padding):
    step = columns(rows)
    first, *others = [positions(role, *step, padding) for role in ROLES]
    assert others == [first] * len(others)
    first, *others = [offsets(role, *step, padding) for role in ROLES]
    assert others == [first] * len(others)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_slots_agree_on_random_tables(data):
    entry = st.integers(-2, 9) | st.just(2**31 - 1)
    width = data.draw(st.integers(1, 4))
    tables = data.draw(st.lists(st.lists(entry, min_size=width, max_size=width), min_size=1, max_size=5))
    token = st.tuples(st.integers(-2, len(tables) - 1), st.integers(-3, 40))
    tokens = data.draw(st.lists(token, max_size=20))
    ids, where = [slot for slot, _ in tokens], [position for _, position in tokens]
    block_size = data.draw(st.integers(1, 9))
    first, *others = [slots(role, tables, ids, where, block_size) for role in ROLES]
    assert others == [first] * len(others)


@settings(max_examples=40, deadline=None)
@given(STEPS, st.sampled_from([1, 3, 16, 64, 128, 1000]))
@example([(0, 8192, 1)], 16)
@example([(0, 8192, 1)], 1000)
@example([(0, 63, 1), (0, 0, 0)], 1)
def test_tiles_cover_every_key_of_every_decode_row_once(rows, block_size):
    # Room as the contract gives it, from the number of slots and the widest row alone.
    max_blocks = max((-(-(cached + new) // block_size) for _, cached, new in rows), default=0)
    room = -(-max_blocks * block_size // 64) if len(rows) == 1 else len(rows) * max_blocks
    step = columns(rows)
    first, *others = [plan(role, *step, block_size=block_size, plan_tiles=room) for role in ROLES]
    assert others == [first] * len(others)
    covered = [
        (row, key)
        for row, tile in first.tiles
        for key in range(tile * first.chunk, min((tile + 1) * first.chunk, rows[row][1] + rows[row][2]))
    ]
    decoding = [row for row, (encoder, _, new) in enumerate(rows) if encoder == 0 and new > 0]
    assert covered == [(row, key) for row in decoding for key in range(rows[row][1] + rows[row][2])]
    assert all(tile * first.chunk < rows[row][1] + rows[row][2] for row, tile in first.tiles)


# ---- the paths in the harness ----------------------------------------------------------------------

ZOO = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2"


@pytest.mark.parametrize("operator", PATHS)
@pytest.mark.parametrize("rows", ["", "idlex3", "paused:5", "pad:3", "idle,pad:9", "decode:70", ZOO])
def test_kernels_pass_every_check_that_the_operator_promises(operator, rows, launched, every_result):
    launch = launched(f"{operator}/{rows}", PATHS[operator])
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "repeat"} <= {
        result.name for result in results if result.status is Status.PASSED
    }


@pytest.mark.parametrize("operator", PATHS)
def test_exempt_checks_exist_and_have_a_reason(operator):
    exempt = contract_of(parse(f"{operator}/")).exempt
    assert exempt.keys() <= checks().keys()
    assert all(exempt.values())


@pytest.mark.parametrize("operator", ["padding_offset", "position_ids"])
def test_operators_without_a_cache_take_no_block_size(operator):
    with pytest.raises(CaseError, match=f"{operator} has no option block: it takes layers"):
        contract_of(parse(f"{operator}/decode:5/block=16"))
