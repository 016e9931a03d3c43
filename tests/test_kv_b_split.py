"""The split of kv_b_proj: worked by hand, in any width, at far offsets, and on the harness's batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import operators
from cases.models import latent_model_names, load_model
from cases.suite import load_suite
from harness.checks import checks
from harness.footprint import required_bytes
from harness.kv_b_data import hard_numbers, weight_rows
from harness.tensors import DTYPES
from harness.verdict import Status
from references.oracle import oracle_for

ROLES = ("definition", "derivation")
LAYOUTS = ("paddle", "torch")
NAN = float("nan")


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def same(got, expected):
    """Whether two tensors have one dtype, shape and every bit in common."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    return got.numel() == 0 or torch.equal(bits(got), bits(expected))


def inputs_of(by_rank, ranks, heads, nope, value):
    """The operator's inputs of a weight [R, W]."""
    return {
        "kv_b_proj_paddle": by_rank,
        "kv_b_proj_torch": by_rank.T.contiguous(),
        "num_attention_heads": heads,
        "qk_nope_head_dim": nope,
        "v_head_dim": value,
        "tensor_parallel_size": ranks,
    }


def paths():
    pytest.importorskip("triton")
    from harness.paths.triton import kv_b_proj, kv_b_split

    return {path.name: path for module in (kv_b_split, kv_b_proj) for path in module.PATHS}


@pytest.fixture(params=[*ROLES, "triton/kv_b_split", "triton/kv_b_proj"])
def split(request):
    """(weight [R, W], ranks, heads, N, V) -> the four outputs by name."""

    def run(by_rank, ranks, heads, nope, value):
        inputs = inputs_of(by_rank, ranks, heads, nope, value)
        if request.param in ROLES:
            return oracle_for("kv_b_split", request.param).run(inputs, None)
        outputs = {}
        for layout in LAYOUTS:
            rank = len(by_rank)
            for half, shape in (("k", (nope, rank)), ("v", (rank, value))):
                outputs[f"{half}_b_proj_weight_{layout}"] = torch.full(
                    (ranks, heads, *shape), NAN, dtype=by_rank.dtype
                )
        paths()[request.param].run(inputs, outputs, {})
        return outputs

    return run


# ---- by hand -------------------------------------------------------------------------------------


