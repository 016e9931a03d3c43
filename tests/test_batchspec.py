"""vLLM's batch-spec strings: read as rows, never printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import CaseError, RuleError, parse
from cases.batchspec import parse_batchspec
from cases.case import MAX_SLOTS

READ = {
    "q1": "prefill:1",
    "q2k": "prefill:2048",
    "q5s5": "prefill:5",
    "q1s2": "decode:1",
    "8q1s1k": "decode:1023x8",
    "q16s64": "hit:48+16",
    "q1ks2k": "hit:1024+1024",
    "q1ks1024": "prefill:1024",
    "2q16_32q1s4k": "prefill:16x2,decode:4095x32",
    "q5s9_q5s9": "hit:4+5x2",
    "q64..q1s65": "prefill:64..decode:64",
    "prefill:64..q1s65": "prefill:64..decode:64",
}


@pytest.mark.parametrize(("spec", "rows"), READ.items())
def test_a_batch_spec_is_read_as_rows(spec, rows):
    case = parse(f"mla_step/{spec}/heads=2")
    assert case == parse(f"mla_step/{rows}/heads=2")
    assert str(case) == f"mla_step/{rows}/heads=2"


@pytest.mark.parametrize(
    "spec", ["q", "8q", "3", "q1s", "q1k2", "q1s2kk", "Q1", "qs5", "1x2", "q1 ", "q1q2", "-1q1", "q٣"]
)
def test_what_does_not_fit_the_grammar_is_refused(spec):
    with pytest.raises(RuleError, match=r"a batch-spec segment is \[count\]q<len>"):
        parse_batchspec(spec, room=9)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("q0", "q must be between 1 and s, got q=0 and s=0"),
        ("q0s9", "q must be between 1 and s, got q=0 and s=9"),
        ("q9s5", "q must be between 1 and s, got q=9 and s=5"),
        ("q1s0", "q must be between 1 and s, got q=1 and s=0"),
        ("0q1", "a count is at least 1 and the step has room for 9 rows, got 0"),
        ("10q1", "a count is at least 1 and the step has room for 9 rows, got 10"),
        ("q2097152k", "needs N between 1 and 2,147,483,647"),
        ("q1s2097152k", "C [+] N must be at most 2,147,483,647"),
    ],
)
def test_lengths_and_counts_that_no_batch_has_are_refused(spec, reason):
    with pytest.raises(RuleError, match=reason):
        parse_batchspec(spec, room=9)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mla_step/q5_q9s5_q1s2", "q9s5"),
        ("mla_step/q5_", "_"),
        ("mla_step/2q1s64,decode:1", "2q1s64,decode:1"),
        (f"mla_step/q1_{MAX_SLOTS}q1", f"{MAX_SLOTS}q1"),
        ("mla_step/q5_q5..q1s6_q1s7", "q1s7"),
    ],
)
def test_the_offending_segment_is_underlined(text, part):
    with pytest.raises(CaseError) as caught:
        parse(text)
    # An empty segment at the end of the text has nothing to show but the place behind it.
    marked = text[caught.value.start : caught.value.end] or text[caught.value.start - 1]
    assert marked == part


@given(st.integers(1, 20), st.integers(1, 3000), st.integers(0, 3000))
def test_a_segment_has_its_count_new_tokens_and_length(count, new, cached):
    rows = parse_batchspec(f"{count}q{new}s{new + cached}", room=20)
    assert [(row.new, row.cached) for row in rows] == [(new, cached)] * count
