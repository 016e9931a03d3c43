"""Broken kernels: records of them, what becomes of one, and the command that says so."""

import ast
import contextlib
import json
import os
import pickle
import re
import signal
import sys
import tomllib
from concurrent.futures import Future
from functools import partial
from types import SimpleNamespace

import pebble
import pytest
import typer

from harness import cli
from harness.commands import mutants as mutants_command
from harness.mutation import mutant as records
from harness.mutation import trial
from harness.mutation.chosen import Chosen, choose
from harness.mutation.generate_cuda import tokens_of
from harness.mutation.mutant import Mutant, MutantError, path_file, read_records, records_of, source_of, stale
from harness.mutation.trial import ChildEnded, HarnessFailure, Trial, in_child, try_here, try_in_child
from harness.pool import Pool, WorkerError
from harness.task import PathInfo, Task
from harness.verdict import CheckResult, Kind, Status, Verdict
from harness.watchdog import TIMEOUT_EXIT
from harness.worker import BROKEN_EXIT, spool_file
from reports import mutants as report

# Said by Python 3.12 of any fork of a process with threads; the children here only run a function.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

KNOWN = sorted(records.KNOWN.rglob("*.toml"))
SPARSE_DECODE = "harness/paths/cuda/sparse_decode.cu"
CATALOGUE = re.compile(r"\b[A-Z][0-9]{1,2}[a-c]?\b|\bCUDA\b")
"""A bug that someone shipped, by its number, or one of those that CUDA has in store for everyone."""


def change(old, new, name="m", file="k.py", why="B1: why", shows=""):
    return Mutant(name, file, old, new, why, shows)


# ---- one change ----------------------------------------------------------------------------------


def test_a_mutant_changes_its_text_and_nothing_else():
    assert change("b", "x\ny").applied("a\nb\nc\n") == "a\nx\ny\nc\n"


@pytest.mark.parametrize(("source", "times"), [("a\nc\n", 0), ("b\nb\n", 2), ("", 0)])
def test_a_text_that_does_not_occur_once_is_refused(source, times):
    with pytest.raises(MutantError) as refusal:
        change("b", "x", name="lost").applied(source)
    said = str(refusal.value)
    assert "lost" in said
    assert "k.py" in said
    assert f"{times} times" in said
    assert "\n" not in said


def test_texts_that_overlap_occur_twice():
    with pytest.raises(MutantError):
        change("x\nx", "x\ny").applied("x\nx\nx\n")


@pytest.mark.parametrize("old", [" ", "\n", "\n  \n"])
def test_a_text_of_spaces_that_does_not_occur_is_refused(old):
    with pytest.raises(MutantError):
        change(old, "x").applied("a")


def test_a_change_that_changes_nothing_is_refused():
    with pytest.raises(MutantError, match="changes nothing"):
        change("b", "b").applied("a b c")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("a", "x", 1),
        ("c = 3", "c = 4", 3),
        ("b\nc = 3\nd", "b\nc = 3\nx", 4),
        ("b\nc = 3\nd", "x\nc = 3\nd", 2),
        ("b\nc = 3\n", "b\n", 3),
        ("c = 3\n", "c = 3\nx\n", 4),
    ],
)
def test_the_line_is_the_first_that_differs(old, new, line):
    assert change(old, new).line("a\nb\nc = 3\nd\n") == line


# ---- files of records ----------------------------------------------------------------------------

RECORD = """
file = "k.py"

[[mutant]]
id = "one"
why = "B1: wrong"
old = "a"
new = "b"

[[mutant]]
id = "two"
why = "B2: smoothly wrong"
old = "a"
new = ""
shows = "planted"

[[accepted]]
why = "equivalent"
old = "c"
new = "d"
"""


def test_a_file_of_records_is_read():
    found = read_records(RECORD, "k.toml")
    assert found.file == "k.py"
    assert found.mutants == (
        Mutant("one", "k.py", "a", "b", "B1: wrong"),
        Mutant("two", "k.py", "a", "", "B2: smoothly wrong", "planted"),
    )
    assert found.acceptance(change("c", "d", name="g001")) == "equivalent"
    assert found.acceptance(change("c", "e", name="g001")) is None
    assert found.acceptance(change("d", "c", name="g001")) is None


def test_a_file_may_record_nothing():
    found = read_records('file = "k.py"', "k.toml")
    assert (found.mutants, found.accepted) == ((), ())


