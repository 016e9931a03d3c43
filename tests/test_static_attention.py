"""Attention over lists of every row kind: a step worked by hand, two meanings of a list, one kind or none."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of
from harness.footprint import required_bytes
from harness.verdict import Status
from references.oracle import Precision, Writes, oracle_for

ROLES = ("definition", "derivation")
RANK, ROPE = 256, 32
SMALL = "model=minicpm3-4b,heads=2"
EVERY_KIND = "draft:9+3,hit:17+2,prefill:4,decode:20,idle,paused:7,pad:2"


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def rows_of(width, *rows):
    """[n, width] bf16: rows that begin with these numbers, zeros behind them."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.bfloat16)


def packed(latents, k_pe, scale_fmt="fp32"):
    """The packed rows of tokens as `packed_cache_write` makes them."""
    count, width = len(latents), RANK + RANK // 32 + 2 * ROPE
    inputs = {
        "compressed_kv": latents,
        "k_pe": k_pe,
        "packed_cache": torch.zeros(count, 1, 1, width, dtype=torch.uint8),
        "slot_mapping": torch.arange(count),
        "scale_fmt": scale_fmt,
    }
    return oracle_for("packed_cache_write", "definition").run(inputs)["packed_cache"].values


def inputs_of(layer, *, rounds_keys=True):
    return {**layer.tensors, **layer.attributes, "rounds_keys": rounds_keys}


def scratch_of(path, text):
    """The workspace of a case, full of a byte that no kernel writes."""
    return {
        name: torch.full(shape, 0x5A, dtype=getattr(torch, dtype))
        for name, (shape, dtype) in path.workspace(parse(text)).items()
    }


@pytest.fixture(scope="module")
def triton_path():
    pytest.importorskip("triton")
    from harness.paths.triton.static_attention import PATHS

    return PATHS[0]


@pytest.fixture(scope="module")
def cuda_path(cuda_on_the_processor):
    from harness.paths.cuda.static_attention import PATHS

    return PATHS[0]


@pytest.fixture(params=[*ROLES, "triton", "cuda"])
def attend(request):
    """(text, inputs) -> out, lse and the cache afterwards; the text says what workspace is there."""

    def run(text, inputs):
        cache = inputs["packed_cache"].clone()
        inputs = {**inputs, "packed_cache": cache}
        if request.param in ROLES:
            got = oracle_for("static_attention", request.param).run(inputs, None)
            writes = got["packed_cache"]
            cache.view(-1, cache.shape[3])[writes.rows] = writes.values
            return got["out"], got["lse"], cache
        path = request.getfixturevalue(f"{request.param}_path")
        tokens, heads = inputs["q"].shape[:2]
        out = torch.full((tokens, heads, RANK), torch.nan, dtype=torch.bfloat16)
        lse = torch.full((tokens, heads), torch.nan)
        path.run(inputs, {"out": out, "lse": lse, "packed_cache": cache}, scratch_of(path, text))
        return out.double(), lse.double(), cache

    return run


HAND = "static_attention/decode:1,prefill:2,hit:1+1,pad:1/model=minicpm3-4b,heads=1,topk=3,block=2"


