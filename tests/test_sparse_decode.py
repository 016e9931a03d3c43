"""Sparse decode: rows built byte by byte, lists of every kind, the dense answer, split plans."""

import math
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of
from harness.budgets import lse_budgets
from harness.list_data import ASCENDING, FIRST, LAST, SCATTERED, listed_keys, no_keys
from harness.verdict import Status
from references.oracle import Precision, oracle_for

ROLES = ("definition", "derivation")
RANK, ROPE = 128, 16
ONE, TWO, HALF, NAN_CODE = 0x38, 0x40, 0x30, 0x7F
"""Codes of e4m3fn."""

OUTSIDE = (-1, -2, -64, -(2**31), 2**31 - 1)
"""Entries that are no row of any cache."""


def packed_row(codes, scale, rope):
    """The bytes of one row: its first codes, the scale of its tile, the first numbers of its rope part."""
    halves = [struct.pack("<f", value)[2:] for value in (*rope, *[0.0] * (ROPE - len(rope)))]
    row = bytes([*codes, *[0] * (RANK - len(codes))]) + struct.pack("<f", scale) + b"".join(halves)
    return list(row)


def cache_of(rows, block_size=2):
    """[blocks, 1, block_size, width] uint8: these rows, NaN bytes behind them."""
    blocks = -(-len(rows) // block_size)
    cache = torch.full((blocks, 1, block_size, RANK + 4 + 2 * ROPE), 0xFF, dtype=torch.uint8)
    cache.view(-1, cache.shape[3])[: len(rows)] = torch.tensor(rows, dtype=torch.uint8)
    return cache


def query_of(latent=(), rope=(), heads=1):
    """[1, heads, R + D] bf16, the same for every head."""
    query = torch.zeros(1, heads, RANK + ROPE, dtype=torch.bfloat16)
    query[..., : len(latent)] = torch.tensor(latent)
    query[..., RANK : RANK + len(rope)] = torch.tensor(rope)
    return query


@pytest.fixture(params=[*ROLES, "triton", "triton split"])
def attend(request):
    """(queries, cache, lists) -> out [T, H, R] and lse [T, H], with a softmax scale of 1."""

    def run(queries, cache, lists, *, rounds_keys=True):
        inputs = {
            "q": queries,
            "packed_cache": cache,
            "indices": torch.tensor(lists, dtype=torch.int32).unsqueeze(1),
            "softmax_scale": 1.0,
            "kv_lora_rank": RANK,
            "splits": None,
            "rounds_keys": rounds_keys,
        }
        if request.param in ROLES:
            got = oracle_for("sparse_decode", request.param).run(inputs, None)
            return got["out"], got["lse"]
        pytest.importorskip("triton")
        from harness.paths.triton.sparse_decode import sparse_decode

        tokens, heads = queries.shape[:2]
        splits = 3 if request.param == "triton split" else 1
        out = torch.full((tokens, heads, RANK), torch.nan, dtype=torch.bfloat16)
        lse = torch.full((tokens, heads), torch.nan)
        sparse_decode(
            queries,
            cache,
            inputs["indices"],
            out,
            lse,
            softmax_scale=1.0,
            num_splits=splits,
            partial_out=torch.full((tokens, heads, splits, RANK), torch.nan),
            partial_max=torch.full((tokens, heads, splits), torch.nan),
            partial_sum=torch.full((tokens, heads, splits), torch.nan),
        )
        return out.double(), lse.double()

    return run


def assert_row(got, expected, lse, expected_lse):
    """The first columns of one row, and its LSE; the columns behind them are 0."""
    width = len(expected)
    assert got[:width].tolist() == pytest.approx(expected, rel=4e-3, abs=1e-6)
    assert not bool(got[width:].any())
    assert float(lse) == pytest.approx(expected_lse, abs=1e-5)


# ---- by hand -------------------------------------------------------------------------------------


def test_one_key_is_its_codes_times_its_scale(attend):
    cache = cache_of([packed_row([TWO] * 3, 9.0, [5.0]), packed_row([ONE, HALF, 0xC0], 0.75, [0.5, -2.0])])
    # Codes 1, 0.5 and -2 at a scale of 0.75; 2 x 0.75 + 4 x 0.5 - 1 x 2 = 1.5.
    out, lse = attend(query_of([2.0], [4.0, 1.0]), cache, [[1]])
    assert_row(out[0, 0], [0.75, 0.375, -1.5], lse[0, 0], 1.5)


def test_two_keys_weigh_as_their_logits_say(attend):
    cache = cache_of([packed_row([ONE], 1.0, []), packed_row([ONE], 3.0, [])])
    # Logits 0.5 and 1.5: weights 1 / (1 + e) and e / (1 + e).
    out, lse = attend(query_of([0.5]), cache, [[0, 1]])
    share = math.e / (1 + math.e)
    assert_row(out[0, 0], [1 + 2 * share], lse[0, 0], 1.5 + math.log1p(1 / math.e))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("nothing", [*OUTSIDE, 3, 4, 100])
def test_what_names_no_row_is_no_key_wherever_it_stands(attend, nothing, place):
    # Three rows in blocks of three: 3 is the row behind the last.
    cache = cache_of([packed_row([ONE], 1.0, []), packed_row([TWO], 1.0, []), packed_row([], 1.0, [])], 3)
    entries = [1, 0]
    entries.insert(place, nothing)
    out, lse = attend(query_of([0.0]), cache, [entries])
    assert_row(out[0, 0], [1.5], lse[0, 0], math.log(2))


def test_a_row_named_twice_is_two_keys(attend):
    cache = cache_of([packed_row([ONE], 1.0, []), packed_row([TWO], 2.0, [])])
    out, lse = attend(query_of([0.0]), cache, [[1, 0, 1, -1, 1]])
    assert_row(out[0, 0], [(3 * 4.0 + 1.0) / 4], lse[0, 0], math.log(4))


@pytest.mark.parametrize("query", [0.0, math.nan])
@pytest.mark.parametrize("entries", [[-1], [-1] * 70, [2, -2, 2**31 - 1]])
def test_a_list_without_a_key_gives_0_and_minus_infinity(attend, entries, query):
    out, lse = attend(query_of([query]), cache_of([packed_row([ONE], 1.0, [])] * 2), [entries])
    assert not bool(out.any())
    assert lse.tolist() == [[-math.inf]]


def test_rows_that_no_list_names_have_no_influence(attend):
    nan = packed_row([NAN_CODE] * RANK, math.nan, [math.nan])
    cache = cache_of([nan, packed_row([ONE], 1.0, []), nan, nan])
    out, lse = attend(query_of([1.0], [1.0]), cache, [[-1, 1, 4, -3]])
    assert_row(out[0, 0], [1.0], lse[0, 0], 1.0)


@pytest.mark.parametrize(
    "row",
    [
        packed_row([NAN_CODE], 1.0, []),
        packed_row([0xFF], 1.0, []),
        packed_row([ONE], math.nan, []),
        packed_row([0], math.inf, []),
        packed_row([ONE], 1.0, [math.nan]),
    ],
    ids=["code", "negative code", "scale", "infinite scale of 0", "rope"],
)
def test_not_a_number_in_a_key_is_none_in_the_answer(attend, row):
    out, lse = attend(query_of([1.0], [1.0]), cache_of([row, packed_row([ONE], 1.0, [])]), [[1, 0]])
    assert bool(out[0, 0, 0].isnan())
    assert bool(lse.isnan())


def test_every_head_has_the_list_and_every_token_its_own(attend):
    cache = cache_of([packed_row([ONE], float(scale), []) for scale in (1, 2, 4)])
    out, _ = attend(query_of(heads=70).repeat(3, 1, 1), cache, [[0, -1], [-1, 2], [1, 0]])
    assert out[:, :, 0].tolist() == [[1.0] * 70, [4.0] * 70, [1.5] * 70]


def test_lists_longer_than_what_is_looked_at_together_are_read_to_their_end(attend):
    cache = cache_of([packed_row([ONE], 1.0, []), packed_row([TWO], 1.0, [])])
    out, lse = attend(query_of(), cache, [[-1] * 1500 + [0] + [-1] * 600 + [1]])
    assert_row(out[0, 0], [1.5], lse[0, 0], math.log(2))


def test_every_code_is_read_as_torch_reads_it(attend):
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[NAN_CODE, NAN_CODE + 128]] = ONE
    halves = codes.view(2, RANK)
    cache = cache_of([packed_row(half.tolist(), 1.0, []) for half in halves])
    out, _ = attend(query_of().repeat(2, 1, 1), cache, [[0], [1]])
    assert torch.equal(out.flatten(), codes.view(torch.float8_e4m3fn).double())


