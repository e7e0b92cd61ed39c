"""A file's plan cut into slabs: every byte once, payloads between elements, CRC places wherever a border falls."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gpudcp.chunkplan.save import ChunkWrite, LiteralWrite, SaveFilePlan, plan_save
from gpudcp.chunkplan.slabs import NO_ROW, SlabContents, cut_into_slabs

BLOCK = 4096
Entry = tuple[torch.dtype, tuple[int, ...]] | bytes

entries = st.lists(
    st.one_of(
        st.binary(max_size=9000),
        st.tuples(
            st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]),
            st.one_of(st.just(()), st.tuples(st.integers(0, 9000)), st.tuples(st.integers(0, 40), st.integers(0, 90))),
        ),
    ),
    min_size=1,
    max_size=8,
)


def file_of(wanted: list[Entry]) -> SaveFilePlan | None:
    """The plan of one file; None if nothing is in it."""
    items, literals = [], {}
    for position, entry in enumerate(wanted):
        index = MetadataIndex(f"item.{position}")
        if isinstance(entry, bytes):
            literals[position] = entry
            items.append(WriteItem(index=index, type=WriteItemType.BYTE_IO))
            continue
        dtype, sizes = entry
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size([0] * len(sizes)), sizes=torch.Size(sizes)),
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(sizes),
        )
        items.append(WriteItem(index=index, type=WriteItemType.TENSOR, tensor_data=data))
    files = plan_save(items, literals, paths=["file"], slab_nbytes=BLOCK).files
    return files[0] if files else None


def crc_of(row: int) -> bytes:
    """Four bytes that no other row has."""
    return bytes([0xC0, row, 0xC1, row])


def expected_bytes(file: SaveFilePlan) -> bytes:
    """The file, where element n of a payload is its row and n, and a CRC is the row's."""
    data = bytearray(file.nbytes)
    for row, write in enumerate(file.writes):
        if isinstance(write, LiteralWrite):
            whole = write.data
        else:
            payload = b"".join(element(row, n, write) for n in range(numel_of(write)))
            whole = write.envelope.prefix + payload + write.envelope.suffix_with(int.from_bytes(crc_of(row), "little"))
        data[write.byte_offset : write.byte_offset + write.nbytes] = whole
    return bytes(data)


def numel_of(write: ChunkWrite) -> int:
    return write.envelope.payload_nbytes // write.dtype.itemsize


def element(row: int, n: int, write: ChunkWrite) -> bytes:
    return (row * 7919 + n).to_bytes(16, "little")[: write.dtype.itemsize]


def filled(file: SaveFilePlan, slab: SlabContents, *, taken: bytearray) -> bytes:
    """The slab's bytes, by its literals, its parts and its CRC places; counts each byte in ``taken``."""
    margin = 4
    data = bytearray(slab.nbytes + 2 * margin)
    for literal in slab.literals:
        start = margin + literal.slab_offset
        data[start : start + len(literal.data)] = literal.data
        for n in range(literal.slab_offset, literal.slab_offset + len(literal.data)):
            taken[n] += 1
        assert (literal.row == NO_ROW) == (not literal.crc_offsets)
    for part in slab.parts:
        write = file.writes[part.row]
        assert isinstance(write, ChunkWrite)
        run = b"".join(element(part.row, n, write) for n in range(part.start, part.stop))
        assert run, "no part is empty"
        data[margin + part.slab_offset : margin + part.slab_offset + len(run)] = run
        for n in range(part.slab_offset, part.slab_offset + len(run)):
            taken[n] += 1
    for literal in slab.literals:
        for place in literal.crc_offsets:
            start = margin + literal.slab_offset + place
            assert start >= 1, "a place has a byte in the slab"
            assert start < margin + slab.nbytes
            data[start : start + 4] = crc_of(literal.row)
    return bytes(data[margin : margin + slab.nbytes])


@given(wanted=entries, blocks=st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_slabs_tile_the_file_and_hold_all_of_its_bytes(wanted: list[Entry], blocks: int) -> None:
    """In order, each as long as asked but the last; nothing twice; CRCs whole, also over a border."""
    file = file_of(wanted)
    if file is None:
        return
    slabs = list(cut_into_slabs(file, slab_nbytes=blocks * BLOCK))
    end, data = 0, b""
    for slab in slabs:
        assert slab.byte_offset == end
        assert slab.nbytes == min(blocks * BLOCK, file.nbytes - end)
        end += slab.nbytes
        taken = bytearray(slab.nbytes)
        data += filled(file, slab, taken=taken)
        assert max(taken, default=0) <= 1
    assert end == file.nbytes
    assert data == expected_bytes(file)


@given(wanted=entries, blocks=st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_the_parts_of_a_payload_are_its_elements_in_order(wanted: list[Entry], blocks: int) -> None:
    """Each begins where the one before it ended; every payload with elements comes to its last one."""
    file = file_of(wanted)
    if file is None:
        return
    stops = {row: 0 for row, write in enumerate(file.writes) if isinstance(write, ChunkWrite) and numel_of(write)}
    for slab in cut_into_slabs(file, slab_nbytes=blocks * BLOCK):
        for part in slab.parts:
            assert part.start == stops[part.row] < part.stop
            stops[part.row] = part.stop
    assert stops == {row: numel_of(file.writes[row]) for row in stops}  # type: ignore[arg-type]


def test_a_crc_place_on_a_border_is_in_both_slabs() -> None:
    """Of the four bytes some end one slab and the rest begin the next: for every way to divide them."""
    found = set()
    for numel in range(3000, 4000):
        file = file_of([(torch.uint8, (numel,)), b"end"])
        assert file is not None
        slabs = list(cut_into_slabs(file, slab_nbytes=BLOCK))
        for before, after in pairwise(slabs):
            over = [
                BLOCK - literal.slab_offset - place
                for literal in before.literals
                for place in literal.crc_offsets
                if literal.slab_offset + place + 4 > BLOCK
            ]
            begun = [4 + place for literal in after.literals for place in literal.crc_offsets if place < 0]
            assert [4 - n for n in over] == begun
            found.update(over)
    assert found == {1, 2, 3}
