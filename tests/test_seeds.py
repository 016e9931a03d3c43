"""`--seeds`: every case again on other data."""

import json

import pytest
import typer

from cases import RuleError, parse
from harness import cli
from harness.plan import asked_cases

ONE = "mla_decode/decode:5/heads=2"
TWO = "latent_cache_write/prefill:3"
CHECKS = ("pages", "repeat", "neighbours", "idle", "permute", "poison", "lse", "values", "graph")


def texts(*cases, seeds, operator="*"):
    return [str(item.case) for item in asked_cases(cases, [], operator, CHECKS, seeds=seeds)]


def test_one_seed_is_each_case_as_it_is():
    assert texts(ONE, TWO, seeds=1) == [ONE, TWO]
    assert asked_cases([ONE, TWO], [], "*", CHECKS) == asked_cases([ONE, TWO], [], "*", CHECKS, seeds=1)


def test_all_cases_come_before_the_next_seed():
    assert texts(ONE, TWO, seeds=3) == [
        ONE,
        TWO,
        f"{ONE},seed=1",
        f"{TWO}/seed=1",
        f"{ONE},seed=2",
        f"{TWO}/seed=2",
    ]


def test_seeds_count_from_the_case_s_own():
    assert texts(f"{ONE},seed=7", seeds=3) == [f"{ONE},seed={seed}" for seed in (7, 8, 9)]


def test_nothing_but_the_seed_changes():
    text = "mla_decode/decode:5,draft:9+2/heads=2,dtype=fp16,data=huge,seed=3,splits=2"
    again = asked_cases([text], [], "*", CHECKS, seeds=2)[1].case
    assert again.options.seed == 4
    assert again.with_options(seed=3) == parse(text)
    assert parse(str(again)) == again


def test_a_case_asked_for_twice_has_its_seeds_once():
    assert texts(ONE, ONE, seeds=2) == [ONE, f"{ONE},seed=1"]


def test_cases_whose_seeds_meet_are_asked_for_once():
    found = texts(ONE, f"{ONE},seed=1", seeds=2)
    assert sorted(found) == [ONE, f"{ONE},seed=1", f"{ONE},seed=2"]


def test_only_cases_of_the_operator_are_asked_for_again():
    assert texts(ONE, TWO, seeds=2, operator="latent_*") == [TWO, f"{TWO}/seed=1"]


def test_checks_and_second_oracles_are_those_of_the_case():
    once = asked_cases([], ["regress"], "*", CHECKS)
    twice = asked_cases([], ["regress"], "*", CHECKS, seeds=2)
    assert twice[: len(once)] == once
    assert len({item.case for item in twice}) == 2 * len(once)
    for before, after in zip(once, twice[len(once) :], strict=True):
        assert after.case.options.seed == before.case.options.seed + 1
        assert (after.checks, after.both_oracles) == (before.checks, before.both_oracles)
    assert any(item.checks for item in once)


def test_a_seed_beyond_the_largest_is_refused():
    last = f"{ONE},seed={10**18 - 1}"
    assert texts(last, seeds=1) == [last]
    with pytest.raises(RuleError, match="seed"):
        texts(last, seeds=2)


@pytest.mark.parametrize("seeds", ["0", "-1", "many"])
def test_fewer_than_one_seed_are_refused(monkeypatch, capsys, seeds):
    monkeypatch.setattr(cli, "app", typer.Typer(pretty_exceptions_enable=False, add_completion=False))
    monkeypatch.setattr("sys.argv", ["mla-harness", "run", TWO, "--seeds", seeds])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert "--seeds" in capsys.readouterr().err


def test_a_run_judges_every_seed_on_data_of_its_own(command, tmp_path):
    file = tmp_path / "r.jsonl"
    asked = (f"{TWO}/seed=4", "--seeds", "2", "--path", "triton/*", "--workers", "1", "--lane", "interpreted")
    result = command("harness", "run", *asked, "--report", f"jsonl:{file}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1].startswith("2 passed, 0 failed")
    _, *verdicts, _ = [json.loads(line) for line in file.read_text().splitlines()]
    assert {verdict["case"] for verdict in verdicts} == {f"{TWO}/seed=4", f"{TWO}/seed=5"}
    assert len({verdict["inputs_digest"] for verdict in verdicts}) == 2
