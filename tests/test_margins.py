"""The budgets' table: how far clean errors stay below, how far mutants go beyond, and what is said of it."""

import json
import math
from dataclasses import replace

import pytest
import typer

from cases import parse
from harness import cli
from harness.commands import budgets as budgets_command
from harness.margins import Cell, Margin, cells, in_every_dtype
from harness.mutation import mutant as records
from harness.mutation.mutant import Mutant
from harness.plan import asked_cases
from harness.task import PathInfo
from harness.verdict import CheckResult, Kind, Status, Verdict
from reports import budgets as report

CASE = "mla_decode/decode:3/heads=2"
OTHER = "mla_decode/decode:9/heads=2"
FLAT = "mla_decode/decode:3/heads=2,data=flat"
HALF = "mla_decode/decode:3/heads=2,dtype=fp16"


def bug(name="bug", shows="planted"):
    return Mutant(name, "k.py", "a", name, "B1: why", shows)


def verdict(case=CASE, *, digest="clean", **errors):
    """Passed or failed by the errors of its checks, each with a budget of 1."""
    checks = []
    for name, error in errors.items():
        is_over = not error <= 1
        more = {"kind": Kind.WRONG, "reason": "over budget"} if is_over else {}
        status = Status.FAILED if is_over else Status.PASSED
        checks.append(CheckResult(name, status, "out", error=error, budget=1.0, **more))
    is_bad = any(check.status is Status.FAILED for check in checks)
    more = {"kind": Kind.WRONG, "reason": "over budget"} if is_bad else {}
    return Verdict(
        case,
        "mla_decode",
        "tiny/mla_decode",
        "interpreted",
        Status.FAILED if is_bad else Status.PASSED,
        checks=tuple(checks),
        outputs_digest=digest,
        **more,
    )


def ended(case, status, kind):
    return Verdict(case, "mla_decode", "tiny/mla_decode", "interpreted", status, kind, "it ended")


def cell(clean=None, refused=(), shares=None, due=()):
    return Cell("tiny/op", "bf16", "flat", 1, clean or {}, tuple(refused), shares or {}, frozenset(due))


# ---- one dtype and data mode ---------------------------------------------------------------------


def test_the_share_of_a_margin_is_error_by_budget():
    assert Margin(1.0, 4.0, CASE).share == 0.25
    assert Margin(math.nan, 4.0, CASE).share == math.inf
    assert Margin(math.inf, 4.0, CASE).share == math.inf


@pytest.mark.parametrize(("error", "holds"), [(0.0, True), (0.66, True), (0.67, False), (1.0, False)])
def test_a_clean_error_may_reach_two_thirds_of_its_budget(error, holds):
    found = cell(clean={"values": Margin(0.1, 1.0, OTHER), "lse": Margin(error, 1.0, CASE)}).complaints()
    assert (found == []) == holds
    for complaint in found:
        assert "tiny/op bf16 flat: clean lse" in complaint
        assert CASE in complaint


def test_a_clean_error_that_is_not_a_number_is_complained_of():
    (complaint,) = cell(clean={"values": Margin(math.nan, 1.0, CASE)}).complaints()
    assert "clean values" in complaint


def test_every_refused_clean_case_is_complained_of():
    first, second = cell(refused=[CASE, OTHER]).complaints()
    assert first.startswith("tiny/op bf16 flat: ")
    assert first.endswith(CASE)
    assert second.endswith(OTHER)


@pytest.mark.parametrize(
    ("share", "due", "holds"),
    [(1.9, True, False), (0.0, True, False), (2.0, True, True), (math.inf, True, True), (1.9, False, True)],
)
def test_a_mutant_due_here_must_be_twice_over_budget(share, due, holds):
    found = cell(
        shares={"strong": 9.0, "weak": share}, due={"strong", *(["weak"] if due else [])}
    ).complaints()
    assert (found == []) == holds
    assert all("mutant weak is" in complaint for complaint in found)


def test_the_weakest_mutant_is_of_those_due_here():
    found = cell(shares={"a": 5.0, "b": 3.0, "c": 1.5, "d": math.inf}, due={"a", "b", "d", "unchanged"})
    assert found.weakest == ("b", 3.0)
    assert cell(shares={"c": 1.5}, due={"a"}).weakest is None


def test_mutants_over_budget_are_counted_whether_due_or_not():
    assert cell(shares={"a": 5.0, "b": 1.0, "c": 0.9, "d": math.inf}, due={"a", "c"}).caught == 2


# ---- from verdicts -------------------------------------------------------------------------------


def table(clean, broken=None):
    return {(item.dtype, item.data): item for item in cells("tiny/mla_decode", clean, broken or {})}


