"""A whole step of one layer: worked by hand, against itself in pieces, and where nothing may happen."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import parse
from cases.contract import contract_of, operators
from cases.suite import load_suite
from harness.budgets import BUDGETS, judge_rows, layer_budgets, lse_budgets, row_errors
from harness.checks import checks
from harness.data import CODE_COLUMNS, ProjectedSource, Source
from harness.footprint import required_bytes
from harness.tensors import DTYPES
from harness.verdict import Status
from references.oracle import AGREEMENT, Precision, oracle_for

ROLES = ("definition", "derivation")
MODELS = ("deepseek-v3", "glm-4.7-flash", "minicpm3-4b", "mistral-small-4")
MODES = ("planted", "randn", "flat", "peaked", "huge", "deep", "tiny")
SMALL = "model=minicpm3-4b,heads=2"


def step(inputs, role, precision=None):
    return oracle_for("mla_step", role).run(inputs, precision)


def inputs_of(batch):
    return {**batch.layers[0].tensors, **batch.layers[0].attributes}


def written(outputs):
    """Physical row -> bytes of what a step leaves there."""
    writes = outputs["latent_cache"]
    values = writes.values.contiguous().view(torch.uint8).tolist()
    return dict(zip(writes.rows.tolist(), values, strict=True))


@pytest.fixture(scope="module")
def triton_step():
    """Runs the production path on tensors by name; returns its output, the cache is written in place."""
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    def run(inputs, case):
        (layer,) = case.layers
        shape = (len(inputs["q_nope"]), layer.num_attention_heads, layer.v_head_dim)
        out = torch.full(shape, torch.nan, dtype=inputs["q_nope"].dtype)
        scratch = {
            name: torch.zeros(size, dtype=getattr(torch, dtype))
            for name, (size, dtype) in mla_step.workspace(case).items()
        }
        mla_step.run(inputs, {"out": out}, scratch)
        return out

    return run


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_step_worked_by_hand(role):
    # One head, N = R = V = 2, D = 1, blocks of two tokens. Row 0 decodes with one token cached, row 1 is a
    # first chunk of two, the last token is padding. W_UK swaps the columns of a latent, W_UV doubles them.
    nan = math.nan
    cache = torch.full((2, 1, 2, 3), nan)
    cache[1, 0, 0] = torch.tensor([1.0, 0.0, 2.0])
    inputs = {
        "q_nope": torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[0.0, 1.0]], [[nan, nan]]]),
        "q_pe": torch.tensor([[[1.0]], [[5.0]], [[0.0]], [[nan]]]),
        "compressed_kv": torch.tensor([[0.0, 1.0], [2.0, 2.0], [4.0, 0.0], [nan, nan]]),
        "k_pe": torch.tensor([[3.0], [1.0], [1.0], [nan]]),
        "w_uk": torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]),
        "w_uv": torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]),
        "latent_cache": cache,
        "block_tables": torch.tensor([[1, 9], [0, 9]], dtype=torch.int32),
        "seq_lens_encoder": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens_decoder": torch.tensor([1, 0], dtype=torch.int32),
        "seq_lens_this_time": torch.tensor([1, 2], dtype=torch.int32),
        "softmax_scale": 0.5,
        "window": 0,
    }
    got = step(inputs, role)
    # Row 0: keys [0, 1 | 2] and [1, 0 | 3], logits 0.5 (2 + 2) and 0.5 (1 + 3): equal.
    # Row 1: its first token sees itself alone. Its second has keys [2, 2 | 1] and [0, 4 | 1] and logits 1, 2.
    first = 1 / (1 + math.e)
    expected = [[1.0, 1.0], [4.0, 4.0], [4 * first + 8 * (1 - first), 4 * first], [0.0, 0.0]]
    assert got["out"].squeeze(1).tolist() == [pytest.approx(row) for row in expected]
    assert got["latent_cache"].rows.tolist() == [3, 0, 1]
    assert got["latent_cache"].values.tolist() == [[0, 1, 3], [2, 2, 1], [4, 0, 1]]


def test_what_logits_may_be_moved_by_is_worked_by_hand():
    # Two keys whose first column agrees: its error moves both logits alike. Rope columns are not rounded.
    inputs = {
        "q_nope": torch.tensor([[[7.0, 3.0]]]),
        "q_pe": torch.tensor([[[5.0]]]),
        "compressed_kv": torch.tensor([[1.0, 2.0]]),
        "k_pe": torch.tensor([[4.0]]),
        "w_uk": torch.eye(2)[None],
        "w_uv": torch.eye(2)[None],
        "latent_cache": torch.tensor([[[[1.0, -1.0, 8.0], [0.0, 0.0, 0.0]]]]),
        "block_tables": torch.tensor([[0]], dtype=torch.int32),
        "seq_lens_decoder": torch.tensor([1], dtype=torch.int32),
        "seq_lens_this_time": torch.tensor([1], dtype=torch.int32),
        "softmax_scale": 0.5,
        "window": 0,
    }
    got = step(inputs, "definition")
    assert got["logit_spread"].item() == 0.5 * 3.0 * 2.0
    # 0.5 (7 - 3 + 40) = 22, more than 0.5 sqrt(49 + 9 + 1600).
    assert got["logit_magnitude"].item() == 22.0


# ---- the references ------------------------------------------------------------------------------

ROW = st.one_of(
    st.sampled_from(["idle", "paused:5", "paused:16"]),
    st.integers(1, 20).map("prefill:{}".format),
    st.integers(1, 40).map("decode:{}".format),
    st.tuples(st.integers(1, 40), st.integers(1, 20)).map(lambda pair: "hit:{}+{}".format(*pair)),
    st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda pair: "draft:{}+{}".format(*pair)),
)
ROWS = st.builds(
    "{}{}".format, st.lists(ROW, min_size=1, max_size=5).map(",".join), st.sampled_from(["", ",pad:3"])
)


def largest_difference(inputs):
    one, other = (step(inputs, role)["out"] for role in ROLES)
    return float(row_errors(one, other).largest.amax()) if one.numel() else 0.0


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sampled_from(list(DTYPES)), st.integers(1, 17))
def test_the_references_agree(make_batch, rows, dtype, block):
    inputs = inputs_of(make_batch(f"mla_step/{rows}/{SMALL},dtype={dtype},block={block}"))
    assert largest_difference(inputs) <= AGREEMENT
    one, other = (written(step(inputs, role)) for role in ROLES)
    assert one == other


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_the_references_agree_in_every_mode(model, mode, make_batch):
    text = f"mla_step/draft:30+3,hit:64+7,prefill:5,decode:90/heads=2,model={model},data={mode}"
    assert largest_difference(inputs_of(make_batch(text))) <= AGREEMENT


# ---- the data ------------------------------------------------------------------------------------


def projected(mode, model, length, dtype="bf16"):
    """Logits of the query at position length - 1 for keys 0 to length, as stored: [H, length + 1]."""
    layer = parse(f"mla_step/decode:1/model={model},heads=16,dtype={dtype}").layers[0]
    source, device = ProjectedSource(layer, mode, 0), torch.device("cpu")
    positions = torch.arange(length + 1)
    keys, at = torch.zeros_like(positions), torch.tensor([length - 1])
    stored = DTYPES[dtype]
    rows = Source(layer, mode, 0).cache_rows(keys, positions).to(stored).double()
    query = source.queries(keys[at], keys[at], at, keys[at])[0].to(stored).double()
    w_uk = source.w_uk(device).to(stored).double()
    nope, rank = layer.qk_nope_head_dim, layer.kv_lora_rank
    k_nope = torch.einsum("hnr,kr->hkn", w_uk, rows[:, :rank])
    logits = torch.einsum("hn,hkn->hk", query[:, :nope], k_nope) + query[:, nope:] @ rows[:, rank:].T
    return logits * layer.softmax_scale


@pytest.mark.parametrize("length", [3, 5, 33, 64, 300])
@pytest.mark.parametrize("model", MODELS)
def test_planted_boundary_keys_stand_out_after_projection(model, length):
    logits = projected("planted", model, length)
    weights = torch.softmax(logits[:, :length], -1)
    assert 0.3 < float((weights[:, 0] + weights[:, -1]).mean()) < 0.7
    assert float(torch.softmax(logits, -1)[:, -1].mean()) > 0.5


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_numbers_of_every_dtype_and_differ_by_head(model):
    layer = parse(f"mla_step/decode:1/model={model},heads=3").layers[0]
    for mode in ("planted", "deep"):
        source = ProjectedSource(layer, mode, 0)
        for weight in (source.w_uk(torch.device("cpu")), source.w_uv(torch.device("cpu"))):
            for dtype in DTYPES.values():
                assert torch.equal(weight.to(dtype).float(), weight)
            assert not torch.equal(weight[0], weight[1])
    code = source.w_uv(torch.device("cpu"))[0, :, -CODE_COLUMNS:]
    assert torch.equal(code[-CODE_COLUMNS:].abs(), torch.eye(CODE_COLUMNS))
    assert not code[:-CODE_COLUMNS].any()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("model", MODELS)
def test_deep_logits_are_near_the_stated_one(model, dtype):
    logits = projected("deep", model, 100, dtype)
    assert float((logits / -6.0e4 - 1).abs().max()) < 0.01
    assert float(logits.std(-1).min()) > 0.03


def test_randn_logits_and_peaks_are_as_stated():
    assert 2.5 < float(projected("randn", "deepseek-v3", 500).std()) < 3.5
    assert float(projected("flat", "deepseek-v3", 500).std()) < 0.1
    peaked = projected("peaked", "deepseek-v3", 200)[:, :200].softmax(-1)
    assert float(peaked.amax(-1).min()) > 0.99


def test_memory_is_foreseen(make_batch):
    text = "mla_step/draft:30+3,hit:64+17,prefill:5,decode:100/heads=8"
    held = sum(len(buffer.raw) for buffer in make_batch(text).layers[0].inputs.values())
    assert required_bytes(parse(text), contract_of(parse(text)), "cpu") > 2 * held


# ---- budgets -------------------------------------------------------------------------------------


def test_a_whole_steps_budget_is_worked_by_hand():
    budget, spread = torch.tensor(4e-3, dtype=torch.float64), torch.tensor([0.0, 2.0], dtype=torch.float64)
    plain, moved = layer_budgets("bf16", budget, spread).tolist()
    assert plain == pytest.approx(4e-3 * math.sqrt(1.5))
    assert moved == pytest.approx(math.hypot(4e-3 * math.sqrt(1.5), 3 * 2.0**-8 / math.sqrt(6) * 2))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_both_forms_emulated_stay_within_the_budget(dtype, model, make_batch):
    inputs = inputs_of(make_batch(f"mla_step/hit:64+17,decode:100/heads=4,model={model},dtype={dtype}"))
    exact = step(inputs, "definition")
    precision = Precision(weights=DTYPES[dtype], output=DTYPES[dtype])
    errors = [row_errors(step(inputs, role, precision)["out"], exact["out"]) for role in ROLES]
    # One rounds k_nope and v, the other the absorbed query and the latent output.
    assert not torch.equal(errors[0].relative_l2, errors[1].relative_l2)
    for error in errors:
        judged = judge_rows(
            dtype,
            error,
            errors[0].relative_l2,
            logit_error=lse_budgets(exact["logit_magnitude"]),
            logit_spread=exact["logit_spread"],
        )
        assert float((judged.error / judged.budget).max()) < 0.75
        # More roundings than an operator has: by the root of 4 to 2, less where logits are small.
        if dtype != "fp32":
            assert 0.4 < float(error.relative_l2.mean()) / BUDGETS[dtype].floor < 1.0


# ---- one sequence in pieces ----------------------------------------------------------------------


def pieces(make_batch, text, lengths):
    """The whole prompt's inputs, and those of each of its chunks on one cache, in order."""
    whole = inputs_of(make_batch(text))
    begin = 0
    for length in lengths:
        part = {
            **whole,
            **{
                name: whole[name][begin : begin + length]
                for name in ("q_nope", "q_pe", "compressed_kv", "k_pe")
            },
            "seq_lens_encoder": torch.tensor([length], dtype=torch.int32),
            "seq_lens_decoder": torch.tensor([begin], dtype=torch.int32),
            "seq_lens_this_time": torch.tensor([length], dtype=torch.int32),
        }
        yield (
            part,
            parse(
                f"mla_step/hit:{begin}+{length}/{SMALL}" if begin else f"mla_step/prefill:{length}/{SMALL}"
            ),
        )
        begin += length