ENTRY = '[[mutant]]\nid = "one"\nwhy = "B1"\nold = "a"\nnew = "b"\n'
FILE = 'file = "k.py"\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("file = ", "TOML", id="not TOML"),
        pytest.param(ENTRY, "file", id="no file"),
        pytest.param("file = 3\n" + ENTRY, "file", id="a file that is a number"),
        pytest.param(FILE + "files = 3\n", "files", id="an unknown key"),
        pytest.param(FILE + ENTRY.replace("new", "nev"), "new", id="a key spelt wrong"),
        pytest.param(FILE + ENTRY.replace('new = "b"\n', ""), "new is missing", id="no new"),
        pytest.param(FILE + ENTRY.replace('id = "one"\n', ""), "id is missing", id="no id"),
        pytest.param(FILE + ENTRY + 'seen = "x"', "'seen'", id="a key too many"),
        pytest.param(FILE + ENTRY.replace('"B1"', '" "'), "why", id="an empty why"),
        pytest.param(FILE + ENTRY.replace('"a"', '""'), "old", id="an empty old"),
        pytest.param(FILE + ENTRY.replace('"a"', '" "'), "old", id="a blank old"),
        pytest.param(FILE + ENTRY.replace('"one"', '"a/b"'), "'a/b'", id="an id that is a file's"),
        pytest.param(FILE + ENTRY.replace('"a"', "3"), "old", id="an old that is a number"),
        pytest.param(FILE + ENTRY.replace('"b"', "['b']"), "new", id="a new that is a list"),
        pytest.param(FILE + ENTRY + ENTRY, "'one' occurs twice", id="an id twice"),
        pytest.param(FILE + ENTRY.replace("[[mutant]]", "[[accepted]]\nx = 1"), "accepted 1", id="accepted"),
        pytest.param(FILE + ENTRY.replace("[[mutant]]", "[mutant]"), "mutant", id="a table for a list"),
        pytest.param(FILE + 'mutant = "x"\n', "mutant", id="a text for a list"),
        pytest.param(FILE + "accepted = [1]\n", "accepted", id="a number for an entry"),
        pytest.param(FILE + "mutant = 3\n", "mutant", id="a number for a list"),
    ],
)
def test_a_record_that_cannot_be_read_is_refused_in_one_sentence(text, said):
    with pytest.raises(MutantError) as refusal:
        read_records(text, "known/k.toml")
    assert said in str(refusal.value)
    assert "known/k.toml" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_record_without_a_file_is_told_so():
    with pytest.raises(MutantError, match=r"missing|has no file"):
        read_records(ENTRY, "known/k.toml")


def test_the_second_of_two_wrong_entries_is_named():
    with pytest.raises(MutantError, match="mutant 2"):
        read_records(FILE + ENTRY + ENTRY.replace("new", "nev"), "known/k.toml")


def test_an_acceptance_is_stale_once_its_change_is_not_generated():
    kept, gone, other = change("a", "b"), change("c", "d"), change("a", "c")
    generated = [change("a", "b", name="g001"), change("e", "f", name="g002")]
    assert stale([kept, gone, other], generated) == [gone, other]
    assert stale([], generated) == []


@pytest.mark.parametrize("path", ["triton/mla_decode", "triton/mla_decode@fast"])
def test_the_file_of_a_path_is_called_as_the_path(path):
    assert path_file(path) == "harness/paths/triton/mla_decode.py"
    assert records_of(path).file == "harness/paths/triton/mla_decode.py"


def test_a_variant_with_a_file_of_its_own_has_records_of_its_own():
    path = "triton/prefill_attention@padded"
    assert path_file(path) == "harness/paths/_prefill_attention_padded.py"
    found, others = records_of(path), records_of("triton/prefill_attention")
    assert (found.file, others.file) == (path_file(path), path_file("triton/prefill_attention"))
    assert {mutant.file for mutant in found.mutants} == {found.file}


@pytest.mark.parametrize("family", ["triton", "cuda"])
@pytest.mark.parametrize(
    ("path", "file"),
    [("mla_step", "_mla_step.py"), ("prefill_attention@padded", "_prefill_attention_padded.py")],
)
def test_a_composition_is_the_file_of_every_family_s_path(family, path, file):
    found = records_of(f"{family}/{path}")
    assert found.file == path_file(f"{family}/{path}") == f"harness/paths/{file}"
    assert found.mutants


def test_a_path_without_records_has_none():
    assert records_of("nowhere/mla_decode") == records.Records("harness/paths/nowhere/mla_decode.py", (), ())


# ---- the records that there are ------------------------------------------------------------------


def path_of(file):
    """The path whose bugs a file records; of a composition that families share, Triton's."""
    family = "triton" if file.parent == records.KNOWN else file.parent.name
    return f"{family}/{file.stem.removeprefix('_')}"


@pytest.fixture(scope="module", params=KNOWN, ids=path_of)
def known(request):
    """(path, its records)."""
    path = path_of(request.param)
    return path, records_of(path)


def test_there_are_thirty_bugs_that_engines_shipped():
    assert len(KNOWN) >= 2
    assert sum(len(tomllib.loads(file.read_text())["mutant"]) for file in KNOWN) >= 30


def test_a_broken_header_is_put_where_the_kernel_includes_it():
    header = "harness/cuda/include/mla/attention.h"
    broken = change("if (keep != 1.0f) {", "if (keep > 1.0f) {", file=header)
    text = trial._in_place_of_its_inclusion(header, broken.applied(source_of(header)), SPARSE_DECODE)
    assert '#include "mla/attention.h"' not in text
    assert "if (keep > 1.0f) {" in text
    assert "if (keep != 1.0f) {" not in text


def test_a_header_that_the_kernel_does_not_include_is_refused():
    with pytest.raises(MutantError, match=r"must include harness/.*/search\.h once, by itself"):
        trial._in_place_of_its_inclusion("harness/cuda/include/mla/search.h", "", SPARSE_DECODE)


def test_a_file_of_records_lies_where_its_path_does(known):
    path, found = known
    assert found.file == path_file(path)
    assert found.mutants
    # A kernel may be broken in a header that it includes by itself.
    headers = {mutant.file for mutant in found.mutants} - {found.file}
    inclusions = [f'#include "{file.removeprefix("harness/cuda/include/")}"' for file in headers]
    assert all(inclusion in source_of(found.file) for inclusion in inclusions)


def meaning_of(file, text):
    """What does not change with comments and layout."""
    if file.endswith((".cu", ".h")):
        return [token.text for token in tokens_of(text)]
    return ast.dump(ast.parse(text))


def test_every_recorded_bug_changes_what_the_kernel_means(known):
    _, found = known
    for mutant in found.mutants:
        source = source_of(mutant.file)
        assert source.count(mutant.old) == 1, mutant.id
        assert meaning_of(mutant.file, mutant.applied(source)) != meaning_of(mutant.file, source), mutant.id


