"""The archive parser against torch.save: what it finds is what torch.load gives; the rest it leaves alone."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.serialization import config as serialization_config

from gpudcp.boxes import extent_of_box
from gpudcp.errors import CorruptCheckpointError
from gpudcp.formats.archive import ReadAt, StoredTensor, check_records, read_stored_tensor
from gpudcp.formats.checksum import crc32
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, is_savable
from gpudcp.formats.envelope import envelope_at

# torch says so once for each process, on any use of these.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning"),
]

DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and is_savable(value) and value not in QUANTIZED_DTYPES
    },
    key=str,
)


class _Marked(torch.Tensor):
    """A tensor subclass without anything of its own."""


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def reader_of(data: bytes, *, before: int = 0, after: int = 0) -> ReadAt:
    """Reads from an archive that stands between other bytes of a file, none of which may be read."""
    file = b"\xff" * before + data + b"\xff" * after

    def read_at(byte_offset: int, nbytes: int) -> bytes:
        assert before <= byte_offset
        assert nbytes >= 0
        assert byte_offset + nbytes <= before + len(data), "a read outside the item"
        return file[byte_offset : byte_offset + nbytes]

    return read_at


def parse(data: bytes, *, before: int = 0, after: int = 0) -> StoredTensor | None:
    read_at = reader_of(data, before=before, after=after)
    return read_stored_tensor(read_at, byte_offset=before, nbytes=len(data), path="some file", fqn="some.key")


def check(data: bytes) -> None:
    check_records(reader_of(data), byte_offset=0, nbytes=len(data), path="some file", fqn="some.key")


def rebuilt(stored: StoredTensor, data: bytes) -> torch.Tensor:
    """The tensor that the parser's answer describes, by plain as_strided over the payload."""
    payload = data[stored.payload_offset : stored.payload_offset + stored.payload_nbytes]
    if not payload:
        return torch.empty(stored.sizes, dtype=stored.dtype)
    memory = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(stored.dtype)
    tensor = memory.as_strided(stored.sizes, stored.strides, stored.storage_offset)
    tensor = tensor.conj() if stored.is_conj else tensor
    return torch._neg_view(tensor) if stored.is_neg else tensor


def bytes_of(tensor: torch.Tensor) -> bytes:
    tensor = tensor.resolve_conj().resolve_neg().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def rezipped(
    data: bytes, changes: dict[str, bytes | None], *, compression: int = zipfile.ZIP_STORED, only: str = ""
) -> bytes:
    """The archive written anew by zipfile, with some records replaced or (None) left out; CRCs are right again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            record = changes.get(name.partition("/")[2], old.read(name))
            if record is not None:
                new.writestr(name, record, compression if name.endswith(only) else zipfile.ZIP_STORED)
    return buffer.getvalue()


def record_of(data: bytes, name: str) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(f"archive/{name}")


@pytest.fixture
def without_crc32() -> Iterator[None]:
    """torch writes no checksums."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


def large() -> torch.Tensor:
    return torch.arange(600, dtype=torch.float32).reshape(20, 30)


VIEWS = {
    "contiguous": lambda: large(),
    "0-d": lambda: torch.tensor(3.5),
    "0-d inside a storage": lambda: large()[3, 4],
    "zero elements": lambda: torch.empty(3, 0, 2),
    "zero elements inside a storage": lambda: large()[5:5],
    "transposed": lambda: large().T,
    "permuted": lambda: torch.arange(24, dtype=torch.int16).reshape(2, 3, 4).permute(2, 0, 1),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "rows of a storage": lambda: large()[4:9],
    "columns of a storage": lambda: large()[:, 7:11],
    "every third column": lambda: large()[2:, ::3],
    "expanded": lambda: torch.arange(5.0).reshape(5, 1).expand(5, 4),
    "overlapping": lambda: torch.arange(10.0).as_strided((4, 3), (2, 1), 1),
    "bytes seen as int16": lambda: torch.arange(8, dtype=torch.uint8)[2:6].view(torch.int16),
    "conjugate": lambda: torch.randn(3, 2, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex128).conj().imag,
    "conjugate, transposed": lambda: torch.randn(3, 2, dtype=torch.complex64).T.conj(),
    "needs grad": lambda: torch.randn(3, requires_grad=True),
}


