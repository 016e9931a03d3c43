"""Cases drawn until time runs out: what is drawn, what is told of a failure, when it ends."""

import tomllib
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings

from cases import parse
from cases.contract import contract_of, operators
from cases.strategies import Scale, batches
from harness.fuzzing import Tally, drawn_cases, fuzz
from harness.judge import judge_case
from harness.mutation.mutant import Mutant, path_file
from harness.mutation.trial import load_mutant
from harness.task import Task
from harness.verdict import CheckResult, Kind, Status, Verdict


def verdict_of(task, kind=None, tensor="out"):
    parts = (task.case, task.operator, task.path, task.lane)
    if kind is None:
        return Verdict(*parts, Status.PASSED)
    check = CheckResult("values", Status.FAILED, tensor, kind, "it is so")
    return Verdict(*parts, Status.FAILED, kind, "it is so", checks=(check,))


def tasks_for(*texts, path="triton/mla_decode"):
    return [Task(text, "mla_decode", path, "interpreted") for text in texts]


def all_found(tasks_of, judge, **limits):
    tally = Tally()
    limits = {"seconds": 60.0, "width": 2, **limits}
    return list(fuzz(tasks_of, judge, tally=tally, **limits)), tally


# ---- what is drawn -------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", sorted(operators()))
def test_drawn_cases_are_legal_and_no_larger_than_asked(operator):
    scale = Scale(slots=3, length=100, heads=4)

    @settings(max_examples=25, deadline=None, database=None)
    @given(batches(operator, scale))
    def check(case):
        assert parse(str(case)) == case
        contract_of(case)
        rows = [row for step in case.steps for row in step if row.is_slot]
        if not operators()[operator].is_stack:
            assert len(rows) <= scale.slots
            assert all(row.length <= scale.length for row in rows)
        if "heads" in operators()[operator].options:
            assert max(layer.num_attention_heads for layer in case.layers) <= scale.heads

    check()


def test_draws_are_the_same_for_a_seed_and_others_for_another():
    first = drawn_cases("mla_decode", "interpreted", 30, seed=7)
    assert first == drawn_cases("mla_decode", "interpreted", 30, seed=7)
    assert first != drawn_cases("mla_decode", "interpreted", 30, seed=8)
    assert len(first) == len(set(first))


def test_lengths_at_the_ends_of_blocks_and_lists_come_up():
    """The totals and multiples that a kernel's rare faults need."""
    drawn = [case for seed in range(3) for case in drawn_cases("mla_decode", "compiled", 100, seed)]
    rows = [(row, case.layers[0].block_size) for case in drawn for row in case.steps[0] if row.cached]
    assert any(row.length == 257 for row, _ in rows)
    assert any(row.cached % (8 * block) == 0 for row, block in rows if block > 1)
    kinds = [[row.kind.word for row in case.steps[0]] for case in drawn]
    assert any(
        a != "idle" and b == "paused" and c != "idle"
        for k in kinds
        for a, b, c in zip(k, k[1:], k[2:], strict=False)
    )


# ---- what is told --------------------------------------------------------------------------------


def test_a_failure_is_reduced_and_offered_as_an_entry_of_a_suite():
    def judge(tasks):
        for task in tasks:
            cached = max((row.cached for row in parse(task.case).steps[0]), default=0)
            yield verdict_of(task, Kind.WRONG if cached > 64 else None)

    rounds = [tasks_for("mla_decode/decode:9", "mla_decode/decode:200x3,prefill:4/heads=4,block=32"), []]
    (found,), tally = all_found(rounds.__getitem__, judge)
    assert str(found.reduction.case) == "mla_decode/decode:65/heads=1"
    (entry,) = tomllib.loads(found.entry)["entry"]
    assert entry["cases"] == ["mla_decode/decode:65/heads=1"]
    assert "wrong on triton/mla_decode [interpreted]" in entry["why"]
    assert (tally.counts[Status.PASSED], tally.counts[Status.FAILED], len(tally.cases)) == (1, 1, 2)


def test_a_failure_of_the_same_kind_is_told_once_and_of_another_again():
    def judge(tasks):
        for task in tasks:
            yield verdict_of(task, Kind.GUARD if "pad" in task.case else Kind.WRONG)

    rounds = [tasks_for("mla_decode/decode:1", "mla_decode/decode:2", "mla_decode/decode:3,pad:1"), []]
    found, _ = all_found(rounds.__getitem__, judge)
    assert [item.verdict.kind for item in found] == [Kind.WRONG, Kind.GUARD]


def test_other_paths_that_fail_alike_are_told_too():
    rounds = [tasks_for("mla_decode/decode:1") + tasks_for("mla_decode/decode:1", path="cuda/mla_decode"), []]
    found, _ = all_found(rounds.__getitem__, lambda tasks: [verdict_of(task, Kind.WRONG) for task in tasks])
    assert [item.verdict.path for item in found] == ["triton/mla_decode", "cuda/mla_decode"]


def test_a_search_ends_when_time_is_up_and_waits_for_no_verdict_more():
    judged = []

    def judge(tasks):
        for task in tasks:
            judged.append(task)
            yield verdict_of(task)

    numbers = count()
    found, tally = all_found(
        lambda _: tasks_for(*(f"mla_decode/decode:{next(numbers) + 1}" for _ in range(50))),
        judge,
        seconds=0.05,
    )
    assert found == []
    assert tally.counts[Status.PASSED] == len(judged)
    assert tally.seconds < 5.0


def test_without_time_nothing_is_drawn():
    found, tally = all_found(lambda _: pytest.fail("drawn"), lambda _: [], seconds=0.0)
    assert (found, tally.cases) == ([], set())


# ---- rare faults, for tests/find_rare_faults.py --------------------------------------------------


def rare_faults():
    with (Path(__file__).parent / "data" / "rare_faults.toml").open("rb") as file:
        return tomllib.load(file)["fault"]


@pytest.mark.parametrize("fault", rare_faults(), ids=lambda fault: fault["id"])
def test_a_planted_fault_shows_in_its_own_batch_alone(fault, lane, tmp_path):
    mutant = Mutant(fault["id"], path_file(fault["path"]), fault["old"], fault["new"], "")
    path = load_mutant(mutant, fault["path"], tmp_path)
    statuses = {}
    for key in ("shown_by", "hidden_from"):
        task = Task(fault[key], path.operator, path.name, "interpreted")
        statuses[key] = judge_case(task, path, lane, tmp_path / "lock").status
    assert statuses == {"shown_by": Status.FAILED, "hidden_from": Status.PASSED}
