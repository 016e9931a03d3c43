"""A wrong path is called by its fault's name where that alone explains it, and by none where none does."""

import importlib.util
import sys
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from cases import Kind, parse
from harness import diagnosis, experiments
from harness.bounds import OutOfBounds
from harness.checks import checks
from harness.diagnosis import NEVER_WRITTEN, diagnose, twin
from harness.judge import judge_case
from harness.kernel_path import KernelPath
from harness.launch import Launch, PathFailure
from harness.mutation.mutant import records_of
from harness.mutation.trial import load_mutant
from harness.task import Task
from harness.verdict import Status
from references.faults import Fault, faults
from reports.console import check_lines, failure_block

CASE = "mla_decode/decode:40,draft:30+3,idle,decode:5,pad:2/model=minicpm3-4b,heads=2,block=16"
WRITE = "latent_cache_write/hit:30+3,decode:15,idle,prefill:5,pad:6/model=minicpm3-4b,block=16"


def supports_all(_):
    return None


def path_of(run, operator="mla_decode", **options):
    return KernelPath(f"test/{operator}", operator, ("interpreted",), supports_all, run, **options)


def every_key(visible, _):
    return visible


def attend(inputs, outputs, visible_of=every_key, scale=1.0, lse_scale=1.0):
    """Absorbed decode, one token at a time, with places to break it."""
    encoder, decoder, starts = (
        inputs[name].tolist() for name in ("seq_lens_encoder", "seq_lens_decoder", "cu_seqlens_q")
    )
    cache = inputs["latent_cache"]
    for token, slot in enumerate(inputs["batch_id_per_token"].tolist()):
        if slot < 0 or encoder[slot] > 0:
            outputs["out"][token] = 0.0
            outputs["lse"][token] = -torch.inf
            continue
        kv_len = decoder[slot] + starts[slot + 1] - starts[slot]
        positions = torch.arange(visible_of(decoder[slot] + token - starts[slot] + 1, kv_len))
        blocks = inputs["block_tables"][slot, positions // cache.shape[2]].long()
        keys = cache[blocks, 0, positions % cache.shape[2]].double()
        logits = inputs["q"][token].double() @ keys.T * inputs["softmax_scale"] * scale
        outputs["out"][token] = torch.softmax(logits, -1) @ keys[:, : inputs["kv_lora_rank"]]
        outputs["lse"][token] = torch.logsumexp(logits, -1) * lse_scale


def broken(**places):
    return path_of(lambda inputs, outputs, _: attend(inputs, outputs, **places))


def afterwards(act):
    """The right path, then act(inputs, outputs)."""

    def run(inputs, outputs, _):
        attend(inputs, outputs)
        act(inputs, outputs)

    return path_of(run)


def writing(slot_of):
    """A cache write whose tokens go to the slots of slot_of([Tp] slots)."""

    def run(inputs, outputs, _):
        cache = outputs["latent_cache"].view(-1, outputs["latent_cache"].shape[-1])
        rows = torch.cat([inputs["compressed_kv"], inputs["k_pe"]], dim=1)
        for token, slot in enumerate(slot_of(inputs["slot_mapping"]).tolist()):
            if slot >= 0:
                cache[slot] = rows[token]

    return path_of(run, "latent_cache_write")


RIGHT = broken()
NEWEST_UNSEEN = broken(visible_of=lambda visible, _: max(visible - 1, 1))
NOT_CAUSAL = broken(visible_of=lambda _, kv_len: kv_len)


def test_of_a_right_launch_there_is_nothing_to_explain(launched):
    found = diagnose(launched(CASE, RIGHT))
    assert not found.names
    assert not found.sure


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (broken(visible_of=lambda visible, _: visible - 1), "newest-key-unseen"),
        (NOT_CAUSAL, "not-causal"),
        (broken(lse_scale=1.4426950408889634), "lse-base-2"),
        (broken(visible_of=lambda visible, _: min(visible, 32)), "keys-beyond-a-bound"),
        (broken(scale=0.6931471805599453), "log2-e-missing"),
    ],
)
def test_a_mistake_is_called_by_its_name(path, name, launched):
    found = diagnose(launched(CASE, path))
    assert found.names == (name,)
    assert found.sure
    assert found.sentence.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("slot_of", "name"),
    [
        (lambda slots: torch.cat([slots[1:], slots[:1] * 0 - 1]), "neighbours-slot"),
        (lambda slots: torch.where(slots < 0, -1, slots)[: len(slots) // 8 * 8], "launch-rounded-down"),
    ],
)
def test_a_wrong_write_is_called_by_its_name(slot_of, name, launched):
    found = diagnose(launched(WRITE, writing(slot_of)))
    assert found.names == (name,)
    assert found.sure


def test_a_mistake_that_nobody_knows_is_not_called_by_a_name(launched):
    def spoil(inputs, outputs):
        outputs["out"][:, :, ::3] *= 1.1

    found = diagnose(launched(CASE, afterwards(spoil)))
    assert not found.sure
    assert found.sentence.startswith("unknown: ")


def test_two_mistakes_at_a_time_are_not_one_of_them(launched):
    path = broken(visible_of=lambda visible, _: max(visible - 1, 1), lse_scale=1.4426950408889634)
    found = diagnose(launched(CASE, path))
    assert not found.sure
    assert found.sentence.startswith("unknown: ")


def test_what_explains_a_part_is_told_with_how_much(launched):
    def spoil(inputs, outputs):
        outputs["out"][0] = -outputs["out"][0]

    def run(inputs, outputs, _):
        attend(inputs, outputs, visible_of=lambda visible, _: visible - 1)
        spoil(inputs, outputs)

    found = diagnose(launched(CASE, path_of(run)))
    assert not found.sure
    assert found.names[0] == "newest-key-unseen"
    # Five real tokens, each wrong in out and in its LSE, and one out that is wrong in another way.
    assert "newest-key-unseen explains 9 of 10 failing rows" in found.sentence


def test_faults_with_the_same_numbers_are_told_together(launched, monkeypatch):
    monkeypatch.setattr(diagnosis, "_twins", lambda _: ())
    # Of one draft of two, the first token sees one key too many: the second, or all of the row.
    found = diagnose(launched("mla_decode/draft:30+2/model=minicpm3-4b,heads=2", NOT_CAUSAL))
    assert set(found.names) >= {"not-causal", "next-token-seen"}
    assert not found.sure
    assert found.sentence.startswith("not sure: ")


def test_a_wider_launch_tells_them_apart(launched):
    found = diagnose(launched("mla_decode/draft:30+2/model=minicpm3-4b,heads=2", NOT_CAUSAL))
    assert found.names == ("not-causal",)
    assert found.sure


def test_what_a_wider_launch_contradicts_is_not_sure(launched):
    def visible_of(visible, kv_len):
        return kv_len if kv_len < 50 else visible - 1

    found = diagnose(
        launched("mla_decode/draft:30+3/model=minicpm3-4b,heads=2", broken(visible_of=visible_of))
    )
    assert found.names == ("not-causal",)
    assert not found.sure
    assert found.sentence.startswith("likely not-causal: ")
    assert "but not of a wider one" in found.sentence


def test_a_right_twin_names_nothing(launched):
    launches = []

    def run(inputs, outputs, _):
        attend(inputs, outputs)
        launches.append(1)
        if len(launches) == 1:
            outputs["out"][:, :, ::3] *= 1.1

    found = diagnose(launched(CASE, path_of(run)))
    assert found.sentence.startswith("unknown: ")


def wrong_at_first():
    """A path whose newest key goes unseen in its first launch, and that is right afterwards."""
    launches = []

    def run(inputs, outputs, _):
        launches.append(1)
        is_first = len(launches) == 1
        attend(inputs, outputs, lambda visible, _: max(visible - is_first, 1))

    return path_of(run)


def leaving(explains_first):
    """The fault of that path, where its rows are few; where they are many it would leave a tensor."""
    (fault, *_) = (item for item in faults() if item.form == "but a first token sees itself")

    def apply(question):
        if explains_first and len(question.inputs["seq_lens_decoder"]) < 5:
            return fault.apply(question)
        raise IndexError("outside")

    return Fault("leaving", ("mla_decode",), "it leaves", "B1", apply)


def test_a_mistake_that_would_have_left_a_tensor_of_a_right_launch_is_not_sure(launched, monkeypatch):
    monkeypatch.setattr(diagnosis, "faults", lambda: (leaving(explains_first=True),))
    found = diagnose(launched(CASE, wrong_at_first()))
    assert found.names == ("leaving",), found.sentence
    assert not found.sure


def test_a_mistake_that_would_leave_its_tensors_in_every_launch_explains_nothing(launched, monkeypatch):
    monkeypatch.setattr(diagnosis, "faults", lambda: (leaving(explains_first=False),))
    monkeypatch.setattr(diagnosis, "is_installed", lambda: False)
    found = diagnose(launched(CASE, NEWEST_UNSEEN))
    assert found.names == ()
    assert found.sentence.startswith("unknown: ")


def test_rows_that_were_never_written_are_told(launched):
    def run(inputs, outputs, workspace):
        kept = {name: values[3:4].clone() for name, values in outputs.items()}
        attend(inputs, outputs)
        for name, values in kept.items():
            outputs[name][3:4] = values

    found = diagnose(launched(CASE, path_of(run)))
    assert found.names == (NEVER_WRITTEN,)
    assert found.sure


@pytest.mark.parametrize(
    ("value", "name"), [(None, "empty-rows-unwritten"), (-torch.nan, "empty-rows-divided")]
)
def test_a_nan_that_was_computed_is_not_what_was_never_written(value, name, launched):
    def run(inputs, outputs, _):
        kept = {key: values.clone() for key, values in outputs.items()}
        attend(inputs, outputs)
        empty = outputs["lse"].isinf().all(1)
        for key, values in outputs.items():
            values[empty] = kept[key][empty] if value is None else value

    found = diagnose(launched(CASE, path_of(run)))
    assert found.names == (name,), found.sentence
    assert found.sure


def test_without_time_nothing_is_sure(launched, monkeypatch):
    monkeypatch.setattr(diagnosis, "SECONDS", 0.0)
    found = diagnose(launched(CASE, NEWEST_UNSEEN))
    assert not found.sure
    assert "want of time" in found.sentence


def test_a_path_that_left_its_tensors_is_explained_by_where_it_does_not(lane):
    launches = []

    def run(inputs, outputs, _):
        launches.append(1)
        if len(launches) == 1:
            raise OutOfBounds("load", "somewhere")
        attend(inputs, outputs, visible_of=lambda visible, _: visible - 1)

    launch = Launch.prepare(parse(CASE), path_of(run), lane)
    with pytest.raises((OutOfBounds, PathFailure)):
        launch.run()
    assert not launch.has_ended
    found = diagnose(launch)
    assert found.names == ("newest-key-unseen",)


def test_what_is_unwritten_in_this_launch_alone_is_not_sure(launched):
    def run(inputs, outputs, _):
        if outputs["out"].is_contiguous():
            attend(inputs, outputs)

    found = diagnose(launched(CASE, path_of(run)))
    assert found.names == (experiments.WRITTEN_AS_DENSE,), found.sentence
    assert not found.sure


LARGE = "latent_cache_write/decode:1/model=minicpm3-4b,pool=120000,pages=reversed"


def test_a_cache_too_large_to_copy_is_as_it_was_while_a_mistake_is_made(launched):
    found = diagnose(launched(LARGE, writing(lambda slots: torch.full_like(slots, -1))))
    assert found.names == ("nothing-written",), found.sentence
    assert found.sure
    found = diagnose(launched(LARGE, writing(lambda slots: torch.where(slots > 7_000_000, -1, slots))))
    assert found.names == ("offsets-32-bit",), found.sentence


# ---- the twin ------------------------------------------------------------------------------------


def test_a_twin_begins_with_the_case_s_rows_and_has_every_kind():
    case = parse(CASE)
    rows = twin(case).steps[0]
    slots = [row for row in case.steps[0] if row.is_slot]
    assert list(rows[: len(slots)]) == slots
    assert {row.kind for row in rows} == set(Kind)


def test_a_twin_s_unread_rows_are_zero_and_the_rest_stays():
    made = twin(parse(f"{CASE},seed=5")).options
    assert (made.poison, made.tail, made.seed, made.block) == ("zero", "0", 5, (16,))


@pytest.mark.parametrize(
    "text", ["prefill_attention/hit:5+2", "padding_offset/decode:5", "kv_b_split/decode:1", "rope/pad:9"]
)
def test_a_twin_asks_for_no_option_that_its_operator_has_not(text):
    made = twin(parse(text))
    assert parse(str(made)) == made


def test_a_twin_has_heads_and_lists_enough_to_tell_faults_apart():
    made = twin(parse("sparse_prefill/prefill:9/heads=1,topk=1")).options
    assert made.heads == (3,)
    assert made.topk == 100


def test_a_twin_without_a_block_table_has_no_cached_tokens():
    rows = twin(parse("read_cache_interleave/prefill:5/table=none")).steps[0]
    assert not any(row.cached for row in rows)


def test_a_twin_of_a_later_step_stands_alone():
    made = twin(parse("mla_step/prefill:30..decode:30/model=minicpm3-4b,heads=2"), step=1)
    assert len(made.steps) == 1
    assert made.steps[0][0].cached == 30


# ---- the check -----------------------------------------------------------------------------------


@pytest.fixture
def judge(lane, tmp_path):
    """(text, path, checks) -> the verdict."""

    def verdict_of(text, path, asked=()):
        case = parse(text)
        task = Task(str(case), case.operator, path.name, lane.name, checks=asked)
        return judge_case(task, path, lane, tmp_path / "lock")

    return verdict_of


def told(verdict):
    return [check for check in verdict.checks if check.name == "diagnosis"]


def test_a_diagnosis_is_made_where_it_is_asked_for(judge):
    assert not told(judge(CASE, NEWEST_UNSEEN))
    (found,) = told(judge(CASE, NEWEST_UNSEEN, ("diagnosis",)))
    assert found.reason.startswith("newest-key-unseen: ")


def test_a_diagnosis_fails_no_verdict(judge):
    verdict = judge(CASE, NEWEST_UNSEEN, ("diagnosis",))
    assert told(verdict)[0].status is Status.PASSED
    assert verdict.reason == judge(CASE, NEWEST_UNSEEN).reason


def test_a_right_path_is_not_diagnosed(judge):
    verdict = judge(CASE, RIGHT, ("diagnosis",))
    assert verdict.status is Status.PASSED
    assert not told(verdict)


def test_a_diagnosis_is_the_last_thing_that_is_said(judge):
    verdict = judge(CASE, NEWEST_UNSEEN, ("diagnosis", "repeat"))
    assert verdict.checks[-1].name == "diagnosis"


def test_a_write_that_is_not_made_is_diagnosed(judge):
    (found,) = told(
        judge(
            "latent_cache_write/decode:15,prefill:5/model=minicpm3-4b",
            writing(lambda slots: slots.clone().fill_(-1)),
            ("diagnosis",),
        )
    )
    assert found.reason.startswith("nothing-written: ")


def test_a_console_says_the_cause(judge):
    verdict = judge(CASE, NEWEST_UNSEEN, ("diagnosis",))
    assert "  cause   newest-key-unseen: " in failure_block(verdict)
    assert check_lines(told(verdict)[0], "mla_decode")[0].startswith("  cause   newest-key-unseen: ")


def test_the_check_explains_and_does_not_judge():
    assert checks()["diagnosis"].explains
    assert not checks()["diagnosis"].by_default


# ---- recorded bugs that are diagnosed, for tests/diagnose_mutants.py -----------------------------

_SPEC = importlib.util.spec_from_file_location(
    "diagnose_mutants", Path(__file__).with_name("diagnose_mutants.py")
)
diagnose_mutants = importlib.util.module_from_spec(_SPEC)
# Dataclasses look their module up by name.
sys.modules[_SPEC.name] = diagnose_mutants
_SPEC.loader.exec_module(diagnose_mutants)

BUGS = diagnose_mutants.bugs_of("")
BY_EXPERIMENT = {"race", *(remedy.name for remedy in experiments.REMEDIES)}


def test_a_bug_that_is_diagnosed_is_recorded_once_in_its_list():
    keys = [(bug.list, bug.path, bug.mutant) for bug in BUGS]
    assert len(keys) == len(set(keys))
    for bug in BUGS:
        assert bug.mutant in {mutant.id for mutant in records_of(bug.path).mutants}, bug
        assert fnmatch(bug.path, diagnose_mutants.LANES[bug.lane]), bug


def test_what_a_bug_is_called_is_a_name_that_may_be_given():
    known = {fault.name for fault in faults()} | BY_EXPERIMENT | {NEVER_WRITTEN}
    assert {name for bug in BUGS for name in bug.names} <= known


@pytest.mark.parametrize(
    ("said", "is_judged"),
    [
        ("not-causal: every token ...", diagnose_mutants.RIGHT),
        ("likely not-causal: every token ...", diagnose_mutants.RIGHT),
        ("windowed: only the newest ...", diagnose_mutants.WRONG),
        ("likely windowed: only the newest ...", diagnose_mutants.UNSURE),
        ("not sure: each of windowed, not-causal gives all numbers of ...", diagnose_mutants.AMONG),
        ("not sure: each of windowed, lse-base-2 gives all numbers of ...", diagnose_mutants.UNSURE),
        ("unknown: none of 66 faults ... The nearest: not-causal explains ...", diagnose_mutants.UNKNOWN),
        ("the outputs are right: there is nothing to explain", diagnose_mutants.UNKNOWN),
    ],
)
def test_a_diagnosis_is_held_against_the_names_that_were_decided(said, is_judged):
    assert diagnose_mutants.judged(said, ["not-causal"]) == is_judged


@pytest.fixture
def planted(lane, tmp_path):
    """(path, recorded bug, text) -> a launch of the path with the bug."""

    def launch_of(path, mutant, text):
        bug = next(item for item in records_of(path).mutants if item.id == mutant)
        launch = Launch.prepare(parse(text), load_mutant(bug, path, tmp_path), lane)
        with suppress(OutOfBounds):
            launch.run()
        return launch

    return launch_of


@pytest.mark.parametrize(
    ("path", "mutant", "text", "name"),
    [
        ("triton/gqa_cache_write", "keys-not-rotated", "gqa_cache_write/prefill:2/heads=1", "unrotated"),
        (
            "triton/gqa_step",
            "sink-of-the-first-head",
            "gqa_step/decode:9/heads=2,kv_heads=1,sink=learned",
            "sink-of-the-first-head",
        ),
        ("triton/launch_buffers", "numbers-of-the-list", "launch_buffers/decode:70x2", "numbers-of-the-list"),
        (
            "triton/merge_states",
            "tokens-read-as-dense",
            "merge_states/decode:1,decode:1.k2/heads=1",
            "read-as-dense",
        ),
        (
            "triton/mla_logits",
            "queries-not-rotated",
            "mla_logits/prefill:2/model=minicpm3-4b,heads=1",
            "unrotated",
        ),
        (
            "triton/qkv_split",
            "ranks-dealt-heads",
            "qkv_split//heads=2,kv_heads=2,tp=2",
            "ranks-dealt-heads",
        ),
        (
            "triton/static_attention",
            "merged-at-the-packed-place",
            "static_attention/prefill:2,decode:1/model=minicpm3-4b,heads=1,topk=3",
            "merged-at-the-packed-place",
        ),
    ],
)
def test_a_recorded_bug_is_called_by_its_name(path, mutant, text, name, planted):
    found = diagnose(planted(path, mutant, text))
    assert found.names == (name,), found.sentence
    assert found.sure


def test_a_path_that_leaves_its_tensors_is_likely_to_have_made_a_mistake_that_would(planted):
    launch = planted("triton/mla_decode", "token-index-as-block-index", "mla_decode/decode:1/heads=1")
    assert not launch.has_ended
    found = diagnose(launch)
    assert "token-as-block" in found.names, found.sentence
    assert "not-causal" not in found.names
    assert not found.sure
    assert "leaves its tensors where the path does" in found.sentence


def test_a_wider_launch_decides_where_it_contradicts_a_small_one(planted):
    # In a step without slots the last one is none.
    found = diagnose(planted("triton/padding_offset", "padding-is-the-last-slot", "padding_offset/pad:1"))
    assert found.names == ("padding-in-the-last-slot",), found.sentence
    assert not found.sure
    assert "of a wider launch, but not of this one" in found.sentence