@pytest.mark.parametrize("alignment", [64, 4096])
@pytest.mark.parametrize("view", VIEWS)
def test_views_that_torch_saves_are_found_as_torch_loads_them(view: str, alignment: int) -> None:
    """Sizes, strides, storage offset and the conj and neg flags are torch's, at any alignment of its records."""
    tensor = VIEWS[view]().detach() if view != "needs grad" else VIEWS[view]()
    with serialization_config.patch({"save.storage_alignment": alignment}):
        data = saved(tensor)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    stored = parse(data)
    assert stored is not None
    assert stored.payload_offset % alignment == 0
    assert (stored.dtype, stored.sizes, stored.strides) == (loaded.dtype, tuple(loaded.shape), loaded.stride())
    assert stored.storage_offset == loaded.storage_offset()
    assert (stored.is_conj, stored.is_neg) == (loaded.is_conj(), loaded.is_neg())
    assert stored.crc32 == crc32(record_of(data, "data/0"))
    assert bytes_of(rebuilt(stored, data)) == bytes_of(loaded) == bytes_of(tensor.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_that_torch_saves_is_found(dtype: torch.dtype) -> None:
    """Storage classes (rebuild v2) and untyped storages with their dtype beside them (v3) alike."""
    memory = torch.arange(12 * dtype.itemsize, dtype=torch.uint8) % 2
    tensor = memory.view(dtype).reshape(4, 3).T[1:]
    data = saved(tensor)
    stored = parse(data)
    assert stored is not None
    assert (stored.dtype, stored.sizes, stored.strides, stored.storage_offset) == (dtype, (2, 4), (1, 3), 1)
    assert bytes_of(rebuilt(stored, data)) == bytes_of(tensor)


def test_an_archive_is_found_at_any_byte_of_a_file_and_nothing_around_it_is_read() -> None:
    """Offsets inside the archive count from its own start; the answer counts from the file's."""
    data = saved(large())
    alone = parse(data)
    assert alone is not None
    for before, after in ((0, 9), (1, 0), (4097, 70_000)):
        among_others = parse(data, before=before, after=after)
        assert among_others == alone._replace(payload_offset=before + alone.payload_offset)


@pytest.mark.usefixtures("without_crc32")
def test_an_archive_without_checksums_is_found_and_reported_as_unchecked() -> None:
    """torch's own switch leaves zeros in the directory, which say nothing about the payload."""
    tensor = large()
    data = saved(tensor)
    stored = parse(data)
    assert stored is not None
    assert stored.crc32 is None
    assert bytes_of(rebuilt(stored, data)) == bytes_of(tensor)


def test_an_empty_payload_is_checked_although_its_checksum_is_zero() -> None:
    """The CRC-32 of nothing is 0: no sign of a missing one."""
    stored = parse(saved(torch.empty(0)))
    assert stored is not None
    assert stored.crc32 == 0


def with_attribute() -> torch.Tensor:
    tensor = torch.ones(2)
    tensor.note = "kept by torch.save"  # type: ignore[attr-defined]
    return tensor


NOT_ONE_TENSOR = {
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 2, torch.qint8),
    "quantized by channel": lambda: torch.quantize_per_channel(
        torch.randn(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8
    ),
    "sparse coo": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "subclass": lambda: torch.ones(2).as_subclass(_Marked),
    "tensor with an attribute": with_attribute,
    "meta tensor": lambda: torch.empty(2, device="meta"),
    "two tensors": lambda: [torch.ones(2), torch.ones(3)],
    "dict of one tensor": lambda: {"a": torch.ones(2)},
    "number": lambda: 5,
    "storage": lambda: torch.ones(2).untyped_storage(),
    "dtype": lambda: torch.float32,
    "None": lambda: None,
}


@pytest.mark.parametrize("kind", NOT_ONE_TENSOR)
def test_what_is_not_one_strided_tensor_is_left_to_torch(kind: str) -> None:
    """A valid archive of something else is no error: None, so that the caller asks torch.load."""
    assert parse(saved(NOT_ONE_TENSOR[kind]())) is None


def test_another_byte_order_is_left_to_torch() -> None:
    """torch.load swaps the bytes; the payload is not what a plan could copy."""
    other = b"big" if sys.byteorder == "little" else b"little"
    data = rezipped(saved(torch.arange(3, dtype=torch.int32)), {"byteorder": other})
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), torch.tensor([0, 1 << 24, 2 << 24]).int())
    assert parse(data) is None


