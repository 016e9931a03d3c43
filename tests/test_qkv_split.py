"""The split of a projection and the tiles of a launch: by hand, in any size, on the harness's batches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import operators
from cases.operators.qkv_split import HIDDEN_SIZE
from harness import model_data
from harness.checks import checks
from harness.footprint import required_bytes
from harness.kernel_path import path_named
from harness.kv_b_data import weight_rows
from harness.verdict import Status
from references.oracle import oracle_for

ROLES = ("definition", "derivation")
LAYOUTS = ("paddle", "torch")
ERNIE = "model=ernie-4.5-21b-a3b"
NAN = float("nan")


def same(got, expected):
    """Whether two tensors have one dtype, shape and every bit in common."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    return torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def inputs_of(by_rank, ranks, heads, kv_heads, key, value):
    """The operator's inputs of a weight [inputs, outputs]; kv_heads are those of all ranks."""
    return {
        "qkvg_proj_paddle": by_rank,
        "qkvg_proj_torch": by_rank.T.contiguous(),
        "num_attention_heads": heads,
        "total_num_key_value_heads": kv_heads,
        "qk_head_dim": key,
        "v_head_dim": value,
        "tensor_parallel_size": ranks,
    }


def path_of(request):
    """The path that a fixture's parameter names, if this process can run it."""
    if request.param.startswith("cuda/"):
        request.getfixturevalue("cuda_on_the_processor")
    else:
        pytest.importorskip("triton")
    return path_named(request.param)


@pytest.fixture(params=[*ROLES, "triton/qkv_split", "cuda/qkv_split"])
def split(request):
    """(weight [inputs, W], ranks, heads, KV heads of all ranks, K, V) -> the outputs by name."""

    def run(by_rank, *sizes):
        inputs = inputs_of(by_rank, *sizes)
        expected = oracle_for("qkv_split", "definition").run(inputs, None)
        if request.param in ROLES:
            return oracle_for("qkv_split", request.param).run(inputs, None)
        outputs = {
            name: torch.full_like(item, -7 if item.dtype is torch.int32 else NAN)
            for name, item in expected.items()
        }
        path_of(request).run(inputs, outputs, {})
        return outputs

    return run


# ---- a projection by hand ------------------------------------------------------------------------


def test_a_split_worked_by_hand(split):
    # Two ranks of two heads, two KV heads, K = 2, V = 1. Features: q 0-7, k 8-11, v 12-13, gates 14-17.
    got = split(torch.arange(18.0).view(1, 18), 2, 2, 2, 2, 1)
    for layout in LAYOUTS:
        expected = [[0, 1, 2, 3, 8, 9, 12], [4, 5, 6, 7, 10, 11, 13]]
        assert got[f"qkv_proj_weight_{layout}"][:, 0].tolist() == expected
        gated = [[*expected[0], 14, 15], [*expected[1], 16, 17]]
        assert got[f"qkvg_proj_weight_{layout}"][:, 0].tolist() == gated
    assert got["qkv_offsets"].tolist() == [
        [[0, 0, 4], [8, 4, 2], [12, 6, 1], [14, 7, 2]],
        [[4, 0, 4], [10, 4, 2], [13, 6, 1], [16, 7, 2]],
    ]


def test_ranks_that_are_more_than_the_kv_heads_share_them_with_their_neighbours(split):
    # B65a. Four ranks of one head, two KV heads, K = 1, V = 2. q 0-3, k 4-5, v 6-9, gates 10-17.
    got = split(torch.arange(18.0).view(1, 18), 4, 1, 2, 1, 2)
    expected = [[0, 4, 6, 7], [1, 4, 6, 7], [2, 5, 8, 9], [3, 5, 8, 9]]
    for layout in LAYOUTS:
        assert got[f"qkv_proj_weight_{layout}"][:, 0].tolist() == expected
    assert got["qkv_offsets"][2].tolist() == [[2, 0, 1], [5, 1, 1], [8, 2, 2], [14, 4, 2]]


