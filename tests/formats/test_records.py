"""read_records: where the records of an archive lie, and their checksums; against zipfile and torch's own reader."""

from __future__ import annotations

import io
import zipfile

import pytest
import torch

from gpudcp.errors import CorruptCheckpointError
from gpudcp.formats.archive import ArchiveRecord, read_records

BEFORE = b"something before"


def archive_of(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def records_of(archive: bytes) -> tuple[ArchiveRecord, ...] | None:
    """Of an archive that does not begin with its file."""
    data = BEFORE + archive
    return read_records(
        lambda start, nbytes: data[start : start + nbytes],
        byte_offset=len(BEFORE),
        nbytes=len(archive),
        path="file",
        fqn="fqn",
    )


@pytest.mark.parametrize(
    "value", [torch.arange(1000.0), {"a": torch.ones(3), "b": [torch.zeros(2, 2), "text"]}, "object", torch.zeros(0)]
)
def test_records_are_those_that_zipfile_and_torch_find(value: object) -> None:
    """Names, places, lengths, and the checksum of each, in the directory's order."""
    archive = archive_of(value)
    found = records_of(archive)
    assert found is not None
    infos = zipfile.ZipFile(io.BytesIO(archive)).infolist()
    assert [(each.name, each.nbytes, each.crc32) for each in found] == [
        (info.filename, info.file_size, info.CRC) for info in infos
    ]
    reader = torch._C.PyTorchFileReader(io.BytesIO(archive))
    for each in found:
        short = each.name.partition("/")[2]
        assert each.byte_offset - len(BEFORE) == reader.get_record_offset(short)


def test_records_without_checksums_have_none() -> None:
    """An empty one needs none: its checksum is 0."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        found = records_of(archive_of(torch.ones(5)))
    finally:
        torch.serialization.set_crc32_options(before)
    assert found is not None
    assert {each.crc32 for each in found if each.name.endswith("data/0")} == {None}


def test_a_compressed_record_is_listed_and_not_looked_into() -> None:
    """Its bytes are not those that its checksum is of."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1000))
    (found,) = records_of(buffer.getvalue()) or ()
    assert (found.name, found.nbytes, found.crc32) == ("archive/data.pkl", 0, None)


@pytest.mark.parametrize("data", [b"", b"PK", bytes(100), b"any bytes at all, of whatever length they may be"])
def test_bytes_that_are_no_archive_have_no_records(data: bytes) -> None:
    """What a planner gives as an object may be anything."""
    assert records_of(data) is None


@pytest.mark.parametrize("part", ["start", "end"])
def test_an_archive_that_has_lost_one_of_its_ends_is_corrupt(part: str) -> None:
    """It still has the other one, which says what it was."""
    archive = archive_of(torch.ones(5))
    broken = bytes(100) + archive[100:] if part == "start" else archive[:-200]
    with pytest.raises(CorruptCheckpointError, match="file: fqn: no torch-save archive at byte 16"):
        records_of(broken)
