"""verify: whatever is damaged in a checkpoint is found, named and placed; what is whole is not."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import runpy
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

import gpudcp
from gpudcp import Options, VerifyReport
from gpudcp.errors import CheckpointBusyError, CheckpointNotFoundError, GpuDcpError
from gpudcp.formats.index import index_columns
from gpudcp.names import Names
from gpudcp.records import ItemRecords
from gpudcp.verification.claims import claims_of
from gpudcp.verification.indexes import is_written_of, read_index
from gpudcp.views import ColumnMetadata

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")

SMALL_SLABS = Options(slab_nbytes=4096)
BLOCK_NBYTES = 4096


def state_of(seed: int = 0) -> dict[str, Any]:
    """Tensors of several dtypes, one larger than a small slab, an empty one, a scalar, a quantized one, objects."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(12, 10, generator=generator),
        "large": torch.randint(0, 1 << 30, (100, 60), generator=generator, dtype=torch.int32),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "step": torch.tensor(float(seed), dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "quantized": torch.quantize_per_tensor(torch.randn(5, generator=generator), 0.1, 0, torch.qint8),
        "note": f"number {seed}",
        "nested": {"list": [1, 2.5, "three"]},
    }


def blank_state() -> dict[str, Any]:
    """Destinations for `state_of`."""
    state = state_of()
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and not value.is_quantized:
            value.zero_()
        elif not isinstance(value, torch.Tensor):
            state[key] = {"list": [0, 0.0, ""]} if key == "nested" else ""
    return state