def test_recorded_bugs_are_distinct(known):
    _, found = known
    assert len({mutant.id for mutant in found.mutants}) == len(found.mutants)
    changed = {(mutant.file, mutant.applied(source_of(mutant.file))) for mutant in found.mutants}
    assert len(changed) == len(found.mutants)


def test_every_recorded_bug_names_one_of_the_catalogue(known):
    _, found = known
    assert [mutant.id for mutant in found.mutants if not CATALOGUE.search(mutant.why.partition(":")[0])] == []


def test_smooth_bugs_name_a_data_mode(known):
    _, found = known
    modes = {"", "planted", "randn", "flat", "peaked", "huge", "deep", "tiny"}
    assert {mutant.shows for mutant in found.mutants} <= modes


# ---- a process of its own ------------------------------------------------------------------------


def test_a_child_hands_over_what_its_work_returns(tmp_path):
    here = os.getpid()
    told, child = in_child(lambda: ("x" * 100_000, os.getpid()), tmp_path / "answer")
    assert told == "x" * 100_000
    assert child != here


def test_what_a_child_changes_is_gone_with_it(tmp_path):
    state = []
    in_child(lambda: state.append(1), tmp_path / "answer")
    assert state == []


def test_a_child_hands_over_what_its_work_raises(tmp_path):
    def work():
        raise KeyError("no such tile")

    with pytest.raises(KeyError, match="no such tile"):
        in_child(work, tmp_path / "answer")


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (partial(os._exit, TIMEOUT_EXIT), TIMEOUT_EXIT),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), -9),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), -15),
    ],
    ids=["exit", "killed", "ended"],
)
def test_a_child_that_ends_without_an_answer_says_how(tmp_path, end, code):
    with pytest.raises(ChildEnded) as ended:
        in_child(end, tmp_path / "answer")
    assert ended.value.exit_code == code


def test_a_child_that_leaves_by_system_exit_has_no_answer(tmp_path):
    def leave():
        raise SystemExit(0)

    with pytest.raises(ChildEnded):
        in_child(leave, tmp_path / "answer")


def test_a_child_that_ends_with_code_zero_has_no_answer(tmp_path):
    with pytest.raises(ChildEnded):
        in_child(partial(os._exit, 0), tmp_path / "answer")


def test_an_answer_of_an_earlier_child_is_not_taken_for_a_later_one_s(tmp_path):
    assert in_child(lambda: "earlier", tmp_path / "answer") == "earlier"
    with pytest.raises(ChildEnded):
        in_child(partial(os._exit, 0), tmp_path / "answer")


class Particular(Exception):
    """An exception that is made of two things, so that a copy cannot be made of its message."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


def test_an_exception_that_cannot_be_copied_keeps_its_message(tmp_path):
    def work():
        raise Particular("bad tile", "line 3")

    with pytest.raises(Exception, match="bad tile at line 3"):
        in_child(work, tmp_path / "answer")


def test_the_exit_code_of_a_child_survives_the_way_to_another_process():
    ended = pickle.loads(pickle.dumps(ChildEnded(TIMEOUT_EXIT)))  # noqa: S301 our own
    assert ended.exit_code == TIMEOUT_EXIT
    assert str(ended) == str(ChildEnded(TIMEOUT_EXIT))


# ---- one mutant ----------------------------------------------------------------------------------

MODULE = """
from types import SimpleNamespace

ANSWER = "right"
PATHS = (SimpleNamespace(name="tiny/other", answer=""), SimpleNamespace(name="tiny/op", answer=ANSWER))
"""
FILE_OF_PATH = "harness/paths/tiny/op.py"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder in place of the checkout: one path's file, and a place for its records."""
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "KNOWN", tmp_path / "known")
    (tmp_path / FILE_OF_PATH).parent.mkdir(parents=True)
    (tmp_path / FILE_OF_PATH).write_text(MODULE)
    (tmp_path / "known/tiny").mkdir(parents=True)
    (tmp_path / "scratch").mkdir()
    return tmp_path


def mutated(new, name="m"):
    """The tiny path with another answer, a Python expression."""
    return change('ANSWER = "right"', f"ANSWER = {new}", name=name, file=FILE_OF_PATH)


def task(case, path="tiny/op", checks=()):
    return Task(case=case, operator="op", path=path, lane="interpreted", checks=checks)


def ended(item, status, kind=None, reason="", checks=()):
    return Verdict(item.case, "op", item.path, "interpreted", status, kind, reason, tuple(checks))


def judge(item, path):
    """What the tiny path's answer says: on the case it names, or on all."""
    act, _, case = path.answer.partition(" on ")
    if act == "right" or (case and case != item.case):
        return ended(item, Status.PASSED)
    if act == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "hang":
        os._exit(TIMEOUT_EXIT)
    if act == "skip":
        return ended(item, Status.SKIPPED, Kind.UNSUPPORTED, "not taken")
    if act == "conflict":
        return ended(item, Status.ERROR, Kind.ORACLE_CONFLICT, "the references differ")
    if act == "broken":
        return ended(item, Status.ERROR, None, "the harness failed")
    if act == "raise":
        return ended(item, Status.ERROR, Kind.CRASH, "the path raised")
    passed = CheckResult("guard", Status.PASSED)
    failed = [
        CheckResult(name, Status.FAILED, "out", Kind.WRONG, f"{name} is bad") for name in ("lse", "idle")
    ]
    return ended(item, Status.FAILED, Kind.WRONG, "lse is bad", [passed, *failed])


