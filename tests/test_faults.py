"""Named faults: each changes an answer, an empty step has none, and no two names stand for one answer."""

import json

import pytest
import torch

from cases import parse
from cases.contract import Judge, contract_of, operators
from harness.batch import materialise
from harness.listing import LISTINGS
from references.faults import Question, Unwritten, faults
from references.faults._attention import OPERATORS, of
from references.faults._tokens import anew, begun
from references.faults.metadata import planned, windowed
from references.faults.selection import selected
from references.oracle import Writes, oracle_for

MODEL = "model=minicpm3-4b,heads=3"
"""Narrow, and with more than two heads: the one before is not the one behind."""

GROUPS = "model=ernie-4.5-21b-a3b,heads=6,kv_heads=2"
LAYERS = "model=ernie-4.5-21b-a3b,heads=8,kv_heads=2+4,layers=2"
"""The last layer is asked; what is kept of the first is not its own."""

PACKED = "model=deepseek-v3,heads=2,cache=packed"

ROWS = "hit:70+5,draft:100+6,idle,decode:511,paused:9,prefill:37,hit:64+66,decode:129,pad:3"
EMPTY = "idle,paused:9"

CASES = {
    "mla_decode": [
        f"{MODEL},block=16,splits=4,poison=zero,tail=0",
        f"{MODEL},block=16,strided=1,data=deep,poison=zero",
        f"{MODEL},block=16,pool=2000,pages=sequential,poison=zero,tail=0",
    ],
    "prefill_attention": [MODEL, f"{MODEL},strided=1,data=deep", "model=deepseek-v3,heads=2"],
    "mla_step": [
        f"{MODEL},block=16,poison=zero,tail=0",
        f"{MODEL},block=16,strided=1,data=deep,poison=zero",
        f"{MODEL},block=16,pool=2000,pages=sequential,poison=zero,tail=0",
        "model=deepseek-v3,heads=2,poison=zero",
        f"{MODEL},block=16,window=40,poison=zero,tail=0",
    ],
    "sparse_decode": [
        "heads=3,block=16,topk=100,splits=4",
        "heads=3,topk=100,strided=1,data=deep",
        "heads=3,topk=1000,block=128,pages=sequential",
    ],
    "sparse_prefill": ["heads=3,topk=100", "heads=3,topk=100,strided=1,data=deep"],
    "latent_cache_write": [
        "model=minicpm3-4b,block=16,poison=zero,tail=0",
        "model=minicpm3-4b,block=16,strided=1,data=tiny,pages=sequential,pool=2000,poison=zero,tail=0",
    ],
    "packed_cache_write": [
        "block=16,poison=zero,tail=0",
        "block=16,strided=1,scale_fmt=ue8m0,pages=sequential,pool=2000,poison=zero,tail=0",
    ],
    "read_cache_interleave": [
        "model=minicpm3-4b,block=16,poison=zero,tail=0",
        "model=minicpm3-4b,block=16,strided=1,data=tiny,pages=sequential,pool=2000,poison=zero,tail=0",
    ],
    "rope": [MODEL, "model=deepseek-v3,heads=3,strided=1", f"{MODEL},dtype=fp32"],
    "decode_rows": [MODEL, f"{MODEL},strided=1,data=tiny"],
    "merge_states": [MODEL, f"{MODEL},strided=1,data=deep", f"{MODEL},data=huge"],
    "position_ids": [""],
    "padding_offset": [""],
    "slot_mapping": ["block=16,tail=0", "block=16,strided=1,tail=-1"],
    "swa_indices": ["block=16,window=100,tail=0", "block=16,strided=1,tail=0"],
    "kv_b_split": ["model=minicpm3-4b,tp=2,heads=3", "model=glm-5,tp=2,heads=3"],
    "step_plan": ["block=16"],
    "static_attention": [
        "heads=3,block=16,topk=100",
        "heads=3,topk=100,strided=1,data=deep",
        "heads=3,topk=1000,block=128,pages=sequential,scale_fmt=ue8m0",
    ],
    "gqa_step": [
        f"{GROUPS},v_dim=64,block=16,poison=zero,tail=0",
        f"{GROUPS},v_dim=192,window=100,sink=learned,splits=4,block=16,poison=zero,tail=0",
        f"{GROUPS},block=16,strided=1,data=deep,poison=zero,pages=sequential,pool=2000,tail=0",
    ],
    "gqa_cache_write": [
        f"{GROUPS},v_dim=64,block=16,poison=zero,tail=0",
        f"{LAYERS},v_dim=192,block=16,strided=1,poison=zero,pages=sequential,pool=2000,tail=0",
    ],
    "qkv_split": [
        f"{GROUPS},v_dim=64,tp=2",
        "model=ernie-4.5-21b-a3b,heads=3,kv_heads=2,v_dim=64,tp=4",
        f"{LAYERS},v_dim=192,tp=2,strided=1",
    ],
    "launch_buffers": [LAYERS, GROUPS],
    "mla_logits": [],
}

