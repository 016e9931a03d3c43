import json

import pytest

from harness.plan import UsageError
from reports.compare import MAX_LINES, compare, markdown, read


def record(case="mla_decode/decode:5", **changed):
    """A passed verdict as the jsonl report has it, some of it changed."""
    check = {"name": "values", "tensor": "out", "error": changed.pop("error", 1e-3), "budget": 4e-3}
    return {
        "schema": 1,
        "case": case,
        "path": "triton/mla_decode",
        "lane": "compiled",
        "status": "passed",
        "reason": "",
        "checks": [check],
        "inputs_digest": "a",
        "outputs_digest": "b",
        "seconds": {"compile": 0.0, "run": 0.01, "oracle": 0.1},
        **changed,
    }


def test_a_run_is_not_worse_than_itself():
    found = compare([record()], [record()])
    assert not found.is_worse
    assert found.matched == 1
    assert markdown(found).splitlines()[0] == "**not worse**: 1 verdicts in both runs"


@pytest.mark.parametrize("status", ["failed", "error", "xpassed"])
def test_what_passed_and_fails_now_is_worse_and_named_with_its_reason(status):
    found = compare([record()], [record(status=status, reason="lse is off")])
    assert found.is_worse
    assert "- `mla_decode/decode:5` triton/mla_decode compiled: lse is off" in markdown(found)


def test_what_failed_and_passes_now_is_fixed_and_not_worse():
    found = compare([record(status="failed", reason="lse is off")], [record()])
    assert not found.is_worse
    assert "## Fixed (1)" in markdown(found)


def test_what_failed_before_and_still_fails_is_not_worse():
    failing = record(status="failed", reason="lse is off")
    assert not compare([failing], [failing]).is_worse


@pytest.mark.parametrize("after", [[], [record(status="skipped", reason="too large")]])
def test_what_is_no_longer_judged_is_worse(after):
    other = record("mla_decode/decode:6")
    found = compare([record(), other], [other, *after])
    assert found.is_worse
    assert "No longer judged (1)" in markdown(found)


def test_what_was_skipped_before_cannot_be_lost_and_is_new_when_judged():
    found = compare([record(status="skipped", reason="no GPU")], [record()])
    assert not found.is_worse
    assert found.added == [("mla_decode/decode:5", "triton/mla_decode", "compiled")]


@pytest.mark.parametrize(
    ("before", "after", "is_worse"),
    [
        (1e-3, 2e-3, True),
        # Within noise, below the floor, smaller.
        (2e-3, 2.4e-3, False),
        (1e-4, 9e-4, False),
        (3e-3, 1e-3, False),
    ],
)
def test_an_error_drifts_if_it_grows_beyond_noise_and_comes_near_its_budget(before, after, is_worse):
    found = compare([record(error=before)], [record(error=after)])
    assert found.is_worse is is_worse
    assert ("25% -> 50% of the budget" in markdown(found)) is is_worse


def test_other_output_bits_are_told_and_not_worse():
    found = compare([record()], [record(outputs_digest="c")])
    assert not found.is_worse
    assert "Other output bits (1)" in markdown(found)


def test_with_other_inputs_errors_and_bits_are_not_compared():
    found = compare([record()], [record(inputs_digest="z", outputs_digest="c", error=3.9e-3)])
    assert found.inputs
    assert not found.drifts
    assert not found.bits


def test_runs_without_a_lane_in_common_are_matched_by_case_and_path_and_not_by_bits():
    found = compare([record(lane="interpreted")], [record(outputs_digest="c", error=3e-3)])
    assert [drift.key for drift in found.drifts] == [("mla_decode/decode:5", "triton/mla_decode")]
    assert not found.bits


@pytest.mark.parametrize("side", ["before", "after"])
def test_bits_of_a_path_that_changes_them_by_itself_are_not_compared(side):
    unsteady = record("mla_decode/decode:6", status="failed", kind="nondeterministic", reason="bits differ")
    other = record(path="cuda/mla_decode")
    runs = {
        "before": [record(), other],
        "after": [record(outputs_digest="c"), {**other, "outputs_digest": "c"}],
    }
    runs[side].append(unsteady)
    found = compare(runs["before"], runs["after"])
    assert [key[1] for key in found.bits] == ["cuda/mla_decode"]
    assert "- triton/mla_decode: a run saw its bits change by themselves" in markdown(found)


def test_a_failing_check_of_repeats_makes_a_path_unsteady_whatever_its_verdict_is_called():
    checks = [{"name": "repeat", "tensor": "out", "kind": "nondeterministic"}]
    wrong = record("mla_decode/decode:6", status="failed", kind="wrong", reason="off", checks=checks)
    assert compare([record(), wrong], [record(outputs_digest="c"), wrong]).bits == []


def test_what_the_runs_were_reached_with_is_told_where_it_differs():
    def made(triton):
        return [record(environment={"triton": triton, "torch": "2.11"})]

    text = markdown(compare(made("3.6.0"), made("3.9.0")))
    assert "triton: 3.6.0 before, 3.9.0 now" in text
    assert "torch" not in text
    assert "before, " not in markdown(compare(made("3.6.0"), made("3.6.0")))


def test_a_reason_of_several_lines_stays_one_entry():
    failing = record(status="error", reason="it raised\n\n# a heading\n- a list")
    assert (
        "compiled: it raised # a heading - a list"
        in markdown(compare([record()], [failing])).splitlines()[-1]
    )


def test_lanes_are_matched_where_the_runs_share_one():
    found = compare([record(lane="host"), record()], [record(status="failed", reason="r")])
    assert [key[2] for key, _ in found.failing] == ["compiled"]
    assert [key[2] for key, _ in found.lost] == ["host"]


def test_times_are_ratios_by_path_and_short_ones_are_left_out():
    slow = record(seconds={"run": 0.03})
    short = record("mla_decode/decode:6", seconds={"run": 1e-4})
    found = compare([record(), short], [slow, short])
    assert found.ratios == {"triton/mla_decode": [pytest.approx(3.0)]}
    assert "| triton/mla_decode | 1 | 3.00 | 3.00 |" in markdown(found)


def test_long_sections_are_cut_and_counted():
    cases = [f"mla_decode/decode:{number}" for number in range(MAX_LINES + 7)]
    found = compare([record(case) for case in cases], [record(cases[0])])
    assert markdown(found).count("not in the later run") == MAX_LINES
    assert "- ... and 6 more" in markdown(found)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no verdicts"),
        ('{"schema": 1, "run": {}}\n', "has no verdicts"),
        ('{"schema": 1, "case"', ":1 is not JSON"),
        ("[]", ":1 must be an object"),
        ('{"schema": 2, "run": {}}', "must have schema 1, got 2"),
        ('{"schema": 1, "case": "c", "path": "p", "lane": "l"}', "it has no status"),
    ],
)
def test_a_file_that_is_no_report_is_refused_in_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "report.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError, match=sentence):
        read(file)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "binary")


def test_the_command_compares_two_reports(main_here, tmp_path):
    files = []
    for name, text in (("a", [record()]), ("b", [record(status="failed", reason="lse is off")])):
        files.append(tmp_path / name)
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in text))
    assert main_here("compare", str(files[0]), str(files[0])).returncode == 0
    worse = main_here("compare", *map(str, files))
    assert worse.returncode == 1
    assert "New failures (1)" in worse.stdout
    missing = main_here("compare", str(files[0]), str(tmp_path / "none"))
    assert missing.returncode == 2
    assert "cannot be read" in missing.stderr
