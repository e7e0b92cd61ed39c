"""Save plans: every byte has its place, and a file put together as the plan says is one that torch reads."""

from __future__ import annotations

import dataclasses
import io
import pickle
import zipfile
from math import prod
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gpudcp.chunkplan import save as save_module
from gpudcp.chunkplan.save import ChunkWrite, LiteralWrite, SaveChunkPlan, SaveFilePlan, plan_save
from gpudcp.errors import PlanError
from gpudcp.formats.checksum import crc32
from gpudcp.formats.dtypes import QUANTIZED_DTYPES, is_savable
from gpudcp.formats.envelope import envelope_at, payload_alignment_nbytes

# torch says so once for each process, on any use of complex32.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")

EVERY_DTYPE = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
DTYPES = [dtype for dtype in EVERY_DTYPE if is_savable(dtype) and dtype not in QUANTIZED_DTYPES]
SLAB_NBYTES = 8192


def tensor_item(
    fqn: str, dtype: torch.dtype, sizes: tuple[int, ...], whole: tuple[int, ...] | None = None
) -> WriteItem:
    """A chunk of these sizes, of a tensor of size ``whole``, as DCP's planners make it."""
    chunk = ChunkStorageMetadata(torch.Size([0] * len(sizes)), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=dtype), torch.Size(whole or sizes))
    return WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.TENSOR, tensor_data=data)


def object_item(fqn: str) -> WriteItem:
    return WriteItem(MetadataIndex(fqn), WriteItemType.BYTE_IO)


def plan(items: list[WriteItem], literals: dict[int, bytes], slab_nbytes: int = SLAB_NBYTES) -> SaveChunkPlan:
    return plan_save(items, literals, paths=["__0_0_ab.distcp"], slab_nbytes=slab_nbytes)


def payload_of(write: ChunkWrite) -> bytes:
    """Some bytes of a tensor, for which only 0 and 1 are right if it is of bool."""
    return bytes((write.position + i * 7) % 2 for i in range(write.envelope.payload_nbytes))


def assembled(file: SaveFilePlan) -> bytearray:
    """The file, as the most obedient executor would write it: all places are from the plan, none is computed."""
    data = bytearray(file.nbytes)
    for write in file.writes:
        if isinstance(write, LiteralWrite):
            data[write.byte_offset : write.byte_offset + write.nbytes] = write.data
            continue
        payload = payload_of(write)
        suffix = bytearray(write.envelope.suffix)
        for place in write.envelope.crc_offsets:
            suffix[place : place + 4] = crc32(payload).to_bytes(4, "little")
        data[write.byte_offset : write.payload_offset] = write.envelope.prefix
        data[write.payload_offset : write.payload_offset + len(payload)] = payload
        data[write.payload_offset + len(payload) : write.byte_offset + write.nbytes] = suffix
    return data


@st.composite
def saves(draw: st.DrawFn) -> tuple[list[WriteItem], dict[int, bytes]]:
    """Tensors and objects in any order; some tensors larger than a slab, some without elements."""
    items: list[WriteItem] = []
    literals: dict[int, bytes] = {}
    for position in range(draw(st.integers(1, 9))):
        if draw(st.booleans()):
            sizes = draw(st.one_of(st.lists(st.integers(0, 9), max_size=3), st.lists(st.integers(1, 40), max_size=2)))
            if draw(st.integers(0, 5)) == 0:
                sizes = [draw(st.integers(60_000, 70_000))]
            items.append(tensor_item(f"tensor {position}", draw(st.sampled_from(DTYPES)), tuple(sizes)))
        else:
            items.append(object_item(f"object {position}"))
            literals[position] = draw(st.binary(max_size=300))
    return items, literals