@pytest.mark.parametrize(("kv_heads", "width"), [(8, 24 + 8 + 8), (4, 24 + 4 + 4)])
def test_a_layer_is_as_wide_as_its_own_kv_heads_make_it(split, kv_heads, width):
    # B63: 24 heads, KV heads 8 in one layer and 4 in the next, K = V = 1.
    got = split(torch.zeros(1, 48 + 2 * kv_heads), 1, 24, kv_heads, 1, 1)
    assert got["qkv_proj_weight_paddle"].shape == (1, 1, width)
    assert int(got["qkv_offsets"][0, :3, 2].sum()) == width


SIZES = st.tuples(
    st.sampled_from([(1, 3, 1), (1, 4, 4), (2, 2, 2), (2, 3, 1), (4, 1, 2), (4, 2, 8), (8, 1, 2)]),
    st.integers(1, 9),
    st.integers(1, 9),
)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 5), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_the_references_of_the_split_agree(sizes, inputs, dtype):
    (ranks, heads, kv_heads), key, value = sizes
    width = (ranks * heads + kv_heads) * (key + value)
    by_rank = weight_rows("qkvg_proj", torch.arange(inputs), width, dtype, seed=1)
    asked = inputs_of(by_rank, ranks, heads, kv_heads, key, value)
    one, other = (oracle_for("qkv_split", role).run(asked, None) for role in ROLES)
    assert set(one) == set(other) == {spec.name for spec in operators()["qkv_split"].outputs}
    assert [name for name in one if not same(one[name], other[name])] == []


# Under, on and over a tile of 128 features and one of 64 inputs.
@pytest.mark.parametrize(("inputs", "key", "value"), [(1, 1, 1), (65, 43, 3), (64, 64, 64), (3, 130, 257)])
def test_any_width_is_split(split, inputs, key, value):
    by_rank = weight_rows("qkvg_proj", torch.arange(inputs), 3 * (key + value), torch.float16, seed=1)
    sizes = (1, 2, 1, key, value)
    expected = oracle_for("qkv_split", "derivation").run(inputs_of(by_rank, *sizes), None)
    got = split(by_rank, *sizes)
    assert [name for name in expected if not same(got[name], expected[name])] == []


def test_both_layouts_hold_the_same_weights_and_layers_have_others(make_batch):
    first, second = make_batch(f"qkv_split//{ERNIE},heads=3,kv_heads=1,layers=2,tp=2").layers
    paddle, torch_layout = (first.tensors[f"qkvg_proj_{layout}"] for layout in LAYOUTS)
    assert paddle.shape == (HIDDEN_SIZE, 7 * 256)
    assert same(paddle, torch_layout.T)
    assert float((paddle == second.tensors["qkvg_proj_paddle"]).float().mean()) < 0.05
    assert model_data.HIDDEN_SIZE == HIDDEN_SIZE


# ---- tiles by hand -------------------------------------------------------------------------------


@pytest.fixture(params=[*ROLES, "triton/launch_buffers", "cuda/launch_buffers"])
def plan(request):
    """(lengths (encoder, decoder, this) by slot, heads, KV heads, block size, most tokens) -> outputs."""

    def run(lengths, heads, kv_heads, block_size, longest):
        columns = torch.tensor(lengths, dtype=torch.int32).view(-1, 3).T.contiguous()
        names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
        inputs = {
            **dict(zip(names, columns, strict=True)),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "block_size": block_size,
            "max_row_tokens": longest,
        }
        expected = oracle_for("launch_buffers", "definition").run(inputs, None)
        if request.param in ROLES:
            return oracle_for("launch_buffers", request.param).run(inputs, None)
        outputs = {name: torch.full_like(item, -7) for name, item in expected.items()}
        starts = torch.full((3, len(lengths) + 1), -7, dtype=torch.int32)
        path_of(request).run(inputs, outputs, {"tile_starts": starts})
        return outputs

    return run


@pytest.mark.parametrize(("kv_heads", "tiles", "room"), [(8, 99, 192), (4, 197, 384)])
def test_a_prompt_overflows_the_room_of_a_layer_with_more_kv_heads(plan, kv_heads, tiles, room):
    # P7: 192 tiles of room and 197 tiles are those of two layers of one model.
    got = plan([(2100, 0, 2100)], 24, kv_heads, 64, 4096)
    assert got["num_tiles"].tolist() == [tiles, 0, 33]
    assert got["capacity"].tolist() == [room, 4 * room, 64]
    assert got["encoder_tile_ids"].tolist() == [*range(tiles), *[-1] * (room - tiles)]


