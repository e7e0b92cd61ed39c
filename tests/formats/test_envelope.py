"""Envelopes: what stock torch, Python's zipfile and our own parser find in the bytes around a payload."""

from __future__ import annotations

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.utils import _create_file_view

from gpudcp.formats.archive import StoredTensor, read_stored_tensor
from gpudcp.formats.checksum import crc32
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, is_savable
from gpudcp.formats.envelope import envelope_at, payload_alignment_nbytes, tensor_pickle

# torch says so once for each process, on any use of complex32.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and is_savable(value) and value not in QUANTIZED_DTYPES
    },
    key=str,
)
SHAPES = [(), (0,), (3, 0, 2), (0, 0), (1,), (7,), (1, 1, 9), (3, 5), (2, 3, 4, 5), (1, 300, 1), (70000,)]
ODD_OFFSETS = [0, 1, 63, 64, 4095, 123_457]
RECORDS = ["archive/data.pkl", "archive/byteorder", "archive/version", "archive/data/0"]
MARKER = b"\xa5" * 64
GIB = 1 << 30


def payload_of(nbytes: int) -> bytes:
    return bytes(i * 37 % 251 for i in range(nbytes))


def tensor_of(dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    """A tensor of arbitrary bits, NaNs and denormals included; of 0 and 1 for bool, which has no other bits."""
    payload = bytearray(payload_of(prod(sizes) * dtype.itemsize))
    if dtype is torch.bool:
        payload = bytearray(byte & 1 for byte in payload)
    if not payload:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(payload, dtype=torch.uint8).view(dtype).reshape(sizes)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def item_of(byte_offset: int, dtype: torch.dtype, sizes: tuple[int, ...], payload: bytes) -> bytes:
    envelope = envelope_at(byte_offset, dtype, sizes)
    return envelope.prefix + payload + envelope.suffix_with(crc32(payload))


def parse(data: bytes, byte_offset: int = 0) -> StoredTensor | None:
    return read_stored_tensor(
        lambda start, nbytes: data[start : start + nbytes],
        byte_offset=byte_offset,
        nbytes=len(data) - byte_offset,
        path="file",
        fqn="fqn",
    )


def record_offset(data: bytes) -> int:
    offset: int = torch._C.PyTorchFileReader(io.BytesIO(data)).get_record_offset("data/0")
    return offset


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_every_savable_dtype_and_shape_at_odd_file_offsets_bit_for_bit(dtype: torch.dtype) -> None:
    """Stock's weights-only load gives back dtype, shape, strides and every bit, wherever in a file the item stands."""
    for sizes in SHAPES:
        tensor = tensor_of(dtype, sizes)
        for byte_offset in ODD_OFFSETS:
            item = item_of(byte_offset, dtype, sizes, bytes_of(tensor))
            loaded = torch.load(io.BytesIO(item), weights_only=True)
            assert (loaded.dtype, loaded.shape, loaded.stride()) == (dtype, torch.Size(sizes), tensor.stride())
            assert bytes_of(loaded) == bytes_of(tensor)
            assert not loaded.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.complex128], ids=str)
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_zipfile_and_torch_and_our_parser_find_the_payload_at_its_aligned_place(
    dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """The payload starts on an aligned byte of the file, and three independent readers agree on where that is."""
    payload = bytes_of(tensor_of(dtype, sizes))
    for byte_offset in ODD_OFFSETS:
        prefix_nbytes = len(envelope_at(byte_offset, dtype, sizes).prefix)
        item = item_of(byte_offset, dtype, sizes, payload)
        assert (byte_offset + prefix_nbytes) % (4096 if len(payload) >= 65536 else 64) == 0
        assert record_offset(item) == prefix_nbytes
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == RECORDS
            assert archive.read("archive/data/0") == payload
            directory_crc = archive.getinfo("archive/data/0").CRC
            assert directory_crc == crc32(payload)
            assert archive.read("archive/byteorder") == sys.byteorder.encode()
            assert archive.read("archive/version") == b"3\n"
        stored = parse(bytes(byte_offset) + item, byte_offset)
        assert stored is not None
        assert (stored.payload_offset, stored.payload_nbytes) == (byte_offset + prefix_nbytes, len(payload))
        assert (stored.dtype, stored.sizes, stored.crc32) == (dtype, sizes, crc32(payload))
        assert stored.strides == torch.empty(sizes).stride()


def test_payloads_of_64_kib_and_more_start_on_a_page_and_smaller_ones_on_a_cache_line() -> None:
    """The boundary lies at exactly 64 KiB, and no padding is longer than the alignment asks for."""
    assert payload_alignment_nbytes(65535) == 64
    assert payload_alignment_nbytes(65536) == 4096
    for nbytes, alignment in ((65535, 64), (65536, 4096)):
        lengths = set()
        for byte_offset in range(0, 8192, 61):
            prefix_nbytes = len(envelope_at(byte_offset, torch.uint8, (nbytes,)).prefix)
            assert (byte_offset + prefix_nbytes) % alignment == 0
            lengths.add(prefix_nbytes)
        assert max(lengths) - min(lengths) < alignment


@given(
    dtype=st.sampled_from(DTYPES),
    sizes=st.lists(st.integers(0, 40), max_size=4).map(tuple),
    byte_offset=st.integers(0, 1 << 50),
)
@settings(max_examples=150, deadline=None)
def test_every_envelope_is_aligned_and_depends_on_the_offset_by_its_alignment_alone(
    dtype: torch.dtype, sizes: tuple[int, ...], byte_offset: int
) -> None:
    """Envelopes are cached by the offset's remainder, so two offsets a page apart must share every byte."""
    envelope = envelope_at(byte_offset, dtype, sizes)
    assert envelope.payload_nbytes == prod(sizes) * dtype.itemsize
    assert (byte_offset + len(envelope.prefix)) % payload_alignment_nbytes(envelope.payload_nbytes) == 0
    assert envelope == envelope_at(byte_offset + 4096, dtype, torch.Size(sizes))
    payload = payload_of(envelope.payload_nbytes)
    stored = parse(envelope.prefix + payload + envelope.suffix_with(crc32(payload)))
    assert stored is not None
    assert (stored.dtype, stored.sizes) == (dtype, sizes)
    assert (stored.payload_offset, stored.payload_nbytes) == (len(envelope.prefix), len(payload))


def test_local_headers_carry_no_checksums_and_no_sizes_and_only_the_payload_is_padded() -> None:
    """Flag bit 3 says that CRC and sizes follow the data, so that payloads stream; torch writes the same flags."""
    item = item_of(5, torch.float32, (3,), bytes(12))
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        for info in archive.infolist():
            assert info.flag_bits == 0x0808
            assert info.compress_type == zipfile.ZIP_STORED
            header = item[info.header_offset : info.header_offset + 30]
            assert header[6:8] == b"\x08\x08"
            assert header[14:26] == bytes(12)
            extra_nbytes = int.from_bytes(header[28:30], "little")
            assert (extra_nbytes > 0) == (info.filename == "archive/data/0")
            end = info.header_offset + 30 + len(info.filename) + extra_nbytes + info.file_size
            sizes = info.file_size.to_bytes(4, "little") * 2
            assert item[end : end + 16] == b"PK\x07\x08" + info.CRC.to_bytes(4, "little") + sizes


def test_the_checksum_stands_in_the_suffix_at_the_two_places_named_and_nowhere_else() -> None:
    """An executor that patches the places and one that joins the parts write the same suffix."""
    envelope = envelope_at(0, torch.float64, (5,))
    crc = 0x89ABCDEF
    patched = bytearray(envelope.suffix)
    for place in envelope.crc_offsets:
        assert patched[place : place + 4] == bytes(4)
        patched[place : place + 4] = crc.to_bytes(4, "little")
    assert envelope.suffix_with(crc) == bytes(patched)
    assert envelope.suffix_with(0) == envelope.suffix
    assert envelope.crc_offsets[0] == 4


def test_a_wrong_checksum_is_found_by_zipfile_in_the_payload() -> None:
    """The checksum of the directory is one that standard tools check."""
    envelope = envelope_at(0, torch.uint8, (9,))
    item = envelope.prefix + payload_of(9) + envelope.suffix_with(crc32(payload_of(9)) ^ 1)
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        assert archive.testzip() == "archive/data/0"


def test_an_envelope_without_checksum_reads_as_unchecked_everywhere() -> None:
    """A zero in the directory means: written without checksums; torch loads it, and our parser says None."""
    envelope = envelope_at(0, torch.int16, (4,))
    item = envelope.prefix + payload_of(8) + envelope.suffix
    assert bytes_of(torch.load(io.BytesIO(item), weights_only=True)) == payload_of(8)
    stored = parse(item)
    assert stored is not None
    assert stored.crc32 is None


class _Recorder(pickle.Unpickler):
    """Unpickles to what the pickle says: names, calls and persistent ids, as plain tuples."""

    def persistent_load(self, pid: Any) -> Any:
        return ("storage", pid)

    def find_class(self, module: str, name: str) -> Any:
        return _Named(module, name)


class _Named:
    def __init__(self, module: str, name: str) -> None:
        self._name = (module, name)

    def __call__(self, *args: Any) -> Any:
        return ("call", self._name, args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self._name == other._name

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(), (0,), (3, 0, 2), (5,), (255, 256), (2, 3, 4), (65536, 2)], ids=str)
def test_the_pickle_says_the_same_as_the_one_torch_saves(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """The same calls, with the same arguments, on a storage of the same type, key, place and length."""
    buffer = io.BytesIO()
    torch.save(torch.empty(sizes, dtype=dtype), buffer)
    with zipfile.ZipFile(buffer) as archive:
        theirs = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    ours = tensor_pickle(dtype, sizes)
    assert _Recorder(io.BytesIO(ours)).load() == _Recorder(io.BytesIO(theirs)).load()


@pytest.mark.parametrize("sizes", [(1 << 31,), (1 << 33, 0), ((1 << 31) - 1, 1), (1, 1 << 40)], ids=str)
def test_the_pickle_of_huge_sizes_says_the_same_as_the_one_torch_saves(sizes: tuple[int, ...]) -> None:
    """Sizes beyond 31 bits take another opcode, and mean the same; strides are those of torch."""
    ours = _Recorder(io.BytesIO(tensor_pickle(torch.float32, sizes))).load()
    _, _, (storage, storage_offset, found_sizes, strides, *_) = ours
    assert storage[1][4] == prod(sizes)
    assert (storage_offset, found_sizes) == (0, sizes)
    assert strides == torch.empty(sizes, device="meta").stride()


GOLDEN = b"".join(
    (
        # Local headers: signature, version 0, flags 0x0808, stored, no time, CRC and sizes; lengths of name, extra.
        b"PK\x03\x04\0\0\x08\x08" + bytes(18) + b"\x10\0\0\0" + b"archive/data.pkl",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nShortStorage\n",
        b"X\x01\0\0\x000X\x03\0\0\0cpuK\x02tQK\0(K\x02t(K\x01t\x89ccollections\nOrderedDict\n)RtR.",
        b"PK\x07\x08" + b"\x53\x2d\x2e\xf3" + b"\x80\0\0\0" * 2,
        b"PK\x03\x04\0\0\x08\x08" + bytes(18) + b"\x11\0\0\0" + b"archive/byteorder" + b"little",
        b"PK\x07\x08" + b"\x85\x3d\xe3\x19" + b"\x06\0\0\0" * 2,
        b"PK\x03\x04\0\0\x08\x08" + bytes(18) + b"\x0f\0\0\0" + b"archive/version" + b"3\n",
        b"PK\x07\x08" + b"\xd1\x9e\x67\x55" + b"\x02\0\0\0" * 2,
        b"PK\x03\x04\0\0\x08\x08" + bytes(18) + b"\x0e\0\x12\0" + b"archive/data/0",
        # The padding: field "FB" of 14 bytes, so that the payload starts at byte 384.
        b"FB\x0e\0" + bytes(14),
        b"\x01\x02\x03\x04",
        b"PK\x07\x08" + b"\xcd\xfb\x3c\xb6" + b"\x04\0\0\0" * 2,
        # The directory: versions 0, flags 0x0808, stored, no time; CRC, sizes, name length, ..., offset of the header.
        b"PK\x01\x02\0\0\0\0\x08\x08" + bytes(6) + b"\x53\x2d\x2e\xf3" + b"\x80\0\0\0" * 2,
        b"\x10\0" + bytes(12) + b"\0\0\0\0" + b"archive/data.pkl",
        b"PK\x01\x02\0\0\0\0\x08\x08" + bytes(6) + b"\x85\x3d\xe3\x19" + b"\x06\0\0\0" * 2,
        b"\x11\0" + bytes(12) + b"\xbe\0\0\0" + b"archive/byteorder",
        b"PK\x01\x02\0\0\0\0\x08\x08" + bytes(6) + b"\xd1\x9e\x67\x55" + b"\x02\0\0\0" * 2,
        b"\x0f\0" + bytes(12) + b"\x03\x01\0\0" + b"archive/version",
        b"PK\x01\x02\0\0\0\0\x08\x08" + bytes(6) + b"\xcd\xfb\x3c\xb6" + b"\x04\0\0\0" * 2,
        b"\x0e\0" + bytes(12) + b"\x42\x01\0\0" + b"archive/data/0",
        # The end: four records, 246 bytes of directory at byte 404.
        b"PK\x05\x06" + bytes(4) + b"\x04\0\x04\0" + b"\xf6\0\0\0" + b"\x94\x01\0\0" + b"\0\0",
    )
)


@pytest.mark.skipif(sys.byteorder != "little", reason="the golden bytes are those of a little-endian machine")
def test_a_small_envelope_is_these_golden_bytes() -> None:
    """The format is fixed byte by byte: what old versions wrote, new versions write."""
    envelope = envelope_at(0, torch.int16, (2,))
    assert envelope.prefix + b"\x01\x02\x03\x04" + envelope.suffix_with(0xB63CFBCD) == GOLDEN


class SparseItem:
    """An envelope around a hole in a file, with a marker at each end of the payload: few blocks, any length."""

    def __init__(self, path: Path, byte_offset: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
        self.path = path
        self.byte_offset = byte_offset
        self.envelope = envelope_at(byte_offset, dtype, sizes)
        self.payload_offset = byte_offset + len(self.envelope.prefix)
        end = self.payload_offset + self.envelope.payload_nbytes
        with open(path, "wb") as file:
            file.seek(byte_offset)
            file.write(self.envelope.prefix)
            file.write(MARKER)
            file.seek(end - len(MARKER))
            file.write(MARKER)
            file.write(self.envelope.suffix_with(0x12345678))
        self.nbytes = os.path.getsize(path) - byte_offset
        assert os.stat(path).st_blocks * 512 < 1 << 20

    def read_at(self, byte_offset: int, nbytes: int) -> bytes:
        assert nbytes < 1 << 16
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), nbytes, byte_offset)


