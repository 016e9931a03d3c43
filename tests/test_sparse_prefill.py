"""Sparse prefill: keys worked by hand, lists of every kind, the causal answer, both references."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of
from harness.verdict import Status
from references.oracle import Precision, largest_partial_sums, oracle_for

ROLES = ("definition", "derivation")
RANK, ROPE = 16, 16


def tokens_of(*rows):
    """[n, 16] fp32: rows that begin with these numbers, zeros behind them."""
    return torch.tensor([[*row, *[0.0] * (16 - len(row))] for row in rows])


@pytest.fixture(params=[*ROLES, "triton"])
def attend(request):
    """(queries, latents, ropes, lists) -> out [T, H, R], lse [T, H] at a softmax scale of 1, in fp32."""

    def run(queries, latents, ropes, lists):
        inputs = {
            "q": queries,
            "compressed_kv": latents,
            "k_pe": ropes,
            "indices": torch.tensor(lists, dtype=torch.int32).unsqueeze(1),
            "softmax_scale": 1.0,
            "kv_lora_rank": RANK,
        }
        tokens, heads = queries.shape[:2]
        if request.param in ROLES:
            got = oracle_for("sparse_prefill", request.param).run(inputs, None)
            return got["out"], got["lse"]
        pytest.importorskip("triton")
        from harness.paths.triton.sparse_prefill import PATHS

        out = torch.full((tokens, heads, RANK), torch.nan)
        lse = torch.full((tokens, heads), torch.nan)
        PATHS[0].run(inputs, {"out": out, "lse": lse}, {})
        return out.double(), lse.double()

    return run


def queries_of(*rows, heads=1):
    """[n, heads, R + D] fp32: (latent, rope) numbers of each token, the same for every head."""
    latents, ropes = (tokens_of(*[row[part] for row in rows]) for part in (0, 1))
    return torch.cat([latents, ropes], 1).unsqueeze(1).repeat(1, heads, 1)


# ---- by hand -------------------------------------------------------------------------------------


def test_a_key_is_a_latent_and_a_rope_part_and_a_value_is_the_latent(attend):
    out, lse = attend(
        queries_of(([2.0], [3.0]), ([], [])),
        tokens_of([5.0], [1.0, -7.0]),
        tokens_of([9.0], [0.5]),
        [[1], [0]],
    )
    # 2 x 1 + 3 x 0.5 = 3.5.
    assert out[0, 0].tolist() == [1.0, -7.0, *[0.0] * 14]
    assert float(lse[0, 0]) == pytest.approx(3.5)
    assert out[1, 0, 0] == 5.0


def test_keys_weigh_as_their_logits_say_and_as_often_as_they_are_named(attend):
    queries = queries_of(([1.0], []), ([1.0], []))
    out, lse = attend(queries, tokens_of([0.0], [math.log(2)]), tokens_of([], []), [[0, 1, -1], [1, 0, 1]])
    # Logits 0 and ln 2: 1 + 2 = 3, and 1 + 2 + 2 = 5.
    assert out[:, 0, 0].tolist() == pytest.approx([2 / 3 * math.log(2), 4 / 5 * math.log(2)], rel=1e-6)
    assert lse[:, 0].tolist() == pytest.approx([math.log(3), math.log(5)], rel=1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("nothing", [-1, -2, -64, -(2**31), 2, 3, 640, 2**31 - 1])
def test_what_names_no_token_is_no_key_wherever_it_stands(attend, nothing, place):
    entries = [1, 0]
    entries.insert(place, nothing)
    out, lse = attend(
        queries_of(([], []), ([], [])), tokens_of([1.0], [4.0]), tokens_of([], []), [entries] * 2
    )
    assert out[:, 0, 0].tolist() == pytest.approx([2.5, 2.5])
    assert lse.flatten().tolist() == pytest.approx([math.log(2)] * 2)


@pytest.mark.parametrize("query", [0.0, math.nan])
def test_a_list_without_a_key_gives_0_and_minus_infinity(attend, query):
    out, lse = attend(queries_of(([query], [])), tokens_of([1.0]), tokens_of([]), [[-1, 1, 5] * 30])
    assert not bool(out.any())
    assert lse.tolist() == [[-math.inf]]


def test_tokens_that_no_list_names_have_no_influence(attend):
    latents, ropes = tokens_of([math.nan], [3.0], [math.inf]), tokens_of([math.nan], [], [math.inf])
    out, lse = attend(queries_of(*[([1.0], [1.0])] * 3), latents, ropes, [[1, -1]] * 3)
    assert out[:, 0, 0].tolist() == [3.0] * 3
    assert lse.flatten().tolist() == [3.0] * 3


def test_not_a_number_in_a_key_is_none_in_the_answer(attend):
    queries = queries_of(*[([1.0], [1.0])] * 2, heads=2)
    out, lse = attend(queries, tokens_of([1.0], [1.0]), tokens_of([math.nan], [0.0]), [[0, 1], [1, -1]])
    assert bool(out[0, :, 0].isnan().all())
    assert bool(lse[0].isnan().all())
    assert out[1, :, 0].tolist() == [1.0, 1.0]


def test_every_head_has_the_list_and_every_token_its_own(attend):
    queries = queries_of(*[([], [])] * 3, heads=20)
    out, _ = attend(
        queries, tokens_of([1.0], [2.0], [4.0]), tokens_of([], [], []), [[0, -1], [-1, 2], [1, 0]]
    )
    assert out[:, :, 0].tolist() == [[1.0] * 20, [4.0] * 20, [1.5] * 20]


# ---- on the harness's batches --------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5", "decode:30", "draft:9+3"]),
    st.integers(1, 20).map("prefill:{}".format),
    st.tuples(st.integers(1, 60), st.integers(1, 9)).map(lambda pair: "hit:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=4).map(",".join), st.sampled_from(["", ",pad:3"])
)


def inputs_of(layer):
    return {**layer.tensors, **layer.attributes}


@settings(max_examples=40, deadline=None)
@given(
    ROWS, st.integers(1, 30), st.sampled_from(["bf16", "fp16", "fp32"]), st.sampled_from(["planted", "huge"])
)
def test_the_references_agree_and_lists_name_new_tokens_each_once(make_batch, rows, topk, dtype, data):
    text = f"sparse_prefill/{rows}/model=minicpm3-4b,heads=2,topk={topk},dtype={dtype},data={data}"
    batch = make_batch(text)
    inputs = inputs_of(batch.layers[0])
    one, other = (oracle_for("sparse_prefill", role).run(inputs, None) for role in ROLES)
    for name in ("out", "lse"):
        assert torch.allclose(one[name], other[name], rtol=1e-10, atol=1e-12)
    metadata = batch.metadata
    tokens = metadata.tokens
    for token, entries in enumerate(inputs["indices"][:, 0].tolist()):
        named = [entry for entry in entries if 0 <= entry < tokens]
        slot = int(metadata.batch_id_per_token[token])
        if slot < 0 or metadata.seq_lens_encoder[slot] == 0:
            assert named == []
            continue
        first = int(metadata.cu_seqlens_q[slot])
        assert len(named) == len(set(named)) == min(topk, token - first + 1)
        assert set(named) <= set(range(first, token + 1))
        assert token in named
        assert topk == 1 or first in named


def test_lists_of_every_token_so_far_are_causal_attention_of_a_first_chunk(make_batch):
    layer = make_batch("sparse_prefill/prefill:20/model=minicpm3-4b,heads=3,topk=20").layers[0]
    inputs = inputs_of(layer)
    got = oracle_for("sparse_prefill", "definition").run(inputs, None)
    keys = torch.cat([inputs["compressed_kv"], inputs["k_pe"]], 1).double()
    logits = torch.einsum("thl,kl->htk", inputs["q"].double(), keys) * inputs["softmax_scale"]
    logits = logits + torch.full((20, 20), -torch.inf, dtype=torch.float64).triu(1)
    expected = (logits.softmax(-1) @ keys[:, :256]).transpose(0, 1)
    assert torch.allclose(got["out"], expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(got["lse"], logits.logsumexp(-1).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("topk", [2, 5, 20])
def test_newest_and_oldest_listed_keys_hold_about_half_of_the_mass(make_batch, topk):
    # Fewer would hide a lost key, more a wrong scale. A chunk's oldest key is its own, not position 0.
    layer = make_batch(f"sparse_prefill/hit:30+20/model=minicpm3-4b,heads=8,topk={topk},dtype=fp32").layers[0]
    inputs = inputs_of(layer)
    keys = torch.cat([inputs["compressed_kv"], inputs["k_pe"]], 1).double()
    entries = inputs["indices"][19, 0].long()
    named = entries[(entries >= 0) & (entries < 20)]
    logits = inputs["q"][19].double() @ keys[named].T * inputs["softmax_scale"]
    standing_out = (named == 0) | (named == 19)
    share = float(logits.softmax(-1)[:, standing_out].sum(-1).mean())
    assert (share == pytest.approx(1.0)) if topk == 2 else (0.3 < share < 0.7)


def test_the_emulation_rounds_weights_and_output_alone(make_batch):
    inputs = inputs_of(make_batch("sparse_prefill/prefill:20/model=minicpm3-4b,heads=4,topk=20").layers[0])
    run = oracle_for("sparse_prefill", "definition").run
    exact, emulated = run(inputs, None), run(inputs, Precision(torch.bfloat16, torch.bfloat16))
    assert torch.equal(emulated["out"], emulated["out"].bfloat16().double())
    error = (emulated["out"] - exact["out"]).norm(dim=-1) / exact["out"].norm(dim=-1)
    assert 5e-4 < float(error.max()) < 4e-3
    with pytest.raises(ValueError, match="float64 only"):
        oracle_for("sparse_prefill", "derivation").run({}, Precision(torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize(
    "text",
    [
        "sparse_prefill/draft:30+2,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2/heads=2,topk=4",
        *(f"sparse_prefill/{rows}/heads=2,topk=9" for rows in ("", "idlex3", "paused:5", "idle,pad:3")),
    ],
)
def test_the_kernel_passes_every_check(text, launched, every_result):
    pytest.importorskip("triton")
    from harness.paths.triton.sparse_prefill import PATHS

    results = every_result(launched(text.replace("/heads", "/model=minicpm3-4b,heads"), PATHS[0]))
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "lse", "guard", "inputs", "bounds"} <= {result.name for result in results}


# ---- the contract --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dimension", "value"), [("kv_lora_rank", 8), ("kv_lora_rank", 384), ("qk_rope_head_dim", 96)]
)
def test_widths_that_the_kernel_does_not_take_are_refused_with_the_reason(dimension, value):
    pytest.importorskip("triton")
    from harness.paths.triton.sparse_prefill import supports

    (layer,) = parse("sparse_prefill/prefill:5").layers
    assert supports(SimpleNamespace(layers=(layer,))) is None
    odd = replace(layer, model=replace(layer.model, **{dimension: value}))
    reason = supports(SimpleNamespace(layers=(odd,)))
    assert dimension in reason
    assert str(value) in reason


def test_work_counts_listed_pairs_new_keys_and_ends():
    case = parse("sparse_prefill/hit:50+3,prefill:4,decode:9,pad:1/heads=3,topk=2")
    work = contract_of(case).work(case, case.layers[0])
    # 1 + 2 + 2 and 1 + 2 + 2 + 2 pairs; 7 keys; 9 tokens with padding.
    assert work.flops == 2 * 12 * 3 * (576 + 512)
    assert work.bytes == 2 * (7 * 576 + 9 * 3 * (576 + 512)) + 9 * (4 * 3 + 4 * 2)


def test_sums_that_come_back_count_by_how_far_they_were():
    query = torch.ones(1, 64, dtype=torch.float64)
    there_and_back = torch.cat([torch.ones(32), -torch.ones(32)]).double().unsqueeze(0)
    straight = torch.full((1, 64), 0.25, dtype=torch.float64)
    # 32 ones and as many back; 64 quarters; of both, each key's own.
    assert largest_partial_sums(query, torch.cat([there_and_back, straight])).tolist() == [[32.0, 16.0]]
