"""Rotation: tables against published numbers, the operator worked by hand, its budgets, its batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of, operators
from cases.models import RopeScaling, latent_model_names, load_model, model_names
from harness.checks import checks
from harness.fill import FINITE_POISON
from harness.footprint import required_bytes
from harness.rope_budgets import half_ulps, rotation_budgets
from harness.rope_data import FAR_POSITION
from harness.rope_tables import correction_range, frequencies, rotation_rows, table_scale
from harness.tensors import DTYPES
from harness.verdict import Status
from references import rope_by_matrices
from references.oracle import AGREEMENT, Precision, oracle_for

ROLES = ("definition", "derivation")
ROTATING = [name for name in model_names() if load_model(name).rope != "none"]
ROOT = math.sqrt(0.5)
NAN = math.nan


def positions_of(*values):
    return np.array(values, np.int64)


def scaled(name="deepseek-v3", **changes):
    """A model with other rope_scaling than its own."""
    model = load_model(name)
    return replace(model, rope_scaling=replace(model.rope_scaling, **changes))


# ---- tables --------------------------------------------------------------------------------------

FREQUENCIES = {
    "deepseek-v3": {
        0: 1,
        9: 0.074989421,
        10: 0.056234133,
        11: 0.039006927,
        16: 0.0055,
        22: 0.000177828,
        23: 3.3338e-5,
        31: 3.334e-6,
    },
    "kimi-k2": {18: 0.0022742038, 19: 0.0016217600, 20: 3.61405e-5},
}


@pytest.mark.parametrize(
    ("name", "bounds"), [("deepseek-v3", (10, 23)), ("kimi-k2", (19, 20)), ("mistral-small-4", (12, 25))]
)
def test_yarn_interpolates_between_the_published_pairs(name, bounds):
    model = load_model(name)
    assert correction_range(model, model.rope_scaling) == bounds


@pytest.mark.parametrize("name", FREQUENCIES)
def test_frequencies_are_the_published_ones(name):
    found = frequencies(load_model(name))
    assert len(found) == 32
    for pair, value in FREQUENCIES[name].items():
        # As many digits as the published number has.
        digits = len(f"{value:.10g}".partition("e")[0].replace(".", "").lstrip("0"))
        assert float(f"{found[pair]:.{digits - 1}e}") == value


def test_frequencies_without_scaling_are_powers_of_theta():
    # D = 64: 1e6^(-16/32) = 1e-3.
    found = frequencies(load_model("glm-5"))
    assert float(found[0]) == 1
    assert math.isclose(float(found[16]), 1e-3, rel_tol=1e-15)


def test_longrope_divides_each_frequency_by_its_own_factor():
    model = load_model("minicpm3-4b")
    assert len(model.rope_scaling.short_factor) == len(model.rope_scaling.long_factor) == 16
    found = frequencies(model)
    # 1e4^(-15/16) = 10^-3.75.
    assert math.isclose(float(found[0]), 1 / 1.0591234137867171, rel_tol=1e-15)
    assert math.isclose(float(found[15]), 10**-3.75 / 16.940876586213285, rel_tol=1e-14)
    assert table_scale(model) == 1


def test_longrope_has_another_list_and_a_scale_beyond_the_original_length():
    # No model of ours is served beyond it: a made-up one, four times as long.
    short, long = (1.0,) * 16, tuple(float(pair + 2) for pair in range(16))
    within = scaled("minicpm3-4b", short_factor=short, long_factor=long)
    beyond = scaled("minicpm3-4b", short_factor=short, long_factor=long, factor=4.0)
    assert [
        round(float(a / b), 12) for a, b in zip(frequencies(within), frequencies(beyond), strict=True)
    ] == [*long]
    assert table_scale(within) == 1
    assert math.isclose(
        float(table_scale(beyond)), math.sqrt(1 + math.log(4) / math.log(32768)), rel_tol=1e-15
    )


def test_the_tables_scale_is_a_ratio_of_mscales_and_the_softmax_scales_is_not():
    log_factor = math.log(40)
    both = scaled(mscale=1.0, mscale_all_dim=0.707)
    assert math.isclose(
        float(table_scale(both)), (0.1 * log_factor + 1) / (0.0707 * log_factor + 1), rel_tol=1e-15
    )
    assert round(both.yarn_mscale, 7) == 1.2608038
    table_only = scaled(mscale=1.0, mscale_all_dim=0.0)
    assert (round(float(table_scale(table_only)), 7), table_only.yarn_mscale) == (1.3688879, 1)
    logits_only = scaled(mscale=0.0, mscale_all_dim=1.0)
    assert (round(float(1 / table_scale(logits_only)), 7), round(logits_only.yarn_mscale, 7)) == (
        1.3688879,
        1.3688879,
    )
    assert table_scale(scaled(factor=1.0, mscale=1.0, mscale_all_dim=0.0)) == 1


@pytest.mark.parametrize("name", ROTATING)
def test_no_published_table_is_scaled(name):
    assert table_scale(load_model(name)) == 1


@pytest.mark.parametrize("name", ROTATING)
def test_the_table_handed_out_is_what_the_reference_derives(name):
    positions = positions_of(0, 1, 2, 3, 4095, 4096, 20_000, 163_839, 1_048_575)
    derived = rope_by_matrices.table(load_model(name), positions)
    # A float64 angle of 10^6 is off by half its ulp, 6e-11, and by 10^6 times the frequency's error.
    assert np.abs(rotation_rows(load_model(name), positions) - derived).max() < 1e-9


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([2, 32, 64, 96]),
    st.floats(2, 1e8),
    st.sampled_from([None, "yarn"]),
    st.floats(1, 200),
    st.integers(64, 65536),
    st.tuples(st.floats(1, 64), st.floats(1, 64)),
    st.tuples(st.floats(0, 2), st.floats(0, 2)),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
)
def test_tables_of_made_up_models_agree(width, theta, kind, factor, original, betas, mscales, positions):
    scaling = None
    if kind is not None:
        scaling = RopeScaling(kind, factor, original, max(betas), min(betas), *mscales)
    model = replace(load_model("deepseek-v3"), qk_rope_head_dim=width, rope_theta=theta, rope_scaling=scaling)
    if scaling is not None:
        # No formula says what a range that ends before it begins would mean.
        low, high = correction_range(model, scaling)
        assume(low <= high)
    places = positions_of(*positions)
    derived = rope_by_matrices.table(model, places)
    close = np.abs(rotation_rows(model, places) - derived).max() < 1e-8
    # Where a bound is a whole number but for rounding, float64 may take the pair beside it.
    edges = [
        width * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta)) if scaling else 0.5
        for beta in betas
    ]
    assert close or any(abs(edge - round(edge)) < 1e-9 for edge in edges)


def test_a_table_begins_with_ones_and_zeros_and_every_row_keeps_lengths():
    for name in ROTATING:
        rows = rotation_rows(load_model(name), np.arange(3000))
        pairs = rows.shape[1] // 2
        assert (rows[0] == [1.0] * pairs + [0.0] * pairs).all()
        assert np.abs(rows[:, :pairs] ** 2 + rows[:, pairs:] ** 2 - 1).max() < 1e-15


def test_whole_turns_cost_no_digits():
    # cos and sin of 2^31 - 2, the last position there can be, to 16 digits.
    (row,) = rotation_rows(load_model("glm-5"), positions_of(2**31 - 2))
    assert math.isclose(row[0], math.cos(2147483646), abs_tol=1e-15)
    assert math.isclose(row[32], math.sin(2147483646), abs_tol=1e-15)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (load_model("kimi-linear-48b"), "rotates nothing"),
        (scaled(type="linear"), "is yarn or longrope, got 'linear'"),
        (
            scaled("minicpm3-4b", short_factor=(1.0,)),
            "short_factor of minicpm3-4b has one number for each of 16",
        ),
        (scaled("minicpm3-4b", factor=2.0, long_factor=()), "long_factor of minicpm3-4b"),
    ],
)
def test_what_has_no_table_is_refused_with_the_reason(model, reason):
    with pytest.raises(ValueError, match=reason):
        rotation_rows(model, positions_of(1))


# ---- by hand -------------------------------------------------------------------------------------


@pytest.fixture(params=[*ROLES, "triton/rope", "triton/rope@rounded"])
def rotate(request):
    """(q [Tp, H, D], k [Tp, D], positions, table or None, style) -> q_pe and k_pe, both float64."""

    def run(query, key, positions, table, *, is_neox=False, ids=None, out=None):
        ids = [0] * len(positions) if ids is None else ids
        inputs = {
            "q_pe_raw": query,
            "k_pe_raw": key,
            "position_ids": torch.tensor(positions, dtype=torch.int32),
            "batch_id_per_token": torch.tensor(ids, dtype=torch.int32),
            "cos_sin_cache": table,
            "is_neox": int(is_neox),
        }
        if request.param in ROLES:
            got = oracle_for("rope", request.param).run(inputs, None)
        else:
            got = out or {name: torch.full_like(part, NAN) for name, part in (("q_pe", query), ("k_pe", key))}
            path_named(request.param).run(inputs, got, {})
        return got["q_pe"].double(), got["k_pe"].double()

    return run


def path_named(name):
    pytest.importorskip("triton")
    from harness.paths.triton import rope

    return next(path for path in rope.PATHS if path.name == name)


PATH_NAMES = ("triton/rope", "triton/rope@rounded")

# Rows: no turn, a quarter, a half, and pair 0 by an eighth while pair 1 turns by a quarter back.
TABLE = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [-1, -1, 0, 0], [0.5, 0, 0.5, -1]])


def test_interleaved_pairs_are_neighbours(rotate):
    query, key = torch.tensor([[[1.0, 2, 3, 4]]] * 4), torch.tensor([[5.0, 6, 7, 8]] * 4)
    q_pe, k_pe = rotate(query, key, [0, 1, 2, 3], TABLE)
    assert q_pe[:, 0].tolist() == [[1, 2, 3, 4], [-2, 1, -4, 3], [-1, -2, -3, -4], [-0.5, 1.5, 4, -3]]
    assert k_pe.tolist() == [[5, 6, 7, 8], [-6, 5, -8, 7], [-5, -6, -7, -8], [-0.5, 5.5, 8, -7]]


def test_half_split_pairs_are_half_a_row_apart(rotate):
    query, key = torch.tensor([[[1.0, 2, 3, 4]]] * 4), torch.tensor([[5.0, 6, 7, 8]] * 4)
    q_pe, k_pe = rotate(query, key, [0, 1, 2, 3], TABLE, is_neox=True)
    assert q_pe[:, 0].tolist() == [[1, 2, 3, 4], [-3, -4, 1, 2], [-1, -2, -3, -4], [-1, 4, 2, -2]]
    assert k_pe.tolist() == [[5, 6, 7, 8], [-7, -8, 5, 6], [-5, -6, -7, -8], [-1, 8, 6, -6]]


def test_every_head_and_the_key_turn_by_their_token_s_position(rotate):
    query = torch.arange(1.0, 25).view(2, 3, 4)
    q_pe, k_pe = rotate(query, query[:, 0], [2, 1], TABLE)
    assert torch.equal(q_pe[0], -query[0].double())
    assert torch.equal(
        q_pe[1], torch.tensor([[-14.0, 13, -16, 15], [-18, 17, -20, 19], [-22, 21, -24, 23]]).double()
    )
    assert torch.equal(k_pe, q_pe[:, 0])


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("stale", [4, -1, -(2**31), FAR_POSITION, 0])
def test_padding_is_zero_and_its_position_is_not_followed(rotate, stale, is_neox):
    query, key = torch.tensor([[[NAN] * 4], [[1.0, 2, 3, 4]]]), torch.tensor([[NAN] * 4, [5.0, 6, 7, 8]])
    q_pe, k_pe = rotate(query, key, [stale, 2], TABLE, is_neox=is_neox, ids=[-1, 0])
    assert q_pe.tolist() == [[[0] * 4], [[-1, -2, -3, -4]]]
    assert k_pe.tolist() == [[0] * 4, [-5, -6, -7, -8]]


def test_a_step_without_tokens_gives_empty_tensors(rotate):
    q_pe, k_pe = rotate(torch.empty(0, 3, 4), torch.empty(0, 4), [], TABLE)
    assert (q_pe.shape, k_pe.shape) == ((0, 3, 4), (0, 4))


@pytest.mark.parametrize("is_neox", [False, True])
def test_without_a_table_the_parts_are_copied(rotate, is_neox):
    query, key = torch.tensor([[[1.0, -0.0, 1e-40, 4]]] * 2), torch.tensor([[5.0, 6, 7, -8]] * 2)
    q_pe, k_pe = rotate(query, key, [9, -1], None, is_neox=is_neox, ids=[3, -1])
    assert torch.equal(q_pe, torch.stack([query[0], torch.zeros(1, 4)]).double())
    assert torch.equal(k_pe, torch.stack([key[0], torch.zeros(4)]).double())


@pytest.mark.parametrize("is_neox", [False, True])
@pytest.mark.parametrize("width", [2, 6, 32, 48, 96, 128])
@pytest.mark.parametrize("heads", [1, 3, 70])
def test_any_even_width_and_any_heads_are_rotated(rotate, width, heads, is_neox):
    generator = torch.Generator().manual_seed(width)
    wide = torch.randn(2, heads + 1, width + 5, generator=generator)
    joint = torch.randn(2, width + 7, generator=generator)
    query, key = wide[:, :heads, 5:], joint[:, 7:]
    angles = torch.rand(9, width // 2, generator=generator) * 6
    table = torch.full((9, width + 3), NAN)
    table[:, :width] = torch.cat([angles.cos(), angles.sin()], dim=1)
    q_pe, k_pe = rotate(query, key, [8, 3], table[:, :width], is_neox=is_neox)
    cos, sin = angles[[8, 3]].cos().double(), angles[[8, 3]].sin().double()
    columns = torch.arange(width).view(2, -1).T if is_neox else torch.arange(width).view(-1, 2)
    for part, got in ((query.double(), q_pe), (key.double().unsqueeze(1), k_pe.unsqueeze(1))):
        turned = torch.complex(part[..., columns[:, 0]], part[..., columns[:, 1]]) * torch.complex(
            cos, sin
        ).unsqueeze(1)
        expected = torch.zeros_like(part)
        expected[..., columns[:, 0]], expected[..., columns[:, 1]] = turned.real, turned.imag
        assert (got - expected).abs().max() < 1e-6


@pytest.mark.parametrize("rotate", PATH_NAMES, indirect=True)
@pytest.mark.parametrize("is_neox", [False, True])
def test_outputs_may_be_the_inputs(rotate, is_neox):
    query, key = torch.randn(3, 5, 4), torch.randn(3, 4)
    apart = rotate(query, key, [1, 3, 3], TABLE, is_neox=is_neox)
    rotate(query, key, [1, 3, 3], TABLE, is_neox=is_neox, out={"q_pe": query, "k_pe": key})
    assert torch.equal(query.double(), apart[0])
    assert torch.equal(key.double(), apart[1])


@pytest.mark.parametrize("rotate", PATH_NAMES, indirect=True)
def test_queries_beyond_2_31_elements_are_found(rotate):
    # Two tokens 2^31 elements apart: of the memory between nothing becomes real.
    raw = torch.empty(2**31 + 8, dtype=torch.bfloat16)
    query = raw.as_strided((2, 1, 4), (2**31, 4, 1))
    query[0], query[1] = torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8])
    out = {"q_pe": torch.empty(2, 1, 4, dtype=query.dtype), "k_pe": torch.empty(2, 4, dtype=query.dtype)}
    q_pe, _ = rotate(query, query[:, 0], [1, 2], TABLE.bfloat16(), out=out)
    assert q_pe[:, 0].tolist() == [[-2, 1, -4, 3], [-5, -6, -7, -8]]


def test_an_odd_width_is_refused_with_the_reason():
    (layer,) = parse("rope/decode:5").layers
    odd = replace(layer, model=replace(layer.model, qk_rope_head_dim=63))
    for name in PATH_NAMES:
        path = path_named(name)
        assert "must be even, got 63" in path.supports(type("Case", (), {"layers": (odd,)}))
        assert path.supports(parse("rope/decode:5")) is None


# ---- what a rotation is --------------------------------------------------------------------------


def rotated(vectors, positions, model, *, is_neox, role="definition"):
    """[n, D] float64 vectors, each turned to its position."""
    table = torch.from_numpy(rotation_rows(model, np.arange(max(positions) + 1)))
    inputs = {
        "q_pe_raw": vectors.unsqueeze(1),
        "k_pe_raw": vectors,
        "position_ids": torch.tensor(positions, dtype=torch.int32),
        "batch_id_per_token": torch.zeros(len(positions), dtype=torch.int32),
        "cos_sin_cache": table,
        "is_neox": int(is_neox),
    }
    return oracle_for("rope", role).run(inputs, None)["k_pe"]


POSITION = st.integers(0, 5000)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ROTATING), st.booleans(), POSITION, POSITION, POSITION, st.integers(0, 99))
def test_dot_products_depend_on_the_distance_alone_and_lengths_on_nothing(name, is_neox, a, b, shift, seed):
    model = load_model(name)
    width = model.qk_rope_head_dim
    query, key = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    vectors = torch.stack([query, key, query, key])
    turned = rotated(vectors, [a, b, a + shift, b + shift], model, is_neox=is_neox)
    assert torch.allclose(turned.norm(dim=1), vectors.norm(dim=1), rtol=1e-12)
    assert torch.isclose(turned[0] @ turned[1], turned[2] @ turned[3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("role", ROLES)
def test_the_two_pairings_are_one_rotation_on_columns_in_another_order(role):
    model = load_model("deepseek-v3")
    vectors = torch.randn(3, 64, dtype=torch.float64)
    order = torch.cat([torch.arange(0, 64, 2), torch.arange(1, 64, 2)])
    interleaved = rotated(vectors, [3, 77, 4000], model, is_neox=False, role=role)
    half_split = rotated(vectors[:, order], [3, 77, 4000], model, is_neox=True, role=role)
    assert torch.allclose(interleaved[:, order], half_split, rtol=0, atol=1e-14)
    other = rotated(vectors, [3, 77, 4000], model, is_neox=True, role=role)
    assert (interleaved - other).abs().max() > 0.5


# ---- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "magnitude", "half"),
    [
        (torch.bfloat16, 1.0, 2.0**-8),
        (torch.bfloat16, 1.99, 2.0**-8),
        (torch.bfloat16, 0.99, 2.0**-9),
        (torch.float16, 1.0, 2.0**-11),
        (torch.float16, 3.0, 2.0**-10),
        # fp16 below 2^-14: spacing 2^-24 down to 0.
        (torch.float16, 2.0**-20, 2.0**-25),
        (torch.float16, 0.0, 2.0**-25),
        (torch.float32, 1.0, 2.0**-24),
    ],
)
def test_half_an_ulp_is_half_the_spacing_of_the_dtype(dtype, magnitude, half):
    assert float(half_ulps(torch.tensor([magnitude], dtype=torch.float64), dtype)) == half


def budgets_of(expected, products, dtype, **options):
    expected, products = (torch.tensor([value], dtype=torch.float64) for value in (expected, products))
    return float(rotation_budgets(expected, products, dtype, **options))


def test_budgets_count_the_roundings_of_the_arithmetic():
    # 0.75 = 1 - 0.25: fp32 noise 2^-23 x 1.25; h(0.75) = 2^-9, h(1) = 2^-8, h(0.25) = 2^-10 in bf16.
    noise = 1.25 * 2.0**-23
    once = budgets_of(0.75, (1.0, 0.25), torch.bfloat16, rounds_products=False)
    assert math.isclose(once, noise + 2.0**-9, rel_tol=1e-12)
    often = budgets_of(0.75, (1.0, 0.25), torch.bfloat16, rounds_products=True)
    assert math.isclose(often, noise + 2.0**-8 + 2.0**-10 + 2.0**-9, rel_tol=1e-12)
    assert math.isclose(
        budgets_of(0.75, (1.0, 0.25), torch.float32, rounds_products=True), noise, rel_tol=1e-12
    )
    # What rounding of the products may lift above 1 has the spacing of numbers above 1.
    lifted = budgets_of(0.999, (0.999, 0.0), torch.bfloat16, rounds_products=True)
    assert lifted > 2.0**-8


@pytest.mark.parametrize("rounds_products", [False, True])
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_what_has_no_product_has_no_budget(dtype, rounds_products):
    assert budgets_of(0.3, (0.0, 0.0), dtype, rounds_products=rounds_products) == 0


def emulations(make_batch, text):
    """(float64, fp32 rope, rope in the model dtype, budgets of both) of a case's queries."""
    layer = make_batch(text).layers[0]
    inputs, dtype = {**layer.tensors, **layer.attributes}, DTYPES[layer.layer.dtype]
    oracle = oracle_for("rope", "definition")
    exact = oracle.run(inputs, None)
    found = [
        oracle.run(inputs, Precision(weights=weights, output=dtype))["q_pe"]
        for weights in (torch.float32, dtype)
    ]
    budgets = [
        rotation_budgets(exact["q_pe"], exact["q_pe_products"], dtype, rounds_products=rounds)
        for rounds in (False, True)
    ]
    return exact, found, budgets