def bits_of(state: dict[str, Any]) -> dict[str, Any]:
    """What two states have in common that hold the same bits."""

    def bits(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        plain = value.int_repr() if value.is_quantized else value
        return value.dtype, value.shape, plain.contiguous().view(-1).view(torch.uint8).tolist()

    return {key: bits(value) for key, value in state.items()}


@pytest.fixture
def with_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small checkpoints get an index too."""
    monkeypatch.setattr("gpudcp.formats.index.LEAST_ROWS", 1)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint of ours."""
    gpudcp.save(state_of(), tmp_path / "own")
    return tmp_path / "own"


def two_state() -> dict[str, Any]:
    """Two tensors of five blocks each."""
    return {f"t{number}": torch.arange(5000.0) + number for number in range(2)}


@pytest.fixture
def two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of ours in two data files, alike in everything but the tensors' values."""
    monkeypatch.setattr("gpudcp.chunkplan.save.FULL_FILE_NBYTES", 1 << 14)
    gpudcp.save(two_state(), tmp_path / "two", options=Options(threads=2, direct_io="off"))
    assert len(data_files(tmp_path / "two")) == 2
    return tmp_path / "two"


def save_stock(state: dict[str, Any], directory: Path) -> Path:
    """A checkpoint of stock torch's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory)
    return directory


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """The same state, saved by stock torch."""
    return save_stock(state_of(), tmp_path / "stock")


def data_files(directory: Path) -> list[Path]:
    """By name."""
    return sorted(directory.glob("*.distcp"))


def metadata_of(directory: Path, name: str = ".metadata") -> Metadata:
    """What stock torch would read."""
    metadata: Metadata = pickle.loads((directory / name).read_bytes())
    return metadata


def record_of(directory: Path, fqn: str) -> Any:
    """The storage record of the only item of ``fqn``."""
    (record,) = [record for index, record in metadata_of(directory).storage_data.items() if index.fqn == fqn]
    return record


def rewrite_metadata(directory: Path, change: Callable[[Metadata], None]) -> None:
    """Change the metadata and write it as stock torch does, which gives it no checksum."""
    metadata = metadata_of(directory)
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


@contextmanager
def changed(path: Path, byte_offset: int, data: bytes) -> Iterator[None]:
    """These bytes of a file are others, for a while."""
    with path.open("r+b", buffering=0) as file:
        before = os.pread(file.fileno(), len(data), byte_offset)
        os.pwrite(file.fileno(), data, byte_offset)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), before, byte_offset)


@contextmanager
def flipped(path: Path, byte_offset: int, bit: int) -> Iterator[None]:
    """One bit of a file is another, for a while."""
    with path.open("rb") as file:
        byte = os.pread(file.fileno(), 1, byte_offset)[0]
    with changed(path, byte_offset, bytes([byte ^ (1 << bit)])):
        yield


def kinds(report: VerifyReport) -> list[str]:
    """Of its problems."""
    return [problem.kind for problem in report.problems]


@pytest.mark.usefixtures("with_index")
@pytest.mark.parametrize("slab_nbytes", [4096, None])
@pytest.mark.parametrize("lanes", [1, 4])
def test_a_whole_checkpoint_is_ok_and_every_byte_of_it_is_read(tmp_path: Path, slab_nbytes: int, lanes: int) -> None:
    """With its index, in slabs that divide items and in slabs that hold several."""
    gpudcp.save(state_of(), tmp_path / "own")
    report = gpudcp.verify(tmp_path / "own", options=Options(slab_nbytes=slab_nbytes, lanes=lanes))
    assert report.ok
    assert (report.problems, report.unverified, report.stale) == ((), (), ())
    assert (report.nfiles, report.nitems) == (1, 8)
    assert report.nbytes == sum(path.stat().st_size for path in data_files(tmp_path / "own"))
    assert (tmp_path / "own" / ".metadata.index").exists()


def test_a_whole_checkpoint_of_stock_torch_is_ok(stock: Path) -> None:
    """All its records have checksums, objects' and the quantized tensor's too."""
    report = gpudcp.verify(stock, options=SMALL_SLABS)
    assert report.ok, str(report)
    assert (report.unverified, report.nitems) == ((), 8)


def check_flips(directory: Path, count: int, *, loads: bool) -> None:
    """Flip single bits anywhere: verify finds each, and a load raises or gives the bits that were saved."""
    files = sorted(path for path in directory.iterdir() if path.is_file())
    sizes = [path.stat().st_size for path in files]
    generator = random.Random(count)
    expected, missed, loaded_wrong = bits_of(state_of()), [], []
    for number in range(count):
        # By turns: any byte, and any file, as payloads are most of the bytes.
        path = generator.choices(files, sizes if number % 2 else None)[0]
        place = path, generator.randrange(path.stat().st_size), generator.randrange(8)
        with flipped(*place):
            if gpudcp.verify(directory, options=SMALL_SLABS).ok:
                missed.append(place)
            if not loads:
                continue
            found = blank_state()
            try:
                gpudcp.load(found, directory)
            except GpuDcpError:
                continue
            if bits_of(found) != expected:
                loaded_wrong.append(place)
    assert (missed, loaded_wrong) == ([], [])
    assert gpudcp.verify(directory).ok


@pytest.mark.usefixtures("with_index")
def test_a_flipped_bit_anywhere_is_found_and_never_loaded(own: Path) -> None:
    """Payloads, envelopes, objects, ``.metadata`` and the index."""
    check_flips(own, 500, loads=True)


@pytest.mark.slow
@pytest.mark.usefixtures("with_index")
def test_ten_thousand_flipped_bits_are_all_found_and_none_is_loaded(own: Path) -> None:
    """The promise, in full."""
    check_flips(own, 10_000, loads=True)


@pytest.mark.usefixtures("with_index")
def test_no_byte_outside_payloads_can_change_unseen(tmp_path: Path) -> None:
    """Every single byte, padding and JSON among them, one of its bits."""
    directory = tmp_path / "tiny"
    gpudcp.save({"a": torch.arange(3.0), "note": 1}, directory)
    generator = random.Random(1)
    missed = []
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        for byte_offset in range(path.stat().st_size):
            bit = generator.randrange(8)
            with flipped(path, byte_offset, bit):
                if gpudcp.verify(directory, options=Options(lanes=1)).ok:
                    missed.append((path.name, byte_offset, bit))
    assert missed == []


def damaged_blocks(one: Path, other: Path) -> Iterator[None]:
    """Two files with every block of 4096 bytes zeroed, or as the next one, or exchanged: with that, or between them."""
    contents = {path: path.read_bytes() for path in (one, other)}

    def block(path: Path, start: int) -> bytes:
        return contents[path][start : start + BLOCK_NBYTES]

    def changes() -> Iterator[list[tuple[Path, int, bytes]]]:
        for start in range(0, len(contents[one]), BLOCK_NBYTES):
            for path in contents:
                following = block(path, start + BLOCK_NBYTES)
                yield [(path, start, bytes(len(block(path, start))))]
                yield [(path, start, following)]
                yield [(path, start, following), (path, start + BLOCK_NBYTES, block(path, start)[: len(following)])]
            yield [(one, start, block(other, start)), (other, start, block(one, start))]

    for each in changes():
        for path, start, data in each:
            with path.open("r+b") as file:
                os.pwrite(file.fileno(), data, start)
        if any(path.read_bytes() != content for path, content in contents.items()):
            yield
        for path, content in contents.items():
            path.write_bytes(content)


def check_loads_nothing_wrong(directory: Path) -> None:
    """A load of `two_state` raises, or gives the right values."""
    found = {fqn: torch.zeros_like(tensor) for fqn, tensor in two_state().items()}
    with suppress(GpuDcpError):
        gpudcp.load(found, directory)
        assert bits_of(found) == bits_of(two_state())


def test_zeroed_duplicated_and_exchanged_blocks_are_found(two_files: Path) -> None:
    """Every block, with the one after it and with the one at its place in the other file; none is loaded."""
    ndamaged = 0
    for _ in damaged_blocks(*data_files(two_files)):
        assert not gpudcp.verify(two_files, options=SMALL_SLABS).ok
        check_loads_nothing_wrong(two_files)
        ndamaged += 1
    assert ndamaged > 20
    assert gpudcp.verify(two_files).ok


def test_zeroed_duplicated_and_exchanged_blocks_of_stocks_files_are_found(tmp_path: Path) -> None:
    """As far as its checksums reach, which are those of its records: what they miss changes no value."""
    writer = dcp.FileSystemWriter(tmp_path / "stock", single_file_per_rank=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(two_state(), storage_writer=writer)
    ndamaged, nmissed = 0, 0
    for _ in damaged_blocks(*data_files(tmp_path / "stock")):
        nmissed += gpudcp.verify(tmp_path / "stock", options=SMALL_SLABS).ok
        check_loads_nothing_wrong(tmp_path / "stock")
        ndamaged += 1
    assert ndamaged > 20
    assert nmissed == 0


def test_swapped_files_are_found_by_the_checksums_in_the_metadata(two_files: Path) -> None:
    """Each is sound in itself: its own directory agrees with its payloads."""
    one, other = data_files(two_files)
    (two_files / "spare").write_bytes(one.read_bytes())
    one.write_bytes(other.read_bytes())
    other.write_bytes((two_files / "spare").read_bytes())
    report = gpudcp.verify(two_files)
    found = [(problem.kind, problem.fqn) for problem in report.problems]
    # The checksum of the payload, and the one that stands after it.
    assert sorted(found) == [("checksum", "t0"), ("checksum", "t1"), ("envelope", "t0"), ("envelope", "t1")]


def test_a_problem_names_tensor_file_byte_and_both_checksums(own: Path) -> None:
    """Enough to find it with a hex editor."""
    (path,) = data_files(own)
    record = record_of(own, "large")
    with flipped(path, record.gpudcp[0] + 1234, 3):
        (problem,) = gpudcp.verify(own, options=SMALL_SLABS).problems
    assert (problem.kind, problem.fqn, problem.file) == ("checksum", "large", path.name)
    assert problem.byte_offset == record.gpudcp[0]
    assert f"{record.gpudcp[2]:#010x} of 24000 bytes" in problem.expected
    assert problem.found.startswith("0x")
    assert f"checksum: {path.name} at byte {problem.byte_offset}: large: expected CRC-32 " in str(problem)


def test_a_changed_envelope_is_placed_to_the_byte(own: Path) -> None:
    """Also in the padding before a payload, which no reader looks at."""
    (path,) = data_files(own)
    byte_offset = record_of(own, "weight").gpudcp[0] - 1
    with changed(path, byte_offset, b"\x07"):
        (problem,) = gpudcp.verify(own).problems
    assert (problem.kind, problem.fqn, problem.byte_offset) == ("envelope", "weight", byte_offset)
    assert problem.found.startswith("07")


def test_every_problem_is_listed_in_file_order(own: Path) -> None:
    """The first one ends nothing."""
    (path,) = data_files(own)
    fqns = ["weight", "large", "half"]
    offsets = {fqn: record_of(own, fqn).gpudcp[0] for fqn in fqns}
    with flipped(path, offsets["weight"], 0), flipped(path, offsets["large"], 1), flipped(path, offsets["half"], 2):
        report = gpudcp.verify(own, options=SMALL_SLABS)
    assert [problem.fqn for problem in report.problems] == sorted(fqns, key=offsets.__getitem__)
    assert set(kinds(report)) == {"checksum"}
    assert all(str(problem) in str(report) for problem in report.problems)
    assert not report.ok


@pytest.mark.parametrize("which", ["own", "stock"])
def test_a_truncated_file_names_what_it_lost_and_the_rest_is_still_checked(
    request: pytest.FixtureRequest, which: str
) -> None:
    """Ours and stock's."""
    directory: Path = request.getfixturevalue(which)
    records = sorted(metadata_of(directory).storage_data.items(), key=lambda each: each[1].offset)
    (lost, record), *_ = records[-1:]
    path = directory / record.relative_path
    os.truncate(path, record.offset + record.length - 1)
    first = path.read_bytes().index(state_of()["weight"].numpy().tobytes())
    with flipped(path, first, 0):
        report = gpudcp.verify(directory)
    assert [(problem.kind, problem.fqn) for problem in report.problems] == [
        ("checksum", "weight"),
        ("length", lost.fqn),
    ]


def test_a_file_that_is_too_long_is_found(own: Path) -> None:
    """A byte that nothing describes."""
    (path,) = data_files(own)
    nbytes = path.stat().st_size
    with path.open("ab") as file:
        file.write(b"\0")
    (problem,) = gpudcp.verify(own).problems
    assert (problem.kind, problem.file, problem.byte_offset) == ("length", path.name, nbytes)


@pytest.mark.parametrize("what", ["nothing", "a directory", "a pipe"])
def test_a_missing_file_is_one_problem_that_names_what_it_held(two_files: Path, what: str) -> None:
    """Whatever stands in its place; the other file is still checked."""
    path = two_files / record_of(two_files, "t0").relative_path
    path.unlink()
    if what == "a directory":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    report = gpudcp.verify(two_files)
    assert kinds(report) == ["file"]
    assert report.problems[0].file == path.name
    assert "t0" in report.problems[0].expected
    assert report.nbytes > 0


def test_what_was_saved_without_checksums_is_unverified_and_no_problem(tmp_path: Path) -> None:
    """Nobody can tell whether the payloads are right; everything around them is still compared."""
    directory = tmp_path / "unchecked"
    gpudcp.save(state_of(), directory, options=Options(checksum=False))
    report = gpudcp.verify(directory)
    assert report.ok
    assert set(report.unverified) == {"weight", "large", "half", "step"}
    assert "unverified" in str(report)
    (path,) = data_files(directory)
    start = record_of(directory, "weight").gpudcp[0]
    with flipped(path, start, 0):
        assert gpudcp.verify(directory).ok
    with flipped(path, start - 1, 0):
        assert kinds(gpudcp.verify(directory)) == ["envelope"]


def test_stock_torch_without_checksums_is_unverified_and_no_problem(tmp_path: Path) -> None:
    """``set_crc32_options(False)`` leaves zeros in the directory."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        save_stock(state_of(), tmp_path / "stock")
    finally:
        torch.serialization.set_crc32_options(before)
    report = gpudcp.verify(tmp_path / "stock")
    assert report.ok, str(report)
    assert {"weight", "large", "note"} <= set(report.unverified)


def test_damage_to_stocks_payloads_and_objects_is_found(stock: Path) -> None:
    """torch itself looks at none of these checksums."""
    for fqn in ("weight", "large", "half", "step", "note", "quantized"):
        record = record_of(stock, fqn)
        path = stock / record.relative_path
        found = torch._C.PyTorchFileReader(open_slice(path, record))
        name = "data.pkl" if fqn == "note" else "data/0"
        start = record.offset + found.get_record_offset(name)
        with flipped(path, start + 1, 4):
            report = gpudcp.verify(stock, options=SMALL_SLABS)
        assert [(problem.kind in ("checksum", "archive"), problem.fqn) for problem in report.problems] == [(True, fqn)]


def open_slice(path: Path, record: Any) -> Any:
    """The bytes of one item, as a file."""
    return io.BytesIO(path.read_bytes()[record.offset : record.offset + record.length])


def test_a_flipped_bit_of_stocks_data_that_is_not_found_is_never_loaded(stock: Path) -> None:
    """Zip headers have no checksum; one that leads elsewhere leads to other bytes, which have one."""
    (path,) = data_files(stock)
    generator = random.Random(2)
    expected, npassed = bits_of(state_of()), 0
    for _ in range(200):
        with flipped(path, generator.randrange(path.stat().st_size), generator.randrange(8)):
            if not gpudcp.verify(stock, options=SMALL_SLABS).ok:
                continue
            found = blank_state()
            npassed += 1
            with suppress(GpuDcpError):
                gpudcp.load(found, stock)
                assert bits_of(found) == expected
    assert npassed


def test_zeroed_blocks_of_stocks_files_that_touch_a_record_are_found(stock: Path) -> None:
    """Each block; every one of this checkpoint's touches a record."""
    for path in data_files(stock):
        for start in range(0, path.stat().st_size, BLOCK_NBYTES):
            nbytes = min(BLOCK_NBYTES, path.stat().st_size - start)
            with changed(path, start, bytes(nbytes)):
                assert not gpudcp.verify(stock, options=SMALL_SLABS).ok, start


def test_stocks_files_exchanged_between_ranks_are_found_where_shapes_differ(tmp_path: Path) -> None:
    """Stock's metadata has no checksum: same shapes would have to be told from the values."""
    one = save_stock({"a": torch.ones(3, 4)}, tmp_path / "one")
    other = save_stock({"a": torch.ones(4, 3)}, tmp_path / "other")
    shutil.copy(data_files(other)[0], data_files(one)[0])
    report = gpudcp.verify(one)
    assert kinds(report) == ["archive"]
    assert "(4, 3)" in report.problems[0].found


def test_what_went_through_an_extension_is_unverified(stock: Path) -> None:
    """Compressed by stock's writer, say: the checksums are inside."""

    def change(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("weight", [0, 0])].transform_descriptors = ("stream.zstd",)

    rewrite_metadata(stock, change)
    report = gpudcp.verify(stock)
    assert report.ok
    assert report.unverified == ("weight",)


def test_an_object_that_is_no_archive_is_unverified(tmp_path: Path) -> None:
    """A planner may write any bytes; nothing says what they should be."""
    directory = save_stock({"a": torch.ones(2), "note": "n"}, tmp_path / "stock")
    record = record_of(directory, "note")
    with changed(directory / record.relative_path, record.offset, bytes(record.length)):
        report = gpudcp.verify(directory)
    assert report.ok
    assert report.unverified == ("note",)


@pytest.mark.usefixtures("with_index")
def test_a_stale_index_is_mentioned_and_is_no_problem(tmp_path: Path, own: Path) -> None:
    """A crash between the two renames of a commit leaves one; loads pass it over."""
    gpudcp.save(state_of(1), tmp_path / "other")
    gpudcp.save(state_of(), own)
    shutil.copy(tmp_path / "other" / ".metadata.index", own / ".metadata.index")
    report = gpudcp.verify(own)
    assert report.ok
    assert report.stale == (".metadata.index",)


def saved_with_index(own: Path) -> tuple[Path, ColumnMetadata, ItemRecords, tuple[int, int]]:
    """A save's index: its path, what it says, of its rows too, and the length and CRC-32 that bind it."""
    gpudcp.save(state_of(), own)
    path = own / ".metadata.index"
    indexed, identity = read_index(path.read_bytes(), path=str(path))
    assert indexed.row_records is not None
    return path, indexed, indexed.row_records, identity


@pytest.mark.usefixtures("with_index")
def test_an_index_that_says_something_else_than_its_metadata_is_found(own: Path) -> None:
    """Sound in itself, and bound to this very metadata."""
    path, indexed, records, (nbytes, crc) = saved_with_index(own)
    row = [index.fqn for index in records.indices].index("large")
    records.crcs[row] ^= 1
    changed = index_columns(indexed, records)
    assert changed is not None
    path.write_bytes(changed.encoded(nbytes=nbytes, crc=crc))
    (problem,) = gpudcp.verify(own).problems
    assert (problem.kind, problem.fqn, problem.file) == ("index", "large", ".metadata.index")


@pytest.mark.usefixtures("with_index")
def test_a_bit_of_the_index_that_changes_no_meaning_is_found(tmp_path: Path) -> None:
    """JSON says the same in other bytes, and the index's checksum is of what it says."""
    directory = tmp_path / "é"
    gpudcp.save(state_of(), directory)
    path = directory / ".metadata.index"
    byte_offset = path.read_bytes().index(b"u00e9") + 3
    with flipped(path, byte_offset, 5):
        assert path.read_bytes()[byte_offset:][:2] == b"E9"
        assert kinds(gpudcp.verify(directory)) == ["index"]
    assert gpudcp.verify(directory).ok


@pytest.mark.usefixtures("with_index")
def test_metadata_that_is_written_as_its_index_says_is_not_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their agreement is told from the bytes: flat, and nested in dicts whose keys are one object."""
    inner = {f"layer{number}": torch.full((3,), float(number)) for number in range(9)}
    gpudcp.save(state_of(), tmp_path / "flat")
    gpudcp.save({"model": inner, "optimizer": {"state": inner, "note": "x"}, "step": 3}, tmp_path / "nested")

    def unpickle(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is unpickled")

    monkeypatch.setattr(sys.modules["gpudcp.verify"], "decode_metadata", unpickle)
    for name in ("flat", "nested"):
        report = gpudcp.verify(tmp_path / name)
        assert report.ok, str(report)


@pytest.mark.usefixtures("with_index")
def test_metadata_that_says_the_same_in_other_bytes_is_compared_with_its_index(own: Path) -> None:
    """As another release writes it; both ways lead to the same claims."""
    gpudcp.save(state_of(), own)
    path = own / ".metadata.index"
    indexed, _ = read_index(path.read_bytes(), path=str(path))
    pickled = pickle.dumps(metadata_of(own))
    (own / ".metadata").write_bytes(pickled + struct.pack("<8sQI", b"GPUDCPM1", len(pickled), zlib.crc32(pickled)))
    assert indexed.row_records is not None
    columns = index_columns(indexed, indexed.row_records)
    assert columns is not None
    path.write_bytes(columns.encoded(nbytes=len(pickled), crc=zlib.crc32(pickled)))
    assert not is_written_of((own / ".metadata").read_bytes(), indexed)
    report = gpudcp.verify(own)
    assert report.ok, str(report)
    assert report.stale == ()
    of_rows, of_objects = (
        sorted(claims_of(each, str(own), file=".metadata")[0], key=lambda claim: claim.item.fqn)
        for each in (indexed, metadata_of(own))
    )
    assert of_rows == of_objects
    assert len(of_rows) == 8


@pytest.mark.usefixtures("with_index")
def test_an_index_with_paths_of_anything_is_compared_with_its_metadata(own: Path) -> None:
    """JSON holds lists where keys are expected: they are hashed by nobody."""
    path, indexed, records, (nbytes, crc) = saved_with_index(own)
    odd: Any = {"weight": ([1], {"a": None}, 2.5)}
    names = Names(indexed.columns.names.fqns, {**(indexed.columns.names.paths or {}), **odd})
    odd_metadata = ColumnMetadata(
        dataclasses.replace(indexed.columns, names=names),
        records,
        storage_meta=indexed.storage_meta,
        version=indexed.version,
    )
    columns = index_columns(odd_metadata, records)
    assert columns is not None
    path.write_bytes(columns.encoded(nbytes=nbytes, crc=crc))
    (problem,) = gpudcp.verify(own).problems
    assert (problem.kind, problem.file) == ("index", ".metadata.index")
    assert "planner_data" in problem.expected


@pytest.mark.usefixtures("with_index")
def test_data_is_checked_by_the_index_where_the_metadata_is_damaged(own: Path) -> None:
    """Both problems are found."""
    gpudcp.save(state_of(), own)
    (path,) = data_files(own)
    byte_offset = record_of(own, "large").gpudcp[0]
    with flipped(own / ".metadata", 300, 0), flipped(path, byte_offset, 0):
        report = gpudcp.verify(own)
    assert kinds(report) == ["metadata", "checksum"]


def test_stale_data_files_are_mentioned_and_foreign_files_ignored(own: Path) -> None:
    """Of a save that was never committed."""
    stale = f"__0_0_{'0123456789abcdef'}.distcp"
    for name in (stale, "notes.txt", "model.safetensors", "__0_0.distcp"):
        (own / name).write_bytes(b"anything")
    report = gpudcp.verify(own)
    assert report.ok
    assert report.stale == (stale,)
    assert stale in str(report)


def test_checkpoints_of_ranks_that_save_alone_are_checked_each(tmp_path: Path) -> None:
    """``__{rank}.metadata``, all of them; a rank's shard need not be a whole tensor."""
    for rank in (0, 1):
        gpudcp.save(state_of(rank), tmp_path / str(rank), use_collectives=False)
    both = tmp_path / "0"
    metadata = metadata_of(tmp_path / "1", "__0.metadata")
    (other,) = data_files(tmp_path / "1")
    shutil.copy(other, both / other.name)
    (both / "__1.metadata").write_bytes((tmp_path / "1" / "__0.metadata").read_bytes())
    report = gpudcp.verify(both)
    assert report.ok, str(report)
    assert (report.nfiles, report.nitems) == (2, 2 * len(metadata.storage_data))
    with flipped(both / other.name, 0, 0):
        assert [problem.file for problem in gpudcp.verify(both).problems] == [other.name]
    with flipped(both / "__1.metadata", 100, 0):
        report = gpudcp.verify(both)
    assert [(problem.kind, problem.file) for problem in report.problems] == [("metadata", "__1.metadata")]
    # What the damaged one names is not called stale.
    assert report.stale == ()


def chunks_of(metadata: Metadata, fqn: str) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[fqn].chunks  # type: ignore[union-attr]


def forget_record(metadata: Metadata) -> None:
    del metadata.storage_data[MetadataIndex("weight", [0, 0])]


def forget_entry(metadata: Metadata) -> None:
    del metadata.state_dict_metadata["weight"]


def shrink_chunk(metadata: Metadata) -> None:
    chunks_of(metadata, "weight")[0].sizes = torch.Size([11, 10])
    record = metadata.storage_data[MetadataIndex("step", [])]
    record.relative_path = "__1_0.distcp"  # of another rank: then the chunks must make a whole


def grow_chunk(metadata: Metadata) -> None:
    chunks_of(metadata, "weight")[0].sizes = torch.Size([13, 10])


def double_chunk(metadata: Metadata) -> None:
    chunks_of(metadata, "weight").append(ChunkStorageMetadata(torch.Size([6, 0]), torch.Size([6, 10])))


def leave_directory(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("weight", [0, 0])].relative_path = "../elsewhere.distcp"


def leave_file(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("weight", [0, 0])].offset = 1 << 70


def overlap(metadata: Metadata) -> None:
    one, other = (metadata.storage_data[MetadataIndex("large", [0, 0])] for _ in range(2))
    one.length -= 1
    one.offset += 1
    other = metadata.storage_data[MetadataIndex("weight", [0, 0])]
    one.offset, one.length = other.offset + 1, other.length - 1


def name_absurd_rank(metadata: Metadata) -> None:
    metadata.storage_data[MetadataIndex("weight", [0, 0])].relative_path = f"__{'9' * 5000}_0.distcp"


def make_no_numbers(metadata: Metadata) -> None:
    metadata.state_dict_metadata["weight"].size = ("twelve", None)  # type: ignore[union-attr, assignment]


def lose_chunks(metadata: Metadata) -> None:
    chunks_of(metadata, "weight").clear()


def make_crc_too_large(metadata: Metadata) -> None:
    record = metadata.storage_data[MetadataIndex("weight", [0, 0])]
    record.gpudcp = (record.gpudcp[0], record.gpudcp[1], 1 << 40)


def make_sizes_absurd(metadata: Metadata) -> None:
    entry: Any = metadata.state_dict_metadata["weight"]
    entry.size = torch.Size([1 << 61] * 2)
    entry.chunks[0].sizes = entry.size


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (forget_record, "record"),
        (forget_entry, "record"),
        (shrink_chunk, "cover"),
        (grow_chunk, "cover"),
        (double_chunk, "cover"),
        (leave_directory, "record"),
        (leave_file, "length"),
        (overlap, "overlap"),
        (name_absurd_rank, "file"),
        (make_no_numbers, "metadata"),
        (lose_chunks, "metadata"),
        (make_crc_too_large, "archive"),
        (make_sizes_absurd, "archive"),
    ],
)
def test_metadata_that_contradicts_itself_or_the_files_is_found(
    own: Path, change: Callable[[Metadata], None], kind: str
) -> None:
    """One contradiction each, written as stock writes it: with no checksum that would tell first."""
    rewrite_metadata(own, lambda _: None)
    assert gpudcp.verify(own).ok
    rewrite_metadata(own, change)
    report = gpudcp.verify(own)
    assert kind in kinds(report), str(report)
    assert all(
        "weight" in f"{problem.fqn} {problem.found}" or problem.kind == "file" or problem.fqn == "large"
        for problem in report.problems
    )