def test_verdicts_are_grouped_by_dtype_and_data_mode():
    found = table([verdict(CASE), verdict(FLAT), verdict(HALF), verdict(OTHER)])
    assert {key: item.cases for key, item in found.items()} == {
        ("bf16", "planted"): 2,
        ("bf16", "flat"): 1,
        ("fp16", "planted"): 1,
    }


def test_the_worst_clean_margin_of_each_check_is_kept():
    found = table([verdict(CASE, values=0.2, lse=0.5), verdict(OTHER, values=0.3, lse=0.1)])
    assert found["bf16", "planted"].clean == {
        "values": Margin(0.3, 1.0, OTHER),
        "lse": Margin(0.5, 1.0, CASE),
    }


def test_the_worst_margin_is_a_share_and_not_an_error():
    small = verdict(CASE)
    small = replace(small, checks=(CheckResult("values", Status.PASSED, "out", error=0.4, budget=0.5),))
    found = table([small, verdict(OTHER, values=0.6)])
    assert found["bf16", "planted"].clean["values"].case == CASE


def test_a_clean_verdict_that_fails_or_ends_is_refused():
    clean = [verdict(CASE, values=1.5), verdict(OTHER), ended(FLAT, Status.ERROR, Kind.CRASH)]
    found = table(clean)
    assert found["bf16", "planted"].refused == (CASE,)
    assert found["bf16", "flat"].refused == (FLAT,)


def test_skipped_clean_cases_do_not_count():
    found = table([verdict(CASE), ended(OTHER, Status.SKIPPED, Kind.TOO_LARGE)])
    assert found["bf16", "planted"].cases == 1
    assert found["bf16", "planted"].refused == ()
    assert table([ended(CASE, Status.SKIPPED, Kind.TOO_LARGE)]) == {}


def test_a_mutant_s_share_is_the_largest_of_its_cases_and_checks():
    clean = [verdict(CASE), verdict(OTHER)]
    wrong = (verdict(CASE, digest="x", values=0.5, lse=3.0), verdict(OTHER, digest="y", values=2.0, lse=0.1))
    assert table(clean, {bug(): wrong})["bf16", "planted"].shares == {"bug": 3.0}


def test_a_mutant_that_leaves_all_output_bits_alone_is_left_out():
    clean = [verdict(CASE, values=0.5), verdict(OTHER)]
    same = (verdict(CASE, values=0.5), verdict(OTHER))
    found = table(clean, {bug(): same})["bf16", "planted"]
    assert found.shares == {}
    assert found.complaints() == []


def test_a_mutant_that_changes_one_case_is_not_left_out():
    clean = [verdict(CASE, values=0.5), verdict(OTHER)]
    broken = {bug(): (verdict(CASE, values=0.5), verdict(OTHER, digest="x", values=0.7))}
    found = table(clean, broken)["bf16", "planted"]
    assert found.shares == {"bug": 0.7}
    assert len(found.complaints()) == 1


def test_cases_that_clean_kernel_and_mutant_both_skip_say_nothing_of_the_mutant():
    clean = [verdict(CASE, values=0.5), ended(OTHER, Status.SKIPPED, Kind.TOO_LARGE)]
    same = (verdict(CASE, values=0.5), ended(OTHER, Status.SKIPPED, Kind.TOO_LARGE))
    assert table(clean, {bug(): same})["bf16", "planted"].shares == {}


def test_a_mutant_counts_in_each_cell_by_its_cases_there():
    clean = [verdict(CASE), verdict(FLAT)]
    found = table(clean, {bug(): (verdict(CASE, digest="x", values=4.0), verdict(FLAT))})
    assert found["bf16", "planted"].shares == {"bug": 4.0}
    assert found["bf16", "flat"].shares == {}


def test_a_mutant_whose_process_ended_is_infinitely_over_budget():
    found = table([verdict(CASE), verdict(FLAT)], {bug(): ()})
    assert found["bf16", "planted"].shares == {"bug": math.inf}
    assert found["bf16", "flat"].shares == {"bug": math.inf}


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(ended(CASE, Status.ERROR, Kind.CRASH), id="raised"),
        pytest.param(verdict(digest="x", values=math.nan), id="not a number"),
        pytest.param(verdict(digest="x", lse=math.inf), id="infinite"),
        pytest.param(
            replace(
                verdict(digest="x", values=0.5),
                status=Status.FAILED,
                kind=Kind.BOUNDS,
                reason="left its tensors",
            ),
            id="failed by a check without numbers",
        ),
    ],
)
def test_a_mutant_that_fails_without_a_number_is_infinitely_over_budget(broken):
    assert table([verdict(CASE)], {bug(): (broken,)})["bf16", "planted"].shares == {"bug": math.inf}