@pytest.fixture(params=["here", "in a child"])
def attempt(request, small):
    """(answer, cases) -> a trial, in this process or in a child."""
    run = {"here": try_here, "in a child": try_in_child}[request.param]

    def attempted(answer, *cases):
        return run(mutated(answer), [task(case) for case in cases], small / "scratch", judge)

    return attempted


def test_a_mutant_that_every_case_passes_survives(attempt):
    found = attempt("'right'", "one", "two")
    assert (found.caught, found.stillborn, found.cases) == (False, False, 2)
    assert found.path == "tiny/op"


def test_a_mutant_that_every_case_skips_survives(attempt):
    found = attempt("'skip'", "one")
    assert (found.caught, found.stillborn) == (False, False)


def test_a_wrong_mutant_is_caught_by_the_first_failing_check_of_the_first_failing_case(attempt):
    found = attempt("'wrong on two'", "one", "two", "three")
    assert (found.caught, found.case, found.check, found.cases) == (True, "two", "lse", 2)
    assert found.reason == "lse is bad"


def test_a_mutant_that_raises_is_caught_by_its_crash(attempt):
    found = attempt("'raise'", "one")
    assert (found.caught, found.case, found.check) == (True, "one", "crash")
    assert found.reason == "the path raised"


@pytest.mark.parametrize("answer", ["no_such_name", "1 / 0", "(", "__import__('no_such_library')"])
def test_a_mutant_that_cannot_be_imported_is_stillborn(attempt, answer):
    found = attempt(answer, "one")
    assert (found.caught, found.stillborn, found.cases) == (False, True, 0)
    assert "Error: " in found.reason


@pytest.mark.parametrize("answer", ["'conflict'", "'broken'"])
def test_a_failure_of_the_harness_is_not_the_mutant_s(attempt, answer):
    with pytest.raises(HarnessFailure, match="m on one: the"):
        attempt(answer, "one")


@pytest.mark.parametrize(("answer", "check"), [("kill", "crash"), ("hang", "timeout")])
def test_a_mutant_that_ends_its_process_is_caught_by_that(small, answer, check):
    tasks = [task("one"), task("two")]
    found = try_in_child(mutated(f"'{answer} on two'"), tasks, small / "scratch", judge)
    assert (found.caught, found.case, found.check) == (True, "two", check)
    assert found.reason


def test_a_mutant_that_ends_its_process_at_import_is_caught_on_no_case(small):
    tasks = [task("one")]
    folder = small / "scratch"
    assert try_in_child(mutated("'wrong'"), tasks, folder, judge).case == "one"
    found = try_in_child(mutated("__import__('os')._exit(9)"), tasks, folder, judge)
    assert (found.caught, found.check, found.case) == (True, "crash", "")


def test_mutants_of_one_name_tried_at_a_time_do_not_mix(small):
    folder = small / "scratch"

    def judge_while_another_runs(item, path):
        try_in_child(mutated("'right'"), [task("of another")], folder, judge)
        return judge(item, path)

    found = try_in_child(mutated("'kill'"), [task("own")], folder, judge_while_another_runs)
    assert found.case == "own"


def test_every_case_is_judged_where_all_verdicts_are_wanted(small):
    tasks = [task("one"), task("two")]
    found = trial.judge_all(mutated("'wrong on one'"), tasks, small / "scratch", judge)
    assert [(item.case, item.status) for item in found] == [("one", Status.FAILED), ("two", Status.PASSED)]


@pytest.mark.parametrize("judge_all", [trial.judge_all, trial.judge_all_in_child])
@pytest.mark.parametrize("answer", ["'conflict on two'", "'broken on two'"])
def test_no_verdicts_are_given_where_the_harness_fails(small, judge_all, answer):
    with pytest.raises(HarnessFailure, match="m on two: the"):
        judge_all(mutated(answer), [task("one"), task("two")], small / "scratch", judge)


def test_nothing_is_left_of_a_child(small):
    try_in_child(mutated("'right'"), [task("one")], small / "scratch", judge)
    trial.judge_all_in_child(mutated("'right'"), [task("one")], small / "scratch", judge)
    assert list((small / "scratch").iterdir()) == []


def test_mutants_of_one_name_and_file_are_modules_of_their_own(small):
    first, second = (
        trial.load_mutant(mutated(f"'{answer}'"), "tiny/op", small / "scratch") for answer in "ab"
    )
    assert (first.answer, second.answer) == ("a", "b")
    assert len(list((small / "scratch").iterdir())) == 2


def test_a_changed_composition_is_what_the_path_finds_that_uses_it_and_nobody_after_it(small, monkeypatch):
    monkeypatch.setattr(trial, "ROOT", small)
    composition = "harness/paths/_op.py"
    (small / composition).write_text('ANSWER = "right"')
    (small / FILE_OF_PATH).write_text(
        MODULE.replace('ANSWER = "right"', "from harness.paths._op import ANSWER")
    )
    path = trial.load_mutant(change("right", "wrong", file=composition), "tiny/op", small / "scratch")
    assert path.answer == "wrong"
    assert "harness.paths._op" not in sys.modules


def test_all_verdicts_of_a_mutant_that_cannot_be_imported_are_its_error(small):
    with pytest.raises(NameError, match="no_such_name"):
        trial.judge_all(mutated("no_such_name"), [task("one")], small / "scratch", judge)


# ---- which mutants -------------------------------------------------------------------------------


def record(small, *entries, file=FILE_OF_PATH, name="tiny/op"):
    """Writes a file of records: entries of (kind, id, old, new)."""
    text = f'file = "{file}"\n'
    for kind, identity, old, new in entries:
        named = f'id = "{identity}"\n' if identity else ""
        text += (
            f"[[{kind}]]\n{named}why = 'B1: {identity or 'equal'}'\nold = '''{old}'''\nnew = '''{new}'''\n"
        )
    (small / f"known/{name}.toml").write_text(text)