def test_an_archive_without_a_byte_order_is_native() -> None:
    """torch wrote none before 2.1, and takes such files as it finds them."""
    data = rezipped(saved(large()), {"byteorder": None})
    stored = parse(data)
    assert stored is not None
    assert bytes_of(rebuilt(stored, data)) == bytes_of(torch.load(io.BytesIO(data), weights_only=True))


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "byteorder", ""])
def test_compressed_records_are_left_to_torch(record: str) -> None:
    """A zip tool that repacked the archive did no harm: torch still reads it."""
    data = rezipped(saved(large()), {}, compression=zipfile.ZIP_DEFLATED, only=record)
    assert torch.equal(torch.load(io.BytesIO(data), weights_only=True), large())
    assert parse(data) is None


def test_an_archive_that_zipfile_wrote_is_found() -> None:
    """Sizes and checksums in the local headers, no descriptors: as good as torch's own way."""
    data = rezipped(saved(large()), {})
    stored = parse(data)
    assert stored is not None
    assert bytes_of(rebuilt(stored, data)) == bytes_of(large())


def test_a_flipped_bit_in_the_description_is_found_by_its_checksum() -> None:
    """Swapped strides would load a transposed tensor from a payload whose own checksum is right."""
    data = saved(torch.arange(4.0).reshape(2, 2))
    place = data.index(b"K\x02K\x01\x86")
    broken = data[:place] + b"K\x01K\x02\x86" + data[place + 5 :]
    assert torch.equal(torch.load(io.BytesIO(broken), weights_only=True), torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl has CRC-32 0x"):
        parse(broken)


def test_a_payload_too_short_for_its_description_is_corrupt() -> None:
    """Whatever the strides: no byte outside the payload is ever part of a tensor."""
    data = rezipped(saved(large()[:, 7:11]), {"data/0": bytes(2 * (19 * 30 + 10))})
    with pytest.raises(CorruptCheckpointError, match=r"data\.pkl needs 2324 bytes, data/0 has 1160"):
        parse(data)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_payload_may_end_with_its_last_element_and_not_a_byte_before(is_transposed: bool) -> None:
    """The extent of the strides decides, to the byte."""
    tensor = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    data = saved(tensor.T if is_transposed else tensor)
    payload = record_of(data, "data/0")
    assert parse(rezipped(data, {"data/0": payload})) is not None
    assert parse(rezipped(data, {"data/0": payload + b"more"})) is not None
    with pytest.raises(CorruptCheckpointError, match="needs 12 bytes, data/0 has 11"):
        parse(rezipped(data, {"data/0": payload[:-1]}))


def test_an_error_names_the_file_the_tensor_and_the_place() -> None:
    """What a reader of the message needs to find the damage."""
    with pytest.raises(CorruptCheckpointError, match=r"some file: some\.key: .* at byte 7, length 100") as caught:
        parse(bytes(100), before=7)
    assert (caught.value.path, caught.value.fqn) == ("some file", "some.key")  # type: ignore[attr-defined]


def with_directory_field(data: bytes, name: str, field_offset: int, form: str, *values: int) -> bytes:
    """The archive with a field of one record's directory entry overwritten."""
    entry = data.rindex(b"archive/" + name.encode()) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    edited = bytearray(data)
    struct.pack_into(form, edited, entry + field_offset, *values)
    return bytes(edited)


@pytest.mark.parametrize("name", ["data.pkl", "byteorder", "data/0"])
def test_a_record_that_runs_out_of_its_archive_is_corrupt(name: str) -> None:
    """Its size, or its place: a directory may say anything, and nothing outside the item is read."""
    data = saved(large())
    for broken in (
        with_directory_field(data, name, 20, "<II", len(data), len(data)),
        with_directory_field(data, name, 42, "<I", len(data) - 29),
        with_directory_field(data, name, 42, "<I", len(data) + 5000),
    ):
        with pytest.raises(CorruptCheckpointError):
            parse(broken)
        check(broken)


@pytest.mark.parametrize("field_offset", [28, 30, 32], ids=["name", "extra", "comment"])
def test_a_directory_entry_that_runs_out_of_its_directory_is_corrupt(field_offset: int) -> None:
    """The last entry: nothing after it would notice."""
    data = saved(large())
    last = ".data/serialization_id"
    with pytest.raises(CorruptCheckpointError, match="a directory entry beyond the directory"):
        parse(with_directory_field(data, last, field_offset, "<H", 200))


def test_a_tensor_in_another_storage_is_left_to_torch() -> None:
    """The payload is data/0; a description that names data/1 must not be given data/0's bytes."""
    data = saved(torch.arange(4.0))
    forged = record_of(data, "data.pkl").replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001")
    buffer = io.BytesIO(rezipped(data, {"data.pkl": forged}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/data/1", struct.pack("<4f", 9, 8, 7, 6))
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True).tolist() == [9, 8, 7, 6]
    assert parse(buffer.getvalue()) is None


def literal(value: object) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def describing(storage_offset: object, sizes: object, strides: object) -> bytes:
    """An archive with 16 bytes of payload and this description of a float32 tensor, true or not."""
    storage = b"(" + literal("storage") + b"ctorch\nFloatStorage\n" + b"".join(map(literal, ("0", "cpu", 4))) + b"tQ"
    rest = b"".join(map(literal, (storage_offset, sizes, strides, False, {})))
    description = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR."
    return rezipped(saved(torch.zeros(4)), {"data.pkl": description})


ENDLESS = 10**5000  # longer than Python turns into text
IMPOSSIBLE: dict[str, tuple[object, object, object]] = {
    "one element too many": (0, (5,), (1,)),
    "an offset too far": (1, (4,), (1,)),
    "a stride too long": (0, (2, 2), (3, 1)),
    "more strides than sizes": (0, (2,), (1, 1)),
    "a negative offset": (-1, (2,), (1,)),
    "a negative size": (0, (-2,), (1,)),
    "a negative stride": (0, (2,), (-1,)),
    "a fraction": (0, (2.0,), (1,)),
    "a boolean": (0, (True,), (1,)),
    "text": (0, ("2",), (1,)),
    "sizes that are no sequence": (0, 5, 5),
    "no offset": (None, (2,), (1,)),
    "an offset beyond 63 bits": (1 << 63, (0,), (1,)),
    "an endless offset": (ENDLESS, (2,), (1,)),
    "an endless size": (0, (ENDLESS,), (0,)),
    "an endless stride": (0, (2,), (ENDLESS,)),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_descriptions_of_impossible_tensors_are_corrupt(case: str) -> None:
    """Integers only, none negative, none beyond 63 bits, and all elements inside the payload."""
    with pytest.raises(CorruptCheckpointError):
        parse(describing(*IMPOSSIBLE[case]))


def test_a_forged_description_of_a_possible_tensor_is_believed() -> None:
    """The counterpart of the impossible ones: they are refused for what they say, not for how they are made."""
    stored = parse(describing(1, (2, 1), (2, 9)))
    assert stored is not None
    assert (stored.sizes, stored.strides, stored.storage_offset) == ((2, 1), (2, 9), 1)


@pytest.mark.parametrize("name", ["bits8", "uint1", "int4", "quint8", "quint4x2"])
def test_dtypes_that_no_torch_can_save_are_left_to_torch(name: str) -> None:
    """A forged description may name any dtype; only those that a payload can hold go into a plan."""
    data = saved(torch.zeros(4, dtype=torch.float8_e5m2))
    forged = record_of(data, "data.pkl").replace(b"float8_e5m2\n", name.encode() + b"\n")
    assert parse(rezipped(data, {"data.pkl": forged})) is None


OBJECT = {"step": 5, "tensor": torch.arange(20.0), "other": torch.ones(3, dtype=torch.int16), "text": "x" * 40}


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/1", "byteorder", "version", ".data/serialization_id"])
def test_a_flipped_bit_in_any_record_of_an_object_is_found(record: str) -> None:
    """torch.load would take it as it is; the error names the record and both checksums."""
    data = saved(OBJECT)
    check(data)
    content = record_of(data, record)
    broken = bytearray(data)
    broken[data.index(content) + len(content) // 2] ^= 4
    with pytest.raises(CorruptCheckpointError, match=rf"some file: some\.key: .* of archive/{record} at ") as caught:
        check(bytes(broken))
    error: Any = caught.value
    assert (error.path, error.fqn, error.expected_crc32) == ("some file", "some.key", crc32(content))
    assert error.found_crc32 not in (None, error.expected_crc32)


@pytest.mark.usefixtures("without_crc32")
def test_records_without_checksums_are_not_checked() -> None:
    """Written with torch's switch off: nothing is known of them, so nothing is wrong with them."""
    data = bytearray(saved(OBJECT))
    data[data.index(b"x" * 40)] ^= 1
    check(bytes(data))


def test_compressed_records_are_not_checked_as_if_they_were_stored() -> None:
    """Their checksum is that of what they unpack to."""
    check(rezipped(saved(OBJECT), {}, compression=zipfile.ZIP_DEFLATED))


@pytest.mark.parametrize("data", [b"", b"\x80\x02K\x05.", bytes(5000), saved(5)[:-1], saved(5)[10:]], ids=len)
def test_bytes_that_are_no_archive_are_left_to_who_reads_them(data: bytes) -> None:
    """Objects of other formats have no records to check."""
    check(data)


class _Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_malicious_description_runs_nothing(protocol: int, tmp_path: Any) -> None:
    """The parser knows no global that does anything; torch's weights-only load refuses the archive afterwards."""
    flag = tmp_path / "executed"
    for call in (
        _Calls(os.system, f"touch {flag}"),
        _Calls(eval, f"open({str(flag)!r}, 'w')"),
        _Calls(open, flag, "w"),
    ):
        data = rezipped(saved(large()), {"data.pkl": pickle.dumps(call, protocol)})
        assert parse(data) is None
        with pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(data), weights_only=True)
    assert not flag.exists()


def test_a_description_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a module that it names, nor what torch itself loads on demand."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", asked.append)
    for name in (b"cthis\ns\n.", b"ctorch\n_inductor\n.", b"ctorch\nonnx\n.", b"ctorch.this\ns\n."):
        assert parse(rezipped(saved(large()), {"data.pkl": name})) is None
    assert asked == []
    assert "this" not in sys.modules


def _archives() -> list[bytes]:
    tensors = [
        torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
        torch.arange(6, dtype=torch.int16).view(torch.uint16),
        torch.full((3,), 1 + 2j).conj(),
        torch.empty(0),
    ]
    payload = bytes(range(24))
    envelope = envelope_at(0, torch.float32, (2, 3))
    large_item = envelope_at(0, torch.uint8, (1 << 33,))  # its payload is cut short: every offset lies outside
    return [
        *map(saved, tensors),
        rezipped(saved(tensors[0]), {}),
        envelope.prefix + payload + envelope.suffix_with(crc32(payload)),
        large_item.prefix + payload + large_item.suffix,
        saved({"a": torch.ones(2)}),
    ]


ARCHIVES = _archives()
PICKLES = [record_of(data, "data.pkl") for data in ARCHIVES if b"PK\x06\x06" not in data]


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes]) -> bytes:
    """One of these, cut, overwritten, lengthened or shortened in a few places."""
    data = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(data) - 1, 0)))
        match draw(st.sampled_from(["flip", "write", "insert", "remove", "cut", "keep the end", "copy"])):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "write":
                new = draw(st.binary(min_size=1, max_size=9))
                data[place : place + len(new)] = new
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=9))
            case "remove":
                del data[place : place + draw(st.integers(1, 40))]
            case "cut":
                del data[place:]
            case "keep the end":
                del data[:place]
            case "copy":
                data[place:place] = data[draw(st.integers(0, len(data))) :][: draw(st.integers(1, 60))]
    return bytes(data)


