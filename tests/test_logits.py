"""Whole models: what they are made of, what a case may ask, and that a failure names its first stage."""

import pytest
import torch

from cases import CaseError, parse
from cases.blocks import unknown_history
from cases.contract import contract_of
from cases.engine import seeded_schedules
from cases.models import load_model, model_names
from cases.suite import load_suite
from harness.checks import checks
from harness.footprint import required_bytes
from harness.launch import Launch
from harness.model_data import HIDDEN_SIZE, VOCAB_SIZE
from harness.mutation.mutant import records_of
from harness.verdict import Status
from references.oracle import oracle_for

SMALL = "model=minicpm3-4b,heads=2,layers=2,block=16"
ARCHITECTURES = {name for name in model_names() if load_model(name).model_type is not None}


@pytest.fixture(scope="module")
def path():
    pytest.importorskip("triton")
    from harness.paths.triton import mla_logits

    return mla_logits.PATHS[0]


def inputs_of(batch):
    (layer,) = batch.layers
    return {**layer.tensors, **layer.attributes}


# ---- what a model is made of ---------------------------------------------------------------------


@pytest.mark.parametrize("model", sorted(ARCHITECTURES))
def test_queries_are_compressed_exactly_where_the_model_compresses_them(model, make_batch):
    inputs = inputs_of(make_batch(f"mla_logits/prefill:3/model={model},heads=2"))
    compresses = load_model(model).q_lora_rank is not None
    assert (inputs["q_proj"] is None) == compresses
    assert (inputs["q_a_proj"] is not None) == compresses


def test_logits_of_attention_are_spread_and_tokens_differ(make_batch):
    inputs = inputs_of(make_batch("mla_logits/prefill:60/model=deepseek-v3,heads=2,layers=2"))
    assert 0 <= int(inputs["token_ids"].min()) < int(inputs["token_ids"].max()) < VOCAB_SIZE
    assert inputs["embed_tokens"].shape == (VOCAB_SIZE, HIDDEN_SIZE)
    exact = oracle_for("mla_logits", "definition").run(inputs, None)
    # Newest tokens attend unevenly: uniform weights would make attention the mean of the values.
    means = (
        exact["attention"][0, -20:].square().mean().sqrt() / exact["compressed_kv"][0].square().mean().sqrt()
    )
    assert float(means) > 0.3


def test_token_ids_follow_rows_keys_and_tags(make_batch):
    first = inputs_of(make_batch(f"mla_logits/prefill:20@sys,prefill:20@sys,prefill:20.k7/{SMALL}"))
    again = inputs_of(make_batch(f"mla_logits/prefill:20.k7/{SMALL}"))
    one, two, three = first["token_ids"].split(20)
    assert torch.equal(one[:16], two[:16])
    assert not torch.equal(one[16:], two[16:])
    assert torch.equal(three, again["token_ids"])
    assert torch.equal(first["history_ids"], first["token_ids"])


# ---- what a case may ask -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "decode:5/model=minicpm3-4b",
            "slot 0 begins with cached tokens that no row of its tag has computed",
        ),
        ("prefill:40@sys..decode:40,hit:20+5@sys/block=16", "step 1, slot 1 begins with cached tokens"),
        ("prefill:40@sys..decode:40,hit:48+5@sys/block=16", "step 1, slot 1 begins with cached tokens"),
        ("prefill:40@sys..idle..idle,hit:32+5@sys/block=16", "step 2, slot 1 begins with cached tokens"),
        ("prefill:5/layers=2,block=16+32", "block takes one value"),
        ("prefill:5/layers=2,heads=2+4", "heads takes one value"),
        ("prefill:5/model=longcat-flash", "longcat-flash is more than latent attention and an MLP"),
    ],
)
def test_a_case_without_an_answer_is_refused(text, sentence):
    with pytest.raises(CaseError, match=sentence):
        contract_of(parse(f"mla_logits/{text}"))


@pytest.mark.parametrize(
    "text",
    ["prefill:40@sys..decode:40,hit:32+5@sys", "prefill:16@sys,prefill:16@sys..decode:16x2,hit:16+1@sys"],
)
def test_a_prefix_that_a_row_goes_on_with_may_be_found(text):
    case = parse(f"mla_logits/{text}/block=16")
    assert contract_of(case).name == "mla_logits"
    assert unknown_history(case.steps, 64) is not None


def test_an_engine_that_finds_only_what_it_computed_makes_cases_with_an_answer():
    found = 0
    for steps in seeded_schedules(5, 100, steps=8, slots=4, tokens=60, computed=16):
        assert unknown_history(steps, 16) is None
        found += any(row.cached and row.tag for step in steps for row in step if row.kind.word == "hit")
    assert found >= 5


# ---- three oracles -------------------------------------------------------------------------------