def step_by_hand(*lists):
    """A decode row, a first chunk of two, a chunk with a history, padding; blocks of two rows.

    Tokens 0 to 3 go to rows 3, 0, 1 and 5 of six; rows 2 and 4 are cached. Latents are [7, x]: a scale of
    2^-6, so that x = 1 to 6 is kept, and 3.015625 is kept as 3. A query is its rope part, 1.
    """
    nan = math.nan
    latents = rows_of(RANK, [7, 3.015625], [7, 2], [7, 3.015625], [7, 4], [nan] * RANK)
    k_pe = rows_of(ROPE, [0], [0], [0], [2], [nan] * ROPE)
    cache = torch.full((3, 1, 2, RANK + RANK // 32 + 2 * ROPE), 0xFF, dtype=torch.uint8)
    cache.view(6, -1)[[2, 4]] = packed(rows_of(RANK, [7, 5], [7, 6]), rows_of(ROPE, [0], [2]))
    q = torch.zeros(5, 1, RANK + ROPE, dtype=torch.bfloat16)
    q[:, 0, RANK], q[4] = 1.0, nan
    return {
        "q": q,
        "compressed_kv": latents,
        "k_pe": k_pe,
        "indices": int32(*lists, [-1, 6, -1]).unsqueeze(1),
        "packed_cache": cache,
        "slot_mapping": torch.tensor([3, 0, 1, 5, -63]),
        "block_tables": int32([1], [0], [2]),
        "seq_lens_encoder": int32(0, 2, 1),
        "seq_lens_decoder": int32(1, 0, 1),
        "seq_lens_this_time": int32(1, 2, 1),
        "cu_seqlens_q": int32(0, 1, 3, 4),
        "batch_id_per_token": int32(0, 1, 1, 2, -1),
        "softmax_scale": 0.5,
        "kv_lora_rank": RANK,
        "scale_fmt": "fp32",
        "rounds_keys": True,
    }


# ---- by hand -------------------------------------------------------------------------------------


def test_a_list_means_tokens_where_nothing_is_cached_and_rows_elsewhere(attend):
    out, lse, cache = attend(HAND, step_by_hand([3, -1, -1], [2, -1, -1], [-1, 2, 1], [5, 4, -1]))
    # Row 3 is token 0 itself, packed; token 2 is as given; rows 5 and 4 are token 3 and a cached one.
    ln2 = math.log(2)
    assert out[:, 0, 0].tolist() == [7, 7, 7, 7, 0]
    assert out[:, 0, 1].tolist() == pytest.approx([3, 3.015625, (3.015625 + 2) / 2, 5, 0], rel=4e-3)
    assert out[:2, 0, 1].tolist() == [3, 3.015625]
    assert not bool(out[:, :, 2:].any())
    assert lse[:4, 0].tolist() == pytest.approx([0, 0, ln2, 1 + ln2], abs=1e-6)
    assert float(lse[4]) == -math.inf
    before = step_by_hand([-1] * 3, [-1] * 3, [-1] * 3, [-1] * 3)
    rows, new = cache.view(6, -1), packed(before["compressed_kv"][:4], before["k_pe"][:4])
    assert torch.equal(rows[[3, 0, 1, 5]], new)
    assert torch.equal(rows[[2, 4]], before["packed_cache"].view(6, -1)[[2, 4]])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("nothing", [-1, -2, -64, -(2**31), 6, 7, 2**31 - 1])
def test_what_no_meaning_has_is_no_key_wherever_it_stands(attend, nothing, place):
    lists = [[2, 3], [1, 2], [2, 1], [5, 4]]
    for entries in lists:
        entries.insert(place, nothing)
    out, _, _ = attend(HAND, step_by_hand(*lists))
    halves = [(5 + 3) / 2, (2 + 3.015625) / 2, (2 + 3.015625) / 2, (4 + 6) / 2]
    assert out[:4, 0, 1].tolist() == pytest.approx(halves, rel=4e-3)


def test_a_token_that_the_step_does_not_have_is_a_row_that_the_cache_has(attend):
    # 5 is no token of five, and row 5 of six.
    out, lse, _ = attend(HAND, step_by_hand([5, 5, 5], [5, 5, 5], [5, 1, 5], [5, -1, -1]))
    assert out[:, 0, 1].tolist() == [4, 0, 2, 4, 0]
    assert lse.flatten().tolist() == pytest.approx([1 + math.log(3), -math.inf, 0, 1, -math.inf], abs=1e-6)


def test_a_row_named_twice_is_two_keys_in_both_meanings(attend):
    out, lse, _ = attend(HAND, step_by_hand([3, 3, 2], [1, 1, 2], [-1] * 3, [-1] * 3))
    assert out[:2, 0, 1].tolist() == pytest.approx([(3 + 3 + 5) / 3, (2 + 2 + 3.015625) / 3], rel=4e-3)
    assert lse[:2, 0].tolist() == pytest.approx([math.log(3)] * 2, abs=1e-6)


def test_the_other_rows_keys_have_no_influence_though_lists_seem_to_name_them(attend):
    inputs = step_by_hand([3, 2, -1], [2, -1, -1], [1, 2, -1], [5, 4, -1])
    # As tokens, 3 is token 3 and 2 token 2; as rows, 1 and 2 are row 1 and what slot 0 has cached.
    expected = attend(HAND, inputs)
    inputs["compressed_kv"], inputs["k_pe"] = inputs["compressed_kv"].clone(), inputs["k_pe"].clone()
    inputs["compressed_kv"][3], inputs["k_pe"][3] = math.nan, math.nan
    out, lse, _ = attend(HAND, inputs)
    assert torch.equal(out[:3], expected[0][:3])
    assert torch.equal(lse[:3], expected[1][:3])
    assert bool(out[3].isnan().any())


@pytest.mark.parametrize("attend", ["definition", "triton", "cuda"], indirect=True)
def test_a_token_with_a_negative_slot_is_attended_to_and_not_written(attend):
    inputs = step_by_hand([2, -1, -1], [2, -1, -1], [1, 2, -1], [4, -1, -1])
    expected = attend(HAND, inputs)
    inputs["slot_mapping"] = torch.tensor([3, -1, 1, 5, -1])
    out, lse, cache = attend(HAND, inputs)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    assert bool((cache.view(6, -1)[0] == 0xFF).all())
    assert torch.equal(cache.view(6, -1)[1:], expected[2].view(6, -1)[1:])


@pytest.mark.parametrize("rows", ["pad:3", "paused:5,idle,pad:4"])
def test_a_step_of_neither_kind_has_outputs_of_the_right_shape(rows, attend, make_batch):
    text = f"static_attention/{rows}/{SMALL},topk=5"
    inputs = inputs_of(make_batch(text).layers[0])
    out, lse, cache = attend(text, inputs)
    assert out.shape == (len(inputs["q"]), 2, RANK)
    assert not bool(out.any())
    assert bool((lse == -math.inf).all())
    assert torch.equal(cache, inputs["packed_cache"])


# ---- the references ------------------------------------------------------------------------------

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


def run(inputs, role):
    return oracle_for("static_attention", role).run(inputs, None)


def written(outputs):
    """Physical row -> the bytes that a step leaves there."""
    writes = outputs["packed_cache"]
    return dict(zip(writes.rows.tolist(), writes.values.tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    ROWS,
    st.integers(1, 80),
    st.sampled_from([1, 16, 48]),
    st.sampled_from([0, 1, 9]),
    st.booleans(),
    st.sampled_from(["fp32", "ue8m0"]),
)
def test_the_references_agree(make_batch, rows, topk, block, window, rounds_keys, scale_fmt):
    options = f"topk={topk},block={block},window={window},scale_fmt={scale_fmt}"
    batch = make_batch(f"static_attention/{rows}/{SMALL},{options}")
    inputs = inputs_of(batch.layers[0], rounds_keys=rounds_keys)
    one, other = (run(inputs, role) for role in ROLES)
    for name in ("out", "lse"):
        assert torch.allclose(one[name], other[name], rtol=1e-10, atol=1e-12)
    assert bool(one["out"].isfinite().all())
    assert written(one) == written(other)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scale_fmt", ["fp32", "ue8m0"])
def test_the_cache_gets_the_bytes_of_packed_cache_write(scale_fmt, role, make_batch):
    # Tiles of every kind that quantisers get wrong, NaN and infinities among them.
    text = f"packed_cache_write/prefill:200,decode:9,pad:2/model=minicpm3-4b,scale_fmt={scale_fmt}"
    inputs = inputs_of(make_batch(text).layers[0])
    tokens = len(inputs["slot_mapping"])
    asked = {
        **inputs,
        "q": torch.zeros(tokens, 1, RANK + ROPE, dtype=torch.bfloat16),
        "indices": torch.full((tokens, 1, 1), -1, dtype=torch.int32),
        "softmax_scale": 1.0,
        "kv_lora_rank": RANK,
    }
    expected = oracle_for("packed_cache_write", "definition").run(inputs)
    assert written(run(asked, role)) == written(expected)


def test_first_chunks_alone_are_sparse_prefill(make_batch):
    batch = make_batch(f"static_attention/prefill:9,idle,prefill:4,pad:1/{SMALL},topk=6")
    inputs = inputs_of(batch.layers[0])
    got, expected = run(inputs, "definition"), oracle_for("sparse_prefill", "derivation").run(inputs, None)
    for name in ("out", "lse"):
        assert torch.allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rounds_keys", [True, False])
def test_rows_with_a_history_alone_are_sparse_decode_over_the_cache_afterwards(rounds_keys, make_batch):
    batch = make_batch(f"static_attention/decode:40,hit:9+4,paused:3,draft:3+2,pad:1/{SMALL},topk=20")
    inputs = inputs_of(batch.layers[0], rounds_keys=rounds_keys)
    got = run(inputs, "definition")
    cache = inputs["packed_cache"].clone()
    cache.view(-1, cache.shape[3])[got["packed_cache"].rows] = got["packed_cache"].values
    after = {**inputs, "packed_cache": cache}
    expected = oracle_for("sparse_decode", "derivation").run(after, None)
    for name in ("out", "lse"):
        assert torch.allclose(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_the_emulation_rounds_weights_and_output_alone(make_batch):
    layer = make_batch(f"static_attention/decode:90,prefill:20/{SMALL},topk=64").layers[0]
    definition = oracle_for("static_attention", "definition").run
    exact = definition(inputs_of(layer), None)
    emulated = definition(inputs_of(layer), Precision(torch.bfloat16, torch.bfloat16))
    assert torch.equal(emulated["out"], emulated["out"].bfloat16().double())
    error = (emulated["out"] - exact["out"]).norm(dim=-1) / exact["out"].norm(dim=-1)
    assert 5e-4 < float(error.max()) < 4e-3
    assert isinstance(emulated["packed_cache"], Writes)
    with pytest.raises(ValueError, match="float64 only"):
        oracle_for("static_attention", "derivation").run({}, Precision(torch.bfloat16, torch.bfloat16))


# ---- the lists of the batches --------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 70), st.sampled_from([1, 16, 48]), st.sampled_from([0, 1, 9, 33]))
def test_lists_name_the_newest_the_oldest_and_others_each_once(make_batch, rows, topk, block, window):
    options = f"topk={topk},block={block},window={window}"
    batch = make_batch(f"static_attention/{rows}/model=minicpm3-4b,heads=1,{options}")
    layer, metadata = batch.layers[0], batch.metadata
    tables, lists = layer.pages.block_tables, layer.tensors["indices"][:, 0]
    stored = layer.tensors["packed_cache"].view(-1, layer.tensors["packed_cache"].shape[3])
    named = torch.zeros(len(stored), dtype=torch.bool)
    for entries, slot, position in zip(
        lists.tolist(), metadata.batch_id_per_token, metadata.position_ids, strict=True
    ):
        if slot < 0:
            assert [entry for entry in entries if 0 <= entry < max(len(stored), len(lists))] == []
            continue
        has_history = metadata.seq_lens_decoder[slot] > 0
        oldest = max(0, position + 1 - window) if window else 0
        visible = [int(tables[slot, p // block]) * block + p % block for p in range(oldest, position + 1)]
        if not has_history:
            visible = [int(metadata.cu_seqlens_q[slot]) + p for p in range(oldest, position + 1)]
        keys = [entry for entry in entries if 0 <= entry < (len(stored) if has_history else len(lists))]
        assert len(keys) == len(set(keys)) == min(topk, len(visible))
        assert set(keys) <= set(visible)
        assert visible[-1] in keys
        assert topk == 1 or visible[0] in keys
        if window and len(visible) <= topk:
            assert entries[: len(visible)] == visible
        if has_history:
            named[keys] = True
    # What no list names is poison, and so is what this step writes.
    real = layer.tensors["slot_mapping"] >= 0
    named[layer.tensors["slot_mapping"][real]] = False
    assert bool((stored[~named] == 0xFF).all())
    assert not bool((stored[named] == 0xFF).all(1).any())


def test_lists_of_one_kind_name_keys_to_the_other(make_batch):
    batch = make_batch(f"static_attention/prefill:9,decode:20/{SMALL},topk=12,block=16")
    lists, cache = batch.layers[0].tensors["indices"][:, 0], batch.layers[0].tensors["packed_cache"]
    assert bool(((lists[:9] >= 0) & (lists[:9] < cache.shape[0] * 16)).any(1).all())
    assert bool((lists[9] >= 10).any())


def test_deep_logits_stay_equal_when_latents_are_packed(make_batch):
    layer = make_batch(f"static_attention/prefill:20,decode:40/{SMALL},topk=30,data=deep").layers[0]
    lse = run(inputs_of(layer), "definition")["lse"][1:]
    assert float((lse / -6.0e4 - 1).abs().max()) < 0.01
    tiles = layer.tensors["compressed_kv"].float().view(21, 2, 128)
    assert bool((tiles.abs().amax(-1) == 3.5).all())


# ---- the composition -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"static_attention/{EVERY_KIND}/{SMALL},topk=17,block=16",
        f"static_attention/prefill:3,decode:40,hit:9+2/{SMALL},topk=40,window=9,strided=0,scale_fmt=ue8m0",
        f"static_attention/prefill:5,pad:2/{SMALL},topk=9",
        f"static_attention/hit:9+2,decode:5,pad:1/{SMALL},topk=9",
        *(f"static_attention/{rows}/{SMALL},topk=9" for rows in ("", "idlex3", "paused:5", "idle,pad:3")),
    ],
)
def test_the_path_passes_every_check(text, launched, every_result, triton_path):
    results = every_result(launched(text, triton_path))
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "lse", "guard", "inputs", "bounds", "bytes"} <= {result.name for result in results}


def recorded(triton_path, text, make_batch):
    """What each operator of the composition is called with, in order: its name and its inputs' tensors."""
    from harness.paths import _static_attention as composition

    calls = []
    family = triton_path.run.args[0]

    def spy(name, operator):
        def call(*arguments):
            taken = arguments[0] if isinstance(arguments[0], dict) else {}
            kept = {key: value.clone() for key, value in taken.items() if isinstance(value, torch.Tensor)}
            calls.append((name, kept))
            return operator(*arguments)

        return call

    names = (
        "packed_cache_write",
        "sparse_prefill",
        "sparse_decode",
        "select_rows",
        "gather_rows",
        "merge_rows",
    )
    watched = replace(family, **{name: spy(name, getattr(family, name)) for name in names})
    inputs = inputs_of(make_batch(text).layers[0])
    tokens, heads = inputs["q"].shape[:2]
    outputs = {
        "out": torch.full((tokens, heads, RANK), torch.nan, dtype=torch.bfloat16),
        "lse": torch.full((tokens, heads), torch.nan),
        "packed_cache": inputs["packed_cache"],
    }
    composition.run(watched, inputs, outputs, scratch_of(triton_path, text))
    return calls, inputs


@pytest.mark.parametrize(
    ("rows", "operators"),
    [
        ("prefill:3,idle,paused:5,pad:1", ["packed_cache_write", "sparse_prefill"]),
        ("decode:9,draft:3+2,pad:1", ["packed_cache_write", "sparse_decode"]),
        ("hit:9+2,idle", ["packed_cache_write", "sparse_decode"]),
        ("idle,paused:5,pad:2", ["packed_cache_write"]),
        ("idle,paused:5", []),
    ],
)
def test_rows_of_one_kind_alone_take_one_operator_and_no_memory(rows, operators, triton_path, make_batch):
    text = f"static_attention/{rows}/{SMALL},topk=9"
    calls, inputs = recorded(triton_path, text, make_batch)
    assert [name for name, _ in calls] == operators
    if len(calls) > 1:
        # The tensors as they are, nothing packed.
        assert torch.equal(calls[1][1]["indices"], inputs["indices"])
        assert torch.equal(calls[1][1]["q"].view(torch.int16), inputs["q"].view(torch.int16))
    shapes = triton_path.workspace(parse(text))
    assert sum(math.prod(shape) for shape, _ in shapes.values()) <= 2


def test_no_operator_gets_a_list_that_means_something_else_to_it(triton_path, make_batch):
    text = f"static_attention/decode:20,prefill:3,idle,hit:5+2,pad:2/{SMALL},topk=8"
    calls, inputs = recorded(triton_path, text, make_batch)
    given = dict(calls)
    lists = inputs["indices"]
    assert torch.equal(given["sparse_prefill"]["indices"][1:4], lists[1:4])
    others = torch.cat([given["sparse_prefill"]["indices"][:1], given["sparse_prefill"]["indices"][4:6]])
    assert bool((others == -1).all())
    assert torch.equal(given["sparse_decode"]["indices"], torch.cat([lists[:1], lists[4:6]]))
    assert torch.equal(given["sparse_decode"]["q"], torch.cat([inputs["q"][:1], inputs["q"][4:6]]))


@pytest.mark.parametrize("larger", ["draft:30+5,prefill:4,idle,idle,pad:3", "draft:30+8,prefill:4,idle,idle"])
def test_a_step_with_fewer_packed_tokens_than_there_is_room_for(larger, triton_path, make_batch):
    # As a captured graph is replayed: the workspace is that of a step with more.
    text = f"static_attention/draft:30+3,prefill:4,idle,hit:40+1,pad:4/{SMALL},topk=20"
    outs = []
    for scratch in (text, f"static_attention/{larger}/{SMALL},topk=20"):
        inputs = inputs_of(make_batch(text).layers[0])
        workspace = scratch_of(triton_path, scratch)
        out = torch.full((12, 2, RANK), torch.nan, dtype=torch.bfloat16)
        lse = torch.full((12, 2), torch.nan)
        triton_path.run(inputs, {"out": out, "lse": lse, "packed_cache": inputs["packed_cache"]}, workspace)
        outs.append((out, lse))
        # What lies behind the last packed token follows no list.
        assert bool((workspace["packed_lse"][4:] == -math.inf).all())
    assert torch.equal(outs[0][0], outs[1][0])
    assert torch.equal(outs[0][1], outs[1][1])


def test_memory_beside_first_chunks_follows_the_tokens_with_a_history(triton_path):
    def packed_bytes(rows):
        shapes = triton_path.workspace(parse(f"static_attention/{rows}/{SMALL},topk=9"))
        names = [name for name in shapes if name.startswith(("packed", "partial"))]
        return sum(math.prod(shapes[name][0]) * getattr(torch, shapes[name][1]).itemsize for name in names)

    few = packed_bytes("decode:50,draft:30+3,prefill:4")
    assert few == packed_bytes("decode:50,draft:30+3,prefill:200")
    assert 2 * few == packed_bytes("decode:50x2,draft:30+3x2,prefill:4")
    assert packed_bytes("prefill:4") == 0


def test_widths_that_an_operator_does_not_take_are_refused_with_the_reason(triton_path):
    (layer,) = parse("static_attention/decode:5").layers
    assert triton_path.supports(SimpleNamespace(layers=(layer,))) is None
    odd = replace(layer, model=replace(layer.model, kv_lora_rank=384))
    assert "kv_lora_rank" in triton_path.supports(SimpleNamespace(layers=(odd,)))


# ---- the contract --------------------------------------------------------------------------------


def test_work_counts_new_rows_named_rows_pairs_and_ends():
    case = parse("static_attention/decode:99,prefill:2,idle,pad:1/heads=3,topk=10")
    work = contract_of(case).work(case, case.layers[0])
    # Ten of 100; one and two. New rows are read in bf16 and written packed, rows of the cache read packed.
    assert work.flops == 2 * (10 + 1 + 2) * 3 * (576 + 512)
    assert work.bytes == 3 * (2 * 576 + 656 + 8) + 10 * 656 + 4 * (3 * (2 * (576 + 512) + 4) + 4 * 10)
    windowed = parse("static_attention/decode:99,prefill:2/heads=3,topk=10,window=2")
    assert contract_of(case).work(windowed, windowed.layers[0]).flops == 2 * (2 + 1 + 2) * 3 * (576 + 512)


def test_memory_is_foreseen(make_batch):
    text = f"static_attention/{EVERY_KIND}/heads=8,topk=64"
    held = sum(len(buffer.raw) for buffer in make_batch(text).layers[0].inputs.values())
    assert required_bytes(parse(text), contract_of(parse(text)), "cpu") > 2 * held


def test_scratch_is_for_what_is_packed_and_for_partial_results():
    def scratch(rows, options="heads=3,topk=10"):
        case = parse(f"static_attention/{rows}/{options}")
        return contract_of(case).scratch(case, case.layers[0])

    # Two tokens with a history of six: queries, outputs and LSE of 3 heads; lists of both kinds.
    assert scratch("draft:9+2,prefill:3,pad:1") == 2 * 3 * (2 * (576 + 512) + 4) + (6 + 2) * 10 * 4
    assert [scratch(rows) for rows in ("decode:99,hit:3+2", "prefill:9", "paused:5,pad:2", "")] == [0] * 4
    # 600 entries in three splits of every head.
    assert scratch("decode:99,pad:1", "heads=3,topk=600") == 2 * 3 * 3 * (512 + 2) * 4