def test_a_split_worked_by_hand(split):
    # R = 2; two ranks of one head, N = 2, V = 1: features k k v of head 0, k k v of head 1.
    by_rank = torch.tensor([[1.0, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])
    got = split(by_rank, 2, 1, 2, 1)
    for layout in LAYOUTS:
        k_b, v_b = got[f"k_b_proj_weight_{layout}"], got[f"v_b_proj_weight_{layout}"]
        assert k_b.tolist() == [[[[1, 11], [2, 12]]], [[[4, 14], [5, 15]]]]
        assert v_b.tolist() == [[[[3], [13]]], [[[6], [16]]]]


def test_equal_widths_are_told_apart_by_their_places(split):
    # N = V = R = 1, one rank of three heads: keys are the even features.
    got = split(torch.arange(6.0).view(1, 6), 1, 3, 1, 1)
    for layout in LAYOUTS:
        assert got[f"k_b_proj_weight_{layout}"].flatten().tolist() == [0, 2, 4]
        assert got[f"v_b_proj_weight_{layout}"].flatten().tolist() == [1, 3, 5]


def test_both_uses_follow_from_the_split(split):
    # k_nope = W_UK c and v = c W_UV are slices of c times the whole weight.
    by_rank = torch.arange(24.0).view(3, 8)
    got = split(by_rank, 1, 2, 1, 3)
    latent = torch.tensor([2.0, -1, 5])
    whole = (latent @ by_rank).view(2, 4)
    for layout in LAYOUTS:
        keys = got[f"k_b_proj_weight_{layout}"][0] @ latent
        values = latent @ got[f"v_b_proj_weight_{layout}"][0]
        assert torch.equal(torch.cat([keys, values], 1), whole)


# ---- in any width --------------------------------------------------------------------------------

DTYPE = st.sampled_from(list(DTYPES.values()))
SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), DTYPE, st.integers(0, 3))
def test_the_references_agree(sizes, rank, dtype, seed):
    ranks, heads, nope, value = sizes
    by_rank = weight_rows("kv_b_proj", torch.arange(rank), ranks * heads * (nope + value), dtype, seed=seed)
    inputs = inputs_of(by_rank, *sizes)
    one, other = (oracle_for("kv_b_split", role).run(inputs, None) for role in ROLES)
    assert set(one) == set(other) == {spec.name for spec in operators()["kv_b_split"].outputs}
    assert all(same(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(
    ("rank", "nope", "value"),
    # Under, on and over a tile of 128 features and one of 64 latent columns.
    [(1, 1, 1), (65, 130, 3), (63, 127, 129), (64, 128, 128), (130, 5, 257)],
)
def test_the_kernel_splits_any_width(rank, nope, value, dtype):
    by_rank = weight_rows("kv_b_proj", torch.arange(rank), 2 * (nope + value), dtype, seed=0)
    inputs = inputs_of(by_rank, 2, 1, nope, value)
    expected = oracle_for("kv_b_split", "definition").run(inputs, None)
    outputs = {name: torch.full_like(right, NAN) for name, right in expected.items()}
    paths()["triton/kv_b_split"].run(inputs, outputs, {})
    assert [name for name in expected if not same(outputs[name], expected[name])] == []


def test_no_head_is_no_launch():
    from harness.paths.triton.kv_b_split import split_kv_b_proj

    weight = torch.zeros(4, 0)
    split_kv_b_proj(weight, torch.empty(0, 2, 4), torch.empty(0, 4, 3), first_head=0, layout="paddle")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_beyond_four_billion_elements_are_found(layout):
    # The weight lies in a tensor of a little over 2^32 elements, of which a few pages become real. Its stride
    # is a 32-bit number: the product with a row is not.
    from harness.paths.triton.kv_b_split import split_kv_b_proj

    rank, nope, value, stride = 5, 2, 3, 2**30 + 16
    shape = (rank, nope + value) if layout == "paddle" else (nope + value, rank)
    memory = torch.empty((shape[0] - 1) * stride + shape[1], dtype=torch.bfloat16)
    weight = torch.as_strided(memory, shape, (stride, 1))
    by_rank = weight_rows("kv_b_proj", torch.arange(rank), nope + value, torch.bfloat16, seed=0)
    weight.copy_(by_rank if layout == "paddle" else by_rank.T)
    k_b, v_b = torch.empty(1, nope, rank).bfloat16(), torch.empty(1, rank, value).bfloat16()
    split_kv_b_proj(weight, k_b, v_b, first_head=0, layout=layout)
    assert same(k_b[0], by_rank[:, :nope].T)
    assert same(v_b[0], by_rank[:, nope:])


# ---- the data ------------------------------------------------------------------------------------


def test_a_head_s_weights_do_not_depend_on_how_many_heads_there_are():
    rows = torch.arange(5)
    wide, narrow = (weight_rows("kv_b_proj", rows, width, torch.bfloat16, seed=3) for width in (96, 32))
    assert same(wide[:, :32], narrow)
    assert same(weight_rows("kv_b_proj", rows[2:3], 32, torch.bfloat16, seed=3), narrow[2:3])


@pytest.mark.parametrize("changed", [{"seed": 1}, {"seed": 0, "layer": 1}])
def test_seeds_and_layers_have_other_weights(changed):
    rows = torch.arange(4)
    plain, other = (
        weight_rows("kv_b_proj", rows, 64, torch.float32, **which) for which in ({"seed": 0}, changed)
    )
    assert float((plain == other).float().mean()) < 0.1


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_weights_are_of_a_trained_size_and_hold_numbers_that_are_hard_to_copy(dtype):
    weights = weight_rows("kv_b_proj", torch.arange(64), 512, dtype, seed=0)
    assert bool(weights.isfinite().all())
    assert 0.03 < float(weights.double().std()) < 0.045
    integers = weights.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    for number in hard_numbers(dtype, torch.device("cpu")).tolist():
        assert int((integers == number).sum()) >= 8
    smallest = torch.finfo(dtype).smallest_normal
    subnormal = (weights != 0) & (weights.double().abs() < smallest)
    # Four of the five hard numbers, one weight in 256.
    assert 0.5 < int(subnormal.sum()) / (64 * 512 / 256 * 4 / 5) < 1.5
    assert bool((torch.signbit(weights) & (weights == 0)).any())


def test_a_swap_of_halves_or_heads_shows_in_most_elements(make_batch):
    batch = make_batch("kv_b_split//model=mistral-large-3,heads=2")
    (layer,) = batch.layers
    by_head = layer.tensors["kv_b_proj_paddle"].view(512, 2, 256)
    for one, other in ((by_head[:, :, :128], by_head[:, :, 128:]), (by_head[:, 0], by_head[:, 1])):
        assert float((one == other).float().mean()) < 0.05


def test_both_layouts_hold_the_same_weights(make_batch):
    tensors = make_batch("kv_b_split//model=glm-4.7-flash,heads=1,tp=4").layers[0].tensors
    assert tensors["kv_b_proj_paddle"].shape == (512, 4 * (192 + 256))
    assert same(tensors["kv_b_proj_paddle"], tensors["kv_b_proj_torch"].T)
    assert not tensors["kv_b_proj_paddle"].is_contiguous()
    assert not tensors["kv_b_proj_torch"].is_contiguous()


def test_rows_of_a_case_change_no_weight(make_batch):
    texts = ["kv_b_split//model=minicpm3-4b,heads=1", "kv_b_split/decode:9,idle/model=minicpm3-4b,heads=1"]
    one, other = (make_batch(text).layers[0].tensors for text in texts)
    assert same(one["kv_b_proj_torch"], other["kv_b_proj_torch"])


# ---- the contract --------------------------------------------------------------------------------

CASES = [
    "kv_b_split//model=minicpm3-4b,heads=2,tp=2",
    "kv_b_split/decode:9,idle,pad:2/model=mistral-small-4,heads=1,dtype=fp16",
    "kv_b_split//model=glm-4.7-flash,heads=1,dtype=fp32,strided=0",
    "kv_b_split/idlex3/model=minicpm3-4b,heads=2+1,layers=2",
]


@pytest.mark.parametrize("name", ["triton/kv_b_split", "triton/kv_b_proj"])
@pytest.mark.parametrize("text", CASES)
def test_the_paths_pass_every_check_they_are_not_exempt_from(text, name, launched, every_result):
    launch = launched(text, paths()[name])
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds", "repeat", "idle"} <= {result.name for result in results}


def test_every_exemption_names_a_check_and_a_reason():
    exempt = operators()["kv_b_split"].exempt
    assert set(exempt) <= set(checks())
    assert all(len(reason) > 20 for reason in exempt.values())


def test_a_wrong_rank_is_reported_by_its_index(launched):
    from dataclasses import replace

    path = paths()["triton/kv_b_split"]

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        outputs["v_b_proj_weight_torch"][1, 2, 3, 4] += 1

    launch = launched("kv_b_split//model=minicpm3-4b,heads=4,tp=2", replace(path, run=run))
    (failed,) = [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]
    assert (failed.tensor, failed.worst.index) == ("v_b_proj_weight_torch", (1, 2, 3, 4))


def test_work_counts_every_byte_once():
    case = parse("kv_b_split//model=mistral-small-4,heads=2,tp=4")
    # 4 x 2 heads of 64 + 128 features by 256 columns, in bf16, read and written, from two layouts.
    assert operators()[case.operator].work(case, case.layers[0]).bytes == 8 * 192 * 256 * 2 * 2 * 2


def test_memory_is_foreseen(make_batch, launched):
    for text in CASES[:3]:
        launch = launched(text, paths()["triton/kv_b_split"])
        (layer,) = launch.layers
        buffers = (*layer.batch.inputs.values(), *layer.outputs.values())
        held = sum(len(buffer.raw) for buffer in buffers)
        assert required_bytes(parse(text), launch.operator, "cpu") > 3 * held


def test_suite_loading_has_the_widths_of_every_model_and_every_rank_count():
    found = [item.case for item in load_suite("loading").cases]
    assert {case.operator for case in found} == {"kv_b_split"}
    assert {case.options.model for case in found} == set(latent_model_names())
    shared = {}
    for case in found:
        model = load_model(case.options.model)
        widths = (model.kv_lora_rank, model.qk_nope_head_dim, model.v_head_dim)
        shared.setdefault(widths, set()).add(case.options.tp)
    assert all(sizes == {1, 2, 4, 8} for sizes in shared.values()), shared
    assert {case.options.dtype for case in found} == set(DTYPES)