def test_a_mutant_is_due_in_the_mode_that_it_names():
    mutants = {bug("one"): (), bug("two", shows="flat"): (), bug("three", shows=""): ()}
    found = table([verdict(CASE), verdict(FLAT), verdict(HALF)], mutants)
    assert found["bf16", "planted"].due == {"one"}
    assert found["fp16", "planted"].due == {"one"}
    assert found["bf16", "flat"].due == {"two"}


def test_a_case_is_asked_for_in_every_dtype():
    found = in_every_dtype(asked_cases([CASE, OTHER], [], "*", ()))
    assert sorted(str(item.case) for item in found) == sorted(
        case + suffix for case in (CASE, OTHER) for suffix in ("", ",dtype=fp16", ",dtype=fp32")
    )


def test_cases_that_differ_in_dtype_only_are_asked_for_once_a_dtype():
    found = in_every_dtype(asked_cases([CASE, HALF], [], "*", ()))
    assert len(found) == len({item.case for item in found}) == 3


# ---- telling it ----------------------------------------------------------------------------------


def test_the_table_holds_unless_there_is_a_complaint():
    good = cell(clean={"values": Margin(0.001, 0.004, CASE)}, shares={"a": 7.5, "b": 0.5}, due={"a"})
    text = report.text([good])
    line = text.splitlines()[1]
    assert line.split()[:2] == ["bf16", "flat"]
    assert "1.00e-03" in line
    assert "4.0e-03" in line
    assert "0.25" in line
    assert line.endswith("1 of 2; a 7.5 x")
    assert text.splitlines()[-1].startswith("the table holds")
    bad = cell(refused=[CASE])
    text = report.text([good, bad])
    assert "the table holds" not in text
    assert text.splitlines()[-1] == bad.complaints()[0]


def refuse(constant):
    raise ValueError(f"{constant} is not JSON")


def test_infinities_are_texts_in_jsonl(tmp_path):
    file = tmp_path / "deep" / "b.jsonl"
    infinite = cell(
        clean={"values": Margin(math.inf, 1.0, CASE), "lse": Margin(math.nan, 1.0, CASE)},
        shares={"a": math.inf, "b": 2.5},
        due={"b", "a"},
    )
    report.write_jsonl(file, [infinite, cell()])
    first, second = [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()]
    assert first["shares"] == {"a": "inf", "b": 2.5}
    assert first["clean"]["values"] == {"error": "inf", "budget": 1.0, "case": CASE}
    assert first["clean"]["lse"]["error"] == "nan"
    assert first["due"] == ["a", "b"]
    assert (second["dtype"], second["data"], second["shares"]) == ("bf16", "flat", {})


# ---- the command, its workers replaced -----------------------------------------------------------


class Workers:
    """A pool in which the clean path's error and the mutants' are what they are set to."""

    clean = 0.1
    broken = 5.0

    def __init__(self, lane, workers):
        self.lane = lane
        Workers.judged, Workers.tried = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def describe(self):
        return [PathInfo("tiny/mla_decode", "mla_decode", ("interpreted",))]

    def judge(self, tasks):
        Workers.judged = [item.case for item in tasks]
        for item in tasks:
            yield verdict(item.case, values=self.clean)

    def judge_mutants(self, trials):
        for mutant, tasks in trials:
            Workers.tried.append((mutant.id, [item.case for item in tasks]))
            found = tuple(verdict(item.case, digest="x", values=self.broken) for item in tasks)
            yield mutant, tasks[0].path, found