@pytest.mark.parametrize("chunks", [(40,), (1, 39), (7, 9, 24), (15, 1, 16, 8), (16, 17, 7)])
@pytest.mark.parametrize("runner", [*ROLES, "triton"])
def test_a_prompt_in_chunks_equals_one_prefill(chunks, runner, make_batch, triton_step):
    text = f"mla_step/prefill:40/{SMALL},block=16"
    whole = inputs_of(make_batch(text))
    exact = step(whole, "definition")
    outs = []
    for part, case in pieces(make_batch, text, chunks):
        part["latent_cache"] = whole["latent_cache"]
        if runner == "triton":
            outs.append(triton_step(part, case))
            continue
        got = step(part, runner)
        outs.append(got["out"])
        flat = whole["latent_cache"].view(-1, whole["latent_cache"].shape[-1])
        flat[got["latent_cache"].rows] = got["latent_cache"].values
    errors = row_errors(torch.cat(outs), exact["out"])
    limit = AGREEMENT if runner != "triton" else 1.2e-2
    assert float(errors.relative_l2.max()) < limit
    # Every chunk left its rows as one prefill leaves them.
    flat = whole["latent_cache"].view(-1, whole["latent_cache"].shape[-1])
    writes = exact["latent_cache"]
    assert torch.equal(flat[writes.rows].view(torch.uint8), writes.values.contiguous().view(torch.uint8))


