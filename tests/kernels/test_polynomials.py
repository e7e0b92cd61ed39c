"""Arithmetic over GF(2): what is appended, combined and weighted is what zlib computes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from gpudcp_kernels import polynomials
from hypothesis import given, settings
from hypothesis import strategies as st


def column(*values: int) -> polynomials.UInt32s:
    return np.array(values, np.uint32)


def product_bit_by_bit(a: int, b: int) -> int:
    """Schoolbook, on numbers whose bit i is the coefficient of x^i."""
    a, b = int(f"{a:032b}"[::-1], 2), int(f"{b:032b}"[::-1], 2)
    product = 0
    for bit in range(32):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(63, 31, -1):
        product ^= (0x104C11DB7 << (bit - 32)) * (product >> bit & 1)
    return int(f"{product:032b}"[::-1], 2)


@given(a=st.integers(0, 2**32 - 1), b=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_products_are_those_of_the_schoolbook(a: int, b: int) -> None:
    """Multiplied one bit at a time and reduced by the polynomial as the standard writes it."""
    assert polynomials.multiply(column(a), column(b)).tolist() == [product_bit_by_bit(a, b)]


@given(
    exponents=st.lists(st.tuples(st.integers(-(2**50), 2**50), st.integers(-(2**50), 2**50)), min_size=1, max_size=20)
)
@settings(max_examples=50, deadline=None)
def test_powers_of_a_sum_are_products(exponents: list[tuple[int, int]]) -> None:
    """For negative exponents and for those of more than 32 bits, and x^0 is one."""
    a, b = np.array(exponents, np.int64).T
    power = polynomials.power_of_x
    assert np.array_equal(power(a + b), polynomials.multiply(power(a), power(b)))
    assert np.array_equal(polynomials.multiply(power(a), power(-a)), np.full(len(a), 1 << 31, np.uint32))


def test_x_to_the_32_is_the_sum_that_the_taps_say() -> None:
    """And the polynomial's own reflected form."""
    taps = polynomials.power_of_x(np.array([32 - tap for tap in polynomials.TAPS]))
    assert np.bitwise_xor.reduce(taps) == polynomials.power_of_x(np.array([32]))[0] == polynomials.POLYNOMIAL


@given(cuts=st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=20))
@settings(max_examples=50, deadline=None)
def test_combined_crcs_are_those_of_the_whole(cuts: list[tuple[bytes, bytes]]) -> None:
    """Many pairs at once, empty halves included."""
    firsts = column(*(zlib.crc32(a) for a, _ in cuts))
    seconds = column(*(zlib.crc32(b) for _, b in cuts))
    combined = polynomials.combine_crcs(firsts, seconds, np.array([len(b) for _, b in cuts], np.int64))
    assert combined.tolist() == [zlib.crc32(a + b) for a, b in cuts]


@pytest.mark.parametrize("lanes", [1, 8, 256])
def test_the_last_quotient_words_weighted_are_the_remainder(lanes: int) -> None:
    """One lane, divided word by word in NumPy, against the sum of its words times powers of x."""
    words = np.random.default_rng(lanes).integers(0, 2**32, 96, dtype=np.uint32)
    quotients = np.zeros(32 + len(words), np.uint32)
    for k, word in enumerate(words, start=32):
        quotients[k] = word ^ np.bitwise_xor.reduce(quotients[[k - tap for tap in polynomials.TAPS]])
    factors = np.array(polynomials.remainder_factors(lanes), np.uint32)
    weights = polynomials.power_of_x(32 * lanes * np.arange(len(words) - 1, -1, -1))
    expected = np.bitwise_xor.reduce(polynomials.multiply(words, weights))
    assert np.bitwise_xor.reduce(polynomials.multiply(quotients[-32:], factors)) == expected


def test_a_lane_counts_x_to_the_32_for_every_lane_after_it() -> None:
    """The last lane counts one."""
    factors = polynomials.lane_factors(8)
    assert factors[-1] == 1 << 31
    assert np.array_equal(factors[:-1], polynomials.multiply(factors[1:], polynomials.power_of_x(np.array([32]))))