@given(save=saves())
@settings(max_examples=150, deadline=None)
def test_every_item_has_its_place_and_nothing_lies_between(save: tuple[list[WriteItem], dict[int, bytes]]) -> None:
    """In the order of the items, end to end, each payload aligned in the file and where its envelope says."""
    items, literals = save
    (file,) = plan(items, literals).files
    assert [write.position for write in file.writes] == list(range(len(items)))
    end = 0
    for write in file.writes:
        assert write.byte_offset == end
        end += write.nbytes
        if isinstance(write, LiteralWrite):
            assert write.data == literals[write.position]
            assert write.nbytes == len(write.data)
            continue
        data = items[write.position].tensor_data
        assert data is not None
        assert (write.dtype, write.sizes) == (data.properties.dtype, data.chunk.sizes)
        assert write.envelope == envelope_at(write.byte_offset, write.dtype, tuple(write.sizes))
        assert write.payload_offset == write.byte_offset + len(write.envelope.prefix)
        assert write.payload_offset % payload_alignment_nbytes(write.envelope.payload_nbytes) == 0
        assert write.envelope.payload_nbytes == prod(data.chunk.sizes) * data.properties.dtype.itemsize
        assert write.byte_offset + write.nbytes == (
            write.payload_offset + write.envelope.payload_nbytes + len(write.envelope.suffix)
        )
    assert file.nbytes == end


@given(save=saves(), slab_nbytes=st.sampled_from([4096, 8192, 1 << 20]))
@settings(max_examples=100, deadline=None)
def test_slabs_tile_the_file_and_cut_payloads_between_elements(
    save: tuple[list[WriteItem], dict[int, bytes]], slab_nbytes: int
) -> None:
    """No gap, no overlap, none longer than a slab; what is cut can be cast element by element."""
    (file,) = plan(*save, slab_nbytes=slab_nbytes).files
    slabs = list(file.slabs())
    assert [start for start, _ in slabs] == list(range(0, file.nbytes, slab_nbytes))
    assert sum(nbytes for _, nbytes in slabs) == file.nbytes
    assert all(nbytes == slab_nbytes for _, nbytes in slabs[:-1])
    assert all(0 < nbytes <= slab_nbytes for _, nbytes in slabs[-1:])
    for write in file.writes:
        if isinstance(write, ChunkWrite):
            payload_end = write.payload_offset + write.envelope.payload_nbytes
            for start, _ in slabs:
                if write.payload_offset < start < payload_end:
                    assert (start - write.payload_offset) % write.dtype.itemsize == 0


@given(save=saves())
@settings(max_examples=60, deadline=None)
def test_a_file_put_together_as_planned_is_read_by_torch(save: tuple[list[WriteItem], dict[int, bytes]]) -> None:
    """Each item's bytes are a whole torch.save archive, its checksum at the places that the plan names."""
    items, literals = save
    (file,) = plan(items, literals).files
    data = assembled(file)
    for write in file.writes:
        item = bytes(data[write.byte_offset : write.byte_offset + write.nbytes])
        if isinstance(write, LiteralWrite):
            assert item == literals[write.position]
            continue
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            assert archive.testzip() is None
        loaded = torch.load(io.BytesIO(item), weights_only=True)
        assert (loaded.dtype, loaded.shape) == (write.dtype, write.sizes)
        flat = loaded.reshape(-1)
        assert (flat.view(torch.uint8).numpy().tobytes() if len(flat) else b"") == payload_of(write)


def test_the_sizes_are_those_of_the_chunk_and_not_of_the_tensor() -> None:
    """A shard of 10 rows of a tensor of a million needs room for 10."""
    (file,) = plan([tensor_item("shard", torch.float32, (10, 3), whole=(1_000_000, 3))], {}).files
    (write,) = file.writes
    assert isinstance(write, ChunkWrite)
    assert write.sizes == (10, 3)
    assert write.envelope.payload_nbytes == 120
    assert file.nbytes < 2048


def test_bytes_are_counted_with_and_without_framing() -> None:
    """The file's bytes, and those of payloads and literals alone."""
    found = plan([tensor_item("a", torch.float64, (5,)), object_item("b")], {1: b"123"})
    assert found.payload_nbytes == 43
    assert found.nbytes == sum(write.nbytes for write in found.files[0].writes) > 43
    assert found.files[0].path == "__0_0_ab.distcp"


def test_no_items_give_no_file() -> None:
    """A rank that writes nothing leaves nothing in the directory."""
    assert plan([], {}) == SaveChunkPlan(files=())
    assert plan([], {}).nbytes == plan([], {}).payload_nbytes == 0


