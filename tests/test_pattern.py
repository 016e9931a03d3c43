"""The rule that failing rows follow is told where it has no exception, and only there."""

import pytest
import torch

from harness.pattern import Boundaries, Place, pattern

BLOCK = Boundaries(block_size=64)
NOTHING = Boundaries()


def decode(cached, slot=0, **more):
    return Place(slot, 0, cached, 1, **more)


def rows(*cached):
    """Decode rows of these cached lengths, one token each: it sees one key more."""
    return [decode(length, slot) for slot, length in enumerate(cached)]


def row(slot, cached, new, *, is_prefill=False):
    """The tokens of one row."""
    return [Place(slot, place, cached, new, is_prefill) for place in range(new)]


def failing(*tokens, of):
    mask = torch.zeros(of, dtype=torch.bool)
    mask[list(tokens)] = True
    return mask


def test_a_case_without_a_passing_row_says_nothing():
    assert pattern(torch.ones(3, dtype=torch.bool), rows(5, 70, 200), BLOCK) == ""


def test_a_case_without_a_failing_row_says_nothing():
    assert pattern(torch.zeros(3, dtype=torch.bool), rows(5, 70, 200), BLOCK) == ""


def test_rows_of_more_than_a_block_are_told_by_the_block():
    said = pattern(failing(2, 3, of=4), rows(5, 63, 64, 200), BLOCK)
    assert said.startswith("where a token sees more than 64 keys, a block")


def test_rows_of_more_than_a_tile_are_told_by_the_tile():
    said = pattern(failing(2, 3, of=4), rows(5, 31, 32, 40), NOTHING)
    assert said.startswith("where a token sees more than 32 keys, a tile of 32")


def test_the_window_comes_before_the_tile_of_its_size():
    said = pattern(failing(1, of=2), rows(99, 100), Boundaries(window=100))
    assert said.startswith("where a token sees more than 100 keys, the window")


def test_no_length_is_told_that_one_row_contradicts():
    said = pattern(failing(1, 3, of=5), rows(5, 40, 70, 90, 200), BLOCK)
    assert "keys" not in said


def test_keys_that_do_not_fill_a_tile_are_told():
    said = pattern(failing(0, 2, 4, of=6), rows(100, 127, 300, 255, 9, 639), NOTHING)
    assert "do not fill whole parts of 128" in said


def test_chunks_that_begin_within_a_block_are_told():
    places = [
        *row(0, 70, 2, is_prefill=True),
        *row(1, 64, 3, is_prefill=True),
        *row(2, 5, 1, is_prefill=True),
        *row(3, 128, 1, is_prefill=True),
    ]
    said = pattern(failing(0, 1, 5, of=7), places, BLOCK)
    assert "where a row has cached tokens that do not fill whole parts of 64, a block" in said


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ((0, 1), "in rows that continue a prompt"),
        ((2, 3), "in first chunks of prompts"),
        ((0, 1, 2, 3), "in prefill rows"),
        ((4, 5), "in decode rows"),
        ((6,), "at padding"),
        ((0, 1, 2, 3, 4, 5), "at real tokens"),
    ],
)
def test_kinds_of_rows_are_told(tokens, said):
    places = [
        *row(0, 9, 2, is_prefill=True),
        *row(1, 0, 2, is_prefill=True),
        *row(2, 9, 2),
        Place(-1),
    ]
    assert pattern(failing(*tokens, of=7), places, NOTHING).split(" or ")[0] == said


def test_padding_follows_no_rule_of_lengths():
    places = [*rows(64, 9), Place(-1)]
    assert "keys" not in pattern(failing(0, 2, of=3), places, BLOCK)


def test_drafts_behind_the_first_token_are_told():
    places = [*row(0, 40, 3), *row(1, 300, 1), *row(2, 9, 2)]
    said = pattern(failing(1, 2, 5, of=6), places, NOTHING)
    assert said.split(" or ")[0] == "behind the first token of a row"


def test_offsets_behind_two_to_the_31_are_told():
    places = [decode(5, 0, last_element=2**31 - 1), decode(7, 1, last_element=2**31)]
    assert pattern(failing(1, of=2), places, NOTHING).startswith(
        "where an element of the cache lies 2^31 or more from its first"
    )


def test_tokens_behind_the_128th_are_told():
    places = [decode(5, slot) for slot in range(200)]
    said = pattern(failing(*range(128, 200), of=200), places, NOTHING)
    assert "at tokens from 128 on" in said
    assert "in rows from 128 on" in said


def test_heads_behind_a_tile_are_told():
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[:, 16:] = True
    assert pattern(mask, rows(5, 5, 5), NOTHING).startswith("on heads from 16 on")


def test_heads_and_tokens_are_told_together():
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[2:, 16:] = True
    said = pattern(mask, rows(5, 63, 64, 200), BLOCK)
    assert "where a token sees more than 64 keys" in said
    assert "on heads from 16 on" in said


def test_rows_that_fail_on_heads_of_their_own_follow_no_rule():
    mask = torch.zeros(4, 20, dtype=torch.bool)
    mask[2, 16:] = True
    mask[3, 16:18] = True
    assert pattern(mask, rows(5, 63, 64, 200), BLOCK) == ""


def test_splits_are_told():
    places = [decode(90, 0, splits=1), decode(70, 1, splits=2), decode(80, 2, splits=1)]
    assert "several splits" in pattern(failing(1, of=3), places, NOTHING)