def check_answer(data: bytes) -> None:
    """The answer is None, a tensor inside its archive, or the one error that the parser promises."""
    with contextlib.suppress(CorruptCheckpointError):
        check(data)
    try:
        stored = parse(data)
    except CorruptCheckpointError:
        return
    if stored is None:
        return
    assert 0 <= stored.payload_offset <= stored.payload_offset + stored.payload_nbytes <= len(data)
    assert is_savable(stored.dtype)
    end = stored.storage_offset + extent_of_box(stored.strides, stored.sizes)
    assert end * stored.dtype.itemsize <= stored.payload_nbytes


@pytest.mark.usefixtures("bounded_memory")
@given(data=mutated(ARCHIVES))
@example(data=b"")
@example(data=b"PK\x05\x06" + bytes(18))
@example(data=ARCHIVES[0][:-1])
@example(data=ARCHIVES[0] + b"\0")
@settings(max_examples=400, deadline=None)
def test_damaged_archives_give_a_tensor_inside_them_or_one_kind_of_error(data: bytes) -> None:
    """Flips, cuts and insertions anywhere: no other exception, no range outside the item."""
    check_answer(data)


@pytest.mark.usefixtures("bounded_memory")
@given(data=st.one_of(mutated(PICKLES), st.binary(max_size=60)))
@settings(max_examples=400, deadline=None)
def test_damaged_descriptions_give_a_tensor_inside_the_archive_or_one_kind_of_error(data: bytes) -> None:
    """The same with the checksums made right again, so that the pickle itself is what must be survived."""
    check_answer(rezipped(ARCHIVES[0], {"data.pkl": data}))


@given(cut=st.integers(0, 4000))
@settings(max_examples=60, deadline=None)
def test_an_archive_cut_anywhere_is_corrupt(cut: int) -> None:
    """The directory stands at the end, so no shorter archive is an archive."""
    for data in ARCHIVES:
        if cut < len(data):
            with pytest.raises(CorruptCheckpointError):
                parse(data[:cut])
