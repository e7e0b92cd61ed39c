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
_ORDER = (1 << 32) - 1


def multiply(a: UInt32s, b: UInt32s) -> UInt32s:
    """Products, element by element, broadcast."""
    product = np.zeros(np.broadcast_shapes(a.shape, b.shape), np.uint32)
    for bit in range(32):
        product = _times_x(product) ^ (b * ((a >> np.uint32(bit)) & np.uint32(1)))
    return product


def power_of_x(exponents: Int64s) -> UInt32s:
    """x to each exponent. Every different one is worked out once."""
    different, places = np.unique(exponents % _ORDER, return_inverse=True)
    power = _byte_powers()[0][different & 0xFF]
    for place in range(1, 4):
        digits = (different >> (8 * place)) & 0xFF
        if digits.any():
            power = multiply(power, _byte_powers()[place][digits])
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
def _byte_powers() -> UInt32s:
    """(4, 256): x^(byte << 8 * place)."""
    powers = np.empty((4, 256), np.uint32)
    step = np.array([_ONE >> np.uint32(1)])  # x
    for place in range(4):
        powers[place, 0] = _ONE
        for byte in range(1, 256):
            powers[place, byte] = multiply(powers[place, byte - 1 : byte], step)[0]
        step = multiply(powers[place, 255:], step)
    return powers