@pytest.mark.parametrize("runner", [*ROLES, "triton"])
def test_a_prefix_hit_equals_recomputing_the_prefix(runner, make_batch, triton_step):
    # Three rows share 32 tokens; the first computes all of its prompt, the others find the prefix.
    hit_text = f"mla_step/hit:32+5@sys,hit:32+9@sys,decode:32@sys/{SMALL},block=16"
    hit = make_batch(hit_text)
    inputs = inputs_of(hit)
    cache = inputs["latent_cache"].view(-1, inputs["latent_cache"].shape[-1])
    tables = inputs["block_tables"].long()
    assert torch.equal(tables[0, :2], tables[1, :2])
    prefix = cache[(tables[0, :2, None] * 16 + torch.arange(16)).flatten()]
    rank = inputs["compressed_kv"].shape[1]
    new = [5, 9, 1]
    starts = [0, 5, 14, 15]
    out = triton_step(inputs, parse(hit_text)) if runner == "triton" else step(inputs, runner)["out"]
    generator = torch.Generator().manual_seed(0)
    for row, length in enumerate(new):
        mine = slice(starts[row], starts[row + 1])
        # What the prefix asks does not matter to what follows it.
        old_nope = torch.randn(32, 2, 64, generator=generator).to(inputs["q_nope"].dtype)
        old_pe = torch.randn(32, 2, 32, generator=generator).to(inputs["q_pe"].dtype)
        alone = {
            **inputs,
            "q_nope": torch.cat([old_nope, inputs["q_nope"][mine]]),
            "q_pe": torch.cat([old_pe, inputs["q_pe"][mine]]),
            "compressed_kv": torch.cat([prefix[:, :rank], inputs["compressed_kv"][mine]]),
            "k_pe": torch.cat([prefix[:, rank:], inputs["k_pe"][mine]]),
            "latent_cache": torch.full_like(inputs["latent_cache"], torch.nan),
            "block_tables": inputs["block_tables"][row : row + 1],
            "seq_lens_encoder": torch.tensor([32 + length], dtype=torch.int32),
            "seq_lens_decoder": torch.tensor([0], dtype=torch.int32),
            "seq_lens_this_time": torch.tensor([32 + length], dtype=torch.int32),
        }
        if runner == "triton":
            recomputed = triton_step(alone, parse(f"mla_step/prefill:{32 + length}/{SMALL}"))
        else:
            recomputed = step(alone, runner)["out"]
        error = row_errors(out[mine], recomputed[32:]).relative_l2
        # Twice a step's budget where both round.
        assert float(error.max()) < (AGREEMENT if runner != "triton" else 2.4e-2)


