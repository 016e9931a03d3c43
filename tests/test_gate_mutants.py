"""Mutants on changed kernel lines: which are tried, on which cases, and what their score says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness.coverage.sites import Coverage, FileCoverage, Hits, Site, SiteKind, digest_of
from harness.gate import mutants
from harness.gate.diff import ChangedFile
from harness.gate.mutants import Candidate, candidates_of, rewritten, sample, try_mutants
from harness.gate.mutators import Mutator, mutators
from harness.gate.policy import Policy
from harness.gate.verdict import FileVerdict, GateVerdict, MutationVerdict, Survivor
from harness.mutation.mutant import ROOT, Mutant, records_of, source_of
from harness.mutation.trial import Trial
from harness.task import PathInfo
from harness.verdict import Kind, Status, Verdict

FILE = "harness/paths/triton/latent_cache_write.py"
TEXT = source_of(FILE)
LINE = next(number for number, line in enumerate(TEXT.split("\n"), 1) if "written = " in line)
CASE = "latent_cache_write/decode:5,idle,pad:2"
OTHER = "latent_cache_write/prefill:3"
POLICY = Policy()
ON_THE_LINE = {"& becomes |", ">= becomes >", ">= becomes <", "0 becomes 1", "< becomes <=", "< becomes >="}
"""What can be done to `(slots >= 0) & (slots < num_slots)`."""


def coverage(hits, lanes=("interpreted",), language="triton"):
    """Coverage of the file: line -> cases that hit the statement there."""
    sites = {
        Site(line, line, SiteKind.STATEMENT): Hits(len(cases), set(lanes), dict.fromkeys(cases))
        for line, cases in hits.items()
    }
    return FileCoverage(FILE, language, digest_of(TEXT), sites)


def changed(*lines):
    return ChangedFile(FILE, frozenset(lines))


def change(old, new, why="w"):
    return Mutant("m", "k.py", old, new, why)


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ("b", "x", [2]),
        ("a\nb", "a\nx", [2]),
        ("b\nc\nd", "b\nx\nd", [3]),
        ("b\nc\nd", "pass", [2, 3, 4]),
        ("b\nc", "b\nc\nnew", [4]),
        ("c\nc2", "c\nc", [4]),
    ],
)
def test_a_mutant_rewrites_the_lines_that_differ(old, new, lines):
    text = "a\nb\nc\nd\n" if "c2" not in old else "a\nb\nc\nc2\n"
    assert list(rewritten(change(old, new), text)) == lines


def test_candidates_rewrite_a_changed_line_and_come_with_the_cases_that_hit_it():
    cover = coverage({LINE: [CASE], LINE + 1: [OTHER]})
    found = candidates_of(mutators()["triton"], changed(LINE), TEXT, cover)
    assert sorted(one.mutant.why for one in found) == sorted(ON_THE_LINE)
    assert {one.line for one in found} == {LINE}
    assert {one.cases for one in found} == {(CASE,)}
    everything = mutators()["triton"].generate(FILE, TEXT)
    elsewhere = [item for item in everything if LINE not in rewritten(item, TEXT)]
    assert len(found) + len(elsewhere) == len(everything)
    assert candidates_of(mutators()["triton"], changed(1), TEXT, cover) == []


def test_a_sample_depends_on_the_seed_and_on_the_mutants_and_not_on_their_order():
    found = [Candidate(change("a", str(number)), 1, ()) for number in range(100)]
    drawn = sample(found, 10, 0)
    assert len(set(drawn)) == 10
    assert [found.index(one) for one in drawn] == sorted(found.index(one) for one in drawn)
    assert set(sample(found[::-1], 10, 0)) == set(drawn)
    assert set(sample(found, 10, 1)) != set(drawn)
    # One mutant more changes at most one of the sample.
    more = [*found, Candidate(change("a", "more"), 1, ())]
    assert len(set(sample(more, 10, 0)) & set(drawn)) >= 9
    assert sample(found[:4], 10, 0) == found[:4]


def test_a_mutant_that_is_compiled_counts_for_several():
    cheap = [Candidate(change("a", str(number)), 1, ()) for number in range(20)]
    dear = [Candidate(change("b", str(number)), 1, (), 4) for number in range(20)]
    assert len(sample(dear, 60, 0)) == 15
    both = sample([*cheap, *dear], 20, 0)
    assert 20 - 3 <= sum(one.cost for one in both) <= 20
    assert sample([*cheap, *dear], 1000, 0) == [*cheap, *dear]


def test_candidates_of_a_cuda_file_lie_on_its_changed_lines_and_cost_a_compilation():
    file = "harness/paths/cuda/slot_mapping.cu"
    text = source_of(file)
    line = next(number for number, line in enumerate(text.split("\n"), 1) if "column < max_blocks" in line)
    cover = FileCoverage(file, "cuda", digest_of(text), {})
    cover.sites[Site(line, line, SiteKind.STATEMENT)] = Hits(1, {"host"}, {CASE})
    found = candidates_of(mutators()["cuda"], ChangedFile(file, frozenset({line})), text, cover)
    assert {"< becomes <="} <= {one.mutant.why for one in found}
    assert {(one.line, one.cases, one.cost) for one in found} == {(line, (CASE,), 4)}


class FakePool:
    """Stands in for the workers: judges and tries as the class attributes say, and remembers."""

    failing = frozenset()
    catching = frozenset()
    stillborn = frozenset()
    paths = (
        PathInfo("triton/latent_cache_write", "latent_cache_write", ("interpreted", "compiled")),
        PathInfo("triton/rope", "rope", ("interpreted", "compiled")),
    )
    tried: list

    def __init__(self, lane, workers):
        self.lane = lane
        type(self).lanes.append(lane)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def describe(self):
        return list(self.paths)

    def judge(self, tasks):
        for task in tasks:
            bad = task.case in self.failing
            reason = {"kind": Kind.WRONG, "reason": "off"} if bad else {}
            status = Status.FAILED if bad else Status.PASSED
            yield Verdict(task.case, task.operator, task.path, task.lane, status, **reason)

    def try_mutants(self, trials):
        for mutant, tasks in trials:
            type(self).tried.append((mutant, [task.case for task in tasks], tasks[0].path))
            caught = any(task.case in self.catching for task in tasks)
            is_stillborn = mutant.why in self.stillborn
            yield Trial(mutant, tasks[0].path, caught=caught, stillborn=is_stillborn, cases=len(tasks))


@pytest.fixture
def pool(monkeypatch):
    class Pool(FakePool):
        tried: list = []  # noqa: RUF012
        lanes: list = []  # noqa: RUF012

    monkeypatch.setattr(mutants, "Pool", Pool)
    return Pool


def score(cover, *lines, policy=POLICY, seed=0, root=ROOT):
    def one(_):
        return 1

    return try_mutants([(changed(*lines), cover)], root, policy, seed, one, one)


def test_mutants_run_on_the_cases_that_hit_their_line_and_on_no_others(pool):
    pool.catching = {CASE}
    found = score(coverage({LINE: [CASE], LINE + 1: [OTHER]}), LINE)
    assert found.eligible == found.caught == len(pool.tried) == len(ON_THE_LINE) - 1
    assert {(tuple(cases), path) for _, cases, path in pool.tried} == {((CASE,), "triton/latent_cache_write")}
    assert not found.is_below
    assert pool.lanes == ["interpreted"]


def test_mutants_that_the_records_accept_do_not_count(pool):
    accepted = [item for item in records_of("triton/latent_cache_write").accepted if "written = " in item.new]
    assert [item.new.strip() for item in accepted] == ["written = (slots >= 0) & (slots <= num_slots)"]
    found = score(coverage({LINE: [CASE]}), LINE)
    assert found.accepted == 1
    assert {mutant.why for mutant, _, _ in pool.tried} == ON_THE_LINE - {"< becomes <="}


def test_survivors_are_named_with_their_line_and_what_changed(pool):
    found = score(coverage({LINE: [OTHER]}), LINE)
    assert found.is_below
    assert len(found.survivors) == found.eligible
    item = next(item for item in found.survivors if item.why == "& becomes |")
    assert (item.file, item.line, item.cases) == (FILE, LINE, 1)
    assert item.old == "written = (slots >= 0) & (slots < num_slots)"
    assert item.new == "written = (slots >= 0) | (slots < num_slots)"


def test_a_line_that_no_case_hits_leaves_its_mutants_alive_and_none_is_run(pool):
    found = score(coverage({LINE: [], LINE + 1: [CASE]}), LINE)
    assert pool.tried == []
    assert len(found.survivors) == found.eligible > 0
    assert {item.cases for item in found.survivors} == {0}


def test_a_case_that_the_kernel_itself_fails_can_catch_nothing(pool):
    pool.catching = pool.failing = {CASE}
    found = score(coverage({LINE: [CASE, OTHER]}), LINE)
    assert {tuple(cases) for _, cases, _ in pool.tried} == {(OTHER,)}
    assert found.caught == 0
    assert f"no mutant is tried on {CASE}: triton/latent_cache_write fails it as it is" in found.notes


def test_at_most_so_many_mutants_are_tried_as_the_policy_says(pool):
    pool.catching = {CASE}
    found = score(coverage({LINE: [CASE]}), LINE, policy=Policy(max_mutants=3))
    assert (found.tried, len(pool.tried)) == (3, 3)
    assert found.eligible > 3
    first = [mutant for mutant, _, _ in pool.tried]
    pool.tried.clear()
    score(coverage({LINE: [CASE]}), LINE, policy=Policy(max_mutants=3), seed=1)
    assert [mutant for mutant, _, _ in pool.tried] != first


def test_mutants_that_cannot_be_imported_are_no_survivors(pool):
    pool.stillborn = {"& becomes |"}
    pool.catching = {CASE}
    found = score(coverage({LINE: [CASE]}), LINE)
    assert found.stillborn == 1
    assert found.score.total == found.eligible - 1


def test_a_file_of_several_paths_is_tried_on_each_until_one_notices(pool):
    variant = PathInfo("triton/latent_cache_write@variant", "latent_cache_write", ("interpreted",))
    pool.paths = (*FakePool.paths, variant)
    found = score(coverage({LINE: [CASE]}), LINE)
    assert len(pool.tried) == 2 * found.eligible
    assert {item.cases for item in found.survivors} == {2}
    pool.tried.clear()
    pool.catching = {CASE}
    score(coverage({LINE: [CASE]}), LINE)
    assert {path for _, _, path in pool.tried} == {"triton/latent_cache_write"}


def test_the_lane_is_one_that_hit_the_file(pool):
    score(coverage({LINE: [CASE]}, lanes=("compiled",)), LINE)
    assert pool.lanes == ["compiled"]


@pytest.mark.parametrize(
    ("cover", "root", "why"),
    [
        (coverage({LINE: [CASE]}, language="hip"), ROOT, "none are generated in hip"),
        (coverage({LINE: [CASE]}, lanes=("host",)), ROOT, "none of the lanes interpreted, compiled hit it"),
        (coverage({LINE: [CASE]}), Path("/"), "no path of the harness runs it"),
    ],
)
def test_a_file_whose_mutants_cannot_be_tried_is_told_with_its_reason(pool, cover, root, why):
    found = score(cover, LINE, root=root)
    assert found.notes == (f"no mutants of {FILE} are tried: {why}",)
    assert (found.eligible, found.tried, found.is_below) == (0, 0, False)


def test_a_file_that_no_path_is_called_as_is_told(pool):
    pool.paths = ()
    found = score(coverage({LINE: [CASE]}), LINE)
    assert found.notes == (f"no mutants of {FILE} are tried: no path of lane interpreted is called as it is",)
    assert found.eligible == 0


def test_tests_of_an_engine_that_are_no_cases_are_left_out(pool):
    pool.catching = {CASE}
    score(coverage({LINE: ["tests/test_a.py::test_b[1]", "rope/decode:3", CASE]}), LINE)
    assert {tuple(cases) for _, cases, _ in pool.tried} == {(CASE,)}


def test_a_language_is_one_file():
    assert sorted(mutators()) == ["cuda", "triton"]
    assert all(isinstance(item, Mutator) and item.lanes for item in mutators().values())


def test_the_gate_fails_for_its_mutants_and_names_the_survivors():
    survivor = Survivor("k.py", 7, "+ becomes -", "a + b", "a - b", 3)
    alive = MutationVerdict(eligible=3, caught=2, survivors=(survivor,), limit=70)
    verdict = GateVerdict("x", mutation=alive)
    assert verdict.exit_code == 9
    assert verdict.reasons() == [
        "2 of 3 mutants on changed kernel lines are caught, 66 %, and it must be 70 %"
    ]
    assert [(item.file, item.first, item.text, item.is_failure) for item in verdict.findings()] == [
        ("k.py", 7, "a mutant survives: + becomes -; 3 cases that run it do not notice", True)
    ]
    enough = GateVerdict(
        "x", mutation=MutationVerdict(eligible=10, caught=7, survivors=(survivor,) * 3, limit=70)
    )
    assert enough.exit_code == 0
    assert not any(item.is_failure for item in enough.findings())


def test_no_mutant_is_tried_where_cases_fail(monkeypatch):
    from harness.commands import gate as command
    from harness.gate.verdict import FailedCase

    monkeypatch.setattr(command, "try_mutants", lambda *_: pytest.fail("tried"))
    failed = (FailedCase("c", "p", "l", "failed", "r", "x"),)
    for verdict in (GateVerdict("x", failed=failed), GateVerdict("x", run=1)):
        found = command._with_mutants(verdict, None, None, None, None, 0, 0)
        assert found.notes == ("no mutants are tried: cases fail on the kernels as they are",)


def test_ctrl_c_keeps_what_is_known(monkeypatch):
    from harness.commands import gate as command
    from harness.gate.change import Change

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "try_mutants", interrupted)
    verdict = GateVerdict("x", files=(FileVerdict("a", "python", 1, Policy().limits("a", is_kernel=False)),))
    found = command._with_mutants(verdict, Change("x", ()), ROOT, None, Policy(), 0, 0)
    assert found.exit_code == 130
    assert found.files == verdict.files


def test_the_command_tries_mutants_of_a_real_kernel(tmp_path):
    diff = tmp_path / "change.diff"
    line = TEXT.split("\n")[LINE - 1]
    diff.write_text(f"--- a/{FILE}\n+++ b/{FILE}\n@@ -{LINE} +{LINE} @@\n-old\n+{line}\n")
    report = tmp_path / "gate.json"
    cover = coverage({LINE: ["latent_cache_write/decode:5,draft:30+5,idle,pad:2/block=16"]})
    Coverage({FILE: cover}).write(tmp_path / "coverage.json")
    arguments = ["--diff-file", diff, "--coverage", tmp_path / "coverage.json", "--report", f"json:{report}"]
    result = subprocess.run(
        [sys.executable, "-m", "harness", "gate", *map(str, arguments), "--workers", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    # Whoever writes slot 0 can tell two of the five; padding in the batch and rows written tell the others.
    found = json.loads(report.read_text())["gate"]["mutants"]
    assert (found["eligible"], found["tried"], found["accepted"]) == (5, 5, 1)
    alive = {item["why"] for item in found["survivors"]}
    assert alive <= {">= becomes >", "0 becomes 1"}
    assert found["caught"] == 5 - len(alive)
    assert result.returncode == (9 if alive else 0), result.stdout + result.stderr
