"""Keys out of the cache, decode rows packed and merged: worked by hand, at their edges, in any width."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of, operators
from cases.errors import CaseError
from harness.checks import checks
from harness.verdict import Status
from references.oracle import oracle_for

ROLES = ("definition", "derivation")
FAMILIES = ("triton", "cuda")
MINE = ("read_cache_interleave", "decode_rows")
NAN = float("nan")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def prefix_sum(lengths):
    return int32([sum(lengths[:row]) for row in range(len(lengths) + 1)])


def production_path(request, operator):
    """Runs a family's path of an operator on tensors by name, outputs NaN or -1 before."""
    if request.param == "triton":
        pytest.importorskip("triton")
    else:
        request.getfixturevalue("cuda_on_the_processor")
    (path,) = import_module(f"harness.paths.{request.param}.{operator}").PATHS

    def run(inputs, shapes):
        outputs = {
            name: torch.full(shape, NAN if dtype.is_floating_point else -1, dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        path.run(inputs, outputs, {})
        return outputs

    return run


@pytest.fixture(params=[*ROLES, *FAMILIES])
def read(request):
    """(cache, tables, new latents, new k_pe, encoder, decoder, this_time) -> the two outputs."""

    def run(cache, tables, compressed_kv, k_pe, encoder, decoder, this_time, *, more=0):
        keys = [new + old if new else 0 for new, old in zip(encoder, decoder, strict=True)]
        inputs = {
            "latent_cache": cache,
            "block_tables": tables,
            "compressed_kv": compressed_kv,
            "k_pe": k_pe,
            "seq_lens_encoder": int32(encoder),
            "seq_lens_decoder": int32(decoder),
            "cu_seqlens_q": prefix_sum(this_time),
            "cu_seqlens_k_prefill": prefix_sum(keys),
        }
        if request.param in ROLES:
            return oracle_for("read_cache_interleave", request.param).run(inputs, None)
        shapes = {
            "full_compressed_kv": ((sum(keys) + more, compressed_kv.shape[1]), compressed_kv.dtype),
            "full_k_pe": ((sum(keys) + more, k_pe.shape[1]), k_pe.dtype),
        }
        return production_path(request, "read_cache_interleave")(inputs, shapes)

    run.role = request.param
    return run


def same(got, expected):
    """Whether two tensors have one dtype, shape and every bit in common."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    if got.numel() == 0:
        return True
    bits = (tensor.contiguous().view(torch.uint8) for tensor in (got, expected))
    return torch.equal(*bits)


# ---- read_cache_interleave by hand ---------------------------------------------------------------


def small_cache(blocks, block_size, rank, rope, dtype=torch.float32):
    """[nb, 1, bs, R + D]: row r holds 100 r, 100 r + 1, ..."""
    rows = torch.arange(blocks * block_size).unsqueeze(1) * 100 + torch.arange(rank + rope)
    return rows.view(blocks, 1, block_size, rank + rope).to(dtype)


def test_the_golden_case_of_o09(read):
    # bs = 2, R = 4, D = 2, table [1, 0], three cached and two new tokens: cache rows (1, 0), (1, 1), (0, 0),
    # then the new ones. Of cache row (0, 1), where the first new token will go, nothing is seen.
    cache = small_cache(2, 2, 4, 2)
    cache[0, 0, 1] = NAN
    new_latent = torch.tensor([[-1.0, -2, -3, -4], [-5, -6, -7, -8]])
    new_rope = torch.tensor([[-9.0, -10], [-11, -12]])
    got = read(cache, int32([[1, 0]]), new_latent, new_rope, [2], [3], [2])
    latent = [[200.0, 201, 202, 203], [300, 301, 302, 303], [0, 1, 2, 3], [-1, -2, -3, -4], [-5, -6, -7, -8]]
    rope = [[204.0, 205], [304, 305], [4, 5], [-9, -10], [-11, -12]]
    assert same(got["full_compressed_kv"], torch.tensor(latent))
    assert same(got["full_k_pe"], torch.tensor(rope))


def test_only_prefill_rows_have_keys(read):
    # Decode (two cached, one new), paused, first chunk of one token, idle, continued chunk of one on one.
    cache = small_cache(4, 2, 1, 1)
    tables = int32([[3, 2**30], [2, 2**30], [-1, -1], [-1, -1], [1, 2**30]])
    latent = torch.tensor([[-1.0], [-2], [-3]])
    rope = torch.tensor([[-4.0], [-5], [-6]])
    got = read(cache, tables, latent, rope, [0, 0, 1, 0, 1], [2, 1, 0, 0, 1], [1, 0, 1, 0, 1])
    # Tokens 1 and 2 are the chunks'; the cached one is row 0 of block 1, physical row 2.
    assert same(got["full_compressed_kv"], torch.tensor([[-2.0], [200], [-3]]))
    assert same(got["full_k_pe"], torch.tensor([[-5.0], [201], [-6]]))


@pytest.mark.parametrize("table", [None, "empty", "given"])
def test_first_chunks_need_no_table(read, table):
    tables = {None: None, "empty": int32([[], []]).view(2, 0), "given": int32([[2**30], [-1]])}[table]
    latent, rope = torch.tensor([[1.0], [2], [3]]), torch.tensor([[4.0], [5], [6]])
    got = read(small_cache(1, 2, 1, 1), tables, latent, rope, [2, 1], [0, 0], [2, 1])
    assert same(got["full_compressed_kv"], latent)
    assert same(got["full_k_pe"], rope)


@pytest.mark.parametrize(
    ("encoder", "decoder", "this_time"),
    [([], [], []), ([0, 0], [0, 0], [0, 0]), ([0], [5], [0]), ([0, 0], [3, 2], [1, 2])],
)
def test_steps_without_a_key_give_empty_tensors(read, encoder, decoder, this_time):
    tokens, slots = sum(this_time), len(encoder)
    tables = torch.zeros(slots, 3, dtype=torch.int32)
    got = read(
        small_cache(2, 2, 4, 2),
        tables,
        torch.ones(tokens, 4),
        torch.ones(tokens, 2),
        encoder,
        decoder,
        this_time,
    )
    assert got["full_compressed_kv"].shape == (0, 4)
    assert got["full_k_pe"].shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rank", "rope"), [(320, 64), (384, 96), (512, 48), (3, 1), (1, 5)])
def test_widths_that_are_no_power_of_two_are_copied(read, rank, rope, dtype):
    # FastDeploy's B15: 320, 384 and 96 do not compile there. Columns beyond a row belong to the next one.
    generator = torch.Generator().manual_seed(rank)
    width = rank + rope
    cache = torch.randn(4, 1, 3, width, generator=generator).to(dtype)
    latent = torch.randn(3, rank, generator=generator).to(dtype)
    new_rope = torch.randn(3, rope, generator=generator).to(dtype)
    got = read(cache, int32([[2, 0], [1, 3]]), latent, new_rope, [1, 2], [4, 5], [1, 2])
    rows = [cache[2, 0], cache[0, 0, :1], "0", cache[1, 0], cache[3, 0, :2], "1", "2"]
    joint = torch.cat([latent, new_rope], dim=1)
    expected = torch.cat([joint[int(row)].unsqueeze(0) if isinstance(row, str) else row for row in rows])
    assert same(got["full_compressed_kv"], expected[:, :rank])
    assert same(got["full_k_pe"], expected[:, rank:])


@pytest.mark.parametrize("read", FAMILIES, indirect=True)
@pytest.mark.parametrize("more", [1, 20])
def test_rows_behind_the_last_key_become_zero(read, more):
    # A captured graph's outputs are as long as its longest step.
    latent, rope = torch.tensor([[1.0], [2], [3]]), torch.tensor([[4.0], [5], [6]])
    cache = torch.full((1, 1, 2, 2), NAN)
    got = read(cache, int32([[0], [0]]), latent, rope, [3, 0], [0, 0], [3, 0], more=more)
    assert same(got["full_compressed_kv"], torch.cat([latent, torch.zeros(more, 1)]))
    assert same(got["full_k_pe"], torch.cat([rope, torch.zeros(more, 1)]))
    none = read(cache, int32([[0]]), latent[:1], rope[:1], [0], [1], [1], more=more)
    assert same(none["full_k_pe"], torch.zeros(more, 1))
    no_slot = read(cache, int32([]).view(0, 1), latent[:0], rope[:0], [], [], [], more=more)
    assert same(no_slot["full_compressed_kv"], torch.zeros(more, 1))


# ---- decode_rows by hand -------------------------------------------------------------------------


@pytest.fixture(params=[*ROLES, *FAMILIES])
def decode_rows(request):
    """(query, prefill_out, decode_out, encoder, decoder, this_time) -> the five outputs, by name."""

    def run(query, prefill_out, decode_out, encoder, decoder, this_time):
        ids = [slot for slot, count in enumerate(this_time) for _ in range(count)]
        tokens, room, slots = len(query), len(decode_out), len(encoder)
        inputs = {
            "query": query,
            "prefill_out": prefill_out,
            "decode_out": decode_out,
            "seq_lens_encoder": int32(encoder),
            "seq_lens_decoder": int32(decoder),
            "seq_lens_this_time": int32(this_time),
            "cu_seqlens_q": prefix_sum(this_time),
            "batch_id_per_token": int32(ids + [-1] * (tokens - len(ids))),
        }
        if request.param in ROLES:
            return oracle_for("decode_rows", request.param).run(inputs, None)
        shapes = {
            "cu_seqlens_q_decode": ((slots + 1,), torch.int32),
            "batch_id_per_decode_token": ((room,), torch.int32),
            "packed_query": ((room, *query.shape[1:]), query.dtype),
            "merged": (tuple(prefill_out.shape), prefill_out.dtype),
            "cache_seqlens": ((slots,), torch.int32),
        }
        return production_path(request, "decode_rows")(inputs, shapes)

    return run


def by_token(values, heads=2, width=3):
    """[n, H, V]: every element of a token holds its value."""
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).repeat(1, heads, width)


def test_decode_tokens_are_packed_and_merged(decode_rows):
    # Slots: draft of two on 30, continued chunk of one on 5, paused, idle, decode on 9, first chunk of two.
    # Tokens: 0 and 1 the draft's, 2 the chunk's, 3 the decode row's, 4 and 5 the first chunk's, 6 padding.
    got = decode_rows(
        by_token([20, 21, 22, 23, 24, 25, NAN], width=4),
        by_token([NAN, NAN, 2, NAN, 4, 5, NAN]),
        by_token([10, 11, 13]),
        [0, 1, 0, 0, 0, 2],
        [30, 5, 7, 0, 9, 0],
        [2, 1, 0, 0, 1, 2],
    )
    assert same(got["cu_seqlens_q_decode"], int32([0, 2, 2, 2, 2, 3, 3]))
    assert same(got["batch_id_per_decode_token"], int32([0, 0, 4]))
    assert same(got["packed_query"], by_token([20, 21, 23], width=4))
    assert same(got["merged"], by_token([10, 11, 2, 13, 4, 5, 0]))
    assert same(got["cache_seqlens"], int32([32, 0, 0, 0, 10, 0]))


def test_a_long_draft_is_packed_and_merged_to_its_last_token(decode_rows):
    # FastDeploy's B23 at the widths of its kernel: beyond 4 tokens at 128, 6 at 192, 8 at 256.
    for width in (64, 128, 192, 256):
        got = decode_rows(
            by_token([NAN, *range(12, 21)], 1, 24),
            by_token([1, *[NAN] * 9], 1, width),
            by_token(range(2, 11), 1, width),
            [1, 0],
            [0, 30],
            [1, 9],
        )
        assert same(got["packed_query"], by_token(range(12, 21), 1, 24))
        assert same(got["merged"], by_token(range(1, 11), 1, width))
        assert got["batch_id_per_decode_token"].tolist() == [1] * 9
        assert got["cache_seqlens"].tolist() == [0, 39]


def test_strided_tensors_of_any_width_are_copied(decode_rows):
    query, prefill, decode = (torch.full((3, 7, 130), NAN) for _ in range(3))
    query[1, :5, :30], prefill[0, :5, :80], decode[0, :5, :80] = 3.5, 1.5, 2.5
    got = decode_rows(query[:, :5, :30], prefill[:, :5, :80], decode[:1, :5, :80], [1, 0], [4, 4], [1, 1])
    assert same(got["packed_query"], by_token([3.5], 5, 30))
    assert same(got["merged"], by_token([1.5, 2.5, 0], 5, 80))


@pytest.mark.parametrize("slots", [0, 1, 3])
@pytest.mark.parametrize("padding", [0, 5])
def test_steps_without_a_token_decide_every_slot_and_place(decode_rows, slots, padding):
    nothing = by_token([NAN] * padding)
    got = decode_rows(nothing, nothing, nothing, [0] * slots, [5] * slots, [0] * slots)
    assert same(got["cu_seqlens_q_decode"], torch.zeros(slots + 1, dtype=torch.int32))
    assert same(got["batch_id_per_decode_token"], torch.full((padding,), -1, dtype=torch.int32))
    assert same(got["packed_query"], torch.zeros(padding, 2, 3))
    assert same(got["merged"], torch.zeros(padding, 2, 3))
    assert same(got["cache_seqlens"], torch.zeros(slots, dtype=torch.int32))


def test_room_behind_the_last_decode_token_is_nobodys(decode_rows):
    # A captured graph has room for its largest step, here without a padding token.
    query, prefill = by_token([20, 21, 22]), by_token([NAN, 1, NAN])
    got = decode_rows(query, prefill, by_token([10, 12, NAN, NAN]), [0, 1, 0], [4, 4, 6], [1, 1, 1])
    assert same(got["batch_id_per_decode_token"], int32([0, 2, -1, -1]))
    assert same(got["packed_query"], by_token([20, 22, 0, 0]))
    assert same(got["merged"], by_token([10, 1, 12]))
    more = by_token([NAN] * 200)
    got = decode_rows(by_token([20]), by_token([1]), more, [1], [0], [1])
    assert got["batch_id_per_decode_token"].tolist() == [-1] * 200
    assert same(got["merged"], by_token([1]))


@pytest.mark.parametrize("decode_rows", FAMILIES, indirect=True)
@pytest.mark.parametrize("room", [0, 1, 3])
def test_decode_tokens_beyond_the_room_are_left_out(decode_rows, room):
    # Fewer places than decode tokens are refused by the contract; still nothing leaves its tensor.
    query, prefill = by_token([20, 21, 22, 23, 24]), by_token([NAN, NAN, 2, NAN, NAN])
    got = decode_rows(query, prefill, by_token([10, 11, 13][:room]), [0, 1, 0], [4, 4, 6], [2, 1, 2])
    assert got["cu_seqlens_q_decode"].tolist() == [0, 2, 2, 4]
    assert got["batch_id_per_decode_token"].tolist() == [0, 0, 2][:room]
    assert same(got["packed_query"], by_token([20, 21, 23][:room]))
    merged = {0: [0, 0, 2, 0, 0], 1: [10, 0, 2, 0, 0], 3: [10, 11, 2, 13, 0]}[room]
    assert same(got["merged"], by_token(merged))


def test_merged_in_place_only_decode_tokens_are_written():
    pytest.importorskip("triton")
    from harness.paths.triton.decode_rows import merge_decode_rows

    # A chunk, a draft of two of which one has a place, padding.
    merged = by_token([1, 2, 3, 4])
    merge_decode_rows(None, by_token([10]), int32([0, 1, 3]), int32([0, 0, 2]), int32([0, 1, 1, -1]), merged)
    assert same(merged, by_token([1, 10, 3, 4]))


# ---- on the harness's batches --------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5", "paused:16"]),
    st.integers(1, 20).map("prefill:{}".format),
    st.integers(1, 40).map("decode:{}".format),
    st.tuples(st.integers(1, 40), st.integers(1, 20)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=6).map(",".join), st.sampled_from(["", ",pad:3"])
)
DTYPE = st.sampled_from(["bf16", "fp16", "fp32"])


def references_agree(batch):
    """Whether the two references of a batch's operator give the same bits."""
    layer = batch.layers[0]
    inputs = {**layer.tensors, **layer.attributes}
    one, other = (oracle_for(batch.operator.name, role).run(inputs, None) for role in ROLES)
    return all(same(one[spec.name], other[spec.name]) for spec in batch.operator.outputs)


@settings(max_examples=60, deadline=None)
@given(ROWS, DTYPE, st.integers(1, 7), st.sampled_from(["shuffled", "reversed"]))
def test_the_references_of_the_gather_agree(make_batch, rows, dtype, block, pages):
    text = f"read_cache_interleave/{rows}/model=minicpm3-4b,dtype={dtype},block={block},pages={pages}"
    assert references_agree(make_batch(text))


@settings(max_examples=60, deadline=None)
@given(ROWS, DTYPE, st.sampled_from(["nan", "finite", "zero"]))
def test_the_references_of_packing_and_merge_agree(make_batch, rows, dtype, poison):
    assert references_agree(make_batch(f"decode_rows/{rows}/heads=2,dtype={dtype},poison={poison}"))


SMALL = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2/model=minicpm3-4b"
CASES = [
    f"read_cache_interleave/{SMALL},block=16",
    f"read_cache_interleave/{SMALL},block=3,dtype=fp16,strided=0",
    f"decode_rows/{SMALL},heads=5",
    f"decode_rows/{SMALL},heads=2,dtype=fp32,strided=0",
    *(f"{name}/{rows}" for name in MINE for rows in ("", "idlex3", "paused:5", "pad:3", "idle,pad:9")),
]


@pytest.mark.parametrize("text", CASES)
def test_the_kernels_pass_every_check_they_are_not_exempt_from(text, launched, every_result):
    pytest.importorskip("triton")
    from harness.paths.triton import decode_rows, read_cache_interleave

    operator = contract_of(parse(text))
    (path,) = {"decode_rows": decode_rows, "read_cache_interleave": read_cache_interleave}[
        operator.name
    ].PATHS
    launch = launched(text, path)
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {result.name for result in results}


@pytest.mark.parametrize(("place", "token", "row"), [(0, "1", "1"), (2, "3", "1"), (3, "8", "")])
def test_a_wrong_selection_is_reported_by_token(place, token, row, launched):
    # Told by the tokens that are packed there; behind the last lie those of padding.
    pytest.importorskip("triton")
    from dataclasses import replace

    from harness.paths.triton import decode_rows

    (path,) = decode_rows.PATHS

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        outputs["batch_id_per_decode_token"][place] = 0
        outputs["packed_query"][place, 1] = 0.5

    launch = launched("decode_rows/prefill:1,draft:5+3,prefill:4,pad:1/heads=2", replace(path, run=run))
    failed = [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]
    assert [(item.tensor, item.where.tokens, item.where.rows, item.where.heads) for item in failed] == [
        ("batch_id_per_decode_token", token, row, ""),
        ("packed_query", token, row, "1"),
    ]


# ---- the contracts -------------------------------------------------------------------------------


def test_a_case_without_a_table_has_no_cached_token(make_batch):
    layer = make_batch("read_cache_interleave/prefill:5,idle/table=none,model=minicpm3-4b").layers[0]
    assert "block_tables" not in layer.tensors
    assert layer.attributes["block_tables"] is None
    for rows in ("hit:5+3", "prefill:5,decode:3", "prefill:5,paused:3"):
        with pytest.raises(CaseError, match="table=none takes rows without any"):
            contract_of(parse(f"read_cache_interleave/{rows}/table=none"))


@pytest.mark.parametrize(("poison", "value"), [("finite", 16384.0), ("zero", 0.0)])
def test_unselected_tokens_hold_the_poison_that_is_asked_for(make_batch, poison, value):
    text = "decode_rows/hit:6+2,decode:9,pad:1/heads=2"
    plain, other = (make_batch(name).layers[0].tensors for name in (text, f"{text},poison={poison}"))
    assert bool(plain["prefill_out"][2].isnan().all())
    assert bool((other["prefill_out"][2] == value).all())
    assert torch.equal(plain["prefill_out"][:2], other["prefill_out"][:2])
    # Of the packed outputs one is a token's.
    assert torch.equal(plain["decode_out"][0], other["decode_out"][0])
    for name, real in (("prefill_out", slice(2)), ("decode_out", slice(1))):
        assert bool(plain[name][real].isfinite().all())
        # Padding is NaN whatever the poison.
        assert bool(other[name][-1].isnan().all())


def test_decode_outputs_are_the_tokens_own_wherever_they_are_packed(make_batch):
    # The same rows among others: what a token holds depends on its sequence and position alone.
    texts = ("draft:9+2.k3,decode:5.k4", "prefill:2.k1,draft:9+2.k3,hit:5+1.k2,decode:5.k4,pad:2")
    few, many = (make_batch(f"decode_rows/{rows}/heads=2").layers[0].tensors for rows in texts)
    assert few["decode_out"].shape[0] == 3
    assert many["decode_out"].shape[0] == 5
    assert torch.equal(few["decode_out"], many["decode_out"][:3])
    assert bool(many["decode_out"][3:].isnan().all())


@pytest.mark.parametrize("name", MINE)
def test_every_exemption_names_a_check_and_a_reason(name):
    exempt = operators()[name].exempt
    assert set(exempt) <= set(checks())
    assert all(len(reason) > 20 for reason in exempt.values())


def test_work_counts_every_byte_once():
    case = parse("read_cache_interleave/decode:100,hit:6+2,prefill:3")
    # 8 + 3 keys of 576 bf16 values, read and written.
    assert operators()[case.operator].work(case, case.layers[0]).bytes == 11 * 576 * 2 * 2
    case = parse("decode_rows/decode:100,hit:6+2,pad:4/heads=2")
    # A query of 2 x 192 bf16 values read, 5 packed; 3 outputs of 2 x 128 read, 7 written; an id of each.
    assert operators()[case.operator].work(case, case.layers[0]).bytes == 6 * 768 + 10 * 512 + (7 + 5) * 4