@pytest.mark.parametrize("attend", [*ROLES, "triton"], indirect=True)
def test_scales_are_any_float32_and_keys_are_rounded_once(attend):
    # 1.125 x 3 / 448 is no number of bf16; its LSE tells the product from the rounded one.
    scale = float(np.float32(3 / 448))
    exact = 1.125 * scale
    rounded = float(torch.tensor(exact, dtype=torch.float32).bfloat16())
    assert abs(rounded / exact - 1) > 5e-4
    _, lse = attend(query_of([64.0]), cache_of([packed_row([0x39], scale, [])]), [[0]])
    assert float(lse) == pytest.approx(64 * rounded, rel=1e-6)


@pytest.mark.parametrize("role", ROLES)
def test_keys_are_as_stored_where_the_path_does_not_round_them(role):
    scale = float(np.float32(3 / 448))
    inputs = {
        "q": query_of([64.0]),
        "packed_cache": cache_of([packed_row([0x39], scale, [])]),
        "indices": torch.zeros(1, 1, 1, dtype=torch.int32),
        "softmax_scale": 0.5,
        "kv_lora_rank": RANK,
    }
    got = oracle_for("sparse_decode", role).run(inputs, None)
    assert float(got["lse"]) == pytest.approx(32 * 1.125 * scale, rel=1e-14)
    assert float(got["out"][0, 0, 0]) == pytest.approx(1.125 * scale, rel=1e-14)