def test_items_of_no_bytes_still_have_a_place() -> None:
    """An empty literal and a tensor without elements; the latter has an envelope."""
    (file,) = plan([object_item("a"), tensor_item("b", torch.int8, (0, 4)), object_item("c")], {0: b"", 2: b""}).files
    assert [write.nbytes > 0 for write in file.writes] == [False, True, False]
    assert [write.byte_offset for write in file.writes] == [0, 0, file.nbytes]


def test_a_tensor_with_literal_bytes_is_written_as_they_are() -> None:
    """Quantized tensors: their item describes a tensor, and their bytes are ready."""
    item = tensor_item("quantized", torch.qint8, (4,))
    (file,) = plan([item], {0: b"ready"}).files
    assert file.writes == (LiteralWrite(0, 0, 5, b"ready"),)


@pytest.mark.parametrize("dtype", [dtype for dtype in EVERY_DTYPE if not is_savable(dtype)], ids=str)
def test_a_dtype_that_stock_cannot_save_is_refused_by_name(dtype: torch.dtype) -> None:
    """The tensor and the dtype, before anything is written."""
    with pytest.raises(PlanError, match=rf"^model\.weight: dtype {dtype} cannot be saved"):
        plan([tensor_item("a", torch.int8, (1,)), tensor_item("model.weight", dtype, (4,))], {})


def test_an_item_without_bytes_or_description_is_refused_by_name() -> None:
    """What a broken planner may hand over."""
    broken = WriteItem(MetadataIndex("model.weight"), WriteItemType.TENSOR, tensor_data=None)
    for item in (broken, object_item("model.weight")):
        with pytest.raises(PlanError, match=r"^model\.weight: the write item has no tensor_data"):
            plan([item], {})


def test_a_tensor_of_many_tebibytes_is_planned_at_once() -> None:
    """A plan is numbers: no memory is taken for what it describes."""
    item = tensor_item("huge", torch.bfloat16, (1 << 20, 1 << 22))
    (file,) = plan([item, tensor_item("next", torch.int8, (3,))], {}, slab_nbytes=1 << 40).files
    assert file.nbytes > 1 << 43
    assert file.writes[1].byte_offset == file.writes[0].nbytes > 1 << 43
    assert len(list(file.slabs())) == 9


def test_a_plan_is_a_value() -> None:
    """The same items give the same plan, which survives pickling."""
    items = [tensor_item("a", torch.float16, (70_000,)), object_item("b")]
    first = plan(items, {1: b"x"})
    assert first == plan(items, {1: b"x"}) == pickle.loads(pickle.dumps(first))


def literal(position: int, byte_offset: int, nbytes: int) -> LiteralWrite:
    return LiteralWrite(position, byte_offset, nbytes, bytes(nbytes))


def test_writes_that_overlap_are_no_plan() -> None:
    """Nor are those out of order; the message names the file, the item and both bytes."""
    writes = (literal(3, 0, 10), literal(5, 9, 4))
    with pytest.raises(PlanError, match=r"^some path: item 5 starts at byte 9, the one before it ends at byte 10$"):
        SaveFilePlan(path="some path", nbytes=99, slab_nbytes=4096, writes=writes)
    with pytest.raises(PlanError, match="item 1 starts at byte 0"):
        SaveFilePlan(path="some path", nbytes=99, slab_nbytes=4096, writes=(literal(0, 50, 4), literal(1, 0, 4)))
    SaveFilePlan(path="some path", nbytes=99, slab_nbytes=4096, writes=(literal(3, 0, 10), literal(5, 10, 4)))


def test_writes_beyond_the_end_of_their_file_are_no_plan() -> None:
    """A file is written whole, and has no room for more."""
    with pytest.raises(PlanError, match=r"^some path: items need 14 bytes, the file has 13$"):
        SaveFilePlan(path="some path", nbytes=13, slab_nbytes=4096, writes=(literal(0, 10, 4),))


