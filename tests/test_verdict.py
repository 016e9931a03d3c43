"""Verdicts: illegal ones cannot be built, the worst failure decides, and the JSON is the one promised."""

import json
import math
from dataclasses import replace

import pytest

from harness.verdict import (
    SEVERITY,
    CheckResult,
    Kind,
    Seconds,
    Status,
    Verdict,
    Where,
    Worst,
    judged,
    ranges,
)

PARTS = {
    "case": "mla_decode/decode:3",
    "operator": "mla_decode",
    "path": "triton/mla_decode",
    "lane": "interpreted",
}


def verdict(status, kind=None, reason=""):
    return Verdict(**PARTS, status=status, kind=kind, reason=reason)


def failure(kind, reason="it is so"):
    return CheckResult(kind.value, Status.FAILED, "out", kind, reason)


# ---- what cannot be built ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (Status.PASSED, Kind.WRONG, ""),
        (Status.PASSED, None, "it went well"),
        (Status.FAILED, Kind.WRONG, ""),
        (Status.FAILED, None, "it is wrong"),
        (Status.SKIPPED, Kind.UNSUPPORTED, ""),
        (Status.SKIPPED, None, "not today"),
        (Status.XFAILED, Kind.WRONG, ""),
        (Status.XPASSED, None, ""),
        (Status.ERROR, Kind.CRASH, ""),
    ],
)
def test_illegal_verdicts_are_refused(status, kind, reason):
    with pytest.raises(ValueError, match=r"verdict|pass"):
        verdict(status, kind, reason)


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (Status.XFAILED, Kind.WRONG, "known"),
        (Status.XPASSED, None, "listed"),
        (Status.ERROR, Kind.WRONG, "broken"),
        (Status.FAILED, None, "no kind"),
        (Status.FAILED, Kind.WRONG, ""),
        (Status.SKIPPED, None, ""),
    ],
)
def test_illegal_check_results_are_refused(status, kind, reason):
    with pytest.raises(ValueError, match="check"):
        CheckResult("values", status, "out", kind, reason)


def test_legal_states_can_be_built():
    verdict(Status.PASSED)
    verdict(Status.SKIPPED, Kind.UNAVAILABLE, "no GPU")
    # An error without a kind is the harness's own.
    verdict(Status.ERROR, None, "the harness failed")
    CheckResult("graph", Status.SKIPPED, reason="no token")
    CheckResult("values", Status.PASSED)


# ---- which failure decides -----------------------------------------------------------------------


def test_without_a_failure_the_verdict_is_a_pass():
    checks = [CheckResult("values", Status.PASSED), CheckResult("graph", Status.SKIPPED, reason="no token")]
    result = judged(PARTS, checks)
    assert (result.status, result.kind, result.reason) == (Status.PASSED, None, "")
    assert result.checks == tuple(checks)


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (Kind.BOUNDS, Kind.GUARD),
        (Kind.GUARD, Kind.INPUT_CHANGED),
        (Kind.INPUT_CHANGED, Kind.WRONG),
        (Kind.WRONG, Kind.NONDETERMINISTIC),
    ],
)
def test_the_worst_failure_decides_whatever_the_order(worse, better):
    checks = [failure(better, "the lesser"), failure(worse, "the worse"), CheckResult("x", Status.PASSED)]
    for order in (checks, checks[::-1]):
        result = judged(PARTS, order)
        assert (result.status, result.kind, result.reason) == (Status.FAILED, worse, "the worse")
        assert len(result.checks) == 3


def test_of_equal_failures_the_first_decides():
    result = judged(PARTS, [failure(Kind.WRONG, "first"), failure(Kind.WRONG, "second")])
    assert result.reason == "first"


def test_severity_ranks_every_kind():
    assert sorted(SEVERITY.values()) == list(range(len(Kind)))
    assert SEVERITY[Kind.CRASH] == 0


# ---- known failures ------------------------------------------------------------------------------


def test_an_expected_failure_is_xfailed_with_both_reasons():
    result = verdict(Status.FAILED, Kind.WRONG, "row 2 is off").expected_to_fail("issue 7")
    assert (result.status, result.kind) == (Status.XFAILED, Kind.WRONG)
    assert result.reason == "row 2 is off (known: issue 7)"
    assert not result.is_bad


def test_an_expected_failure_that_passes_is_bad():
    result = verdict(Status.PASSED).expected_to_fail("issue 7")
    assert result.status is Status.XPASSED
    assert "issue 7" in result.reason
    assert result.is_bad