# ---- the path ------------------------------------------------------------------------------------

CASES = [
    f"mla_step/draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2/{SMALL},block=16",
    f"mla_step/paused:7,idle,decode:40,prefill:5,hit:17+4,draft:30+3/{SMALL},block=16,strided=0,dtype=fp16",
    *(f"mla_step/{rows}/{SMALL}" for rows in ("", "idlex3", "paused:5", "pad:3", "idle,pad:9")),
    f"mla_step/decode:9,pad:1/{SMALL}",
    f"mla_step/hit:9+2,pad:1/{SMALL}",
]


@pytest.mark.parametrize("text", CASES)
def test_the_path_passes_every_check(text, launched, every_result):
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    launch = launched(text, mla_step.PATHS[0])
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds"} <= {result.name for result in results}


@pytest.mark.parametrize("rows", ["", "idlex3", "paused:5", "paused:20,idle"])
def test_a_step_without_a_token_leaves_every_byte(rows, launched):
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    launch = launched(f"mla_step/{rows}/{SMALL},block=16", mla_step.PATHS[0])
    (layer,) = launch.layers
    for name, before in layer.before.items():
        assert layer.batch.inputs[name].equals(before), name
    for buffer in (*layer.outputs.values(), *layer.workspace.values()):
        assert buffer.untouched_outside() or buffer is layer.outputs["latent_cache"]