def test_several_files_grow_at_one_pace_and_none_is_begun_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next item goes to the file with the fewest bytes; a file more is begun when each has its full size."""
    monkeypatch.setattr(save_module, "FULL_FILE_NBYTES", 100_000)
    items = [tensor_item(str(number), torch.uint8, (30_000,)) for number in range(40)]

    def files_of(count: int, npaths: int) -> list[SaveFilePlan]:
        paths = [f"file {number}" for number in range(npaths)]
        return list(plan_save(items[:count], {}, paths=paths, slab_nbytes=SLAB_NBYTES).files)

    assert [len(file.writes) for file in files_of(3, 3)] == [3]
    assert [len(file.writes) for file in files_of(4, 3)] == [4]
    assert [len(file.writes) for file in files_of(5, 3)] == [4, 1]
    assert [len(file.writes) for file in files_of(40, 1)] == [40]
    full = files_of(40, 3)
    assert [file.path for file in full] == ["file 0", "file 1", "file 2"]
    assert sorted(write.position for file in full for write in file.writes) == list(range(40))
    assert max(file.nbytes for file in full) - min(file.nbytes for file in full) <= 35_000


PATHS = [f"file {number}" for number in range(7)]


@given(
    save=saves(), seed=st.randoms(use_true_random=False), ngroups=st.integers(1, 4), full_nbytes=st.integers(1, 9999)
)
@settings(max_examples=100, deadline=None)
def test_every_item_is_in_a_file_of_its_group(
    save: tuple[list[WriteItem], dict[int, bytes]], seed: Random, ngroups: int, full_nbytes: int
) -> None:
    """And there as if the others were not: each group's files are those of a save of its items alone."""
    items, literals = save
    groups = [seed.randrange(ngroups) for _ in items]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "FULL_FILE_NBYTES", full_nbytes)
        files = plan_save(items, literals, paths=PATHS, slab_nbytes=SLAB_NBYTES, groups=groups).files
        assert len({file.path for file in files}) == len(files)
        for group in range(max(groups) + 1):
            positions = [position for position, own in enumerate(groups) if own == group]
            alone = plan_save(
                [items[position] for position in positions],
                {n: literals[position] for n, position in enumerate(positions) if position in literals},
                paths=[file.path for file in files if file.group == group] or ["none"],
                slab_nbytes=SLAB_NBYTES,
            )
            own = [dataclasses.replace(file, group=0) for file in files if file.group == group]
            assert own == [
                dataclasses.replace(
                    file, writes=tuple(write._replace(position=positions[write.position]) for write in file.writes)
                )
                for file in alone.files
            ]


@given(save=saves(), npaths=st.integers(1, 7), full_nbytes=st.integers(1, 9999))
@settings(max_examples=60, deadline=None)
def test_items_of_one_group_are_planned_as_if_there_were_no_groups(
    save: tuple[list[WriteItem], dict[int, bytes]], npaths: int, full_nbytes: int
) -> None:
    """The same files, of the same names."""
    items, literals = save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module, "FULL_FILE_NBYTES", full_nbytes)
        one, other = (
            plan_save(items, literals, paths=PATHS[:npaths], slab_nbytes=SLAB_NBYTES, groups=groups)
            for groups in (None, [0] * len(items))
        )
    assert one == other
    assert {file.group for file in one.files} == {0}


def test_each_group_has_a_file_and_more_of_the_paths_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little the first one holds; a group without items has none."""
    monkeypatch.setattr(save_module, "FULL_FILE_NBYTES", 100_000)
    items = [tensor_item(str(number), torch.uint8, (30_000,)) for number in range(40)]
    groups = [0, *[1, 3] * 19, 0]
    files = plan_save(items, {}, paths=PATHS, slab_nbytes=SLAB_NBYTES, groups=groups).files
    assert [(file.path, file.group) for file in files] == [
        ("file 0", 0),
        ("file 1", 1),
        ("file 5", 1),
        ("file 3", 3),
    ]
    assert [write.position for write in files[0].writes] == [0, 39]
    assert plan_save([], {}, paths=PATHS, slab_nbytes=SLAB_NBYTES, groups=[]).files == ()


def test_more_groups_than_paths_are_refused() -> None:
    """Rather than left out of the checkpoint."""
    items = [tensor_item(str(number), torch.uint8, (3,)) for number in range(3)]
    with pytest.raises(PlanError, match=r"^3 groups of items need a file each, 2 paths are given$"):
        plan_save(items, {}, paths=PATHS[:2], slab_nbytes=SLAB_NBYTES, groups=[0, 2, 1])
