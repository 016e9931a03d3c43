"""Block tables: every row gets blocks of its own, shared ones where the language says so, and a tail."""

import numpy as np
import pytest

from cases import parse
from harness.paging import HUGE_BLOCK_ID, lay_out

ORDERS = ("shuffled", "sequential", "reversed", "strided")
ROWS = "decode:200,idle,hit:64+70,paused:7,prefill:1,draft:62+4,pad:3"


def pages_of(rows, options="", layer=0):
    case = parse(f"mla_decode/{rows}/{options}" if options else f"mla_decode/{rows}")
    return lay_out(case, case.layers[layer])[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block", [1, 3, 16, 64, 128])
def test_rows_without_tags_share_no_block(order, block):
    pages = pages_of(ROWS, f"block={block},pages={order}")
    given = np.concatenate(pages.blocks)
    # Tokens held after the step, by hand: 201, 0, 134, 7, 1, 66.
    assert [len(row) for row in pages.blocks] == [-(-held // block) for held in (201, 0, 134, 7, 1, 66)]
    assert len(np.unique(given)) == len(given)
    assert given.min() >= 0
    assert given.max() < pages.num_blocks


@pytest.mark.parametrize("order", ORDERS)
def test_a_pool_of_just_the_needed_blocks_is_used_whole(order):
    # 201 + 134 + 7 + 1 + 66 tokens in blocks of 16: 13 + 9 + 1 + 1 + 5.
    pages = pages_of(ROWS, f"block=16,pages={order},pool=29")
    assert sorted(np.concatenate(pages.blocks).tolist()) == list(range(29))
    assert pages.used.tolist() == list(range(29))


def test_orders_are_what_their_names_say():
    def blocks(order):
        return pages_of("decode:9", f"block=2,pool=20,pages={order}").blocks[0].tolist()

    assert blocks("sequential") == [0, 1, 2, 3, 4]
    assert blocks("reversed") == [19, 18, 17, 16, 15]
    assert blocks("strided") == [0, 7, 14, 1, 8]
    assert sorted(blocks("shuffled")) != list(range(5))


def test_shuffled_blocks_depend_on_seed_and_layer():
    orders = {
        tuple(pages_of("decode:300", f"block=4,seed={seed},layers=2", layer).blocks[0].tolist())
        for seed in (0, 1)
        for layer in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(("tail", "value"), [("huge", HUGE_BLOCK_ID), ("-1", -1), ("0", 0), ("nb+7", "pool")])
def test_tails_hold_what_the_option_says(tail, value):
    pages = pages_of(ROWS, f"block=16,tail={tail}")
    expected = pages.num_blocks + 7 if value == "pool" else value
    for table, own in zip(pages.block_tables, pages.blocks, strict=True):
        assert table[: len(own)].tolist() == own.tolist()
        assert len(own) < len(table)
        assert set(table[len(own) :].tolist()) == {expected}


def test_a_huge_tail_lies_outside_any_allocation():
    # 288 GiB, even of blocks of one token with the narrowest latent in one byte each.
    assert HUGE_BLOCK_ID * 288 > 287 * 2**30
    assert HUGE_BLOCK_ID < 2**31


@pytest.mark.parametrize("rows", ["", "idlex3", "idlex2,pad:4"])
def test_steps_without_tokens_have_a_table_of_tails(rows):
    pages = pages_of(rows, "tail=-1")
    assert pages.block_tables.dtype == np.int32
    assert (pages.block_tables == -1).all()
    assert pages.block_tables.shape[1] == 1
    assert pages.used.tolist() == []
    assert pages.num_blocks > 0


def test_two_rows_of_a_tag_share_a_block_only_where_both_hold_it_cached():
    # Blocks of 64: 192 cached fill three blocks, 130 fill two, 63 fill none.
    pages = pages_of("decode:192@sys,decode:130@sys,decode:63@sys,decode:192@other,decode:192")
    first, second, third, other, untagged = (row.tolist() for row in pages.blocks)
    assert first[:2] == second[:2]
    assert not set(first[2:]) & set(second[2:])
    for row in (third, other, untagged):
        assert not set(row) & (set(first) | set(second))


def test_a_block_that_is_written_this_step_is_never_shared():
    # 128 cached tokens are two full blocks: the new token's block begins behind them.
    pages = pages_of("decode:128x2@sys,hit:128+70@sys")
    first, second, third = (row.tolist() for row in pages.blocks)
    assert first[:2] == second[:2] == third[:2]
    written = [*first[2:], *second[2:], *third[2:]]
    assert len(written) == len(set(written)) == 1 + 1 + 2
    assert not set(written) & set(first[:2])


def test_the_pool_has_strangers_blocks():
    pages = pages_of(ROWS, "block=16")
    assert pages.num_blocks > len(pages.used) + 2


def steps_of(rows, options="block=16"):
    case = parse(f"mla_step/{rows}/{options}")
    return lay_out(case, case.layers[0])


def test_a_sequence_keeps_its_blocks_from_step_to_step():
    first, second, third = steps_of("prefill:40,decode:9..hit:40+20,decode:10..decode:60,decode:11")
    assert second.blocks[0][:3].tolist() == first.blocks[0].tolist()
    assert third.blocks[0].tolist() == second.blocks[0].tolist()
    assert first.kept.tolist() == []
    assert second.kept.tolist() == first.used.tolist()
    assert third.kept.tolist() == second.used.tolist()


def test_freed_blocks_are_the_first_to_be_given_out_again():
    first, second = steps_of("prefill:30,decode:20..idle,decode:21,prefill:20")
    assert set(second.blocks[2].tolist()) == set(first.blocks[0].tolist())
    # What a stranger left in them is not kept.
    assert second.kept.tolist() == sorted(first.blocks[1].tolist())


def test_a_computed_prefix_becomes_its_tags_and_stays_where_it_is():
    first, second = steps_of("prefill:40@sys..decode:40,hit:32+5@sys")
    assert second.blocks[0].tolist() == first.blocks[0].tolist()
    assert second.blocks[1][:2].tolist() == first.blocks[0][:2].tolist()


def test_of_two_computed_copies_of_a_prefix_one_goes_back_to_the_pool():
    first, second = steps_of("prefill:32@sys,prefill:32@sys..decode:32x2")
    assert not set(first.blocks[0].tolist()) & set(first.blocks[1].tolist())
    assert second.blocks[1][:2].tolist() == second.blocks[0][:2].tolist() == first.blocks[0].tolist()
    assert second.kept.tolist() == sorted(first.blocks[0].tolist())


def test_the_pool_is_as_large_as_the_neediest_step_asks():
    pages = steps_of("prefill:160..idle..prefill:16", "block=16,pool=10")
    assert {page.num_blocks for page in pages} == {10}
