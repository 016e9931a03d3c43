"""The counter hash, against plain Python integers: what these say, every machine must say."""

import hashlib
import statistics

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.hashing import NORMAL_STD, bits, hash_host, mix, normal_integers, row_seeds, text_seed

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15
INT64 = st.integers(-(2**63), 2**63 - 1)


def signed(value):
    value %= WORD
    return value - WORD if value >= WORD // 2 else value


def murmur_finaliser(value):
    """fmix64 of MurmurHash3 on unsigned integers of any size."""
    value %= WORD
    value ^= value >> 33
    value = value * 0xFF51AFD7ED558CCD % WORD
    value ^= value >> 33
    value = value * 0xC4CEB9FE1A85EC53 % WORD
    return value ^ (value >> 33)


def blake(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def seed_of_row(seed, name, key, position):
    start = murmur_finaliser(key + (blake(name) ^ (seed * GOLDEN % WORD)))
    return murmur_finaliser(start + position * GOLDEN)


def int64(*values):
    return torch.tensor(values, dtype=torch.int64)


@given(st.lists(INT64, min_size=1, max_size=20))
def test_mix_is_the_murmur_finaliser(values):
    assert mix(int64(*values)).tolist() == [signed(murmur_finaliser(value)) for value in values]


def test_mix_has_the_published_answers():
    answers = {0: 0, 1: 0xB456BCFC34C2CB2C, 2: 0x3ABF2A20650683E7}
    assert mix(int64(*answers)).tolist() == [signed(value) for value in answers.values()]


def test_one_flipped_bit_changes_about_half_of_the_bits():
    flips = int64(*(signed(1 << bit) for bit in range(64)))
    values = torch.arange(1, 101).unsqueeze(1)
    changed = mix(values ^ flips) ^ mix(values)
    counts = [(word % WORD).bit_count() for word in changed.flatten().tolist()]
    assert 31 < statistics.mean(counts) < 33
    assert min(counts) > 8


@given(st.integers(0, 10**18), st.text(max_size=20), INT64, st.integers(0, 2**31 - 1))
def test_row_seeds_follow_from_seed_name_key_and_position(seed, name, key, position):
    expected = signed(seed_of_row(seed, name, key, position))
    assert row_seeds(seed, name, int64(key), int64(position)).tolist() == [expected]


def test_text_seed_is_the_signed_digest_of_the_text():
    texts = ["", "q.0", "cache.12", "tag.sys"]
    assert [text_seed(text) for text in texts] == [signed(blake(text)) for text in texts]


@given(INT64, st.integers(1, 9))
def test_bits_are_the_halves_of_successive_words(seed, count):
    words = [murmur_finaliser(seed + (counter + 1) * GOLDEN) for counter in range(count)]
    halves = [half for word in words for half in (word % 2**32, word >> 32)]
    assert bits(int64(seed), count).tolist() == [halves[:count]]


def test_a_longer_row_of_bits_begins_with_the_shorter():
    seeds = row_seeds(3, "x", torch.arange(5), torch.arange(5))
    assert torch.equal(bits(seeds, 33)[:, :8], bits(seeds, 8))


def test_normal_integers_are_sums_of_four_bytes():
    seeds = torch.arange(50)
    expected = [[sum(word.to_bytes(4, "little")) - 510 for word in row] for row in bits(seeds, 7).tolist()]
    assert normal_integers(seeds, 7).tolist() == expected


def test_normal_integers_have_mean_zero_and_the_stated_deviation():
    # The variance of one uniform byte, from its definition, four times.
    assert statistics.pvariance(range(256)) * 4 == NORMAL_STD**2
    values = normal_integers(torch.arange(1000), 1000).double()
    # Standard error of the mean of a million: NORMAL_STD / 1000.
    assert abs(float(values.mean())) < 4 * NORMAL_STD / 1000
    assert abs(float(values.std()) / NORMAL_STD - 1) < 0.005


def test_hash_host_is_the_row_seed_of_key_zero():
    values = np.array([0, 1, 7, 2**40], np.int64)
    expected = [signed(seed_of_row(5, "pages.2", 0, int(value))) for value in values]
    assert hash_host(values, 5, "pages.2").tolist() == expected


def test_streams_differ_in_seed_name_key_and_position():
    seeds = {
        int(row_seeds(seed, name, int64(key), int64(position)))
        for seed in range(4)
        for name in ("q.0", "q.1", "cache.0")
        for key in range(8)
        for position in range(8)
    }
    assert len(seeds) == 4 * 3 * 8 * 8