def test_the_suite_has_every_architecture():
    assert {item.case.options.model for item in load_suite("logits").cases} >= {
        *("deepseek-v3", "deepseek-v2-lite", "glm-4.7-flash", "minicpm3-4b"),
        *("mistral-small-4", "kimi-k2", "kimi-linear-48b"),
    }


def test_verdicts_say_what_huggingface_said(path, lane, tmp_path):
    from harness.judge import judge_case
    from harness.task import Task

    case = f"mla_logits/prefill:9..decode:9/{SMALL}"
    verdict = judge_case(Task(case, "mla_logits", path.name, lane.name), path, lane, tmp_path / "lock")
    assert verdict.status is Status.PASSED
    (said,) = [check for check in verdict.checks if check.name == "oracle"]
    pytest.importorskip("transformers")
    assert (said.status, said.tensor, said.budget) == (Status.PASSED, "logits", 1e-5)
    tensors = [check.tensor for check in verdict.checks if check.name == "values"]
    assert tensors[:5] == ["q[0]", "q_pe[0]", "k_pe[0]", "compressed_kv[0]", "latent_cache[0]"]
    assert tensors[-1] == "logits"


# ---- stages --------------------------------------------------------------------------------------


def failing(launch):
    return [item for item in checks()["values"].run(launch) if item.status is Status.FAILED]


@pytest.mark.parametrize("stage", ["q", "k_pe", "attention", "hidden", "logits"])
def test_a_wrong_row_is_named_by_stage_layer_token_and_row(stage, launched):
    from dataclasses import replace

    pytest.importorskip("triton")
    from harness.paths.triton import mla_logits

    right = mla_logits.PATHS[0].run

    def run(inputs, outputs, workspace):
        right(inputs, outputs, workspace)
        out = outputs[stage]
        (out if stage == "logits" else out[1])[6] *= 1.5

    launch = launched(f"mla_logits/prefill:5,prefill:4/{SMALL}", replace(mla_logits.PATHS[0], run=run))
    (result,) = failing(launch)
    assert result.tensor == (stage if stage == "logits" else f"{stage}[1]")
    assert (result.where.tokens, result.where.rows) == ("6", "1")


def test_numbers_that_are_not_finite_at_padding_are_noticed(launched, path):
    from dataclasses import replace

    def run(inputs, outputs, workspace):
        path.run(inputs, outputs, workspace)
        outputs["attention"][0, 5] = torch.nan

    launch = launched(f"mla_logits/prefill:5,pad:2/{SMALL}", replace(path, run=run))
    (result,) = failing(launch)
    assert (result.tensor, result.where.tokens) == ("attention[0]", "5")


def test_every_recorded_bug_names_a_stage_of_the_contract():
    stages = {spec.name for spec in contract_of(parse("mla_logits/prefill:1")).outputs}
    mutants = records_of("triton/mla_logits").mutants
    assert len(mutants) >= 15
    assert {mutant.stage for mutant in mutants} == stages


# ---- steps ---------------------------------------------------------------------------------------


def test_caches_go_on_and_everything_else_of_them_is_poison(path, lane):
    case = parse(f"mla_logits/prefill:20,prefill:5..decode:20,idle/{SMALL}")
    first = Launch.prepare(case, path, lane)
    first.run()
    second = Launch.prepare(case, path, lane, 1, first)
    (old,), (new,) = first.layers, second.layers
    before, after = (layer.outputs["latent_cache"].view.view(-1, 288) for layer in (old, new))
    assert len(new.batch.carried) == 2 * 20
    assert torch.equal(before[new.batch.carried], after[new.batch.carried])
    assert int(after.isfinite().all(1).sum()) == 2 * 20
    # What only a path can compute is not compared bit for bit.
    assert new.history == {}


@pytest.mark.parametrize("rows", ["idlex3", "pad:5", "prefill:4..paused:4,pad:2"])
def test_a_step_without_attention_work_leaves_every_cache_as_it_is(rows, path, lane):
    case = parse(f"mla_logits/{rows}/{SMALL}")
    launch = None
    for step in range(len(case.steps)):
        launch = Launch.prepare(case, path, lane, step, launch)
        launch.run()
    (layer,) = launch.layers
    assert layer.batch.inputs["latent_cache"].equals(layer.before["latent_cache"])
    assert bool(layer.outputs["logits"].view.isfinite().all())


def test_memory_of_a_stack_is_foreseen(make_batch):
    text = "mla_logits/prefill:30,prefill:9/model=deepseek-v3,heads=4,layers=3"
    held = sum(len(buffer.raw) for buffer in make_batch(text).layers[0].inputs.values())
    assert required_bytes(parse(text), contract_of(parse(text)), "cpu") > 2 * held