SHOWN_BY = {
    ("mla_decode", "token-as-block"): "mla_decode/decode:100,decode:5x40/heads=2,block=16,tail=0,strided=0",
    (
        "mla_decode",
        "block-size-ignored",
    ): "mla_decode/decode:100,decode:5x40/heads=2,block=16,tail=0,strided=0",
    ("mla_decode", "table-of-the-token"): "mla_decode/idle,decode:40,decode:30/heads=2,tail=0",
    ("mla_step", "token-as-block"): f"mla_step/decode:100,decode:5x40/{MODEL},block=16,tail=0,strided=0",
    ("mla_step", "block-size-ignored"): f"mla_step/decode:100,decode:5x40/{MODEL},block=16,tail=0,strided=0",
    ("read_cache_interleave", "token-as-block"): (
        "read_cache_interleave/hit:100+1,decode:5x40/model=minicpm3-4b,block=16,tail=0,strided=0"
    ),
    ("sparse_decode", "pages-of-64"): "sparse_decode/decode:500,decode:300/heads=2,block=128,topk=900",
    ("latent_cache_write", "row-0-unwritten"): "latent_cache_write/prefill:9/pages=sequential",
    ("packed_cache_write", "row-0-unwritten"): "packed_cache_write/prefill:9/pages=sequential",
    ("sparse_decode", "row-0-is-no-key"): "sparse_decode/decode:100/heads=2,pages=sequential,topk=200",
    ("read_cache_interleave", "history-taken-for-new"): (
        "read_cache_interleave/hit:5+70,prefill:200/model=minicpm3-4b"
    ),
    ("read_cache_interleave", "position-in-sequence"): (
        "read_cache_interleave/hit:5+70,prefill:200/model=minicpm3-4b"
    ),
    ("read_cache_interleave", "neighbours-tokens"): (
        "read_cache_interleave/draft:5+90,hit:5+70,prefill:80,draft:9+90/model=minicpm3-4b"
    ),
    ("read_cache_interleave", "both-sources-added"): "read_cache_interleave/hit:5+70/model=minicpm3-4b",
    ("read_cache_interleave", "rows-limited"): (
        "read_cache_interleave/prefill:2x40,hit:5+3/model=minicpm3-4b,tail=0"
    ),
    (
        "read_cache_interleave",
        "search-too-short",
    ): "read_cache_interleave/hit:5+3x5,draft:9+60/model=minicpm3-4b",
    (
        "read_cache_interleave",
        "tokens-by-key",
    ): "read_cache_interleave/hit:5+3x5,draft:9+60/model=minicpm3-4b",
    ("mla_decode", "rows-limited"): "mla_decode/decode:5x40/heads=2",
    ("mla_decode", "splits-limited"): "mla_decode/decode:200/heads=2,splits=8",
    ("sparse_decode", "splits-limited"): "sparse_decode/decode:300/heads=2,topk=200,splits=8",
    ("prefill_attention", "rows-limited"): "prefill_attention/prefill:2x40/heads=2",
    ("merge_states", "columns-rounded-down"): "merge_states/hit:5+7/heads=3,v_dim=80",
    ("rope", "neighbours-position"): f"rope/decode:40,draft:300+3/{MODEL}",
    ("rope", "position-off-by-one"): f"rope/decode:40,draft:300+3/{MODEL}",
    ("rope", "position-clamped"): f"rope/decode:5000/{MODEL}",
    ("rope", "zeros-where-nothing-turns"): "rope/decode:40/model=kimi-linear-48b,heads=2",
    ("rope", "launch-limited"): f"rope/prefill:200/{MODEL}",
    ("rope", "launch-rounded-down"): f"rope/prefill:200/{MODEL}",
    ("position_ids", "slots-limited"): "position_ids/decode:5x1030",
    ("slot_mapping", "slots-limited"): "slot_mapping/decode:5x1030",
    ("swa_indices", "slots-limited"): "swa_indices/decode:5x1030",
    ("padding_offset", "sums-begin-anew"): "padding_offset/decode:5x1030",
    ("padding_offset", "sums-carry-one-block"): "padding_offset/decode:5x600",
    ("padding_offset", "slots-limited"): "padding_offset/decode:5x300",
    ("padding_offset", "empty-step-unwritten"): "padding_offset/pad:3",
    ("decode_rows", "sums-begin-anew"): f"decode_rows/decode:5x300/{MODEL}",
    ("decode_rows", "sums-carry-one-block"): f"decode_rows/decode:5x600/{MODEL}",
    ("decode_rows", "slots-limited"): f"decode_rows/decode:5x257/{MODEL}",
    ("decode_rows", "token-as-slot"): f"decode_rows/draft:5+3x4/{MODEL}",
    ("decode_rows", "launch-limited"): f"decode_rows/draft:5+3x50/{MODEL}",
    ("decode_rows", "launch-by-packed-tokens"): f"decode_rows/prefill:140,decode:5/{MODEL}",
    ("decode_rows", "empty-step-unwritten"): f"decode_rows/pad:3/{MODEL}",
    ("packed_cache_write", "row-stride-is-a-literal"): (
        "packed_cache_write/decode:4/model=minicpm3-4b,pages=sequential,pool=20,poison=zero"
    ),
    ("swa_indices", "window-of-none"): "swa_indices/decode:50/window=0",
    ("slot_mapping", "rows-32-bit"): (
        "slot_mapping/decode:63,draft:1022+4/block=1024,pool=2100000,pages=reversed"
    ),
    ("slot_mapping", "rows-32-bit-unsigned"): (
        "slot_mapping/decode:63,draft:1022+4/block=1024,pool=4200000,pages=reversed"
    ),
    ("mla_decode", "mask-of-the-last-token"): "mla_decode/draft:60+9/heads=2",
    ("static_attention", "empty-step-unwritten"): "static_attention/pad:3/heads=2,topk=5",
    ("static_attention", "empty-step-has-an-lse"): "static_attention/pad:3/heads=2,topk=5",
    ("gqa_step", "token-as-block"): f"gqa_step/decode:100,decode:5x40/{GROUPS},block=16,tail=0,strided=0",
    ("gqa_step", "block-size-ignored"): f"gqa_step/decode:100,decode:5x40/{GROUPS},block=16,tail=0,strided=0",
    ("gqa_step", "heads-of-the-first-layer"): f"gqa_step/decode:40/{LAYERS}",
    ("mla_logits", "positions-from-0"): f"mla_logits/prefill:9..decode:9/{MODEL}",
    ("mla_logits", "position-off-by-one"): f"mla_logits/prefill:9..decode:9/{MODEL}",
    ("gqa_cache_write", "rest-unwritten"): "gqa_cache_write/decode:4/model=mimo-v2-flash,heads=4,kv_heads=2",
    ("gqa_cache_write", "place-in-step"): f"gqa_cache_write/draft:300+3,decode:40/{GROUPS}",
    ("launch_buffers", "slots-limited"): f"launch_buffers/decode:5x40/{GROUPS}",
    ("launch_buffers", "sums-begin-anew"): f"launch_buffers/decode:5x300/{GROUPS}",
    ("qkv_split", "part-of-the-tile"): (
        "qkv_split//model=ernie-4.5-21b-a3b,heads=3,kv_heads=2,v_dim=66,tp=2"
    ),
    ("gqa_step", "hidden-keys-are-read"): f"gqa_step/decode:200/{GROUPS},window=40",
    ("gqa_step", "later-splits-lost"): f"gqa_step/decode:1087/{GROUPS},splits=17",
    ("gqa_step", "nothing-seen-is-nan"): f"gqa_step/hit:640+64/{GROUPS},window=5",
    ("gqa_step", "window-of-the-first-layer"): f"gqa_step/decode:40/{LAYERS},window=5+9",
    ("mla_step", "window-of-the-first-layer"): f"mla_step/decode:40/{PACKED},layers=2,window=5+9",
    ("mla_step", "scales-are-powers-of-two"): f"mla_step/decode:40,hit:9+5/{PACKED}",
    ("mla_step", "empty-step-unwritten"): f"mla_step/idle,pad:3/{MODEL}",
    ("step_plan", "slots-limited"): "step_plan/decode:5x40/block=64",
    ("step_plan", "length-without-the-new"): "step_plan/decode:64/block=16",
    ("step_plan", "sums-begin-anew"): "step_plan/decode:5x300",
    ("step_plan", "sums-carry-one-block"): "step_plan/decode:5x600",
    ("step_plan", "tiles-of-half-a-warp"): "step_plan/decode:100x16,decode:600x20/block=64",
    ("step_plan", "lone-slot-by-waves"): "step_plan/decode:640/block=16",
    ("step_plan", "one-decode-row-is-alone"): "step_plan/decode:9,prefill:5",
    ("step_plan", "smaller-of-equal-chunks"): "step_plan/decode:9,prefill:5",
    ("step_plan", "rows-without-a-cache-counted"): "step_plan/prefill:130,decode:5",
    ("step_plan", "maxima-of-one-warp"): "step_plan/decode:5x40,decode:60",
    ("step_plan", "paused-rows-among-the-longest"): "step_plan/decode:5,paused:90",
    ("step_plan", "empty-step-unwritten"): "step_plan/",
    ("step_plan", "launch-limited"): "step_plan/decode:300x40/block=16",
    ("step_plan", "launch-rounded-down"): "step_plan/decode:300x40/block=16",
    ("step_plan", "multiprocessors-ignored"): "step_plan/decode:832,decode:7488",
    ("step_plan", "multiprocessors-of-another-gpu"): "step_plan/decode:4000x20/block=64",
}
"""Cases for faults that no case of `CASES` shows."""

