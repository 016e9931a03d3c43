"""Which cache blocks rows share, and how many a step needs."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import CaseError, Kind, Row, parse
from cases.blocks import blocks_needed, row_blocks, step_blocks
from cases.strategies import steps

SIZES = st.sampled_from([1, 2, 16, 64])
# Short rows: `step_blocks` lists every block.
ONE_STEP = steps(max_steps=1, max_length=300).map(lambda drawn: drawn[0])


def one_step(text):
    return parse(f"mla_decode/{text}").steps[0]


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
    assert len(row_blocks(one_step(text)[0], 0, 64)) == count


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
    assert blocks_needed(one_step(text), 64) == needed


@settings(deadline=None)
@given(ONE_STEP, SIZES)
def test_blocks_needed_counts_the_distinct_blocks(step, size):
    assert blocks_needed(step, size) == len({block for row in step_blocks(step, size) for block in row})


@settings(deadline=None)
@given(ONE_STEP, SIZES)
def test_rows_share_a_block_only_where_both_have_cached_all_of_it(step, size):
    slots = [row for row in step if row.is_slot]
    blocks = step_blocks(step, size)
    for first, one in enumerate(slots):
        for second, other in enumerate(slots[:first]):
            for j, block in enumerate(blocks[first]):
                both_full = min(one.cached, other.cached) >= (j + 1) * size
                same_tag = one.tag is not None and one.tag == other.tag
                shared = j < len(blocks[second]) and block == blocks[second][j]
                assert shared == (same_tag and both_full)


@given(st.integers(1, 300), st.integers(1, 300), SIZES)
def test_the_blocks_of_a_row_are_distinct(cached, new, size):
    blocks = row_blocks(Row(Kind.HIT, cached, new, tag="sys"), 3, size)
    assert len(set(blocks)) == len(blocks)


def test_a_pool_holds_what_the_neediest_step_needs_in_the_layer_of_smallest_blocks():
    # 130 + 66 tokens in blocks of 16, while the first step needs one block.
    text = "mla_step/prefill:9..hit:9+121,decode:65/layers=2,block=64+16,pool={}"
    assert parse(text.format(14)).options.pool == 14
    with pytest.raises(CaseError, match=r"need 14 blocks of 16 tokens, got pool=13 \(rule V3\)"):
        parse(text.format(13))