SPARSE_CASES = {
    "just below 4 GiB - 1": (torch.uint8, (4 * GIB - 2,), False),
    "4 GiB - 1, where zip64 starts": (torch.uint8, (4 * GIB - 1,), True),
    "4 GiB": (torch.float32, (GIB // 4, 4), True),
    "12 GiB": (torch.bfloat16, (3, 2 * GIB), True),
}


@pytest.fixture(params=[0, 5 * 4096 + 1], ids=["at byte 0", "at an odd byte"])
def make_sparse_item(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], SparseItem]:
    """Writes the named case at one of two places of a file."""

    def make(case: str) -> SparseItem:
        dtype, sizes, _ = SPARSE_CASES[case]
        return SparseItem(tmp_path / "sparse.distcp", request.param, dtype, sizes)

    return make


@pytest.mark.parametrize("case", SPARSE_CASES)
def test_items_around_4_gib_are_read_by_zipfile_torch_and_our_parser(
    case: str, make_sparse_item: Callable[[str], SparseItem]
) -> None:
    """zip64 records where they are needed and only there; every reader finds the payload and its length."""
    dtype, sizes, is_zip64 = SPARSE_CASES[case]
    item = make_sparse_item(case)
    nbytes = item.envelope.payload_nbytes
    assert item.payload_offset % 4096 == 0
    # The directory stands beyond 4 GiB in all of them; the payload's own length needs eight bytes in some.
    assert item.envelope.suffix.count(b"PK\x06\x06") == item.envelope.suffix.count(b"PK\x06\x07") == 1
    with open(item.path, "rb") as file:
        assert os.pread(file.fileno(), len(MARKER), item.payload_offset) == MARKER
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo("archive/data/0")
            assert (info.file_size, info.compress_size, info.CRC) == (nbytes, nbytes, 0x12345678)
            assert (len(info.extra) > 0) == is_zip64
            with archive.open("archive/data/0") as payload:
                assert payload.read(len(MARKER) + 1) == MARKER + b"\0"
        reader = torch._C.PyTorchFileReader(_create_file_view(file, item.byte_offset, item.nbytes))
        assert reader.get_record_offset("data/0") == len(item.envelope.prefix)
        assert sorted(f"archive/{name}" for name in reader.get_all_records()) == sorted(RECORDS)
    stored = read_stored_tensor(item.read_at, byte_offset=item.byte_offset, nbytes=item.nbytes, path="file", fqn="fqn")
    strides = torch.empty(sizes, device="meta").stride()
    assert stored == StoredTensor(item.payload_offset, nbytes, 0x12345678, dtype, sizes, strides, 0, False, False)


def test_the_descriptor_of_a_zip64_payload_has_sizes_of_eight_bytes() -> None:
    """APPNOTE.TXT 4.3.9.2: eight bytes each, announced by a zip64 field in the local header."""
    envelope = envelope_at(0, torch.uint8, (5 * GIB,))
    sizes = (5 * GIB).to_bytes(8, "little") * 2
    assert envelope.suffix_with(1).startswith(b"PK\x07\x08\x01\x00\x00\x00" + sizes + b"PK\x01\x02")
    header = envelope.prefix.rindex(b"PK\x03\x04")
    extra = header + 30 + len(b"archive/data/0")
    assert envelope.prefix[extra : extra + 4] == b"\x01\x00\x10\x00"


@pytest.mark.parametrize("case", ["just below 4 GiB - 1", "4 GiB", "12 GiB"])
def test_torch_maps_items_around_4_gib_and_finds_both_ends(case: str, tmp_path: Path) -> None:
    """A memory-mapped stock load reads nothing but the ends that are looked at."""
    dtype, sizes, _ = SPARSE_CASES[case]
    item = SparseItem(tmp_path / "sparse.distcp", 0, dtype, sizes)
    loaded = torch.load(item.path, mmap=True, weights_only=True)
    assert (loaded.dtype, loaded.shape) == (dtype, torch.Size(sizes))
    flat, count = loaded.view(-1), len(MARKER) // dtype.itemsize
    assert bytes_of(flat[:count].clone()) == MARKER
    assert bytes_of(flat[-count:].clone()) == MARKER
    assert int(flat[count]) == 0