def test_recorded_mutants_of_paths_with_tasks_are_chosen_in_order(small):
    record(small, ("mutant", "b", "right", "x"), ("mutant", "a", "right", "y"))
    chosen = choose([task("one")], "*", generated=False)
    assert [mutant.id for mutant, _ in chosen.attempts] == ["b", "a"]
    assert not chosen.accepted
    assert not chosen.stale
    assert not choose([task("one", path="triton/op")], "*", generated=False).attempts


def test_a_glob_picks_mutants(small):
    record(
        small, ("mutant", "lse-a", "right", "x"), ("mutant", "lse-b", "right", "y"), ("mutant", "z", "h", "g")
    )
    chosen = choose([task("one")], "lse-*", generated=False)
    assert [mutant.id for mutant, _ in chosen.attempts] == ["lse-a", "lse-b"]


def test_a_sample_is_drawn_by_its_seed_keeps_the_order_and_is_told(small):
    record(small, *(("mutant", f"m{number:02}", "right", f"new{number}") for number in range(40)))
    drawn = [choose([task("one")], "*", generated=False, sample=10, seed=seed) for seed in (0, 0, 1)]
    ids = [[mutant.id for mutant, _ in chosen.attempts] for chosen in drawn]
    assert ids[0] == ids[1] == sorted(ids[0])
    assert len(ids[0]) == len(ids[2]) == 10
    assert ids[0] != ids[2]
    assert drawn[2].notes == ["tiny/op: a sample of 10 of 40 mutants, seed 1"]
    assert not choose([task("one")], "*", generated=False, sample=40).notes


def test_cases_that_launch_once_come_first(small):
    record(small, ("mutant", "a", "right", "x"))
    tasks = [task("one", checks=("repeat",)), task("two"), task("three", checks=("pages",)), task("four")]
    ((_, chosen),) = choose(tasks, "*", generated=False).attempts
    assert [item.case for item in chosen] == ["two", "four", "one", "three"]


def test_a_mutant_gets_the_tasks_of_its_own_path(small):
    record(small, ("mutant", "a", "right", "x"))
    tasks = [task("one"), task("two", path="triton/op"), task("three")]
    ((_, chosen),) = choose(tasks, "*", generated=False).attempts
    assert [item.case for item in chosen] == ["one", "three"]


def test_variants_that_share_a_file_are_all_tried(small):
    record(small, ("mutant", "a", "right", "x"))
    variants = {"tiny/op", "tiny/op@fast"}
    chosen = choose([task("one", path=path) for path in sorted(variants)], "*", generated=False)
    assert {item.path for _, tasks in chosen.attempts for item in tasks} == variants


def test_a_record_that_does_not_apply_is_refused(small):
    record(small, ("mutant", "gone", "wrong", "x"))
    with pytest.raises(MutantError, match="gone"):
        choose([task("one")], "*", generated=False)


def test_a_record_of_a_file_that_is_not_there_is_refused(small):
    record(small, ("mutant", "a", "right", "x"), file="harness/paths/tiny/opp.py")
    with pytest.raises(MutantError, match=re.escape("opp.py")):
        choose([task("one")], "*", generated=False)


def test_a_record_that_is_not_text_is_refused(small):
    (small / "known/tiny/op.toml").write_bytes(b'file = "\xff"\n')
    with pytest.raises(MutantError, match=re.escape("op.toml")):
        choose([task("one")], "*", generated=False)


def test_generated_mutants_take_the_place_of_recorded_ones(small):
    kernel = "@jit\ndef kernel(a, b):\n    return a + b\n"
    (small / FILE_OF_PATH).write_text(MODULE + kernel)
    plus, times, minus = (f"    return a {operator} b" for operator in "+*-")
    record(
        small,
        ("mutant", "recorded", "right", "x"),
        ("accepted", "", plus, minus),
        ("accepted", "", plus, times),
    )
    chosen = choose([task("one")], "*", generated=True)
    ((mutant, why),) = chosen.accepted.items()
    assert [item for item, _ in chosen.attempts] == [mutant]
    assert (mutant.old, mutant.new, why) == (plus, minus, "B1: equal")
    assert [(item.old, item.new) for item in chosen.stale] == [(plus, times)]


def test_an_acceptance_is_stale_whichever_mutants_are_picked(small):
    record(small, ("accepted", "", "a", "b"))
    assert len(choose([task("one")], "nothing", generated=True).stale) == 1


# ---- telling it ----------------------------------------------------------------------------------

LOOP = "for i in x:\n    y = '''a\\b'''\n    'end'"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a = 1", "a = 2"),
        ('a = "x\\n"', 'a = "\t\\"'),
        ("caf\u00e9 \u2192", "\U0001d6fc = 1"),
        ("    a\n    b", "    a\n    c"),
        ("a\n'b'", "a\n'c''"),
        ("\na\n", "\n\nb\n"),
        ("a\n\x0c\x1b\x7f", "a\n'\x7f"),
        ("a\n\tb \\n", "a\n\tc \u00e9\U0001d6fc"),
        (LOOP, LOOP.upper()),
    ],
)
def test_survivors_can_be_read_back_as_acceptances(old, new):
    survivor = change(old, new)
    text = report.survivor_records([Trial(survivor, "tiny/op")], Chosen())
    assert 'why = ""' in text
    found = read_records('file = "k.py"\n' + text.replace('why = ""', 'why = "equal"'), "k.toml")
    assert found.acceptance(survivor) == "equal"


