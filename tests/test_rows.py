"""The kinds of rows: what each means in step metadata, and which lengths it refuses."""

from dataclasses import replace

import pytest
from hypothesis import given

from cases import Kind, Row, RuleError
from cases.rows import MAX_DIGITS, MAX_LENGTH
from cases.strategies import rows

# text of the row: seq_lens_encoder, seq_lens_decoder, seq_lens_this_time
METADATA = {
    Row(Kind.PREFILL, new=5): ("prefill:5", 5, 0, 5),
    Row(Kind.HIT, cached=64, new=3): ("hit:64+3", 3, 64, 3),
    Row(Kind.DECODE, cached=9): ("decode:9", 0, 9, 1),
    Row(Kind.DRAFT, cached=30, new=5): ("draft:30+5", 0, 30, 5),
    Row(Kind.IDLE): ("idle", 0, 0, 0),
    Row(Kind.PAUSED, cached=7): ("paused:7", 0, 7, 0),
    Row(Kind.PAD, new=4): ("pad:4", 0, 0, 0),
}

# What a row refuses, and words of the reason.
REFUSED = [
    ((Kind.PREFILL, 0, 0), "an empty slot is idle"),
    ((Kind.HIT, 0, 3), "write prefill:N"),
    ((Kind.HIT, 3, 0), "write paused:C"),
    ((Kind.DECODE, 0), "first token is prefill:1"),
    ((Kind.DRAFT, 0, 3), "write prefill:N"),
    ((Kind.DRAFT, 3, 0), "write paused:C"),
    ((Kind.PAUSED, 0), "an empty slot is idle"),
    ((Kind.PAD, 0, 0), "leave the row out"),
    ((Kind.PREFILL, 0, -1), "between 1 and 2,147,483,647"),
    ((Kind.PREFILL, 0, MAX_LENGTH + 1), "between 1 and 2,147,483,647"),
    ((Kind.PREFILL, 1, 1), "has no cached length, got 1"),
    ((Kind.DECODE, 5, 2), "has no new length, got 2"),
    ((Kind.IDLE, 1), "has no cached length, got 1"),
    ((Kind.PAUSED, 5, 1), "has no new length, got 1"),
    ((Kind.PAD, 1, 1), "has no cached length, got 1"),
    ((Kind.DECODE, MAX_LENGTH), "C + N must be at most 2,147,483,647"),
    ((Kind.HIT, MAX_LENGTH, 1), "C + N must be at most 2,147,483,647"),
    ((Kind.IDLE, 0, 0, "sys"), "takes no tag"),
    ((Kind.IDLE, 0, 0, None, 3), "takes no data key"),
    ((Kind.PAD, 0, 4, "sys"), "takes no tag"),
    ((Kind.PAD, 0, 4, None, 3), "takes no data key"),
    ((Kind.DECODE, 5, 1, "Sys"), "a tag is lower-case letters"),
    ((Kind.DECODE, 5, 1, ""), "a tag is lower-case letters"),
    ((Kind.DECODE, 5, 1, None, -1), "a data key has no sign"),
    ((Kind.DECODE, 5, 1, None, 10**MAX_DIGITS), "at most 18 digits"),
]


@pytest.mark.parametrize(("row", "expected"), METADATA.items(), ids=str)
def test_a_kind_has_its_lengths_in_the_metadata(row, expected):
    lengths = (row.seq_lens_encoder, row.seq_lens_decoder, row.seq_lens_this_time)
    assert (str(row), *lengths) == expected


def test_every_kind_is_in_the_table():
    assert {row.kind for row in METADATA} == set(Kind)


@pytest.mark.parametrize(("fields", "reason"), REFUSED, ids=str)
def test_a_row_refuses_what_its_kind_has_no_meaning_for(fields, reason):
    with pytest.raises(RuleError) as caught:
        Row(*fields)
    assert reason in caught.value.message


@pytest.mark.parametrize("kind", Kind)
def test_a_form_shows_every_length_of_the_kind(kind):
    assert kind.form.count("C") + kind.form.count("N") == len(kind.lengths)
    assert kind.form.startswith(kind.word)


def test_the_parts_of_a_row_are_written_in_the_order_of_the_grammar():
    assert Row(Kind.HIT, 64, 17, tag="sys", key=3).text(count=2) == "hit:64+17x2@sys.k3"


def test_a_decode_adds_one_token():
    assert Row(Kind.DECODE, cached=9) == Row(Kind.DECODE, cached=9, new=1)
    assert Row(Kind.DECODE, cached=9).length == 10


@given(rows())
def test_the_lengths_of_a_row_agree_with_one_another(row):
    assert row.seq_lens_encoder in (0, row.seq_lens_this_time)
    assert row.is_prefill == (row.seq_lens_encoder > 0)
    assert not (row.is_prefill and row.is_decode)
    if row.is_slot:
        assert row.length == row.seq_lens_decoder + row.seq_lens_this_time
    # A token always has something to see: V1 forbids a token of an empty sequence that is no prefill.
    if row.seq_lens_this_time and not row.seq_lens_encoder:
        assert row.seq_lens_decoder > 0


@given(rows())
def test_a_copied_row_is_the_same_row(row):
    assert replace(row) == row
    assert hash(replace(row)) == hash(row)
