"""Polynomials over GF(2) modulo that of CRC-32, as NumPy columns: powers of x, combining CRCs, the kernel's constants.

A polynomial is a uint32 in the reflected form of the zip CRC: bit 31 is the constant term, bit 0 is x^31. The
modulus is primitive, so exponents of x count modulo 2^32 - 1 and may be negative. No device here.
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

UInt32s: TypeAlias = npt.NDArray[np.uint32]
Int64s: TypeAlias = npt.NDArray[np.int64]

POLYNOMIAL = 0xEDB88320

TAPS = (6, 9, 10, 16, 20, 21, 22, 24, 25, 27, 28, 30, 31, 32)
"""x^32 is the sum of x^(32 - tap), modulo the polynomial."""

STATE_WORDS = 32
"""The degree: how many remainders a lane of the kernel holds."""

_ONE = np.uint32(1 << 31)
_DIGIT = 11  # bits: three make an exponent
_BITS = np.arange(32, dtype=np.uint64)
_BYTES = 8 * np.arange(4, dtype=np.uint64)
_ORDER = (1 << 32) - 1


def multiply(a: UInt32s, b: UInt32s) -> UInt32s:
    """Products, element by element, broadcast."""
    # A bit more to the right is a power of x more: x^32 and more is in the lower half of the product, and is divided.
    bits = (a[..., None] >> _BITS) & np.uint64(1)
    product = np.bitwise_xor.reduce(bits * (b[..., None].astype(np.uint64) << _BITS), axis=-1) << np.uint64(1)
    places = (product[..., None] >> _BYTES) & np.uint64(0xFF)
    divided: UInt32s = np.bitwise_xor.reduce(_times_x_to_32()[np.arange(4), places], axis=-1)
    divided ^= (product >> np.uint64(32)).astype(np.uint32)
    return divided


def power_of_x(exponents: Int64s) -> UInt32s:
    """x to each exponent. Every different one is worked out once."""
    different, places = np.unique(exponents % _ORDER, return_inverse=True)
    low, middle, high = (
        table[different >> (_DIGIT * place) & ((1 << _DIGIT) - 1)] for place, table in enumerate(_powers())
    )
    power = multiply(multiply(low, middle), high)
    powers: UInt32s = power[places.reshape(exponents.shape)]
    return powers


def combine_crcs(firsts: UInt32s, seconds: UInt32s, second_nbytes: Int64s) -> UInt32s:
    """CRC-32s of pairs of ranges, one after the other, from the CRC-32 of each and the length of the second."""
    return multiply(power_of_x(8 * second_nbytes), firsts) ^ seconds


@cache
def lane_factors(lanes: int) -> UInt32s:
    """(lanes,) what a lane's remainder counts: x^32 for each lane that comes after it."""
    return power_of_x(32 * np.arange(lanes - 1, -1, -1))


@cache
def remainder_factors(lanes: int) -> tuple[int, ...]:
    """What each of a lane's last 32 quotient words counts in the remainder of all its words, as polynomials in x.

    A lane divides a polynomial c in y = x^(32 * lanes), whose coefficients are its words, by the modulus taken as a
    polynomial in y. Of c * y^32, the quotient's last 32 coefficients decide the remainder: coefficient t of them,
    the oldest first, adds y^(63 - t - tap) for every tap that reaches behind the end. y^32 is divided out again.
    """
    factors = []
    for t in range(STATE_WORDS):
        exponents = np.array([32 * lanes * (31 - t - tap) for tap in TAPS if t + tap >= STATE_WORDS])
        factors.append(int(np.bitwise_xor.reduce(power_of_x(exponents))))
    return tuple(factors)


def _times_x(a: UInt32s) -> UInt32s:
    return (a >> np.uint32(1)) ^ (np.uint32(POLYNOMIAL) * (a & np.uint32(1)))


@cache
def _times_x_to_32() -> UInt32s:
    """(4, 256): what each byte of a word counts, at each of its places, when the word is multiplied by x^32."""
    words = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(32):
        words = _times_x(words)
    return words


@cache
def _powers() -> list[UInt32s]:
    """x to each digit of an exponent, (2048,) for each of its three places."""
    tables = []
    step = np.array([_ONE >> np.uint32(1)])  # x
    for _ in range(3):
        table = np.array([_ONE])
        for _ in range(_DIGIT):
            table, step = np.concatenate((table, multiply(table, step))), multiply(step, step)
        tables.append(table)
    return tables