@pytest.mark.parametrize(
    ("rows", "empty"),
    [
        (
            "decode:9,draft:20+3,idle,pad:2",
            ("key", "value", "query", "full_compressed_kv", "packed_nope", "decode_out"),
        ),
        ("prefill:4,hit:20+3,paused:4", ("absorbed", "latent_out", "decode_out")),
        ("paused:4,pad:3", ("key", "absorbed")),
    ],
)
def test_a_branch_without_rows_takes_no_memory(rows, empty):
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    shapes = mla_step.workspace(parse(f"mla_step/{rows}/{SMALL}"))
    assert all(math.prod(shapes[name][0]) == 0 for name in empty)
    # Histories of decode rows have no key (FastDeploy's B19).
    mixed = mla_step.workspace(parse(f"mla_step/decode:500,hit:6+2/{SMALL}"))
    assert mixed["key"][0][0] == 8


def test_scratch_of_decode_rows_follows_their_tokens():
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    def decode_bytes(rows):
        shapes = mla_step.workspace(parse(f"mla_step/{rows}/{SMALL}"))
        names = [
            name for name in shapes if name.startswith(("absorbed", "latent", "decode", "packed", "partial"))
        ]
        return sum(math.prod(shapes[name][0]) * getattr(torch, shapes[name][1]).itemsize for name in names)

    few = decode_bytes("decode:50,draft:30+3,prefill:4")
    assert few == decode_bytes("decode:50,draft:30+3,prefill:200")
    assert 2 * few == decode_bytes("decode:50x2,draft:30+3x2,prefill:4")


@pytest.mark.parametrize("room", [4, 5])
def test_a_step_with_fewer_decode_tokens_than_there_is_room_for(room, make_batch, triton_step):
    # As a captured graph is replayed: the workspace is that of a step with more.
    text = f"mla_step/draft:30+3,hit:17+4,idle,decode:40,pad:2/{SMALL},block=16"
    larger = parse(f"mla_step/draft:30+{room},hit:17+4,idle,idle,pad:{6 - room}/{SMALL},block=16")
    inputs = inputs_of(make_batch(text))
    before = inputs["latent_cache"].clone()
    fitting = triton_step(inputs, parse(text))
    inputs["latent_cache"].copy_(before)
    assert torch.equal(triton_step(inputs, larger), fitting)
    assert not fitting[8:].any()


def test_a_path_that_forgets_a_head_is_reported_with_a_steps_budget(launched):
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    (path,) = mla_step.PATHS

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        outputs["out"][2, 1] = outputs["out"][2, 0]

    launch = launched(f"mla_step/decode:5,prefill:3/{SMALL}", replace(path, run=run))
    failed = [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]
    assert [(item.tensor, item.where.tokens, item.where.heads) for item in failed] == [("out", "2", "1")]
    assert "a whole step's" in failed[0].budget_source


def test_blocks_and_widths_the_kernels_do_not_take_are_refused():
    pytest.importorskip("triton")
    from harness.paths.triton import mla_step

    assert "block_size" in mla_step.supports(parse(f"mla_step/decode:5/{SMALL},block=48"))
    assert mla_step.supports(parse(f"mla_step/decode:5/{SMALL}")) is None


LAYOUTS = [f"L{number:02}" for number in (*range(1, 32), 42, 43, 44, 47)]
LEFT_TO_OTHERS = ["L03", "L13", "L29", "L30", "L43", "L44"]
"""Without a table: suite read. Long rows: suite smoke. Far blocks and a graph: a GPU."""


def test_suite_edge_says_of_every_layout_which_cases_show_it():
    items = load_suite("edge").cases
    whole = _spelled_out(" ".join(item.why for item in items))
    assert [layout for layout in LAYOUTS if layout not in whole] == []
    in_ci = _spelled_out(" ".join(item.why for item in items if "ci" in item.marks))
    assert [layout for layout in LAYOUTS if layout not in in_ci] == LEFT_TO_OTHERS


def _spelled_out(text):
    """`L04-L07` as the four layouts it names."""
    ranges = re.findall(r"L(\d\d)-L(\d\d)", text)
    return text + "".join(f" L{n:02}" for a, b in ranges for n in range(int(a), int(b) + 1))


def test_work_counts_each_branch_in_its_own_form():
    case = parse("mla_step/decode:1/model=minicpm3-4b,heads=1")
    work = operators()["mla_step"].work(case, case.layers[0])
    # N = V = 64, D = 32, R = 256: one token, two keys.
    assert work.flops == 2 * (256 * 128 + 2 * (288 + 256))
    assert work.bytes == 2 * (128 * 256 + 64 + 32 + 64 + 3 * 288)
    case = parse("mla_step/prefill:2/model=minicpm3-4b,heads=1")
    assert operators()["mla_step"].work(case, case.layers[0]).flops == 2 * (2 * 256 * 128 + 3 * 160)