ROWS = "hit:300+40,decode:4000,draft:77+9,pad:2"


@pytest.mark.parametrize("data", ["planted", "randn", "huge", "deep", "tiny"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["deepseek-v3", "minicpm3-4b"])
def test_emulations_are_within_the_budgets_of_their_arithmetic(model, dtype, data, make_batch):
    text = f"rope/{ROWS}/model={model},heads=8,dtype={dtype},data={data}"
    exact, (once, often), (budget, wide) = emulations(make_batch, text)
    assert bool(((once - exact["q_pe"]).abs() <= budget).all())
    assert bool(((often - exact["q_pe"]).abs() <= wide).all())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_budgets_tell_the_two_arithmetics_apart(dtype, make_batch):
    exact, (_, often), (budget, _) = emulations(make_batch, f"rope/{ROWS}/heads=8,dtype={dtype},data=randn")
    over = (often - exact["q_pe"]).abs() > budget
    assert 0.05 < float(over.double().mean()) < 0.9


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_toward_zero_is_twice_over_the_budget(dtype, make_batch):
    exact, _, (budget, _) = emulations(make_batch, f"rope/{ROWS}/heads=8,dtype={dtype},data=randn")
    spacing = 2 * half_ulps(exact["q_pe"].abs(), DTYPES[dtype])
    truncated = (exact["q_pe"] / spacing).trunc() * spacing
    share = ((truncated - exact["q_pe"]).abs() / budget).nan_to_num()
    assert float(share.max()) > 1.9


def test_one_fused_product_is_within_the_budget_of_rounded_ones(make_batch):
    # As a compiler contracts it in bf16: one product rounded, the other exact until the sum.
    layer = make_batch(f"rope/{ROWS}/heads=8,data=randn").layers[0]
    exact, _, (_, wide) = emulations(make_batch, f"rope/{ROWS}/heads=8,data=randn")
    products = exact["q_pe_products"]
    signs = torch.ones(64, dtype=torch.float64)
    raw = torch.nan_to_num(layer.tensors["q_pe_raw"].double())
    partner = raw.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    signs[0::2] = -1
    positions = layer.tensors["position_ids"].long()[:50]
    cos, sin = (
        layer.tensors["cos_sin_cache"][positions].double().repeat_interleave(2, dim=-1).chunk(2, dim=-1)
    )
    first, second = raw[:50] * cos.unsqueeze(1), partner[:50] * sin.unsqueeze(1) * signs
    assert torch.allclose(first.abs(), products[:50, ..., 0])
    fused = (first + second.bfloat16().double()).bfloat16().double()
    assert bool(((fused - exact["q_pe"][:50]).abs() <= wide[:50]).all())


@pytest.mark.parametrize(("name", "which"), [("triton/rope", 0), ("triton/rope@rounded", 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", ["deepseek-v3", "minicpm3-4b"])
def test_interpreted_kernels_give_the_bits_of_their_emulations(
    name, which, model, dtype, make_batch, launched
):
    text = f"rope/hit:300+4,decode:4000,pad:1/model={model},heads=5,dtype={dtype}"
    _, found, _ = emulations(make_batch, text)
    launch = launched(text, path_named(name))
    assert torch.equal(launch.token_rows("q_pe", 0).double(), found[which])


@pytest.mark.parametrize("is_neox", [0, 1])
def test_a_table_in_fp32_is_taken_as_it_is(is_neox):
    model = load_model("deepseek-v3")
    query = torch.randn(6, 3, 64).bfloat16()
    inputs = {
        "q_pe_raw": query,
        "k_pe_raw": query[:, 0],
        "position_ids": torch.arange(100, 106, dtype=torch.int32),
        "batch_id_per_token": torch.zeros(6, dtype=torch.int32),
        "cos_sin_cache": torch.from_numpy(rotation_rows(model, np.arange(106))).float(),
        "is_neox": is_neox,
    }
    outputs = {"q_pe": torch.empty_like(query), "k_pe": torch.empty(6, 64, dtype=torch.bfloat16)}
    path_named("triton/rope").run(inputs, outputs, {})
    expected = oracle_for("rope", "definition").run(inputs, None)
    budget = rotation_budgets(
        expected["q_pe"], expected["q_pe_products"], torch.bfloat16, rounds_products=False
    )
    assert bool(((outputs["q_pe"].double() - expected["q_pe"]).abs() <= budget).all())
    coarse = {**inputs, "cos_sin_cache": inputs["cos_sin_cache"].bfloat16()}
    assert not bool(
        (
            (outputs["q_pe"].double() - oracle_for("rope", "definition").run(coarse, None)["q_pe"]).abs()
            <= budget
        ).all()
    )


def test_the_derivation_refuses_to_emulate(make_batch):
    layer = make_batch("rope/decode:2/heads=1").layers[0]
    half = Precision(weights=torch.bfloat16, output=torch.bfloat16)
    with pytest.raises(ValueError, match="float64 only"):
        oracle_for("rope", "derivation").run({**layer.tensors, **layer.attributes}, half)


# ---- on the harness's batches --------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5"]),
    st.integers(1, 20).map("prefill:{}".format),
    st.integers(1, 200_000).map("decode:{}".format),
    st.tuples(st.integers(1, 5000), st.integers(1, 9)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 5000), st.integers(1, 9)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
STEP = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=5).map(",".join), st.sampled_from(["", ",pad:5"])
)


@settings(max_examples=80, deadline=None)
@given(
    STEP,
    st.sampled_from(latent_model_names()),
    st.sampled_from([*DTYPES]),
    st.sampled_from(["planted", "huge", "tiny"]),
    st.sampled_from(["nan", "finite", "zero"]),
)
def test_the_references_agree(make_batch, rows, model, dtype, data, poison):
    layer = make_batch(f"rope/{rows}/model={model},heads=3,dtype={dtype},data={data},poison={poison}").layers[
        0
    ]
    inputs = {**layer.tensors, **layer.attributes}
    one, other = (oracle_for("rope", role).run(inputs, None) for role in ROLES)
    for name in ("q_pe", "k_pe"):
        error = (one[name] - other[name]).abs()
        scale = one[name].abs().amax(-1, keepdim=True) if len(one[name]) else error
        assert bool((error <= AGREEMENT * scale).all())


SMALL = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:5"
CASES = [
    f"rope/{SMALL}/heads=5",
    f"rope/{SMALL}/model=minicpm3-4b,heads=3,dtype=fp16,strided=0",
    f"rope/{SMALL}/model=kimi-linear-48b,heads=2,dtype=fp32",
    *(f"rope/{rows}/heads=2" for rows in ("", "idlex3", "paused:5", "pad:3", "idle,pad:9")),
]


@pytest.mark.parametrize("name", PATH_NAMES)
@pytest.mark.parametrize("text", CASES)
def test_the_kernels_pass_every_check_they_are_not_exempt_from(text, name, launched, every_result):
    launch = launched(text, path_named(name))
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {result.name for result in results}


def test_the_table_ends_behind_the_last_position_and_is_poison_where_no_token_is(make_batch):
    text = "rope/hit:6+2,decode:9,paused:50,pad:1/heads=1"
    plain = make_batch(text).layers[0].tensors["cos_sin_cache"]
    assert plain.shape == (10, 64)
    used = [6, 7, 9]
    rest = [position for position in range(10) if position not in used]
    exact = torch.from_numpy(rotation_rows(load_model("deepseek-v3"), positions_of(*used)))
    assert torch.equal(plain[used], exact.bfloat16())
    assert bool(plain[rest].isnan().all())
    for poison, value in (("finite", FINITE_POISON), ("zero", 0.0)):
        other = make_batch(f"{text},poison={poison}").layers[0].tensors["cos_sin_cache"]
        assert bool((other[rest] == value).all())
        assert torch.equal(other[used], plain[used])


def test_padding_has_stale_positions_of_every_kind(make_batch):
    tensors = make_batch("rope/hit:6+2,pad:5/heads=1").layers[0].tensors
    assert tensors["position_ids"].tolist() == [6, 7, 8, -1, FAR_POSITION, 7, 8]
    assert make_batch("rope/pad:2/heads=1").layers[0].tensors["position_ids"].tolist() == [1, -1]
    # Other operators keep the position that they always had.
    assert make_batch("slot_mapping/hit:6+2,pad:2").layers[0].tensors["position_ids"].tolist() == [6, 7, 7, 7]


def test_a_model_that_rotates_nothing_has_no_table(make_batch):
    layer = make_batch("rope/decode:9/model=kimi-linear-48b,heads=1").layers[0]
    assert "cos_sin_cache" not in layer.tensors
    assert layer.attributes == {"is_neox": 0, "cos_sin_cache": None}
    assert make_batch("rope/decode:9/model=minicpm3-4b,heads=1").layers[0].attributes == {"is_neox": 1}


def test_a_huge_table_takes_memory_on_a_gpu_and_little_on_the_host(make_batch):
    text = "rope/decode:11184811,decode:5/heads=2"
    case = parse(text)
    buffer = make_batch(text).layers[0].inputs["cos_sin_cache"]
    assert buffer.sparse
    assert bool(buffer.view[[5, 11_184_811]].isfinite().all())
    assert bool(buffer.view[[4, 6, 11_184_810]].isnan().all())
    assert (
        required_bytes(case, contract_of(case), "cuda")
        > 2**32
        > 16 * required_bytes(case, contract_of(case), "cpu")
    )
    small = parse(f"rope/{SMALL}/heads=8")
    held = sum(len(item.raw) for item in make_batch(str(small)).layers[0].inputs.values())
    assert required_bytes(small, contract_of(small), "cpu") > held


# ---- reports -------------------------------------------------------------------------------------


def failed_values(launched, text, spoil):
    path = path_named("triton/rope")

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        spoil(outputs)

    launch = launched(text, replace(path, run=run))
    return [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]


def test_a_wrong_element_is_reported_where_it_lies(launched):
    def spoil(outputs):
        outputs["q_pe"][2, 1, 40] += 1
        outputs["k_pe"][3, 7] = NAN

    query, key = failed_values(launched, "rope/hit:6+2,decode:9,prefill:2/heads=3", spoil)
    assert (query.tensor, query.where.tokens, query.where.rows) == ("q_pe", "2", "1")
    assert (query.where.heads, query.where.dims, query.worst.index) == ("1", "40", (2, 1, 40))
    assert query.reason.startswith("1 of 960 elements of q_pe are over budget, the worst by ")
    assert query.budget_source == "two roundings of its products' sum in fp32 + one of the output to bf16"
    assert (key.tensor, key.where.tokens, key.where.rows, key.where.dims) == ("k_pe", "3", "2", "7")
    assert key.error == math.inf


def test_what_is_not_rotated_must_be_exact(launched):
    def spoil(outputs):
        outputs["k_pe"][0, 5] = torch.nextafter(outputs["k_pe"][0, 5], torch.tensor(9.0))

    text = "rope/decode:9,pad:1/model=kimi-linear-48b,heads=2,dtype=fp32"
    (failed,) = failed_values(launched, text, spoil)
    assert (failed.budget, failed.worst.index) == (0, (0, 5))
    assert failed.budget_source == "nothing is rotated here: it must be exact"
    (padding,) = failed_values(launched, text, lambda outputs: outputs["q_pe"][1, 0, :1].fill_(1e-30))
    assert padding.worst.index == (1, 0, 0)


def test_a_path_says_whether_it_rounds_products():
    assert [path_named(name).rounds_products for name in PATH_NAMES] == [False, True]
    assert not path_named("triton/rope").allocates


def test_rounded_products_do_not_pass_for_unrounded_ones(launched):
    rounded = path_named("triton/rope@rounded")
    text = "rope/hit:300+4,decode:4000/heads=8"
    for path, status in ((rounded, Status.PASSED), (replace(rounded, rounds_products=False), Status.FAILED)):
        launch = launched(text, path)
        assert {item.status for item in checks()["values"].run(launch)} == {status}


# ---- the contract --------------------------------------------------------------------------------


def test_work_counts_every_byte_once():
    operator = operators()["rope"]
    case = parse("rope/decode:100,hit:6+2,paused:9,pad:4/heads=2")
    # 3 real of 7 tokens, 2 heads and a key of 64 bf16 values each; 3 rows of the table; two int32 a token.
    work = operator.work(case, case.layers[0])
    assert work.bytes == ((3 + 7) * 3 + 3) * 128 + 7 * 8
    # Four products and two sums a pair.
    assert work.flops == 3 * 3 * 32 * 6
    nothing = parse("rope/decode:100/heads=2,model=kimi-linear-48b")
    assert operator.work(nothing, nothing.layers[0]).flops == 0


def test_every_exemption_names_a_check_and_a_reason():
    exempt = operators()["rope"].exempt
    assert set(exempt) <= set(checks())
    assert all(len(reason) > 20 for reason in exempt.values())