# ---- on the harness's batches --------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5"]),
    st.integers(1, 9).map("prefill:{}".format),
    st.integers(1, 60).map("decode:{}".format),
    st.tuples(st.integers(1, 60), st.integers(1, 5)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 60), st.integers(1, 5)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=4).map(",".join), st.sampled_from(["", ",pad:3"])
)


def inputs_of(layer, *, rounds_keys):
    return {**layer.tensors, **layer.attributes, "rounds_keys": rounds_keys}


@settings(max_examples=40, deadline=None)
@given(
    ROWS, st.integers(1, 80), st.sampled_from([1, 16, 48]), st.booleans(), st.sampled_from(["fp32", "ue8m0"])
)
def test_the_references_agree(make_batch, rows, topk, block, rounds_keys, scale_fmt):
    text = f"sparse_decode/{rows}/model=minicpm3-4b,heads=2,topk={topk},block={block},scale_fmt={scale_fmt}"
    inputs = inputs_of(make_batch(text).layers[0], rounds_keys=rounds_keys)
    one, other = (oracle_for("sparse_decode", role).run(inputs, None) for role in ROLES)
    for name in ("out", "lse"):
        assert torch.allclose(one[name], other[name], rtol=1e-10, atol=1e-12)
    assert bool(one["out"].isfinite().all())


def test_a_list_of_every_position_is_dense_attention_over_what_the_cache_stands_for(make_batch):
    batch = make_batch(
        "sparse_decode/decode:40,draft:20+3,decode:7/model=minicpm3-4b,heads=3,block=16,topk=64"
    )
    layer = batch.layers[0]
    inputs = inputs_of(layer, rounds_keys=False)
    cache = inputs["packed_cache"]
    stored = cache.view(-1, cache.shape[3])
    codes, scales = stored[:, :256].contiguous().view(torch.float8_e4m3fn), stored[:, 256:264].contiguous()
    latent = codes.double().view(-1, 2, 128) * scales.view(torch.float32).double().unsqueeze(-1)
    rope = stored[:, 264:].contiguous().view(torch.bfloat16).double()
    dense = torch.cat([latent.flatten(1), rope], 1).view(*cache.shape[:3], -1)
    metadata = batch.metadata
    expected = oracle_for("mla_decode", "derivation").run(
        {
            **inputs,
            "latent_cache": dense,
            "block_tables": torch.from_numpy(layer.pages.block_tables),
            "seq_lens_encoder": torch.from_numpy(metadata.seq_lens_encoder),
            "seq_lens_decoder": torch.from_numpy(metadata.seq_lens_decoder),
            "batch_id_per_token": torch.from_numpy(metadata.batch_id_per_token),
        },
        None,
    )
    got = oracle_for("sparse_decode", "definition").run(inputs, None)
    for name in ("out", "lse"):
        assert torch.allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_rounding_the_keys_moves_an_lse_beyond_its_budget_unless_scales_are_powers_of_two(make_batch):
    rows = "decode:90,draft:30+2/model=minicpm3-4b,heads=4,topk=64"
    for scale_fmt in ("fp32", "ue8m0"):
        layer = make_batch(f"sparse_decode/{rows},scale_fmt={scale_fmt}").layers[0]
        run = oracle_for("sparse_decode", "definition").run
        exact, rounded = (run(inputs_of(layer, rounds_keys=flag), None) for flag in (False, True))
        moved = (exact["lse"] - rounded["lse"]).abs() / lse_budgets(exact["logit_magnitude"])
        assert bool((moved > 1).any()) == (scale_fmt == "fp32")
        assert bool((moved > 0).any()) == (scale_fmt == "fp32")


