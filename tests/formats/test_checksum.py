"""CRC-32: with isal and without it, the answer is zlib's."""

from __future__ import annotations

import importlib.util
import sys
import zlib
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.formats import checksum


def without_isal() -> ModuleType:
    """A second copy of the module, made where isal cannot be imported."""
    spec = importlib.util.spec_from_file_location("checksum_without_isal", checksum.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "isal", None)
        spec.loader.exec_module(module)
    return module


PLAIN = without_isal()
LIBRARIES = [pytest.param(checksum, id="as installed"), pytest.param(PLAIN, id="without isal")]


def test_the_library_is_isal_where_it_is_installed_and_zlib_where_not() -> None:
    """The name that reports give is that of the library in use."""
    has_isal = importlib.util.find_spec("isal") is not None
    assert ("isal" if has_isal else "zlib") == checksum.LIBRARY
    assert PLAIN.LIBRARY == "zlib"
    assert PLAIN.crc32 is zlib.crc32


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_check_value_of_the_standard_is_met(library: ModuleType) -> None:
    """The CRC-32 of "123456789" is 0xCBF43926: IEEE 802.3, reflected; of nothing it is 0."""
    assert library.crc32(b"123456789") == 0xCBF43926
    assert library.crc32(b"") == 0


@pytest.mark.parametrize("library", LIBRARIES)
@given(data=st.binary(max_size=5000), cut=st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_any_buffer_in_any_two_parts_has_zlibs_checksum(library: ModuleType, data: bytes, cut: int) -> None:
    """Appended part by part or combined afterwards; bytes, bytearray, memoryview and NumPy arrays alike."""
    first, second = data[:cut], data[cut:]
    expected = zlib.crc32(data)
    assert library.crc32(data) == expected
    assert library.crc32(memoryview(second), library.crc32(bytearray(first))) == expected
    assert library.crc32(np.frombuffer(data, dtype=np.uint8)) == expected
    assert library.crc32_combine(library.crc32(first), library.crc32(second), len(second)) == expected


@pytest.mark.parametrize("library", LIBRARIES)
@given(
    crcs=st.lists(st.integers(0, (1 << 32) - 1), min_size=3, max_size=3),
    lengths=st.lists(st.integers(0, 1 << 45), min_size=2, max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_combining_is_associative_for_lengths_beyond_4_gib(
    library: ModuleType, crcs: list[int], lengths: list[int]
) -> None:
    """From the left or from the right, with lengths that need more than 32 bits."""
    (a, b, c), (b_nbytes, c_nbytes) = crcs, lengths
    from_left = library.crc32_combine(library.crc32_combine(a, b, b_nbytes), c, c_nbytes)
    from_right = library.crc32_combine(a, library.crc32_combine(b, c, c_nbytes), b_nbytes + c_nbytes)
    assert from_left == from_right
    assert 0 <= from_left < 1 << 32
    assert library.crc32_combine(a, 0, 0) == a


@given(first=st.integers(0, (1 << 32) - 1), second=st.integers(0, (1 << 32) - 1), nbytes=st.integers(0, (1 << 62) - 1))
@settings(max_examples=200, deadline=None)
def test_both_libraries_combine_alike(first: int, second: int, nbytes: int) -> None:
    """What isal combines and what plain Python combines is the same, for any length."""
    assert checksum.crc32_combine(first, second, nbytes) == PLAIN.crc32_combine(first, second, nbytes)


@pytest.mark.parametrize("library", LIBRARIES)
def test_five_gib_of_zeros_combine_to_what_doubling_gives(library: ModuleType) -> None:
    """The checksum of 2^n zeros follows from that of 2^(n-1), so nothing longer than 4 MiB has to be read."""
    crc, nbytes = zlib.crc32(bytes(1 << 20)), 1 << 20
    by_length = {nbytes: crc}
    while nbytes < 4 << 30:
        crc = library.crc32_combine(crc, crc, nbytes)
        nbytes *= 2
        by_length[nbytes] = crc
    assert by_length[1 << 22] == zlib.crc32(bytes(1 << 22))
    five = library.crc32_combine(by_length[1 << 30], by_length[4 << 30], 4 << 30)
    assert five == library.crc32_combine(by_length[4 << 30], by_length[1 << 30], 1 << 30)
