"""Smaller cases: each is smaller, can be written, and keeps the data of what is left."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings

from cases import parse
from cases.rows import Kind
from cases.schedule import sequences
from cases.smaller import (
    WAYS,
    default_model,
    fewer_heads,
    fewer_layers,
    fewer_names,
    fewer_options,
    fewer_rows,
    fewer_steps,
    fewer_tokens,
    merged_rows,
    plainer_rows,
    size,
    without_slots,
)
from cases.strategies import cases

ZOO = "mla_decode/draft:30+3,hit:64+17@sys,prefill:5,decode:100@sys,idle,paused:7,pad:3/block=32"


def texts(way, text):
    return [str(case) for case in way(parse(text))]


@settings(max_examples=40, deadline=None)
@given(cases(max_length=2000))
def test_every_smaller_case_is_smaller_and_reads_as_it_is_written(case):
    for way in WAYS:
        for smaller in islice(way(case), 12):
            assert size(smaller) < size(case), way.__name__
            assert parse(str(smaller)) == smaller


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_from_the_smallest_case_nothing_is_taken(way):
    assert texts(way, "mla_decode//heads=1") == []


def test_slots_that_move_up_keep_their_data():
    case = parse(ZOO)
    held = sequences(case.steps)[0]
    for slots in ([0], [1, 2], [0, 1, 2, 4, 5]):
        (smaller,) = without_slots(case, slots)
        kept = [sequence for slot, sequence in enumerate(held) if slot not in slots and sequence]
        left = [sequence for sequence in sequences(smaller.steps)[0] if sequence]
        assert [(item.key, item.tag) for item in left] == [(item.key, item.tag) for item in kept]


def test_rows_go_by_halves_and_then_one_by_one():
    assert texts(fewer_rows, "mla_decode/decode:1,decode:2,decode:3,decode:4,pad:2") == [
        "mla_decode/decode:1,decode:2,decode:3,decode:4",
        "mla_decode/decode:3.k2,decode:4.k3,pad:2",
        "mla_decode/decode:1,decode:2,pad:2",
        "mla_decode/decode:2.k1,decode:3.k2,decode:4.k3,pad:2",
        "mla_decode/decode:1,decode:3.k2,decode:4.k3,pad:2",
        "mla_decode/decode:1,decode:2,decode:4.k3,pad:2",
        "mla_decode/decode:1,decode:2,decode:3,pad:2",
    ]


def test_one_row_takes_the_tokens_of_another_and_then_its_blocks():
    assert texts(merged_rows, "mla_decode/decode:30,idle,draft:9+2/block=32") == [
        "mla_decode/decode:41,idle/block=32",
        "mla_decode/idle,draft:40+2.k2/block=32",
        "mla_decode/decode:62,idle/block=32",
        "mla_decode/idle,draft:41+2.k2/block=32",
    ]


def test_rows_too_long_for_one_are_not_merged():
    assert texts(merged_rows, f"mla_decode/decode:{2**30}x2") == []


def test_steps_go_to_one_alone_or_from_either_end():
    found = texts(fewer_steps, "mla_step/prefill:8..decode:8..decode:9")
    assert found == [
        "mla_step/decode:9",
        "mla_step/decode:8",
        "mla_step/prefill:8",
        "mla_step/prefill:8..decode:8",
        "mla_step/decode:8..decode:9",
    ]


def test_a_shorter_row_leaves_its_later_steps_consistent():
    found = texts(fewer_tokens, "mla_step/prefill:8..hit:8+4..decode:12")
    assert "mla_step/prefill:1..hit:1+4..decode:5" in found
    assert "mla_step/prefill:8..hit:8+1..decode:9" in found
    assert found[0] == "mla_step/prefill:1..hit:1+1..decode:2"


def test_a_length_is_searched_from_below_and_then_from_above():
    found = texts(fewer_tokens, "mla_decode/decode:100")
    lengths = [int(text.rpartition(":")[2]) for text in found]
    assert lengths == [1, 50, 1, 36, 68, 84, 92, 96, 98, 99]


def test_layers_go_to_one_alone_or_lose_one():
    assert texts(fewer_layers, "mla_decode/decode:1/heads=1,layers=3,block=16+32+64") == [
        "mla_decode/decode:1/heads=1,block=16",
        "mla_decode/decode:1/heads=1,block=32",
        "mla_decode/decode:1/heads=1",
        "mla_decode/decode:1/heads=1,layers=2,block=32+64",
        "mla_decode/decode:1/heads=1,layers=2,block=16+64",
        "mla_decode/decode:1/heads=1,layers=2,block=16+32",
    ]


def test_options_are_left_out_or_get_smaller_numbers():
    found = texts(fewer_options, "mla_decode/decode:1/heads=1,layers=2,block=16+32,splits=3,data=deep")
    assert found == [
        "mla_decode/decode:1/heads=1,layers=2,data=deep,splits=3",
        "mla_decode/decode:1/heads=1,layers=2,block=16,data=deep,splits=3",
        "mla_decode/decode:1/heads=1,layers=2,block=32,data=deep,splits=3",
        "mla_decode/decode:1/heads=1,layers=2,block=16+32,splits=3",
        "mla_decode/decode:1/heads=1,layers=2,block=16+32,data=deep",
        "mla_decode/decode:1/heads=1,layers=2,block=16+32,data=deep,splits=1",
        "mla_decode/decode:1/heads=1,layers=2,block=16+32,data=deep,splits=2",
    ]


def test_a_pool_too_small_for_the_rows_is_not_offered():
    pools = [parse(text).options.pool for text in texts(fewer_options, "mla_decode/decode:200/pool=8")]
    assert None in pools
    assert all(pool is None or 4 <= pool < 8 for pool in pools)


def test_heads_get_fewer_in_every_layer():
    assert texts(fewer_heads, "mla_decode/decode:1/heads=4+2,layers=2")[:2] == [
        "mla_decode/decode:1/heads=1,layers=2",
        "mla_decode/decode:1/heads=2,layers=2",
    ]


def test_rows_lose_what_is_special_of_their_kind():
    found = texts(plainer_rows, "mla_decode/hit:4+2,draft:5+3,paused:6")
    assert found == [
        "mla_decode/prefill:2,draft:5+3,paused:6",
        "mla_decode/decode:4,draft:5+3,paused:6",
        "mla_decode/decode:5,draft:5+3,paused:6",
        "mla_decode/hit:4+2,decode:5,paused:6",
        "mla_decode/hit:4+2,decode:7,paused:6",
        "mla_decode/hit:4+2,draft:5+3,idle",
    ]


def test_tags_and_keys_are_taken_together_and_one_by_one():
    found = texts(fewer_names, "mla_decode/decode:70@a,decode:70@a,decode:1.k9")
    assert found == [
        "mla_decode/decode:70x2,decode:1.k9",
        "mla_decode/decode:70,decode:70@a,decode:1.k9",
        "mla_decode/decode:70@a,decode:70,decode:1.k9",
        "mla_decode/decode:70x2@a,decode:1",
    ]


def test_the_default_model_keeps_the_number_of_heads():
    assert texts(default_model, "mla_decode/decode:1/model=minicpm3-4b") == ["mla_decode/decode:1/heads=40"]


def test_padding_is_no_slot():
    (smaller,) = without_slots(parse("mla_decode/decode:3,pad:2"), [0])
    assert [row.kind for row in smaller.steps[0]] == [Kind.PAD]


def test_of_rows_that_are_alike_one_goes():
    found = texts(fewer_rows, "mla_decode/idlex64,decode:3")
    assert len(found) < 15
    assert found[-2:] == ["mla_decode/idlex63,decode:3.k64", "mla_decode/idlex64"]