@pytest.mark.parametrize(
    ("status", "kind"), [(Status.SKIPPED, Kind.UNSUPPORTED), (Status.ERROR, Kind.CRASH), (Status.ERROR, None)]
)
def test_neither_skips_nor_errors_count_as_the_expected_failure(status, kind):
    result = verdict(status, kind, "why")
    assert result.expected_to_fail("issue 7") == result


def test_failures_errors_and_unexpected_passes_are_bad():
    bad = {
        status
        for status in Status
        if verdict(
            status,
            None if status in (Status.PASSED, Status.XPASSED) else Kind.WRONG,
            "" if status is Status.PASSED else "why",
        ).is_bad
    }
    assert bad == {Status.FAILED, Status.ERROR, Status.XPASSED}


# ---- words and JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([], ""),
        ([5], "5"),
        ([0, 1, 2, 7], "0-2,7"),
        ([7, 2, 0, 1, 2], "0-2,7"),
        ([0, 2, 4], "0,2,4"),
        ([-1, 0, 1], "-1-1"),
        (range(1000), "0-999"),
    ],
)
def test_ranges_join_neighbours(indices, text):
    assert ranges(indices) == text


def test_repro_is_one_line_that_names_case_path_and_lane():
    assert verdict(Status.PASSED).repro == (
        "python3 -m harness repro 'mla_decode/decode:3' --path triton/mla_decode --lane interpreted"
    )


FIELDS = [
    "case", "operator", "path", "lane", "status", "kind", "reason", "checks", "inputs_digest",
    "outputs_digest", "seconds", "environment", "smallest", "repro",
]  # fmt: skip
CHECK_FIELDS = [
    "name", "status", "tensor", "kind", "reason", "worst", "error", "budget", "budget_source", "where",
]  # fmt: skip


def full_verdict():
    check = CheckResult(
        "values",
        Status.FAILED,
        "out",
        Kind.WRONG,
        "off",
        worst=Worst((2, 0, 5), math.nan, -math.inf),
        error=math.inf,
        budget=4e-3,
        budget_source="the bf16 floor",
        where=Where(rows="2", tokens="2", heads="0", dims="5"),
    )
    parts = {"inputs_digest": "aa", "outputs_digest": "bb", "environment": {"python": "3"}}
    return judged({**PARTS, **parts, "seconds": Seconds(1.0, 2.0, 3.0)}, [check])


def test_json_has_the_promised_fields():
    data = full_verdict().to_json()
    # The report that writes it adds `schema`.
    assert sorted(data) == sorted(FIELDS)
    assert sorted(data["checks"][0]) == sorted(CHECK_FIELDS)
    assert sorted(data["checks"][0]["worst"]) == ["expected", "got", "index"]
    assert sorted(data["checks"][0]["where"]) == [
        "blocks",
        "dims",
        "heads",
        "pattern",
        "rows",
        "splits",
        "steps",
        "tokens",
    ]
    assert data["seconds"] == {"compile": 1.0, "run": 2.0, "oracle": 3.0}
    assert (data["status"], data["kind"]) == ("failed", "wrong")


def test_json_holds_nan_and_infinities_as_strings():
    data = full_verdict().to_json()
    (check,) = data["checks"]
    assert check["worst"] == {"index": [2, 0, 5], "got": "nan", "expected": "-inf"}
    assert check["error"] == "inf"
    assert check["budget"] == 4e-3
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_json_of_a_pass_has_null_and_empty_fields():
    data = verdict(Status.PASSED).to_json()
    assert data["kind"] is None
    assert data["reason"] == ""
    assert data["checks"] == []


@pytest.mark.parametrize("status", Status)
def test_statuses_are_the_promised_words(status):
    words = {"passed", "failed", "skipped", "xfailed", "xpassed", "error"}
    assert status.value in words
    assert len(Status) == len(words)


def test_kinds_are_the_promised_words():
    words = (
        "wrong guard input_changed bounds nondeterministic crash timeout unsupported unavailable too_large "
        "oracle_conflict"
    )
    assert {kind.value for kind in Kind} == set(words.split())


def test_verdicts_are_values():
    first, second = full_verdict(), full_verdict()
    # NaN is no equal of itself, so compare what is written.
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert verdict(Status.PASSED) == verdict(Status.PASSED)
    assert verdict(Status.PASSED) != replace(verdict(Status.PASSED), lane="compiled")