def test_the_emulation_rounds_weights_and_output_alone(make_batch):
    layer = make_batch("sparse_decode/decode:90/model=minicpm3-4b,heads=4,topk=64").layers[0]
    run = oracle_for("sparse_decode", "definition").run
    exact = run(inputs_of(layer, rounds_keys=True), None)
    emulated = run(inputs_of(layer, rounds_keys=True), Precision(torch.bfloat16, torch.bfloat16))
    assert torch.equal(emulated["out"], emulated["out"].bfloat16().double())
    error = (emulated["out"] - exact["out"]).norm(dim=-1) / exact["out"].norm(dim=-1)
    assert 5e-4 < float(error.max()) < 4e-3
    with pytest.raises(ValueError, match="float64 only"):
        oracle_for("sparse_decode", "derivation").run({}, Precision(torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize(
    "text",
    [
        "sparse_decode/draft:30+2,hit:17+2,prefill:3,decode:40,idle,paused:7,pad:2/heads=2,topk=17,block=16",
        "sparse_decode/decode:70,draft:9+2,pad:1/heads=3,topk=70,splits=2,strided=0",
        *(f"sparse_decode/{rows}/heads=2,topk=9" for rows in ("", "idlex3", "paused:5", "idle,pad:3")),
    ],
)
def test_the_kernels_pass_every_check(text, launched, every_result):
    pytest.importorskip("triton")
    from harness.paths.triton.sparse_decode import PATHS

    results = every_result(launched(text.replace("/heads", "/model=minicpm3-4b,heads"), PATHS[0]))
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "lse", "guard", "inputs", "bounds"} <= {result.name for result in results}


@pytest.mark.parametrize("rounds_keys", [True, False])
def test_a_path_is_judged_by_keys_that_are_rounded_as_it_says(rounds_keys, launched):
    pytest.importorskip("triton")
    from harness.checks import checks
    from harness.paths.triton.sparse_decode import PATHS

    path = replace(PATHS[0], rounds_keys=rounds_keys)
    launch = launched("sparse_decode/decode:40/model=minicpm3-4b,heads=4,topk=30", path)
    (result,) = checks()["lse"].run(launch)
    assert (result.status is Status.PASSED) == rounds_keys


# ---- the lists of the batches --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 70), st.sampled_from([1, 16, 48]))
def test_lists_name_the_newest_the_oldest_and_others_each_once(make_batch, rows, topk, block):
    batch = make_batch(f"sparse_decode/{rows}/model=minicpm3-4b,heads=1,topk={topk},block={block}")
    layer = batch.layers[0]
    tables, lists = layer.pages.block_tables, layer.tensors["indices"][:, 0]
    cache = layer.tensors["packed_cache"]
    num_rows = cache.shape[0] * cache.shape[2]
    stored = cache.view(num_rows, -1)
    named = torch.zeros(num_rows, dtype=torch.bool)
    for entries, slot, position in zip(
        lists.tolist(), batch.metadata.batch_id_per_token, batch.metadata.position_ids, strict=True
    ):
        rows_named = [entry for entry in entries if 0 <= entry < num_rows]
        if slot < 0:
            assert rows_named == []
            continue
        visible = [int(tables[slot, p // block]) * block + p % block for p in range(position + 1)]
        assert len(rows_named) == len(set(rows_named)) == min(topk, len(visible))
        assert set(rows_named) <= set(visible)
        assert visible[-1] in rows_named
        assert topk == 1 or visible[0] in rows_named
        named[rows_named] = True
    # What no list names is poison: a code, a scale and a rope part that are no numbers.
    assert bool((stored[~named] == 0xFF).all())
    assert not bool((stored[named] == 0xFF).all(1).any())


def test_lists_come_in_every_order_and_with_every_kind_of_no_key():
    count, topk, seen = 200, 8, 5
    keys, positions = torch.arange(count), torch.full((count,), seen - 1)
    numbers, names = listed_keys([seen] * count, topk, keys, positions, seed=0, layer=0)
    ways = set()
    for row, named in zip(numbers.tolist(), names.tolist(), strict=True):
        places = [place for place in range(topk) if named[place]]
        assert sorted(row[place] for place in places) == list(range(seen))
        if places == list(range(seen)):
            ascending = [row[place] for place in places] == list(range(seen))
            ways.add(ASCENDING if ascending else FIRST)
        else:
            ways.add(LAST if places == list(range(topk - seen, topk)) else SCATTERED)
    assert ways == {ASCENDING, FIRST, LAST, SCATTERED}
    entries = no_keys((count, topk), 640, positions=torch.arange(count), seed=0, layer=0)
    assert set(entries.flatten().tolist()) == {-1, -2, -64, -(2**31), 640, 647, 2**31 - 1}
    assert 0.6 < float((entries == -1).double().mean()) < 0.9


def test_lists_follow_their_row_into_another_slot(make_batch):
    alone = make_batch("sparse_decode/decode:40/model=minicpm3-4b,heads=1,topk=9,pages=sequential")
    among = make_batch(
        "sparse_decode/idle,decode:40.k0,decode:3/model=minicpm3-4b,heads=1,topk=9,pages=sequential"
    )
    one, other = (batch.layers[0].tensors["indices"][0, 0] for batch in (alone, among))
    first = [
        int(batch.layers[0].pages.block_tables[slot, 0]) * 64 for batch, slot in ((alone, 0), (among, 1))
    ]
    assert (one - first[0]).tolist() == (other - first[1]).tolist()


# ---- the kernels and their plan ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "value"),
    [("kv_lora_rank", 64), ("kv_lora_rank", 384), ("qk_rope_head_dim", 8), ("qk_rope_head_dim", 96)],
)
def test_widths_that_the_kernels_do_not_take_are_refused_with_the_reason(dimension, value):
    pytest.importorskip("triton")
    from harness.paths.triton.sparse_decode import supports

    (layer,) = parse("sparse_decode/decode:5").layers
    assert supports(SimpleNamespace(layers=(layer,))) is None
    odd = replace(layer, model=replace(layer.model, **{dimension: value}))
    reason = supports(SimpleNamespace(layers=(odd,)))
    assert dimension in reason
    assert str(value) in reason


def test_the_workspace_holds_a_part_for_each_token_head_and_split():
    pytest.importorskip("triton")
    from harness.paths.triton.sparse_decode import workspace

    assert workspace(parse("sparse_decode/draft:30+3,idle,decode:5,pad:2/heads=5,splits=4")) == {
        "partial_out": ((6, 5, 4, 512), "float32"),
        "partial_max": ((6, 5, 4), "float32"),
        "partial_sum": ((6, 5, 4), "float32"),
    }
    assert workspace(parse("sparse_decode/decode:5/splits=1")) == {}
    # By plan, for eight processors: one program's 2048 entries in eight parts, eight programs in one each.
    assert workspace(parse("sparse_decode/decode:5/heads=1"))["partial_sum"][0] == (1, 1, 8)
    assert workspace(parse("sparse_decode/decode:5x4/heads=128")) == {}


def test_work_counts_named_rows_pairs_lists_and_ends():
    case = parse("sparse_decode/decode:99,draft:2+2,idle,pad:1/heads=3,topk=10")
    work = contract_of(case).work(case, case.layers[0])
    # Ten of 100; three and four of a row of four, which are read once; 4 tokens with padding.
    assert work.flops == 2 * (10 + 3 + 4) * 3 * (576 + 512)
    assert work.bytes == (10 + 4) * 656 + 4 * (2 * 3 * (576 + 512) + 4 * 3 + 4 * 10)