def test_lists_name_the_tiles_of_each_row_in_order(plan):
    # Groups of 6: a chunk of 22 tokens has 132 query rows, a draft of 3 has 18, a decode row 6.
    lengths = [(22, 10, 22), (0, 0, 0), (0, 5, 3), (0, 9, 0), (0, 20, 1)]
    got = plan(lengths, 12, 2, 16, 32)
    assert got["num_tiles"].tolist() == [3, 3, 5]
    assert got["encoder_batch_ids"][:4].tolist() == [0, 0, 0, -1]
    assert got["encoder_tile_ids"][:4].tolist() == [0, 1, 2, -1]
    assert got["decoder_batch_ids"][:4].tolist() == [2, 2, 4, -1]
    assert got["decoder_tile_ids"][:4].tolist() == [0, 1, 0, -1]
    # 32 keys in two blocks, 8 in one, 21 in two; the resident slot without a token has none.
    assert got["kv_batch_ids"][:6].tolist() == [0, 0, 2, 4, 4, -1]
    assert got["kv_tile_ids"][:6].tolist() == [0, 1, 0, 0, 1, -1]
    assert got["capacity"].tolist() == [5 * 3, 5 * 12, 5 * 2]


def test_without_a_slot_there_is_no_room_and_counts_are_0(plan):
    got = plan([], 12, 2, 16, 32)
    assert got["num_tiles"].tolist() == got["capacity"].tolist() == [0, 0, 0]


# ---- on the harness's batches --------------------------------------------------------------------

CASES = [
    f"qkv_split//{ERNIE},heads=3,kv_heads=2,v_dim=24,tp=4",
    f"qkv_split/decode:9,idle,pad:2/{ERNIE},heads=2,kv_heads=1+2,v_dim=64+130,layers=2,dtype=fp32,strided=0",
    f"launch_buffers/draft:30+3,hit:64+17,prefill:65,idle,paused:7,pad:2/{ERNIE},heads=24,kv_heads=8+4,layers=2",
    f"launch_buffers//{ERNIE}",
]


@pytest.mark.parametrize("text", CASES)
def test_the_kernels_pass_every_check_they_are_not_exempt_from(text, launched, every_result):
    pytest.importorskip("triton")
    launch = launched(text, path_named(f"triton/{parse(text).operator}"))
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds", "repeat"} <= {result.name for result in results}


def test_a_wrong_rank_is_reported_by_its_index(launched):
    pytest.importorskip("triton")
    path = path_named("triton/qkv_split")

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        outputs["qkv_proj_weight_torch"][1, 2, 3] += 1

    launch = launched(f"qkv_split//{ERNIE},heads=1,kv_heads=1,v_dim=16,tp=2", replace(path, run=run))
    (failed,) = [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]
    assert (failed.tensor, failed.worst.index) == ("qkv_proj_weight_torch", (1, 2, 3))


@pytest.mark.parametrize("operator", ["qkv_split", "launch_buffers"])
def test_every_exemption_names_a_check_and_a_reason(operator):
    exempt = operators()[operator].exempt
    assert set(exempt) <= set(checks())
    assert all(len(reason) > 20 for reason in exempt.values())


def test_work_counts_every_byte_once():
    case = parse(f"qkv_split//{ERNIE},heads=3,kv_heads=2,v_dim=64,tp=4")
    # 4 ranks of 3 + 1 heads of 128 and 1 of 64 features, once more with 3 gates of 64; two layouts, two ways.
    features = 4 * (4 * 128 + 64) + 4 * (4 * 128 + 64 + 3 * 64)
    assert operators()[case.operator].work(case, case.layers[0]).bytes == 4 * features * HIDDEN_SIZE * 2


def test_memory_is_foreseen(launched):
    pytest.importorskip("triton")
    for text in CASES[:2]:
        launch = launched(text, path_named("triton/qkv_split"))
        buffers = [
            buffer
            for layer in launch.layers
            for buffer in (*layer.batch.inputs.values(), *layer.outputs.values())
        ]
        assert required_bytes(parse(text), launch.operator, "cpu") > 3 * sum(
            len(item.raw) for item in buffers
        )
