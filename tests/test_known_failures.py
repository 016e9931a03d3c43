"""Known failures: what a line says, and what becomes of verdicts that it speaks of."""

import datetime as dt

import pytest

from harness.known_failures import KnownFailuresError, apply_known, read_known_failures
from harness.run import stale_entries
from harness.verdict import Kind, Status, Verdict

CASE = "mla_decode/decode:9/heads=3"
TODAY = dt.date(2026, 3, 1)


def read(tmp_path, text):
    file = tmp_path / "known.txt"
    file.write_text(text)
    return read_known_failures(file)


def verdict(status, kind=None, reason=""):
    return Verdict(CASE, "mla_decode", "bad/wrong", "interpreted", status, kind, reason)


FAILED = verdict(Status.FAILED, Kind.WRONG, "out is off")


@pytest.mark.parametrize("line", ["*/heads=3 bad/*", f"{CASE} bad/wrong interpreted", "mla* * kind=wrong"])
def test_a_failure_of_the_kind_that_is_known_is_expected(line, tmp_path):
    result = apply_known(read(tmp_path, f"{line} # issue 7"), FAILED)
    assert (result.status, result.reason) == (Status.XFAILED, "out is off (known: issue 7)")


def test_a_failure_of_another_kind_stays_a_failure(tmp_path):
    result = apply_known(read(tmp_path, "* * kind=guard # issue 7"), FAILED)
    assert result.status is Status.FAILED
    assert result.reason == "out is off (known to fail as guard: issue 7)"


@pytest.mark.parametrize(("days", "status"), [(-1, Status.FAILED), (0, Status.XFAILED), (1, Status.XFAILED)])
def test_a_known_failure_holds_through_its_last_day(days, status, tmp_path):
    until = TODAY + dt.timedelta(days=days)
    (known,) = read(tmp_path, f"* * until={until} # issue 7")
    assert known.applied(FAILED, TODAY).status is status


def test_a_known_failure_whose_last_day_is_long_past_counts_again(tmp_path):
    assert apply_known(read(tmp_path, "* * until=2020-01-01 # issue 7"), FAILED).status is Status.FAILED


def test_a_known_failure_that_passes_is_told_whatever_its_kind_and_day(tmp_path):
    known = read(tmp_path, "* * kind=guard until=2020-01-01 # issue 7")
    assert apply_known(known, verdict(Status.PASSED)).status is Status.XPASSED


def test_the_first_line_that_matches_decides_and_others_leave_a_verdict_alone(tmp_path):
    known = read(tmp_path, "* other/* # no\n\n# a comment\n* bad/* # first\n* * # second\n")
    assert apply_known(known, FAILED).reason == "out is off (known: first)"
    assert apply_known(known[:1], FAILED) == FAILED


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a b", "must be 'CASE PATH [LANE]"),
        ("a # why", "must be 'CASE PATH [LANE]"),
        ("a b c d # why", "must be 'CASE PATH [LANE]"),
        ("a b kind=bad # why", "kind is one of crash, timeout"),
        ("a b until=tomorrow # why", "until is a day such as 2027-01-31, got 'tomorrow'"),
    ],
)
def test_a_line_of_another_form_is_refused_with_its_place(line, said, tmp_path):
    with pytest.raises(KnownFailuresError, match=r"known.txt:2") as refusal:
        read(tmp_path, f"# a comment\n{line}\n")
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "is_stale"),
    [
        (f"{CASE} bad/wrong", False),
        ("no_such/* bad/wrong", True),
        ("no_such/* bad/wrong interpreted", True),
        ("no_such/* bad/wrong no_such_lane", True),
        ("no_such/* bad/wrong compiled", False),
    ],
)
def test_a_line_that_speaks_of_no_verdict_is_stale_unless_it_is_of_another_lane(line, is_stale, tmp_path):
    known = read(tmp_path, f"{line} # issue 7")
    assert stale_entries(known, [FAILED]) == (known if is_stale else ())