def test_bytes_that_many_items_claim_are_checked_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claim but the first is a problem, and none has the bytes checksummed again."""

    def claim_often(metadata: Metadata) -> None:
        entry, record = (
            metadata.state_dict_metadata["large"],
            metadata.storage_data[MetadataIndex("large", [0, 0])],
        )
        for number in range(300):
            metadata.state_dict_metadata[f"again{number}"] = entry
            metadata.storage_data[MetadataIndex(f"again{number}", [0, 0])] = record

    rewrite_metadata(own, claim_often)
    checksummed: list[int] = []

    def counted(data: memoryview) -> int:
        checksummed.append(len(data))
        return zlib.crc32(data)

    monkeypatch.setattr("gpudcp.verification.reading.crc32", counted)
    report = gpudcp.verify(own)
    assert kinds(report) == ["overlap"] * 300
    assert sum(checksummed) <= sum(path.stat().st_size for path in data_files(own))


def test_bytes_between_items_must_be_zeros(own: Path) -> None:
    """An item that the metadata does not name, under a checksum that fits: its bytes are nobody's."""
    metadata = metadata_of(own)
    record = metadata.storage_data.pop(MetadataIndex("large", [0, 0]))
    del metadata.state_dict_metadata["large"]
    pickled = pickle.dumps(metadata)
    trailer = struct.pack("<8sQI", b"GPUDCPM1", len(pickled), zlib.crc32(pickled))
    (own / ".metadata").write_bytes(pickled + trailer)
    (problem,) = gpudcp.verify(own).problems
    assert (problem.kind, problem.fqn, problem.byte_offset) == ("gap", None, record.offset)
    with changed(own / record.relative_path, record.offset, bytes(record.length)):
        assert gpudcp.verify(own).ok


