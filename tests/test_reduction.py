"""Failing cases reduced to smallest ones that fail for the same reason."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from cases import parse
from harness.judge import judge_case
from harness.known_failures import KnownFailure
from harness.mutation.mutant import records_of
from harness.mutation.trial import load_mutant
from harness.plan import Plan
from harness.reduction import Failure, reduce, reduce_verdict
from harness.run import with_smallest
from harness.task import Task
from harness.verdict import CheckResult, Kind, Smallest, Status, Verdict, Where

ZOO = "mla_decode/draft:30+3,hit:64+17,prefill:5,decode:100,idle,paused:7,pad:3/heads=8,block=32,seed=3"
TASK = Task(ZOO, "mla_decode", "triton/mla_decode", "interpreted", checks=("repeat", "idle"))


def failed(text, kind=Kind.WRONG, check="values", tensor="out", rows=""):
    result = CheckResult(check, Status.FAILED, tensor, kind, "it is so", where=Where(rows=rows))
    return Verdict(text, "mla_decode", "p", "interpreted", Status.FAILED, kind, "it is so", checks=(result,))


def passed(text):
    return Verdict(text, "mla_decode", "p", "interpreted", Status.PASSED)


def each(predicate):
    """Judges cases one by one, and notes which."""
    asked = []

    def fails(cases):
        asked.extend(map(str, cases))
        return [predicate(case) for case in cases]

    fails.asked = asked
    return fails


def rows_of(case):
    return [row for step in case.steps for row in step]


@pytest.mark.parametrize(
    ("predicate", "smallest"),
    [
        (lambda _: True, "mla_decode//heads=1"),
        (lambda case: any(row.kind.word == "paused" for row in rows_of(case)), "mla_decode/paused:1/heads=1"),
        (lambda case: any(row.cached > 64 for row in rows_of(case)), "mla_decode/decode:65/heads=1"),
        (lambda case: sum(row.length for row in rows_of(case)) == 227, "mla_decode/decode:226/heads=1"),
        (lambda case: case.layers[0].num_attention_heads > 5, "mla_decode//heads=6"),
        (lambda case: case.options.block == (32,), "mla_decode//heads=1,block=32"),
        (lambda case: case.options.seed > 1, "mla_decode//heads=1,seed=2"),
    ],
    ids=["anything", "a kind", "a length", "a total", "heads", "an option", "a number"],
)
def test_nothing_is_left_but_what_the_failure_needs(predicate, smallest):
    found = reduce(parse(ZOO), each(predicate))
    assert found.is_complete
    assert str(found.case) == smallest


def test_what_shows_from_some_number_of_blocks_on_needs_one_row():
    def fails(case):
        return sum(-(-row.length // 32) for row in rows_of(case)) >= 3

    text = "mla_decode/decode:3,decode:9,draft:12+2,decode:31/block=32"
    assert str(reduce(parse(text), each(fails)).case) == "mla_decode/decode:64/heads=1"


def test_a_middle_slot_between_two_others_stays_between_them():
    def fails(case):
        kinds = " ".join(row.kind.word for row in case.steps[0])
        return "decode paused decode" in kinds

    text = "mla_decode/decode:9,decode:30,paused:70,decode:8,pad:2/heads=4"
    assert str(
        reduce(parse(text), each(fails)).case
    ) == "mla_decode/prefill:1,paused:1,prefill:1/heads=1".replace("prefill:1", "decode:1")


def test_steps_layers_and_lists_of_options_go_too():
    text = (
        "mla_step/prefill:130,hit:64+1..hit:130+17,decode:65..decode:147,decode:66"
        "/heads=8,layers=4,block=64+32+16+64"
    )

    def fails(case):
        has_layer = any(layer.block_size == 32 for layer in case.layers)
        return has_layer and any(row.kind.word == "hit" and row.length > 140 for row in rows_of(case))

    found = str(reduce(parse(text), each(fails)).case)
    assert found == "mla_step/hit:124+17/heads=1,block=32"


def test_no_case_is_judged_twice_and_never_more_at_a_time_than_asked_for():
    widths = []

    def fails(cases):
        widths.append(len(cases))
        asked.extend(cases)
        return [any(row.cached > 40 for row in rows_of(case)) for case in cases]

    asked = []
    found = reduce(parse(ZOO), fails, width=3)
    assert len(asked) == len(set(asked)) == found.tried
    assert max(widths) == 3


def test_of_several_judged_together_the_first_that_fails_is_taken():
    alone = reduce(parse(ZOO), each(lambda case: len(case.steps[0]) >= 2))
    together = reduce(parse(ZOO), each(lambda case: len(case.steps[0]) >= 2), width=8)
    assert alone.case == together.case


def test_slots_that_a_verdict_names_are_tried_alone_first():
    fails = each(lambda case: any(row.kind.word == "decode" for row in rows_of(case)))
    reduce(parse(ZOO), fails, slots=[3])
    assert fails.asked[0] == "mla_decode/decode:100.k3,pad:3/heads=8,block=32,seed=3"


def test_without_time_the_case_stays_and_says_so():
    found = reduce(parse(ZOO), each(lambda _: True), seconds=0.0)
    assert (str(found.case), found.is_complete, found.tried) == (str(parse(ZOO)), False, 0)


def test_a_search_ends_at_its_limit_with_the_smallest_so_far():
    def fails(cases):
        time.sleep(0.02)
        return [any(row.cached > 40 for row in rows_of(case)) for case in cases]

    found = reduce(parse(ZOO), fails, seconds=0.1)
    assert not found.is_complete
    assert len(rows_of(found.case)) < 7


# ---- the same reason -----------------------------------------------------------------------------


def test_a_failure_is_its_kind_and_what_failed_whatever_the_layer():
    assert Failure.of(failed("c", tensor="out[2]")) == Failure(Kind.WRONG, frozenset({("values", "out")}))
    assert Failure.of(passed("c")) is None


def test_where_the_harness_failed_no_path_did():
    parts = ("c", "o", "p", "l", Status.ERROR)
    assert Failure.of(Verdict(*parts, None, "the harness failed")) is None
    assert Failure.of(Verdict(*parts, Kind.ORACLE_CONFLICT, "two references differ")) is None
    assert Failure.of(Verdict(*parts, Kind.CRASH, "signal 11")) == Failure(Kind.CRASH, frozenset())


@pytest.mark.parametrize(
    ("other", "is_like"),
    [
        (failed("c"), True),
        (failed("c", tensor="out[1]"), True),
        (failed("c", check="lse", tensor="lse"), False),
        (failed("c", kind=Kind.GUARD, check="guard"), False),
        (passed("c"), False),
        (Verdict("c", "o", "p", "l", Status.ERROR, Kind.CRASH, "signal 11"), False),
    ],
)
def test_a_case_that_fails_for_another_reason_is_not_taken(other, is_like):
    assert Failure.of(failed("c")).is_like(Failure.of(other)) is is_like


def test_crashes_are_alike():
    crash = Failure.of(Verdict("c", "o", "p", "l", Status.ERROR, Kind.CRASH, "signal 11"))
    assert crash.is_like(crash)


def test_a_verdict_is_reduced_by_what_its_own_check_says():
    tasks = []

    def judge(asked):
        tasks.extend(asked)
        for task in reversed(asked):
            cached = max((row.cached for row in rows_of(parse(task.case))), default=0)
            yield failed(task.case) if cached >= 64 else failed(task.case, Kind.GUARD, "guard")

    found = reduce_verdict(failed(ZOO, rows="1,3"), judge, TASK, width=4)
    assert str(found.case) == "mla_decode/decode:64/heads=1"
    assert all(task.checks == () and not task.both_oracles for task in tasks)


def test_a_check_that_failed_is_asked_again_and_no_other():
    def judge(asked):
        assert all(task.checks == ("repeat",) for task in asked)
        return [failed(task.case, Kind.NONDETERMINISTIC, "repeat") for task in asked]

    first = failed(ZOO, Kind.NONDETERMINISTIC, "repeat")
    assert str(reduce_verdict(first, judge, TASK).case) == "mla_decode//heads=1"


def test_cases_that_their_operator_does_not_take_are_not_judged():
    text = "mla_logits/prefill:40..decode:40/heads=2,layers=2"
    asked = []

    def judge(tasks):
        asked.extend(task.case for task in tasks)
        return [failed(task.case) for task in tasks]

    reduce_verdict(failed(text), judge, replace(TASK, case=text))
    assert asked
    assert not any(case.startswith("mla_logits/decode") for case in asked)


def test_a_verdict_that_did_not_fail_is_not_reduced():
    assert reduce_verdict(passed(ZOO), lambda _: [], TASK) is None


# ---- the failures of a run -----------------------------------------------------------------------

LONG, SHORT, OTHER = (f"mla_decode/{rows}/heads=4" for rows in ("decode:90,draft:70+3", "decode:80", "idle"))


class Judge:
    """A pool that fails where a row has at least 64 cached tokens, and in `OTHER`; notes its tasks."""

    workers = 2

    def __init__(self):
        self.asked = []

    def judge(self, tasks):
        self.asked += tasks
        for task in tasks:
            cached = max((row.cached for row in rows_of(parse(task.case))), default=0)
            yield failed(task.case) if cached >= 64 or task.case == OTHER else passed(task.case)


def smallest_of(failures, known=(), seconds=5.0):
    """(case -> what was found of it, the tasks that were judged for it)."""
    pool = Judge()
    plan = Plan(tuple(replace(TASK, case=item.case, path=item.path) for item in failures), ())
    found = with_smallest(pool, plan, failures, known, seconds)
    return {item.case: item.smallest for item in found}, pool.asked


def test_failures_that_look_alike_share_a_smallest_case_that_is_looked_for_once():
    alone = smallest_of([failed(SHORT)])
    found, asked = smallest_of([failed(LONG), failed(SHORT)])
    assert found == dict.fromkeys([LONG, SHORT], Smallest("mla_decode/decode:64/heads=1"))
    assert [task.case for task in asked] == [task.case for task in alone[1]]


@pytest.mark.parametrize("difference", ["path", "kind", "output", "rule", "known failure"])
def test_failures_that_differ_are_reduced_each_by_itself(difference):
    first, second = failed(SHORT), failed(OTHER)
    known = ()
    if difference == "path":
        second = replace(second, path="q")
    elif difference == "kind":
        second = failed(OTHER, kind=Kind.GUARD)
    elif difference == "output":
        second = failed(OTHER, tensor="lse")
    elif difference == "rule":
        where = replace(second.checks[0].where, pattern="in idle rows")
        second = replace(second, checks=(replace(second.checks[0], where=where),))
    else:
        known = (KnownFailure(OTHER, "p", "*", "issue 7"),)
        second = second.expected_to_fail("issue 7")
    found, _ = smallest_of([first, second], known)
    assert found[SHORT] == Smallest("mla_decode/decode:64/heads=1")
    assert found[OTHER] != found[SHORT]


def test_a_known_failure_is_told_apart_by_its_line_and_by_no_rule():
    where = Where(pattern="in rows from 1 on")
    other = failed(LONG)
    other = replace(other, checks=(replace(other.checks[0], where=where),))
    known = (KnownFailure("*", "p", "*", "issue 7"),)
    found, _ = smallest_of([failed(SHORT), other], known)
    assert found[LONG] == found[SHORT] == Smallest("mla_decode/decode:64/heads=1")


def test_without_time_the_smallest_case_is_said_to_be_unfinished():
    found, asked = smallest_of([failed(SHORT)], seconds=0.0)
    assert found == {SHORT: Smallest(SHORT, is_complete=False)}
    assert asked == []


# ---- a broken kernel -----------------------------------------------------------------------------


def test_a_recorded_bug_is_reduced_to_the_row_that_shows_it(lane, tmp_path):
    (bug,) = (item for item in records_of("triton/mla_decode").mutants if item.id == "lse-base-2")
    path = load_mutant(bug, "triton/mla_decode", tmp_path)

    def judge(tasks):
        return [judge_case(task, path, lane, tmp_path / "lock") for task in tasks]

    text = "mla_decode/draft:30+3,hit:64+17,decode:100,idle,paused:7,pad:3/model=minicpm3-4b,heads=3"
    task = replace(TASK, case=text, checks=())
    (verdict,) = judge([task])
    found = reduce_verdict(verdict, judge, task)
    assert found.is_complete
    assert str(found.case) == "mla_decode/decode:1/heads=1"