def test_a_survivor_s_reason_has_to_be_filled_in():
    text = report.survivor_records([Trial(change("a", "b"), "tiny/op")], Chosen())
    with pytest.raises(MutantError, match="why"):
        read_records('file = "k.py"\n' + text, "k.toml")


def five():
    """Trials: caught, caught, accepted survivor, survivor, stillborn; and what was chosen."""
    mutants = [mutated(f"'{name}'", name=name) for name in ("one", "two", "equal", "missed", "dead")]
    one, two, equal, missed, dead = mutants
    trials = [
        Trial(one, "tiny/op", caught=True, case="a", check="values", reason="bad"),
        Trial(two, "tiny/op", caught=True, case="b", check="timeout", reason="bad"),
        Trial(equal, "tiny/op"),
        Trial(missed, "tiny/op"),
        Trial(dead, "tiny/op", stillborn=True, reason="NameError: no"),
    ]
    return trials, Chosen([(mutant, ()) for mutant in mutants], {equal: "both are the same"})


def test_only_unexplained_survivors_are_written_as_records():
    trials, chosen = five()
    text = report.survivor_records(trials, chosen)
    assert text.count("[[accepted]]") == 1
    assert "missed" in text


def test_the_score_counts_an_accepted_survivor_as_not_caught():
    trials, chosen = five()
    found = report.score("tiny/op", trials, chosen)
    assert (found.caught, found.accepted, found.survived, found.stillborn) == (2, 1, 1, 1)
    assert found.share == 0.5
    assert report.score("triton/op", trials, chosen).share == 1.0


def test_survivors_and_stale_acceptances_fail_and_nothing_else_does():
    trials, chosen = five()
    assert report.has_failed(trials, chosen)
    others = [item for item in trials if item.mutant.id != "missed"]
    assert not report.has_failed(others, chosen)
    chosen.stale = [change("a", "b")]
    assert report.has_failed(others, chosen)


def test_a_path_s_survivor_is_not_hidden_by_another_path():
    trials, chosen = five()
    other = Trial(change("a", "b"), "another/op", caught=True)
    assert report.has_failed([other, *trials], chosen)
    assert report.has_failed([*trials, other], chosen)


def test_the_report_says_what_became_of_each(small):
    trials, chosen = five()
    chosen.stale = [change("gone", "b")]
    text = report.text(trials, chosen)
    lines = text.splitlines()
    (caught,) = [line for line in lines if " one " in line]
    assert re.search(r"\bvalues\b.*\bop:4 one\b.*\ba\b.*B1: why", caught)
    assert any("timeout" in line and "op:4 two" in line for line in lines)
    assert "accepted: both are the same" in lines
    assert "SURVIVED" in lines
    assert "cannot be imported: NameError: no" in lines
    assert '  - ANSWER = "right"' in lines
    assert "  + ANSWER = 'missed'" in lines
    assert any(line.startswith("stale: ") and "'gone'" in line for line in lines)
    assert lines[-1].startswith("tiny/op: 2 of 4 mutants caught (50.0%)")
    assert "1 accepted" in lines[-1]
    assert "1 survived" in lines[-1]
    assert "1 more cannot be imported" in lines[-1]


def test_jsonl_has_one_object_a_mutant(small):
    trials, chosen = five()
    file = small / "deep" / "trials.jsonl"
    report.write_jsonl(file, trials, chosen)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["mutant"]["id"] for row in rows] == ["one", "two", "equal", "missed", "dead"]
    assert [row["caught"] for row in rows] == [True, True, False, False, False]
    assert [row["stillborn"] for row in rows] == [False, False, False, False, True]
    assert [row["accepted"] for row in rows] == [None, None, "both are the same", None, None]
    assert rows[0]["check"] == "values"


# ---- the pool ------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path):
    """(what a worker came to) -> a pool whose workers all come to that; nothing is started."""

    def make(outcome):
        future = Future()
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
        made = object.__new__(Pool)
        made._pool = SimpleNamespace(schedule=lambda *_, **__: future)
        made._spool = SimpleNamespace(name=str(tmp_path))
        return made

    return make


def expired(code):
    error = pebble.ProcessExpired("gone")
    error.exitcode = code
    return error


TRIALS = [(change("a", "b"), [task("one"), task("two")])]


def test_a_mutant_that_breaks_the_device_is_caught_by_what_its_worker_left_behind(pool, tmp_path):
    left = Trial(TRIALS[0][0], "tiny/op", caught=True, case="two", check="crash", reason="illegal address")
    spool_file(tmp_path, "trial-0").write_bytes(pickle.dumps(left))
    assert list(pool(expired(BROKEN_EXIT)).try_mutants(TRIALS)) == [left]
    (other,) = pool(expired(-11)).try_mutants(TRIALS)
    assert (other.case, other.check) == ("", "crash")


@pytest.mark.parametrize(
    ("error", "check", "reason"),
    [
        (TimeoutError(), "timeout", ""),
        (expired(TIMEOUT_EXIT), "timeout", ""),
        (expired(-11), "crash", "SIGSEGV"),
        (expired(76), "crash", "exit code 76"),
    ],
)
def test_a_mutant_that_ends_its_worker_is_caught(pool, error, check, reason):
    (found,) = pool(error).try_mutants(TRIALS)
    assert (found.caught, found.check, found.path) == (True, check, "tiny/op")
    assert found.mutant == TRIALS[0][0]
    assert reason in found.reason
    assert found.reason


def test_a_trial_comes_back_as_the_worker_made_it(pool):
    made = Trial(TRIALS[0][0], "tiny/op", cases=2)
    assert list(pool(made).try_mutants(TRIALS)) == [made]