def test_mangled_metadata_gives_problems_or_errors_of_our_tree(own: Path) -> None:
    """Without a checksum that would tell first; verify ends, and raises nothing else."""
    rewrite_metadata(own, lambda _: None)
    path = own / ".metadata"
    whole, generator = path.read_bytes(), random.Random(3)
    nproblems = 0
    for _ in range(300):
        mangled = bytearray(whole)
        for _ in range(generator.choice([1, 1, 3])):
            position = generator.randrange(len(mangled))
            match generator.randrange(3):
                case 0:
                    mangled[position] = generator.randrange(256)
                case 1:
                    del mangled[position : position + generator.randrange(1, 9)]
                case 2:
                    mangled[position:position] = generator.randbytes(3)
        path.write_bytes(mangled)
        with suppress(GpuDcpError):
            nproblems += len(gpudcp.verify(own).problems)
    assert nproblems > 200


def test_one_rank_alone_may_have_saved_no_more_than_its_shard(own: Path) -> None:
    """As on save; of several ranks the chunks must make a whole, as `shrink_chunk` shows."""

    def change(metadata: Metadata) -> None:
        entry: Any = metadata.state_dict_metadata["weight"]
        entry.size = torch.Size([24, 10])

    rewrite_metadata(own, change)
    assert gpudcp.verify(own).ok


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was-run",)