RECORD = """
file = "harness/paths/tiny/mla_decode.py"
[[mutant]]
id = "smooth"
why = "B1"
old = "a"
new = "b"
shows = "planted"
[[mutant]]
id = "abrupt"
why = "B2"
old = "a"
new = "c"
"""


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """(arguments) -> exit code, stdout, stderr of `budgets` with these workers and one smooth mutant."""
    (tmp_path / "known/tiny").mkdir(parents=True)
    (tmp_path / "known/tiny/mla_decode.toml").write_text(RECORD)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "KNOWN", tmp_path / "known")
    monkeypatch.setattr(budgets_command, "Pool", Workers)

    def asked(*arguments):
        monkeypatch.setattr(cli, "app", typer.Typer(pretty_exceptions_enable=False, add_completion=False))
        fixed = ["--path", "tiny/*", "--lane", "interpreted"]
        monkeypatch.setattr("sys.argv", ["mla-harness", "budgets", *fixed, *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code, said.out, said.err

    return asked


@pytest.mark.parametrize(
    ("clean", "broken", "code"), [(0.1, 5.0, 0), (0.8, 5.0, 1), (0.1, 1.5, 1), (1.5, 5.0, 1)]
)
def test_margins_that_do_not_hold_exit_one(ask, monkeypatch, clean, broken, code):
    monkeypatch.setattr(Workers, "clean", clean)
    monkeypatch.setattr(Workers, "broken", broken)
    got, out, err = ask("--suite", "regress")
    assert got == code, err
    assert ("the table holds" in out) == (code == 0)


def test_clean_kernels_run_on_every_seed_and_smooth_mutants_on_one(ask):
    code, _, err = ask("--suite", "regress", "--seeds", "2")
    assert code == 0, err
    assert len(set(Workers.judged)) == len(Workers.judged)
    ((name, cases),) = Workers.tried
    assert name == "smooth"
    assert 2 * len(cases) == len(Workers.judged)
    assert set(cases) < set(Workers.judged)
    dtypes = [parse(case).options.dtype for case in cases]
    assert dtypes.count("bf16") == dtypes.count("fp16") == dtypes.count("fp32") > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--path", "nope/*"], "no path matches 'nope/*'"),
        (["--suite", "nope"], "the suites are"),
        (["--lane", "quantum"], "no lane matches 'quantum'"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_a_question_that_means_nothing_exits_two(ask, arguments, said):
    code, _, err = ask(*arguments)
    assert code == 2
    assert said in err


# ---- the command and its workers -----------------------------------------------------------------

SUITE = """
summary = "one of the smallest"
[[entry]]
why = "four keys"
cases = ["mla_decode/decode:3/heads=2"]
"""

PATH = '''
"""Decode attention with torch alone, in fp64."""

import torch

from harness.kernel_path import KernelPath

GAIN = 1.0


def run(inputs, outputs, workspace):
    q, cache, table = inputs["q"], inputs["latent_cache"], inputs["block_tables"]
    rows, size = cache.view(-1, cache.shape[-1]), cache.shape[2]
    for token, slot in enumerate(inputs["batch_id_per_token"].tolist()):
        seen = int(inputs["seq_lens_decoder"][slot]) + token - int(inputs["cu_seqlens_q"][slot]) + 1
        keys = torch.arange(seen)
        latent = rows[table[slot][keys // size].long() * size + keys % size].double()
        logits = q[token].double() @ latent.T * inputs["softmax_scale"]
        values = logits.softmax(1) @ latent[:, : outputs["out"].shape[2]]
        outputs["out"][token] = values * GAIN
        outputs["lse"][token] = logits.logsumexp(1)


PATHS = (
    KernelPath(
        name="tiny/mla_decode",
        operator="mla_decode",
        lanes=("interpreted",),
        supports=lambda case: None,
        run=run,
    ),
)
'''

GAIN = """
file = "harness/paths/tiny/mla_decode.py"
[[mutant]]
id = "half-as-large-again"
why = "S1: a factor too many"
old = "GAIN = 1.0"
new = "GAIN = 1.5"
shows = "planted"
[[mutant]]
id = "not-weighed"
why = "S1: a factor too many, recorded without a mode"
old = "GAIN = 1.0"
new = "GAIN = 1.001"
"""


def test_budgets_judges_a_clean_path_and_its_smooth_mutants_in_every_dtype(make_house, command):
    house = make_house(
        {
            "cases/suites/one.toml": SUITE,
            "harness/paths/tiny/__init__.py": "",
            "harness/paths/tiny/mla_decode.py": PATH,
            "harness/mutation/known/tiny/mla_decode.toml": GAIN,
        }
    )
    fixed = ("--path", "tiny/*", "--suite", "one", "--lane", "interpreted", "--workers", "1")
    result = command("harness", "budgets", *fixed, "--seeds", "2", "--jsonl", "b.jsonl", cwd=house)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("the table holds")
    rows = {row["dtype"]: row for row in map(json.loads, (house / "b.jsonl").read_text().splitlines())}
    assert sorted(rows) == ["bf16", "fp16", "fp32"]
    for row in rows.values():
        assert (row["data"], row["cases"], row["refused"]) == ("planted", 2, [])
        assert set(row["clean"]) == {"values", "lse"}
        assert list(row["shares"]) == ["half-as-large-again"]
        # Half too much is a relative error of 0.5, and no budget of a dtype is as large as 0.01.
        assert 50 < row["shares"]["half-as-large-again"] < math.inf
    assert rows["fp32"]["clean"]["values"]["budget"] < rows["bf16"]["clean"]["values"]["budget"]
