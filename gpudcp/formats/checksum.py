"""CRC-32 as zip archives use it (IEEE 802.3, reflected polynomial 0xEDB88320), on the host.

isal computes it with carry-less multiplication, at memory speed; zlib stands in where isal has no wheel.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

try:
    from isal import isal_zlib as _isal
except ImportError:
    _isal = None  # type: ignore[assignment]

crc32: Callable[..., int] = zlib.crc32 if _isal is None else _isal.crc32
"""``crc32(buffer, value=0) -> int``: the CRC-32 of ``buffer`` appended to what gave ``value``."""

LIBRARY = "zlib" if _isal is None else "isal"


def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of two ranges one after the other, from the CRC-32 of each and the length of the second in bytes."""
    if _isal is not None:
        combined: Any = _isal.crc32_combine(first, second, second_nbytes)
        return int(combined)
    return _multiply(_power_of_x(8 * second_nbytes), first) ^ second


# Below: polynomials over GF(2) modulo the CRC's, bit 31 the constant term (the reflected form). Multiplying by x^n
# appends n zero bits. The method is the one of zlib's crc32_combine (Mark Adler, zlib 1.2.12).
_POLYNOMIAL = 0xEDB88320
_ONE = 0x80000000


def _multiply(a: int, b: int) -> int:
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


def _power_of_x(exponent: int) -> int:
    power, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return power
