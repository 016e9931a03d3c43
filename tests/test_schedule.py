"""Sequences across steps: who continues, who begins, and what a continued row may say."""

import pytest
from hypothesis import given, settings

from cases import CaseError, Kind, parse
from cases.schedule import sequences
from cases.strategies import steps


def walked(steps_text):
    return sequences(parse(f"mla_step/{steps_text}").steps)


def held(steps_text):
    """Tokens held by each slot after each step; None where there is no sequence."""
    return [[slot and slot.held for slot in slots] for slots in walked(steps_text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prefill:64..hit:64+64..decode:128..decode:129", [[64], [128], [129], [130]]),
        ("prefill:5..paused:5..decode:5", [[5], [5], [6]]),
        ("decode:9..draft:10+3..decode:13", [[10], [13], [14]]),
        ("decode:9,idle,draft:30+5", [[10, None, 35]]),
    ],
)
def test_a_slot_continues_with_the_tokens_it_holds(text, expected):
    assert held(text) == expected


@pytest.mark.parametrize("cached", range(30, 36))
def test_any_number_of_drafted_tokens_may_be_rejected(cached):
    assert held(f"draft:30+5..decode:{cached}") == [[35], [cached + 1]]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("prefill:64..decode:63", "holds 64 tokens"),
        ("prefill:64..decode:65", "holds 64 tokens"),
        ("decode:9..paused:9", "holds 10 tokens"),
        ("paused:7..decode:6", "holds 7 tokens"),
        ("draft:30+5..decode:29", "holds 30 to 35 tokens"),
        ("draft:30+5..decode:36", "holds 30 to 35 tokens"),
        ("draft:30+5..draft:33+2..decode:32", "holds 33 to 35 tokens"),
    ],
)
def test_a_slot_refuses_other_tokens_than_it_holds(text, span):
    with pytest.raises(CaseError, match=span):
        parse(f"mla_step/{text}")


@pytest.mark.parametrize(
    "gap", ["idle", "", "pad:4"], ids=["idle", "a step of zero slots", "padding in its place"]
)
def test_a_freed_slot_admits_any_sequence(gap):
    first, between, last = walked(f"decode:63@sys.k5..{gap}..hit:8+2")
    assert first[0].key == 5
    assert not any(between)
    assert (last[0].key, last[0].tag, last[0].held) == (0, None, 10)


def test_a_prefill_starts_a_new_sequence_in_a_held_slot():
    (first,), (second,) = walked("decode:63@sys.k5..prefill:8")
    assert (first.key, first.tag, first.held) == (5, "sys", 64)
    assert (second.key, second.tag, second.held) == (0, None, 8)


def test_a_shorter_step_frees_the_slots_it_leaves_out():
    assert held("decode:5,decode:9..decode:6..decode:7,decode:90") == [[6, 10], [7], [8, 91]]


def test_key_and_tag_are_inherited():
    for (slot,) in walked("hit:64+8@sys.k5..decode:72..paused:73..draft:73+2"):
        assert (slot.key, slot.tag, slot.tagged_tokens) == (5, "sys", 64)


def test_the_default_key_is_the_slot():
    assert [slot and slot.key for slot in walked("decode:5x2,idle,decode:5.k9,decode:5")[0]] == [
        0,
        1,
        None,
        9,
        4,
    ]


@pytest.mark.parametrize("row", ["decode:73.k5", "decode:73@sys", "decode:73@sys.k5"])
def test_a_continued_row_may_repeat_what_it_inherits(row):
    assert str(parse(f"mla_step/hit:64+9@sys.k5..{row}")) == "mla_step/hit:64+9@sys.k5..decode:73"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("decode:5.k3..decode:6.k4", "data key 3, got .k4"),
        ("decode:5.k3..decode:6.k0", "data key 3, got .k0"),
        ("decode:5@a..decode:6@b", "tag a, got @b"),
        ("decode:5..decode:6@b", "without a tag, got @b"),
    ],
)
def test_a_continued_row_may_not_contradict_what_it_inherits(text, reason):
    with pytest.raises(CaseError, match=reason):
        parse(f"mla_step/{text}")


@settings(max_examples=50, deadline=None)
@given(steps())
def test_held_tokens_are_those_of_the_row(drawn):
    for step, slots in zip(drawn, sequences(drawn), strict=True):
        for row, sequence in zip(step, slots, strict=True):
            if row.kind in (Kind.IDLE, Kind.PAD):
                assert sequence is None
            else:
                assert sequence.floor <= sequence.held == row.length
                assert (sequence.floor < sequence.held) == (row.kind is Kind.DRAFT)
