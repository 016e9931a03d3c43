"""Which cache blocks rows share, and how many a step needs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CaseError, parse
from cases.blocks import blocks_needed, step_blocks
from cases.schedule import canonical_steps, sequences
from cases.strategies import steps

SIZES = st.sampled_from([1, 2, 16, 64])
# Short rows: `step_blocks` lists every block. Keys and tags are inherited only in canonical form.
SOME_STEPS = steps(max_length=300).map(canonical_steps)


def steps_of(text):
    return parse(f"mla_step/{text}").steps


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("prefill:1", 1),
        ("prefill:64", 1),
        ("prefill:65", 2),
        ("hit:64+1", 2),
        ("decode:63", 1),
        ("decode:64", 2),
        ("draft:62+4", 2),
        ("paused:64", 1),
        ("idle", 0),
    ],
)
def test_a_row_has_blocks_for_the_tokens_after_the_step(text, count):
    ((blocks,),) = step_blocks(steps_of(text), 64)
    assert len(blocks) == count


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("", 0),
        ("pad:500", 0),
        ("decode:127x3", 6),
        ("decode:128@sys,decode:128@sys", 4),  # two shared, and each its own third
        ("decode:128@a,decode:128@b", 6),
        ("decode:127@sys,decode:128@sys", 4),  # block 1 of the first is not full: its own
        ("paused:128@sys,paused:64@sys", 2),
        ("hit:192+8@sys,hit:192+70@sys,decode:130@sys", 7),
    ],
)
def test_a_shared_block_counts_once(text, needed):
    assert blocks_needed(steps_of(text), 64) == needed


@settings(deadline=None)
@given(SOME_STEPS, SIZES)
def test_blocks_needed_counts_the_distinct_blocks_of_the_neediest_step(steps, size):
    distinct = [len({block for row in step for block in row}) for step in step_blocks(steps, size)]
    assert blocks_needed(steps, size) == max(distinct)


@settings(deadline=None)
@given(SOME_STEPS, SIZES)
def test_rows_share_a_block_only_where_both_have_cached_all_of_it_of_one_tag(steps, size):
    for step, held, blocks in zip(steps, sequences(steps), step_blocks(steps, size), strict=True):
        for first in range(len(blocks)):
            for second in range(first):
                for j, block in enumerate(blocks[first]):
                    shared = j < len(blocks[second]) and block == blocks[second][j]
                    both = [(step[slot], held[slot]) for slot in (first, second)]
                    full = all(
                        sequence and min(row.cached, sequence.tagged_tokens) >= (j + 1) * size
                        for row, sequence in both
                    )
                    assert shared == (full and held[first].tag == held[second].tag)


@settings(deadline=None)
@given(SOME_STEPS, SIZES)
def test_the_blocks_of_a_row_are_distinct(steps, size):
    for blocks in step_blocks(steps, size):
        for row in blocks:
            assert len(set(row)) == len(row)


def test_a_prefix_that_one_row_has_computed_is_shared_by_rows_that_find_it():
    # 40 tokens of the tag: two full blocks of 16 once they are cached, none in the step that computes them.
    first, second = step_blocks(steps_of("prefill:40@sys..decode:40,hit:32+5@sys"), 16)
    assert [kind for kind, *_ in first[0]] == ["own"] * 3
    assert second[0][:2] == second[1][:2] == [("tag", "sys", 0), ("tag", "sys", 1)]
    assert second[0][2] == first[0][2]


def test_what_rows_of_one_tag_generate_is_not_shared():
    *_, last = step_blocks(steps_of("hit:16+16@sys,hit:16+16@sys..decode:32x2"), 16)
    assert last[0][0] == last[1][0]
    assert not set(last[0][1:]) & set(last[1][1:])


def test_a_sequence_that_begins_in_a_held_slot_has_blocks_of_its_own():
    first, second = step_blocks(steps_of("prefill:9..prefill:9"), 16)
    assert first != second


def test_a_pool_holds_what_the_neediest_step_needs_in_the_layer_of_smallest_blocks():
    # 130 + 66 tokens in blocks of 16, while the first step needs one block.
    text = "mla_step/prefill:9..hit:9+121,decode:65/layers=2,block=64+16,pool={}"
    assert parse(text.format(14)).options.pool == 14
    with pytest.raises(CaseError, match=r"need 14 blocks of 16 tokens, got pool=13 \(rule V3\)"):
        parse(text.format(13))
