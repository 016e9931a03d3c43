"""Both derivations of every operator on tensors worked by hand, and against each other on random cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases.contract import operators
from harness.budgets import row_errors
from references.oracle import AGREEMENT, Precision, oracle_for, oracles

LN2, LN3 = math.log(2), math.log(3)
RANK, ROPE = 2, 1
ROLES = ("definition", "derivation")
NAN = math.nan


@pytest.fixture(params=ROLES)
def mla_decode(request):
    """Runs one of the two references on q [Tp, H, 3] (or [Tp, 3], one head) and a cache [nb, bs, 3]."""
    oracle = oracle_for("mla_decode", request.param)

    def run(q, cache, tables, *, decoder, this_time, encoder=None, padding=0, scale=1.0):
        q, cache = (torch.as_tensor(values, dtype=torch.float64) for values in (q, cache))
        q = q.unsqueeze(1) if q.dim() == 2 else q
        ids = [slot for slot, count in enumerate(this_time) for _ in range(count)]
        starts = [sum(this_time[:slot]) for slot in range(len(this_time) + 1)]
        return oracle.run(
            {
                "q": q,
                "latent_cache": cache.unsqueeze(1),
                "block_tables": torch.tensor(tables, dtype=torch.int32),
                "seq_lens_encoder": torch.tensor(encoder or [0] * len(decoder), dtype=torch.int32),
                "seq_lens_decoder": torch.tensor(decoder, dtype=torch.int32),
                "seq_lens_this_time": torch.tensor(this_time, dtype=torch.int32),
                "cu_seqlens_q": torch.tensor(starts, dtype=torch.int32),
                "batch_id_per_token": torch.tensor(ids + [-1] * padding, dtype=torch.int32),
                "softmax_scale": scale,
                "kv_lora_rank": RANK,
            },
            None,
        )

    return run


def near(tensor, values):
    return torch.allclose(tensor, torch.tensor(values, dtype=torch.float64), rtol=1e-14, atol=1e-14)


# ---- mla_decode by hand: cache rows are [value 0, value 1 | rope key] ----------------------------


def test_equal_logits_give_the_mean_of_the_values(mla_decode):
    # q = 0: both logits are 0, e^0 + e^0 = 2.
    got = mla_decode([[0, 0, 0]], [[[1, 2, 5]], [[3, 6, -9]]], [[0, 1]], decoder=[1], this_time=[1])
    assert near(got["out"], [[[2, 4]]])
    assert near(got["lse"], [[LN2]])


def test_logits_ln_3_apart_weigh_one_to_three(mla_decode):
    # Logits 0 and ln 3: weights 1/4 and 3/4; (1 + 3 * 3) / 4 = 2.5, (2 + 3 * 6) / 4 = 5; ln(1 + 3) = ln 4.
    got = mla_decode([[0, 0, 1]], [[[1, 2, 0], [3, 6, LN3]]], [[0]], decoder=[1], this_time=[1])
    assert near(got["out"], [[[2.5, 5]]])
    assert near(got["lse"], [[2 * LN2]])


def test_logits_count_latent_and_rope_columns_and_the_scale(mla_decode):
    # 0.5 * (2 * 1 + 0 * 2 + 4 * 0.5) = 2 and 0.5 * (2 * 3 + 0 * 6 + 4 * -0.5) = 2: equal again.
    got = mla_decode([[2, 0, 4]], [[[1, 2, 0.5], [3, 6, -0.5]]], [[0]], decoder=[1], this_time=[1], scale=0.5)
    assert near(got["out"], [[[2, 4]]])
    assert near(got["lse"], [[2 + LN2]])


def test_heads_are_independent(mla_decode):
    # Head 0 as in the mean, head 1 as in the one-to-three case, over the same keys.
    got = mla_decode([[[0, 0, 0], [0, 0, 1]]], [[[1, 2, 0], [3, 6, LN3]]], [[0]], decoder=[1], this_time=[1])
    assert near(got["out"], [[[2, 4], [2.5, 5]]])
    assert near(got["lse"], [[LN2, 2 * LN2]])


def test_draft_rows_are_causal_among_themselves(mla_decode):
    # One cached and two new tokens, equal logits. The first new one sees keys 0 and 1: mean (2, 4), ln 2;
    # the second all three: ((1 + 3 + 8) / 3, (2 + 6 + 1) / 3) = (4, 3), ln 3.
    cache = [[[1, 2, 0], [3, 6, 0]], [[8, 1, 0], [NAN, NAN, NAN]]]
    got = mla_decode([[0, 0, 0]] * 2, cache, [[0, 1]], decoder=[1], this_time=[2])
    assert near(got["out"], [[[2, 4]], [[4, 3]]])
    assert near(got["lse"], [[LN2], [LN3]])


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_keys_are_found_through_the_block_table(mla_decode, block_size):
    # Three keys with values 1, 2, 6 in blocks from the pool's end down; mean 3, everything else NaN.
    cache = torch.full((7, block_size, 3), NAN)
    table = [6 - block for block in range(-(-3 // block_size))]
    for position, value in enumerate((1.0, 2.0, 6.0)):
        cache[table[position // block_size], position % block_size] = torch.tensor([value, -value, 0.0])
    tail = [2**30] * (4 - len(table))
    got = mla_decode([[0, 0, 0]], cache, [table + tail], decoder=[2], this_time=[1])
    assert near(got["out"], [[[3, -3]]])
    assert near(got["lse"], [[LN3]])


def test_a_dominating_key_gives_its_own_value_and_logit(mla_decode):
    # A decode row has at least two keys; the other one is far below here, and e^-1000 is 0 in float64.
    got = mla_decode([[0, 0, 1]], [[[1, 2, 7], [3, 6, -993]]], [[0]], decoder=[1], this_time=[1])
    assert near(got["out"], [[[1, 2]]])
    assert near(got["lse"], [[7]])


def test_logits_far_below_zero_do_not_underflow(mla_decode):
    # -60000 and -60000 + ln 3: only their difference matters.
    got = mla_decode([[0, 0, 1]], [[[1, 2, -6e4], [3, 6, -6e4 + LN3]]], [[0]], decoder=[1], this_time=[1])
    assert torch.allclose(got["out"], torch.tensor([[[2.5, 5.0]]], dtype=torch.float64), rtol=1e-11)
    assert near(got["lse"], [[-6e4 + 2 * LN2]])


def test_tokens_of_prefill_rows_and_padding_are_empty(mla_decode):
    # Slot 0: two prefill tokens. Slot 1: one decode token, mean of (3, 6) and (5, 8). Then one of padding.
    cache = [[[NAN, NAN, NAN], [1, 1, 1]], [[3, 6, 0], [5, 8, 0]]]
    q = [[1, 1, 1], [1, 1, 1], [0, 0, 0], [NAN, NAN, NAN]]
    got = mla_decode(q, cache, [[0], [1]], encoder=[2, 0], decoder=[0, 1], this_time=[2, 1], padding=1)
    assert near(got["out"], [[[0, 0]], [[0, 0]], [[4, 7]], [[0, 0]]])
    assert near(got["lse"], [[-math.inf], [-math.inf], [LN2], [-math.inf]])


def test_a_continued_chunk_is_a_prefill_row_too(mla_decode):
    got = mla_decode([[0, 0, 0]], [[[1, 2, 0], [3, 6, 0]]], [[0]], encoder=[1], decoder=[1], this_time=[1])
    assert near(got["out"], [[[0, 0]]])
    assert near(got["lse"], [[-math.inf]])


def test_idle_and_paused_slots_contribute_no_token(mla_decode):
    # Slots: idle, decode of two keys in block 1, paused with two keys in block 0, decode of two in block 2.
    cache = [[[9, 9, 9], [9, 9, 9]], [[1, 2, 0], [3, 6, 0]], [[0, 0, 0], [4, 8, LN3]]]
    tables, decoder, this_time = [[-1], [1], [0], [2]], [0, 1, 2, 1], [0, 1, 0, 1]
    got = mla_decode([[0, 0, 0], [0, 0, 1]], cache, tables, decoder=decoder, this_time=this_time)
    assert near(got["out"], [[[2, 4]], [[3, 6]]])
    assert near(got["lse"], [[LN2], [2 * LN2]])


def test_a_step_without_tokens_gives_empty_tensors(mla_decode):
    got = mla_decode(torch.empty(0, 2, 3), [[[0, 0, 0]]], [[-1]], decoder=[0], this_time=[0])
    assert got["out"].shape == (0, 2, RANK)
    assert got["lse"].shape == (0, 2)


def test_logit_magnitude_is_what_partial_sums_reach():
    # 0.5 * (3 * 1 + 4 * -1) = -0.5, but the products are 3 and -4: 0.5 * sqrt(9 + 16) = 2.5. The second
    # key gives 0.5 * 3 * 1 = 1.5 either way. The third, 0.5 * (3 * 2 + 4 * 2) = 7 and more than its spread
    # 5, is not visible to token 0. Token 2 is of no row.
    cache = torch.tensor([[[1.0, 0, -1], [1, 0, 0], [2, 0, 2]]]).unsqueeze(1)
    inputs = {
        "q": torch.tensor([[[3.0, 0, 4]], [[3, 0, 4]], [[3, 0, 4]]]),
        "latent_cache": cache,
        "block_tables": torch.tensor([[0]]),
        "seq_lens_encoder": torch.tensor([0]),
        "seq_lens_decoder": torch.tensor([1]),
        "cu_seqlens_q": torch.tensor([0, 2]),
        "softmax_scale": 0.5,
        "kv_lora_rank": RANK,
    }
    got = oracle_for("mla_decode", "definition").run(inputs, None)["logit_magnitude"]
    assert got.tolist() == [[2.5], [7.0], [0.0]]


# ---- latent_cache_write by hand ------------------------------------------------------------------


@pytest.fixture(params=ROLES)
def cache_write(request):
    """Runs one of the two references; the cache is given by its shape alone."""
    oracle = oracle_for("latent_cache_write", request.param)

    def run(*, rows, slots, tables, decoder, this_time, block_size):
        rows = torch.tensor(rows, dtype=torch.bfloat16).view(-1, RANK + ROPE)
        writes = oracle.run(
            {
                "compressed_kv": rows[:, :RANK],
                "k_pe": rows[:, RANK:],
                "latent_cache": torch.zeros(8, 1, block_size, RANK + ROPE, dtype=torch.bfloat16),
                "slot_mapping": torch.tensor(slots, dtype=torch.int64),
                "block_tables": torch.tensor(tables, dtype=torch.int32),
                "seq_lens_decoder": torch.tensor(decoder, dtype=torch.int32),
                "seq_lens_this_time": torch.tensor(this_time, dtype=torch.int32),
            },
            None,
        )["latent_cache"]
        return dict(zip(writes.rows.tolist(), writes.values.tolist(), strict=True))

    return run


def test_new_tokens_go_where_their_table_says(cache_write):
    # Blocks of 2. Row 0: one cached, two new at positions 1 and 2: block 5 offset 1, block 3 offset 0.
    # Row 1: three cached, one new at position 3: block 0 offset 1. One padding token.
    got = cache_write(
        rows=[[1, 2, 3], [4, 5, 6], [7, 8, 9], [NAN] * 3],
        slots=[11, 6, 1, -1],
        tables=[[5, 3], [7, 0]],
        decoder=[1, 3],
        this_time=[2, 1],
        block_size=2,
    )
    assert got == {11: [1, 2, 3], 6: [4, 5, 6], 1: [7, 8, 9]}


def test_paused_and_idle_slots_write_nothing(cache_write):
    got = cache_write(
        rows=[[1, 2, 3]],
        slots=[2 * 3 + 1],
        tables=[[0, 4], [2, -1], [-1, -1]],
        decoder=[4, 1, 0],
        this_time=[0, 1, 0],
        block_size=3,
    )
    assert got == {7: [1, 2, 3]}


def test_nothing_to_write_is_no_row(cache_write):
    got = cache_write(rows=[[NAN] * 3], slots=[-64], tables=[[0]], decoder=[1], this_time=[0], block_size=1)
    assert got == {}


# ---- the two against each other ------------------------------------------------------------------

LENGTH = st.integers(1, 20)
ROW = st.one_of(
    st.just("idle"),
    LENGTH.map(lambda n: f"prefill:{n}"),
    LENGTH.map(lambda c: f"decode:{c}"),
    LENGTH.map(lambda c: f"paused:{c}"),
    LENGTH.map(lambda c: f"decode:{c}@sys"),
    st.builds(lambda c, n: f"hit:{c}+{n}", LENGTH, st.integers(1, 5)),
    st.builds(lambda c, n: f"draft:{c}+{n}", LENGTH, st.integers(1, 5)),
)
CASES = st.builds(
    "{}{}/model=minicpm3-4b,block={},dtype={},data={},seed={},pages={}".format,
    st.lists(ROW, min_size=1, max_size=4).map(",".join),
    st.sampled_from(["", ",pad:2"]),
    st.integers(1, 7),
    st.sampled_from(["bf16", "fp16", "fp32"]),
    st.sampled_from(["planted", "randn", "flat", "peaked", "huge", "deep", "tiny"]),
    st.integers(0, 3),
    st.sampled_from(["shuffled", "reversed"]),
)


def oracle_inputs(batch):
    layer = batch.layers[0]
    return {**layer.tensors, **layer.attributes}


@settings(max_examples=150)
@given(CASES)
def test_the_two_derivations_of_mla_decode_agree(make_batch, rows):
    inputs = oracle_inputs(make_batch(f"mla_decode/{rows},heads=2"))
    one, other = (oracle_for("mla_decode", role).run(inputs, None) for role in ROLES)
    assert torch.equal(one["lse"].isinf(), other["lse"].isinf())
    seen = one["lse"].isfinite()
    out, lse = one["out"], one["lse"][seen]
    assert bool(((out - other["out"]).abs().amax(-1) <= AGREEMENT * out.abs().amax(-1)).all())
    assert bool(((lse - other["lse"][seen]).abs() <= AGREEMENT * lse.abs().clamp_min(1)).all())
    assert not out[~seen].any()


@settings(max_examples=150)
@given(CASES)
def test_the_two_derivations_of_the_cache_write_agree(make_batch, rows):
    inputs = oracle_inputs(make_batch(f"latent_cache_write/{rows}"))
    written = []
    for role in ROLES:
        writes = oracle_for("latent_cache_write", role).run(inputs, None)["latent_cache"]
        values = writes.values.contiguous().view(torch.uint8).tolist()
        written.append(dict(zip(writes.rows.tolist(), values, strict=True)))
    assert written[0] == written[1]
    assert len(written[0]) == int(inputs["seq_lens_this_time"].sum())


@pytest.mark.parametrize("operator", operators())
def test_every_operator_has_a_definition_and_a_derivation_with_their_sources(operator):
    mine = [oracle for oracle in oracles() if oracle.operator == operator and oracle.role != "external"]
    assert sorted(oracle.role for oracle in mine) == sorted(ROLES)
    assert all(oracle.source for oracle in mine)
    assert mine[0].run is not mine[1].run


# ---- the emulation that budgets come from --------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "smallest", "largest"),
    [
        # Weights and output rounded once each: two relative errors of up to half an ulp, 2^-9 in bf16 and
        # 2^-12 in fp16; their root mean square over a row is about two thirds of half an ulp each.
        (torch.bfloat16, 1.2e-3, 4e-3),
        (torch.float16, 1.5e-4, 6e-4),
        (torch.float32, 1e-9, 1e-5),
    ],
)
def test_the_emulation_rounds_weights_and_output(dtype, smallest, largest, make_batch):
    inputs = oracle_inputs(make_batch("mla_decode/decode:500x2/heads=8,data=randn"))
    oracle = oracle_for("mla_decode", "definition")
    exact = oracle.run(inputs, None)["out"]
    emulated = oracle.run(inputs, Precision(weights=dtype, output=dtype))["out"]
    assert smallest < float(row_errors(emulated, exact).relative_l2.mean()) < largest
    assert torch.equal(emulated, emulated.to(dtype).double())


def test_weights_and_output_are_rounded_apart(make_batch):
    inputs = oracle_inputs(make_batch("mla_decode/decode:500x2/heads=8,data=randn"))
    oracle = oracle_for("mla_decode", "definition")
    exact = oracle.run(inputs, None)["out"]

    def error(weights, output):
        emulated = oracle.run(inputs, Precision(weights, output))["out"]
        return float(row_errors(emulated, exact).relative_l2.mean())

    half, single = torch.bfloat16, torch.float32
    assert error(single, single) < 1e-5
    assert 5e-4 < error(half, single) < error(half, half)
    assert 5e-4 < error(single, half) < error(half, half)


def test_the_online_derivation_refuses_to_emulate(make_batch):
    inputs = oracle_inputs(make_batch("mla_decode/decode:2/heads=1"))
    half = Precision(weights=torch.bfloat16, output=torch.bfloat16)
    with pytest.raises(ValueError, match="float64 only"):
        oracle_for("mla_decode", "derivation").run(inputs, half)