LEAVING = {
    ("kv_b_split", "keys-as-wide-as-values"): "kv_b_split//model=glm-5,heads=3",
    ("kv_b_split", "ranks-as-wide-as-the-model"): f"kv_b_split//{MODEL},tp=2",
    ("qkv_split", "tile-stored-whole"): "qkv_split//model=minicpm3-4b,heads=3,kv_heads=1,v_dim=72",
}
"""Faults that leave their tensors wherever they change something, with a case where they do."""

STAYING = {
    ("kv_b_split", "keys-as-wide-as-values"): f"kv_b_split//{MODEL}",
    ("kv_b_split", "ranks-as-wide-as-the-model"): f"kv_b_split//{MODEL},tp=1",
    ("qkv_split", "tile-stored-whole"): f"qkv_split//{GROUPS},v_dim=128",
}
"""Cases on which the same are right."""

TOKENS = (0, 4, 5, 6, 10, 11, 12, 40, 49, 100, -4, -3, -1)
"""Tokens of attention that are worked out: of every row of `ROWS`, drafts and padding among them."""


def question_of(text):
    case = parse(text)
    operator = contract_of(case)
    batch = materialise(case, operator, torch.device("cpu"), len(case.steps) - 1)
    first, inputs = (
        {**layer.tensors, **layer.attributes, "rounds_keys": False}
        for layer in (batch.layers[0], batch.layers[-1])
    )
    definition = oracle_for(operator.name, "definition")
    asked = None
    if operator.name in OPERATORS:
        asked = frozenset(token % batch.metadata.tokens for token in TOKENS if batch.metadata.tokens)
    first = first if len(batch.layers) > 1 else {}
    return Question(operator.name, inputs, lambda inputs: definition.run(inputs, None), asked, first=first)