def test_a_case_that_cannot_be_judged_is_the_harness_s_failure(pool):
    with pytest.raises(WorkerError, match="the references differ"):
        list(pool(HarnessFailure("the references differ")).try_mutants(TRIALS))


@pytest.mark.parametrize("error", [TimeoutError(), expired(-9), ChildEnded(-9)])
def test_a_mutant_that_ends_its_process_has_no_verdicts(pool, error):
    assert list(pool(error).judge_mutants(TRIALS)) == [(TRIALS[0][0], "tiny/op", ())]


def test_a_mutant_that_cannot_be_imported_cannot_be_judged(pool):
    with pytest.raises(WorkerError, match=r"mutant m.*no_such_name"):
        list(pool(NameError("no_such_name")).judge_mutants(TRIALS))


# ---- the command, its workers replaced -----------------------------------------------------------


@pytest.fixture
def ask(small, monkeypatch, capsys):
    """(arguments, what becomes of mutants by id) -> exit code, stdout, stderr."""

    class Workers:
        def __init__(self, lane, workers):
            self.lane = lane

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def describe(self):
            return [
                PathInfo("tiny/op", "latent_cache_write", ("interpreted",)),
                PathInfo("bare/op", "latent_cache_write", ("interpreted",)),
            ]

        def try_mutants(self, trials):
            # Workers finish in any order.
            for mutant, tasks in reversed(trials):
                outcome = Workers.outcomes.get(mutant.id, {"caught": True, "check": "values"})
                yield Trial(mutant, tasks[0].path, **outcome)

    def asked(*arguments, **outcomes):
        Workers.outcomes = outcomes
        monkeypatch.setattr(mutants_command, "Pool", Workers)
        app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        app.command("list")(lambda: None)
        monkeypatch.setattr(cli, "app", app)
        monkeypatch.setattr("sys.argv", ["mla-harness", "mutants", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return asked


def test_mutants_that_are_all_caught_exit_zero(small, ask):
    record(small, ("mutant", "a", "right", "x"), ("mutant", "b", "right", "y"))
    code, out, _ = ask()
    assert code == 0
    assert out.splitlines()[-1].startswith("tiny/op: 2 of 2 mutants caught (100.0%)")
    assert out.index(" a ") < out.index(" b ")


def test_a_survivor_exits_one(small, ask):
    record(small, ("mutant", "a", "right", "x"), ("mutant", "b", "right", "y"))
    code, out, _ = ask("--jsonl", str(small / "new/t.jsonl"), "--survivors", str(small / "new/s.toml"), b={})
    assert code == 1
    assert "SURVIVED" in out
    assert [
        json.loads(line)["mutant"]["id"] for line in (small / "new/t.jsonl").read_text().splitlines()
    ] == [
        "a",
        "b",
    ]
    (survivor,) = tomllib.loads((small / "new/s.toml").read_text())["accepted"]
    assert (survivor["old"], survivor["new"]) == ("right", "y")


def test_a_recorded_bug_that_cannot_be_imported_exits_one(small, ask):
    record(small, ("mutant", "a", "right", "x"), ("mutant", "b", "right", "y"))
    code, out, _ = ask(b={"stillborn": True, "reason": "NameError: y"})
    assert code == 1
    assert "NO BUG, mend the record: cannot be imported: NameError: y" in out
    assert "SURVIVED" not in out


KERNEL = "@jit\ndef kernel(a, b):\n    return a + b\n"
EQUAL = ("accepted", "", "    return a + b", "    return a - b")


def test_a_generated_mutant_that_cannot_be_imported_exits_zero(small, ask):
    (small / FILE_OF_PATH).write_text(MODULE + KERNEL)
    code, out, _ = ask("--generated", "--path", "tiny/*", g001={"stillborn": True, "reason": "NameError: y"})
    assert code == 0
    assert "cannot be imported: NameError: y" in out
    assert "NO BUG" not in out


def test_an_accepted_survivor_exits_zero_and_its_reason_is_printed(small, ask):
    (small / FILE_OF_PATH).write_text(MODULE + KERNEL)
    record(small, EQUAL)
    code, out, _ = ask("--generated", "--path", "tiny/*", g001={})
    assert code == 0
    assert "accepted: B1: equal" in out


def test_a_stale_acceptance_exits_one(small, ask):
    (small / FILE_OF_PATH).write_text(MODULE + KERNEL)
    record(small, EQUAL, ("accepted", "", "    return a + c", "    return a - c"))
    code, out, _ = ask("--generated", "--path", "tiny/*")
    assert code == 1
    assert "stale" in out
    assert "a + c" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--path", "nope/*"], "no path matches 'nope/*'"),
        (["--only", "nope*"], "'nope*'"),
        (["--path", "bare/*"], "'bare/*'"),
        (["--lane", "quantum"], "no lane matches 'quantum'"),
        (["--lane", "*"], "lane"),
        (["--suite", "nope"], "the suites are"),
        (["--path", "bare/*", "--generated"], "bare/op"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_question_that_means_nothing_exits_two_with_one_sentence(small, ask, arguments, said):
    record(small, ("mutant", "a", "right", "x"))
    code, _, err = ask(*arguments)
    assert code == 2
    assert err.startswith("mla-harness: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "text",
    [
        "file = ",
        FILE + ENTRY.replace("new", "nev"),
        f'file = "{FILE_OF_PATH}"\n' + ENTRY.replace('"a"', '"zz"'),
    ],
    ids=["not TOML", "not a record", "not in the file"],
)
def test_an_unreadable_record_exits_two_with_one_sentence(small, ask, text):
    (small / "known/tiny/op.toml").write_text(text)
    code, _, err = ask()
    assert code == 2
    assert err.startswith("mla-harness: ")
    assert err.count("\n") == 1


# ---- the command and its workers -----------------------------------------------------------------

SUITE = """
summary = "two of the smallest"
[[entry]]
why = "one token, and one more than eight"
cases = ["latent_cache_write/prefill:1", "latent_cache_write/prefill:9"]
"""

PATH = '''
"""Writes the cache with torch alone."""

import os

import torch

from harness.kernel_path import KernelPath

VERSION = 1


def write(latent, rope, cache, slots):
    rows = cache.view(-1, cache.shape[-1])
    written = slots >= 0
    rows[slots[written]] = torch.cat([latent[written], rope[written]], -1)


WRITERS = {1: write}


def run(inputs, outputs, workspace):
    if len(inputs) < 0:
        return
    WRITERS[1](inputs["compressed_kv"], inputs["k_pe"], outputs["latent_cache"], inputs["slot_mapping"])


PATHS = (
    KernelPath(
        name="tiny/latent_cache_write",
        operator="latent_cache_write",
        lanes=("interpreted",),
        supports=lambda case: None,
        run=run,
    ),
)
'''

BUGS = {
    "hangs": ("if len(inputs) < 0:\n        return", "while True:\n        pass"),
    "dies": ("slots >= 0", "os.kill(os.getpid(), 9)"),
    "raises": ("slots >= 0", "no_such_name"),
    "unborn": ("VERSION = 1", "VERSION = no_such_name"),
    "equal": ("VERSION = 1", "VERSION = 2"),
    "doubled": ("latent[written],", "latent[written] * 2,"),
    "eight": ("slots >= 0", "(slots >= 0) & (torch.arange(len(slots)) < 8)"),
    "changes-inputs": ("rope[written]], -1)", "rope[written]], -1)\n    latent.mul_(2)"),
}
HERE = "harness/paths/tiny/latent_cache_write.py"
RECORDED = "harness/mutation/known/tiny/latent_cache_write.toml"


@pytest.fixture(scope="module")
def house(make_house):
    """A copy of the packages with a small path and a small suite."""
    return make_house(
        {
            "cases/suites/two.toml": SUITE,
            "harness/paths/tiny/__init__.py": "",
            HERE: PATH,
            RECORDED: f'file = "{HERE}"\n',
        }
    )


@pytest.fixture(scope="module")
def mutants(command, house):
    """(arguments) -> a finished `python3 -m harness mutants` in that copy."""
    fixed = ("harness", "mutants", "--path", "tiny/*", "--suite", "two", "--timeout", "1", "--workers", "1")
    return partial(command, *fixed, cwd=house)


@pytest.fixture(scope="module")
def trials(mutants, house):
    """The finished command, and its trials by mutant."""
    text = f'file = "{HERE}"\n'
    for name, (old, new) in BUGS.items():
        text += f"[[mutant]]\nid = '{name}'\nwhy = 'B1: {name}'\nold = '''{old}'''\nnew = '''{new}'''\n"
    (house / RECORDED).write_text(text)
    result = mutants("--jsonl", "t.jsonl")
    with contextlib.suppress(FileNotFoundError):
        rows = [json.loads(line) for line in (house / "t.jsonl").read_text().splitlines()]
        return result, {row["mutant"]["id"]: row for row in rows}
    pytest.fail(result.stderr)


def test_every_kind_of_mutant_is_reported_in_order_and_a_survivor_fails(trials):
    result, rows = trials
    assert result.returncode == 1, result.stderr
    assert list(rows) == list(BUGS)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("tiny/latent_cache_write: 6 of 7 mutants caught (85.7%)")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("name", "check", "case"),
    [
        ("hangs", "timeout", "latent_cache_write/prefill:1"),
        ("dies", "crash", "latent_cache_write/prefill:1"),
        ("raises", "crash", "latent_cache_write/prefill:1"),
        ("doubled", "values", "latent_cache_write/prefill:1"),
        ("eight", "values", "latent_cache_write/prefill:9"),
        ("changes-inputs", "inputs", "latent_cache_write/prefill:1"),
    ],
)
def test_a_mutant_is_caught_by_what_it_does_wrong(trials, name, check, case):
    row = trials[1][name]
    assert (row["caught"], row["stillborn"], row["check"], row["case"]) == (True, False, check, case)


def test_an_equal_mutant_survives_all_cases(trials):
    row = trials[1]["equal"]
    assert (row["caught"], row["stillborn"], row["cases"]) == (False, False, 2)


def test_a_mutant_without_a_module_is_stillborn(trials):
    row = trials[1]["unborn"]
    assert (row["caught"], row["stillborn"]) == (False, True)
    assert "no_such_name" in row["reason"]


def test_survivors_of_generated_mutants_are_those_without_a_reason(mutants, house):
    # Of `if len(inputs) < 0`, never true: <= 0, < 1 and False are the same, >= 0 and True are not.
    never = "    if len(inputs) < 0:"
    text = f'file = "{HERE}"\n'
    for new in ("    if len(inputs) <= 0:", "    if len(inputs) < 1:"):
        text += f"[[accepted]]\nwhy = 'inputs are never none'\nold = '{never}'\nnew = '{new}'\n"
    (house / RECORDED).write_text(text)
    result = mutants("--generated", "--survivors", "out/s.toml")
    assert result.returncode == 1, result.stderr
    assert result.stdout.splitlines().count("accepted: inputs are never none") == 2
    assert result.stdout.splitlines().count("SURVIVED") == 1
    assert "stale" not in result.stdout
    (survivor,) = tomllib.loads((house / "out/s.toml").read_text())["accepted"]
    assert survivor == {"why": "", "old": never, "new": "    if False:"}
