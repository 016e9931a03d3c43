"""Step metadata against the golden vectors of the operators' contracts, worked by hand."""

import numpy as np
import pytest

from cases import parse
from harness.metadata import slot_mapping, step_metadata


def metadata_of(rows):
    return step_metadata(parse(f"mla_decode/{rows}").steps[0])


def test_a_mixed_step_gives_the_contracts_example():
    # enc = [4, 0, 5, 0, 3], dec = [6, 9, 0, 0, 64], this = [4, 1, 5, 0, 3]
    metadata = metadata_of("hit:6+4,decode:9,prefill:5,idle,hit:64+3")
    assert metadata.seq_lens_encoder.tolist() == [4, 0, 5, 0, 3]
    assert metadata.seq_lens_decoder.tolist() == [6, 9, 0, 0, 64]
    assert metadata.seq_lens_this_time.tolist() == [4, 1, 5, 0, 3]
    assert metadata.cu_seqlens_q.tolist() == [0, 4, 5, 10, 10, 13]
    assert metadata.cu_seqlens_k.tolist() == [0, 10, 20, 25, 25, 92]


@pytest.mark.parametrize(
    ("rows", "encoder", "decoder", "this_time", "positions"),
    [
        ("hit:6+4,decode:9", [4, 0], [6, 9], [4, 1], [6, 7, 8, 9, 9]),
        ("prefill:3,hit:5+2", [3, 2], [0, 5], [3, 2], [0, 1, 2, 5, 6]),
        ("decode:9,prefill:4,decode:5", [0, 4, 0], [9, 0, 5], [1, 4, 1], [9, 0, 1, 2, 3, 5]),
        ("draft:7+3,draft:11+3", [0, 0], [7, 11], [3, 3], [7, 8, 9, 11, 12, 13]),
    ],
)
def test_position_ids_are_the_golden_vectors(rows, encoder, decoder, this_time, positions):
    metadata = metadata_of(rows)
    assert metadata.seq_lens_encoder.tolist() == encoder
    assert metadata.seq_lens_decoder.tolist() == decoder
    assert metadata.seq_lens_this_time.tolist() == this_time
    assert metadata.position_ids.tolist() == positions


def test_paused_rows_count_as_keys_and_not_as_queries():
    metadata = metadata_of("paused:5,decode:9,paused:64")
    assert metadata.seq_lens_decoder.tolist() == [5, 9, 64]
    assert metadata.seq_lens_this_time.tolist() == [0, 1, 0]
    assert metadata.cu_seqlens_q.tolist() == [0, 0, 1, 1]
    assert metadata.cu_seqlens_k.tolist() == [0, 5, 15, 79]
    assert metadata.batch_id_per_token.tolist() == [1]


def test_padding_tokens_have_batch_id_minus_one_and_a_stale_position():
    metadata = metadata_of("decode:9,idle,draft:3+2,pad:3")
    assert metadata.slots == 3
    assert metadata.tokens == 6
    assert metadata.batch_id_per_token.tolist() == [0, 2, 2, -1, -1, -1]
    assert metadata.position_ids.tolist() == [9, 3, 4, 4, 4, 4]
    assert metadata.cu_seqlens_q.tolist() == [0, 1, 1, 3]


def test_padding_alone_stands_at_position_zero():
    metadata = metadata_of("idlex2,pad:2")
    assert metadata.batch_id_per_token.tolist() == [-1, -1]
    assert metadata.position_ids.tolist() == [0, 0]
    assert metadata.cu_seqlens_q.tolist() == [0, 0, 0]
    assert metadata.cu_seqlens_k.tolist() == [0, 0, 0]


def test_a_step_without_slots_has_prefix_sums_of_one_zero():
    metadata = metadata_of("")
    assert (metadata.slots, metadata.tokens) == (0, 0)
    assert metadata.cu_seqlens_q.tolist() == [0]
    assert metadata.cu_seqlens_k.tolist() == [0]


def test_every_array_is_int32():
    assert {array.dtype for array in vars(metadata_of("decode:9,pad:1")).values()} == {np.dtype(np.int32)}
    assert {array.dtype for array in vars(metadata_of("")).values()} == {np.dtype(np.int32)}


def test_slot_mapping_goes_through_the_block_table():
    # Blocks of 4. Row 0 holds 5 cached and 4 new tokens at positions 5 to 8: blocks 9, 9, 9 and 3 of its
    # table [2, 9, 3]. Row 1 decodes at position 4, offset 0 of its second block 0.
    metadata = metadata_of("hit:5+4,decode:4")
    tables = np.array([[2, 9, 3], [7, 0, -1]], np.int32)
    slots = slot_mapping(metadata, tables, 4)
    assert slots.dtype == np.int64
    assert slots.tolist() == [9 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 3 * 4 + 0, 0 * 4 + 0]


def test_slot_mapping_of_padding_is_negative_whatever_the_table_holds():
    metadata = metadata_of("decode:4,pad:9")
    slots = slot_mapping(metadata, np.array([[7, 5]], np.int32), 4)
    assert slots[0] == 5 * 4
    assert (slots[1:] < 0).all()
    # Several sizes: -1 and -63 divide to block 0 in C, -64 to block -1, the last is positive in 32 bits.
    assert {-1, -63, -64} < set(slots[1:].tolist())
    assert any(int(np.int64(slot).astype(np.int32)) > 0 for slot in slots[1:])


def test_slot_mapping_does_not_overflow_32_bits():
    metadata = metadata_of("decode:64")
    slots = slot_mapping(metadata, np.array([[0, 2**30]], np.int32), 64)
    assert slots.tolist() == [2**36]