def test_a_pickle_that_would_run_code_is_a_problem_and_not_run(
    own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where loads are told to trust."""
    monkeypatch.chdir(tmp_path)
    (own / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    report = gpudcp.verify(own, options=Options(trust_pickle=True))
    assert kinds(report) == ["metadata"]
    assert "mkdir" in report.problems[0].found
    assert not (tmp_path / "was-run").exists()


def test_a_checkpoint_that_is_replaced_meanwhile_is_not_called_broken(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are gone, and rightly."""
    module = sys.modules["gpudcp.verify"]
    open_reader = module.open_reader  # type: ignore[attr-defined]

    def open_late(path: str, way: Any) -> Any:
        gpudcp.save(state_of(2), own)
        return open_reader(path, way)

    monkeypatch.setattr(module, "open_reader", open_late)
    with pytest.raises(CheckpointBusyError, match="newer checkpoint"):
        gpudcp.verify(own)


@pytest.mark.parametrize("is_there", [True, False])
def test_no_checkpoint_is_an_error(tmp_path: Path, is_there: bool) -> None:
    """Not a report of nothing wrong."""
    if is_there:
        (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint"):
        gpudcp.verify(tmp_path / "empty")


def test_nothing_is_written_and_a_report_survives_pickling(own: Path) -> None:
    """Also not a lock: a read-only checkpoint can be verified."""
    before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    report = gpudcp.verify(own)
    assert {path.name: path.stat().st_mtime_ns for path in own.iterdir()} == before
    assert pickle.loads(pickle.dumps(report)) == report


def run_command(*arguments: str) -> int:
    """``python -m gpudcp`` with these arguments, in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpudcp", *arguments])
        with pytest.raises(SystemExit) as leaving:
            runpy.run_module("gpudcp", run_name="__main__")
    assert isinstance(leaving.value.code, int)
    return leaving.value.code


def test_the_commands_exit_code_tells_whole_from_broken_from_none(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0, 1 and 2; what is wrong is printed."""
    assert run_command("verify", str(own)) == 0
    assert "ok" in capsys.readouterr().out
    (path,) = data_files(own)
    with flipped(path, record_of(own, "large").gpudcp[0], 0):
        assert run_command("verify", str(own), "--lanes", "1") == 1
    assert "large: expected CRC-32" in capsys.readouterr().out
    assert run_command("verify", str(tmp_path / "none")) == 2
    assert "no checkpoint" in capsys.readouterr().err
    assert run_command("verify", str(own), "--lanes", "0") == 2
    assert run_command("verify") == 2


HOSTILE_NAME = "x\n/ck: ok\x1b[2K\u202e\udcff"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_in_a_checkpoint_cannot_forge_a_report(own: Path, encoding: str) -> None:
    """Line breaks, escape sequences, and what no encoding has are escaped; each problem stays on its line."""

    def rename(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("weight", [0, 0])].relative_path = HOSTILE_NAME
        metadata.state_dict_metadata[HOSTILE_NAME + "é"] = metadata.state_dict_metadata["large"]

    rewrite_metadata(own, rename)
    report = gpudcp.verify(own)
    text = str(report)
    assert len(text.splitlines()) == 1 + len(report.problems) + bool(report.unverified) + bool(report.stale)
    assert {problem.file for problem in report.problems} >= {HOSTILE_NAME}
    assert r"file: x\n/ck: ok\x1b[2K\u202e\udcff: expected" in text
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "gpudcp", "verify", str(own)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": encoding},
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stdout.splitlines()) == len(text.splitlines())
    assert b"\x1b" not in done.stdout


def test_an_error_that_quotes_a_name_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is the user's own, and may be pasted from anywhere."""
    assert run_command("verify", str(tmp_path / "no\x1b[31m\nsuch")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"no\x1b[31m\nsuch: no checkpoint" in line