def texts_of(operator):
    if operator == "mla_logits":
        # Its histories are computed by earlier steps: none can be asked for.
        return [f"mla_logits/prefill:9,idle,prefill:20,pad:3/{options}" for options in MODELS]
    return [f"{operator}/{ROWS}" + (f"/{options}" if options else "") for options in CASES[operator]]


@pytest.fixture(scope="module")
def asked():
    """Text of a case -> what its operator is asked, worked out once."""
    known = {}

    def of_text(text):
        if text not in known:
            known[text] = question_of(text)
        return known[text]

    return of_text


def everything_written(question, name, answer):
    """What stands in an output with an answer: the rest of a cache as it was, a number where nothing is."""
    if isinstance(answer, Writes):
        cache = question.inputs[name].clone()
        assert bool(((answer.rows >= 0) & (answer.rows < cache.numel() // cache.shape[-1])).all())
        cache.view(-1, cache.shape[-1])[answer.rows] = answer.values.to(cache.dtype)
        return cache.double()
    if isinstance(answer, Unwritten):
        mask = ~answer.written
        mask = mask.view(*mask.shape, *[1] * (answer.values.dim() - mask.dim()))
        return answer.values.double().masked_fill(mask, 12345.0)
    return answer.double()


def is_same(question, left, right):
    """Whether judges could not tell two answers apart, as far as they are asked for."""
    for spec in operators()[question.operator].outputs:
        if spec.judge is None or spec.name not in left:
            continue
        a, b = (everything_written(question, spec.name, answers[spec.name]) for answers in (left, right))
        if a.shape != b.shape:
            return False
        rounded = spec.judge in (Judge.ATTENTION, Judge.LAYER, Judge.LSE, Judge.STAGE)
        if rounded and question.asked is not None:
            a, b = a[sorted(question.asked)], b[sorted(question.asked)]
        exactly = {"rtol": 0.0, "atol": 0.0}
        tolerance = {"rtol": 1e-6, "atol": 1e-9} if rounded else exactly
        if spec.judge is Judge.STAGE:
            # A fault may turn by the table, in float32, where the definition has angles.
            tolerance = {"rtol": 1e-4, "atol": 1e-5}
        if not torch.allclose(a, b, equal_nan=True, **tolerance):
            return False
    return True


def names_of(operator):
    return sorted({fault.name for fault in faults() if operator in fault.operators})


def forms_of(operator, name):
    return [fault for fault in faults() if fault.name == name and operator in fault.operators]


def answers_of(question, fault):
    """What the operator answers with the mistake; None where it would leave a tensor, too."""
    try:
        return fault.apply(question)
    except IndexError:
        return None


def changes(question, fault):
    answers = answers_of(question, fault)
    return answers is not None and not is_same(question, answers, question.truth)


NAMED = [
    (operator, name)
    for operator in CASES
    for name in names_of(operator)
    # Only a cache of more than 2^32 elements shows it: one worked by hand, below.
    if name != "offsets-32-bit-unsigned" and (operator, name) not in LEAVING
]


def test_there_are_more_than_forty_faults():
    assert len({fault.name for fault in faults()}) >= 40


def test_every_operator_has_faults():
    assert set(CASES) == {operator for fault in faults() for operator in fault.operators}
    assert set(CASES) == set(operators())


def test_faults_are_listed_once_with_their_operators_and_forms():
    rows = {row["name"]: row for row in LISTINGS["faults"]("")}
    assert set(rows) == {fault.name for fault in faults()}
    assert set(rows["not-causal"]["operators"]) == {"mla_decode", "prefill_attention", "mla_step", "gqa_step"}
    assert rows["position-clamped"]["forms"] == [f"below {size}" for size in (2048, 4096, 8192, 32768)]
    assert json.dumps(list(rows.values()))


def test_forms_of_one_name_are_told_apart():
    seen = [(operator, fault.name, fault.form) for fault in faults() for operator in fault.operators]
    assert len(seen) == len(set(seen))


def test_a_fault_says_in_words_what_it_is():
    for fault in faults():
        assert fault.name == fault.name.lower().replace("_", "-").replace(" ", "-")
        assert fault.summary, fault.name
        assert not fault.summary.endswith("."), fault.name
        assert fault.source, fault.name


@pytest.mark.parametrize("operator", OPERATORS)
def test_attention_over_lists_is_the_definition(operator, asked):
    for text in texts_of(operator):
        question = asked(text)
        answer, tokens = of(question).answer(), sorted(question.asked)
        for name in ("out", "lse"):
            if name in question.truth:
                right = question.truth[name]
                assert torch.allclose(answer[name][tokens], right[tokens], rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize(
    ("text", "made"),
    [
        (text, made)
        for made, texts in (
            (planned, (f"step_plan/{ROWS}/block=16", "step_plan/decode:300/block=16", "step_plan/")),
            (selected, (f"decode_rows/{ROWS}/{MODEL}", f"decode_rows/pad:3/{MODEL}")),
            (windowed, (f"swa_indices/{ROWS}/block=16,window=100", f"swa_indices/{ROWS}/window=0")),
        )
        for text in texts
    ],
)
def test_what_faults_change_is_the_definition_where_nothing_is_changed(text, made):
    question = question_of(text)
    assert is_same(question, made(question), question.truth)


@pytest.mark.parametrize("upper", [True, False])
def test_halving_finds_the_last_thing_that_begins_at_or_before_a_place(upper):
    begins = torch.tensor([0, 0, 3, 3, 4, 9])
    assert begun(begins, torch.arange(9), upper=upper).tolist() == [1, 1, 1, 3, 4, 4, 4, 4, 4]
    assert begun(begins[:1], torch.arange(0), upper=upper).tolist() == []


def test_halving_sums_that_do_not_ascend_finds_what_its_middles_lead_to():
    begins = torch.tensor([0, 4, 1, 2, 3])
    found = [begun(begins, torch.arange(4), upper=upper).tolist() for upper in (True, False)]
    assert found == [[0, 2, 3, 4], [0, 2, 3, 3]]


def test_sums_begin_anew_behind_a_block_or_carry_the_block_before_it():
    sums = torch.tensor([0, 1, 3, 6, 10, 15])
    assert anew(sums, 2).tolist() == [0, 1, 3, 3, 7, 5]
    assert anew(sums, 2, 1).tolist() == [0, 1, 3, 6, 10, 12]


@pytest.mark.parametrize(("name", "lost"), [("last-tile-lost", -1), ("empty-last-tile", 1)])
def test_a_row_has_a_tile_less_or_more_where_tiles_are_rounded_wrongly(name, lost):
    # One slot: tiles of 64. 129 keys have three, 128 keys two.
    question = question_of(f"step_plan/decode:{128 if lost < 0 else 127}/block=16")
    right = int(question.truth["decoder_num_tiles"])
    form = "in the list alone" if lost < 0 else ""
    assert int(by_hand(name, question, form)["decoder_num_tiles"]) == right + lost


def test_a_rotation_that_is_cut_off_is_the_nearest_number_on_the_way_to_zero():
    question = question_of(f"rope/decode:40/{MODEL}")
    right, cut = (
        answers["q_pe"] for answers in (question.truth, by_hand("rounded-toward-zero", question, "both"))
    )
    rounded = right.to(torch.bfloat16).double()
    assert bool((cut.abs() <= right.abs()).all())
    assert bool((cut == cut.to(torch.bfloat16).double()).all())
    assert bool((torch.where(rounded.abs() <= right.abs(), cut == rounded, cut.abs() < rounded.abs())).all())


@pytest.mark.parametrize(("operator", "name"), NAMED)
def test_a_fault_changes_an_answer(operator, name, asked):
    texts = [SHOWN_BY[operator, name]] if (operator, name) in SHOWN_BY else texts_of(operator)
    assert any(changes(asked(text), fault) for text in texts for fault in forms_of(operator, name))


@pytest.mark.parametrize(("operator", "name"), LEAVING)
def test_a_fault_that_writes_or_reads_too_far_leaves_its_tensors_and_stays_where_all_fits(operator, name):
    forms, question = forms_of(operator, name), question_of(LEAVING[operator, name])
    assert any(answers_of(question, fault) is None for fault in forms)
    question = question_of(STAYING[operator, name])
    assert not any(changes(question, fault) for fault in forms)
    for fault in forms:
        fault.apply(question)


MODELS = ("model=minicpm3-4b,heads=2,layers=2", "model=deepseek-v3,heads=2,layers=1")

OF_SLOTS = ("kv_b_split", "qkv_split", "step_plan", "padding_offset", "launch_buffers")
"""Operators whose answers do not depend on tokens alone."""


@pytest.mark.parametrize("operator", sorted(set(CASES) - {*OF_SLOTS, "mla_logits"}))
def test_a_step_without_a_token_has_no_fault_of_its_tokens(operator):
    options = CASES[operator][0]
    question = question_of(f"{operator}/{EMPTY}" + (f"/{options}" if options else ""))
    told = {fault.name for fault in faults() if operator in fault.operators and changes(question, fault)}
    # A slot without a token has a length, and where that is wrong it shows.
    assert told <= {"paused-rows-have-a-length", "paused-rows-packed"}


LEFT_ALONE = [
    ("mla_decode/decode:40,decode:7", "not-causal"),
    ("mla_decode/decode:40,decode:7", "later-tokens-see-no-more"),
    ("mla_decode/decode:40,decode:7", "next-token-seen"),
    ("mla_decode/decode:40,decode:7", "padding-unwritten"),
    ("mla_decode/decode:40,decode:7", "later-drafts-unwritten"),
    ("mla_decode/decode:40,draft:7+2/splits=1", "last-split-lost"),
    ("mla_decode/decode:14,decode:7", "keys-beyond-a-bound"),
    ("mla_decode/decode:40/heads=1", "wrong-head"),
    ("mla_decode/decode:40,decode:7/block=1", "block-is-a-row"),
    ("mla_decode/decode:40,decode:7/pages=sequential", "blocks-in-a-line"),
    ("mla_decode/decode:40,decode:7/strided=0", "read-as-dense"),
    ("mla_decode/decode:40,decode:7", "offsets-32-bit-unsigned"),
    ("prefill_attention/prefill:40,prefill:7", "causal-top-left"),
    ("prefill_attention/prefill:40,prefill:7", "history-ignored"),
    ("prefill_attention/hit:40+1", "not-causal"),
    ("prefill_attention/hit:127+1", "last-keys-lost"),
    ("prefill_attention/prefill:40,prefill:7/strided=0", "read-as-dense"),
    ("position_ids/decode:5,prefill:4", "history-ignored"),
    ("padding_offset/prefill:5,prefill:4", "keys-without-the-cache"),
    ("padding_offset/prefill:5,decode:4", "paused-rows-not-counted"),
    ("slot_mapping/decode:5,prefill:4/block=1", "token-as-block"),
    ("slot_mapping/decode:5,prefill:4", "padding-in-the-last-slot"),
    ("swa_indices/decode:50,prefill:4/window=64", "window-ignored"),
    ("swa_indices/prefill:4,prefill:9/window=64", "history-unseen"),
    ("rope/prefill:9", "positions-from-0"),
    ("rope/decode:9/model=kimi-linear-48b", "pairing-exchanged"),
    ("rope/decode:9", "zeros-where-nothing-turns"),
    ("rope/decode:9", "padding-copied"),
    ("read_cache_interleave/prefill:9", "blocks-in-a-line"),
    ("decode_rows/decode:9,decode:4", "length-of-one-token"),
    ("decode_rows/decode:9,decode:4", "one-token-a-slot"),
    ("merge_states/prefill:9/heads=2", "lse-of-one-state"),
    ("merge_states/hit:9+5/heads=2,data=flat", "no-key-is-nan"),
    ("merge_states/hit:9+5/heads=2,data=flat", "one-lse-for-both"),
    ("merge_states/prefill:9/heads=2,strided=0", "read-as-dense"),
    ("prefill_attention/hit:40+9/heads=2,model=glm-4.7-flash", "padded-values-zeroed"),
    ("mla_decode/decode:127,draft:255+1/heads=2,data=deep", "masked-keys-weigh"),
    ("mla_decode/decode:40,decode:7/heads=2", "mask-of-the-last-token"),
    ("mla_decode/decode:40,decode:7/heads=2", "one-token-a-slot"),
    ("mla_decode/decode:40,decode:7/heads=2,splits=1", "unused-splits-merged"),
    ("read_cache_interleave/hit:9+4,hit:5+3", "search-too-short"),
    ("merge_states/hit:9+5/heads=2,v_dim=64", "columns-rounded-down"),
    ("static_attention/hit:9+5/heads=2,topk=20", "decode-branch-alone"),
    ("packed_cache_write/decode:9/scale_fmt=ue8m0", "scales-are-powers-of-two"),
    ("kv_b_split/decode:1/tp=1,heads=2,model=minicpm3-4b", "rank-ignored"),
]


@pytest.mark.parametrize(("text", "name"), LEFT_ALONE)
def test_a_fault_leaves_alone_what_it_is_not_about(text, name):
    question = question_of(text)
    forms = forms_of(question.operator, name)
    assert forms
    assert not any(changes(question, fault) for fault in forms)


# ---- worked by hand ------------------------------------------------------------------------------


def by_hand(name, question, form=""):
    fault = next(item for item in forms_of(question.operator, name) if item.form == form)
    return fault.apply(question)


def two_keys():
    """One token, one head, R = 2 and D = 1, two keys of logits 0 and ln 3: weights 1/4 and 3/4."""
    ln_3 = 1.0986122886681098
    inputs = {
        "q": torch.tensor([[[0.0, 0.0, 1.0]]], dtype=torch.float64),
        "latent_cache": torch.tensor([[[[4.0, 8.0, 0.0]]], [[[0.0, 4.0, ln_3]]]], dtype=torch.float64),
        "block_tables": torch.tensor([[0, 1]], dtype=torch.int32),
        "seq_lens_encoder": torch.tensor([0], dtype=torch.int32),
        "seq_lens_decoder": torch.tensor([1], dtype=torch.int32),
        "seq_lens_this_time": torch.tensor([1], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, 1], dtype=torch.int32),
        "batch_id_per_token": torch.tensor([0], dtype=torch.int32),
        "softmax_scale": 1.0,
        "kv_lora_rank": 2,
        "splits": None,
    }
    definition = oracle_for("mla_decode", "definition")
    return Question("mla_decode", inputs, lambda asked: definition.run(asked, None))


LN_4 = 1.3862943611198906


@pytest.mark.parametrize(
    ("name", "out", "lse"),
    [
        ("newest-key-unseen", [4.0, 8.0], 0.0),
        ("oldest-key-lost", [0.0, 4.0], 1.0986122886681098),
        ("lse-base-2", [1.0, 5.0], 2.0),
        ("lse-without-the-maximum", [1.0, 5.0], LN_4 - 1.0986122886681098),
        ("lse-without-the-sum", [1.0, 5.0], 1.0986122886681098),
        ("rope-left-out", [2.0, 6.0], 0.6931471805599453),
        ("scale-left-out", [1.0, 5.0], LN_4),
        ("not-normalised", [4.0 / 3, 20.0 / 3], LN_4),
        ("normalised-twice", [0.75, 3.75], LN_4),
    ],
)
def test_the_answer_of_a_fault_is_the_one_worked_by_hand(name, out, lse):
    answers = by_hand(name, two_keys())
    assert torch.allclose(answers["out"][0, 0], torch.tensor(out, dtype=torch.float64))
    assert float(answers["lse"][0, 0]) == pytest.approx(lse)


def test_the_splits_of_a_row_are_whole_tiles_and_not_fewer_than_are_worth_one():
    from references.faults.attention import _Cut

    assert _Cut(1, 1).parts(10, 4) == [range(3), range(3, 6), range(6, 9), range(9, 10)]
    assert _Cut(4, 1).parts(10, 4) == [range(4), range(4, 8), range(8, 10)]
    assert _Cut(1, 8).parts(10, 4) == [range(8), range(8, 10)]
    assert _Cut(16, 1).parts(0, 4) == []


def test_a_tile_of_query_rows_begins_and_ends_within_tokens():
    from references.faults._attention import Token
    from references.faults.groups import _tile_of

    token = Token(0, place=5, cached=10, new=8)
    first, second = (_tile_of(token, head, 3, 16) for head in (0, 1))
    assert (first.first.place, first.last.place) == (0, 5)
    assert (second.first.place, second.last.place) == (5, 7)


def test_tiles_of_keys_begin_at_their_multiples_or_at_the_window():
    from references.faults._attention import Token
    from references.faults.groups import _Tile

    token = Token(0, cached=50, window=10)
    aligned, at_the_window = (_Tile(token, token, 32, is_aligned=is_aligned) for is_aligned in (True, False))
    assert (aligned.begin, aligned.end(51)) == (32, 64)
    assert (at_the_window.begin, at_the_window.end(51)) == (41, 73)


def test_a_key_of_zeros_counts_beside_those_that_are_seen():
    from references.faults._attention import of
    from references.faults.groups import EMPTY, _with_empty

    attention = of(two_keys())
    answer = _with_empty(attention, lambda _, token: [EMPTY, *token.visible]).answer()
    # Logits 0, 0 and ln 3: weights 1/5, 1/5 and 3/5, of which the first has no value.
    assert answer["out"][0, 0].tolist() == pytest.approx([0.8, 4.0])
    assert float(answer["lse"][0, 0]) == pytest.approx(1.6094379124341003)


def test_an_offset_that_wraps_is_found_at_the_front_of_the_cache():
    question = two_keys()
    # 2^24 blocks of 64 rows of 4: memory that nobody touches is not there.
    cache = torch.empty((2**24 + 1, 1, 64, 4), dtype=torch.float8_e4m3fn)
    cache[0, 0, 0] = torch.tensor([1.0, 2.0, 0.0, 0.0])
    cache[2**24, 0, 0] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    inputs = {
        **question.inputs,
        "q": torch.zeros(1, 1, 4, dtype=torch.float64),
        "latent_cache": cache,
        "block_tables": torch.tensor([[2**24]], dtype=torch.int32),
        "seq_lens_decoder": torch.tensor([0], dtype=torch.int32),
    }
    asked = Question("mla_decode", inputs, question.define)
    assert asked.truth["out"][0, 0].tolist() == [3.0, 4.0]
    assert by_hand("offsets-32-bit-unsigned", asked)["out"][0, 0].tolist() == [1.0, 2.0]
