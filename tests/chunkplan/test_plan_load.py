"""Load plans: carried out by the most obedient reader, they give exactly the boxes asked for, for the fewest bytes."""

from __future__ import annotations

import pickle
from math import prod
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpudcp.boxes import extent_of_box, is_dense_run, row_major_strides
from gpudcp.chunkplan import load
from gpudcp.chunkplan.load import (
    NO_DESTINATION,
    READ_GAP_NBYTES,
    STRAIGHT_NBYTES,
    ChunkRead,
    LoadChunkPlan,
    PayloadCheck,
    ReadRequest,
    Segment,
    SlabRead,
    plan_load,
    whole_payload_request,
)
from gpudcp.errors import PlanError
from gpudcp.formats.checksum import crc32, crc32_combine

DTYPES = [torch.int8, torch.bfloat16, torch.float32, torch.complex128]


class Stored(NamedTuple):
    """A tensor in a file: its payload's place, and how it lies in it."""

    path: str
    payload_offset: int
    payload_nbytes: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    storage_offset: int

    def request(self, position: int, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> ReadRequest:
        return ReadRequest(
            position, self.path, self.payload_offset, self.dtype, self.strides, self.storage_offset, offsets, lengths
        )

    def check(self, file: bytes) -> PayloadCheck:
        payload = file[self.payload_offset : self.payload_offset + self.payload_nbytes]
        return PayloadCheck(self.path, self.payload_offset, self.payload_nbytes, crc32(payload), self.path)


def row_major(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, path: str = "file", payload_offset: int = 4096
) -> Stored:
    nbytes = prod(sizes) * dtype.itemsize
    return Stored(path, payload_offset, nbytes, dtype, sizes, row_major_strides(sizes), 0)


def elements(
    memory: bytes | bytearray, byte_offset: int, dtype: torch.dtype, strides: tuple[int, ...], sizes: tuple[int, ...]
) -> NDArray[np.void]:
    """A strided view of memory, its elements without a meaning, at any byte."""
    steps = tuple(stride * dtype.itemsize for stride in strides)
    if 0 in sizes:
        return np.empty(sizes, dtype=f"V{dtype.itemsize}")
    return np.ndarray(sizes, f"V{dtype.itemsize}", memory, byte_offset, steps)


def box_of(request: ReadRequest, file: bytes) -> bytes:
    """What a request asks for, row-major, straight from the definition of strides."""
    first = request.storage_offset + sum(o * s for o, s in zip(request.offsets, request.strides, strict=True))
    start = request.payload_offset + first * request.dtype.itemsize
    return elements(file, start, request.dtype, request.strides, request.lengths).tobytes()


def carried_out(plan: LoadChunkPlan, requests: list[ReadRequest], files: dict[str, bytes]) -> dict[int, bytes]:
    """Every destination after every read; each element must have been filled exactly once."""
    filled = {r.position: np.zeros(r.lengths, dtype=np.int64) for r in requests if r.position != NO_DESTINATION}
    found = {
        r.position: np.zeros(r.lengths, dtype=f"V{r.dtype.itemsize}") for r in requests if r.position != NO_DESTINATION
    }
    for read in plan.reads:
        slab = files[read.path][read.byte_offset : read.byte_offset + read.nbytes]
        assert len(slab) == read.nbytes
        for chunk in read.chunks:
            start = chunk.byte_offset - read.byte_offset
            assert 0 <= start <= start + chunk.nbytes <= read.nbytes
            assert chunk.nbytes == extent_of_box(chunk.strides, chunk.lengths) * chunk.dtype.itemsize
            assert chunk.is_dense == is_dense_run(chunk.strides, chunk.lengths)
            if chunk.position == NO_DESTINATION:
                continue
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.lengths, strict=True))
            taken = elements(slab[start : start + chunk.nbytes], 0, chunk.dtype, chunk.strides, chunk.lengths)
            found[chunk.position][box] = taken
            filled[chunk.position][box] += 1
    assert all((counts == 1).all() for counts in filled.values())
    return {position: array.tobytes() for position, array in found.items()}


@st.composite
def stored_tensors(draw: st.DrawFn, path: str, payload_offset: int) -> Stored:
    """Row-major, permuted, cut out of a larger tensor, expanded or of any strides at all."""
    dtype = draw(st.sampled_from(DTYPES))
    sizes = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    order = draw(st.permutations(range(len(sizes))))
    strides, step, extent = [0] * len(sizes), draw(st.sampled_from([1, 1, 2, 17])), 1
    for dim in order:
        strides[dim] = step
        extent += step * max(0, sizes[dim] - 1)
        # The next dimension steps over this one's rows, or over its last element alone, and sometimes farther.
        step = draw(st.sampled_from([step * max(1, sizes[dim]), extent])) + draw(st.sampled_from([0, 0, 0, 1, 3, 40]))
    if draw(st.integers(0, 5)) == 0:
        strides = [draw(st.integers(0, 30)) for _ in sizes]
    storage_offset = draw(st.integers(0, 7))
    numel = storage_offset + extent_of_box(tuple(strides), sizes) + draw(st.integers(0, 9))
    return Stored(path, payload_offset, numel * dtype.itemsize, dtype, sizes, tuple(strides), storage_offset)


class Load(NamedTuple):
    """Files, what stands in them, and what is asked of it."""

    files: dict[str, bytes]
    tensors: list[Stored]
    requests: list[ReadRequest]
    slab_nbytes: int
    gap_nbytes: int
    straight_nbytes: int

    def plan(self, checks: list[PayloadCheck]) -> LoadChunkPlan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "STRAIGHT_NBYTES", self.straight_nbytes)
            return plan_load(self.requests, checks, slab_nbytes=self.slab_nbytes, gap_nbytes=self.gap_nbytes)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """A few tensors in a few files, and boxes of them in any order, the same ones more than once."""
    tensors: list[Stored] = []
    files: dict[str, bytes] = {}
    for path in draw(st.sampled_from([["a"], ["b", "a"], ["c", "a", "b"]])):
        end = 0
        for _ in range(draw(st.integers(1, 3))):
            end += draw(st.integers(0, 70))
            tensors.append(draw(stored_tensors(path, end)))
            end += tensors[-1].payload_nbytes
        files[path] = np.random.default_rng(draw(st.integers(0, 9))).bytes(end)
    requests = []
    for position in range(draw(st.integers(0, 6))):
        tensor = draw(st.sampled_from(tensors))
        offsets = tuple(draw(st.integers(0, size)) for size in tensor.sizes)
        lengths = tuple(draw(st.integers(0, size - o)) for size, o in zip(tensor.sizes, offsets, strict=True))
        if draw(st.integers(0, 3)) == 0:
            offsets, lengths = tuple(0 for _ in tensor.sizes), tensor.sizes
        requests.append(tensor.request(position, offsets, lengths))
    return Load(
        files,
        tensors,
        requests,
        slab_nbytes=draw(st.sampled_from([16, 17, 64, 100, 1000, 1 << 20])),
        gap_nbytes=draw(st.sampled_from([0, 1, 15, 16, 64, 500])),
        straight_nbytes=draw(st.sampled_from([1, 32, 200, STRAIGHT_NBYTES])),
    )


def needed_bytes(requests: list[ReadRequest], path: str, nbytes: int) -> NDArray[np.bool_]:
    """Which bytes of a file some request asks for."""
    needed = np.zeros(nbytes, dtype=bool)
    for request in requests:
        if request.path == path and 0 not in request.lengths:
            first = request.storage_offset + sum(o * s for o, s in zip(request.offsets, request.strides, strict=True))
            itemsize = request.dtype.itemsize
            places = np.array(first)
            for stride, length in zip(request.strides, request.lengths, strict=True):
                places = np.add.outer(places, np.arange(length) * stride)
            starts = request.payload_offset + places.ravel() * itemsize
            needed[np.add.outer(starts, np.arange(itemsize)).ravel()] = True
    return needed


def longest_run(flags: NDArray[np.bool_]) -> int:
    """The length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


@given(case=loads())
@settings(max_examples=500, deadline=None)
def test_a_plan_carried_out_gives_exactly_the_boxes_asked_for(case: Load) -> None:
    """For any strides, offsets, dtypes, slab and gap sizes; nothing is filled twice, nothing is left out."""
    plan = case.plan([])
    found = carried_out(plan, case.requests, case.files)
    for request in case.requests:
        assert found[request.position] == box_of(request, case.files[request.path])
    empty = [request.position for request in case.requests if 0 in request.lengths]
    assert list(plan.empty_positions) == empty
    assert {chunk.position for read in plan.reads for chunk in read.chunks}.isdisjoint(empty)
    assert plan.nbytes == sum(read.nbytes for read in plan.reads)


@given(case=loads())
@settings(max_examples=400, deadline=None)
def test_reads_are_sorted_within_a_slab_and_over_no_long_gap(case: Load) -> None:
    """Each starts and ends with a byte that is needed, and never crosses more needless ones than the gap allows."""
    plan = case.plan([])
    places = [(read.path, read.byte_offset) for read in plan.reads]
    assert places == sorted(places)
    for path, file in case.files.items():
        needed = needed_bytes(case.requests, path, len(file))
        covered = np.zeros(len(file), dtype=bool)
        for read in (read for read in plan.reads if read.path == path):
            part = needed[read.byte_offset : read.byte_offset + read.nbytes]
            assert 0 < len(part) == read.nbytes <= case.slab_nbytes
            assert part[0]
            assert part[-1]
            assert longest_run(~part) <= case.gap_nbytes
            covered[read.byte_offset : read.byte_offset + read.nbytes] = True
        assert (covered >= needed).all()


@given(case=loads())
@settings(max_examples=300, deadline=None)
def test_neighbours_share_a_read_as_far_as_slab_and_gap_allow(case: Load) -> None:
    """Two reads that could have been one would cost a system call more; gapless large chunks stand alone."""
    plan = case.plan([])
    for read in plan.reads:
        large = [chunk.is_dense and chunk.nbytes >= case.straight_nbytes for chunk in read.chunks]
        assert large == [True] if read.is_straight else not any(large)
        assert list(read.chunks) == sorted(read.chunks, key=lambda chunk: chunk.byte_offset)
    for before, after in zip(plan.reads, plan.reads[1:], strict=False):
        if before.path == after.path and not (before.is_straight or after.is_straight):
            first = after.chunks[0]
            is_too_long = first.byte_offset + first.nbytes - before.byte_offset > case.slab_nbytes
            assert is_too_long or after.byte_offset - before.byte_offset - before.nbytes > case.gap_nbytes


@given(case=loads(), data=st.data())
@settings(max_examples=400, deadline=None)
def test_segments_tile_each_payload_that_is_read_whole_and_no_other(case: Load, data: st.DataObject) -> None:
    """The checks of a plan are those of payloads that its reads cover, and their segments give the CRC-32 in order."""
    checked = [tensor for tensor in case.tensors if tensor.payload_nbytes and data.draw(st.booleans())]
    checks = [tensor.check(case.files[tensor.path]) for tensor in data.draw(st.permutations(checked))]
    plan = case.plan(checks)
    for check in checks:
        covered = np.zeros(len(case.files[check.path]), dtype=bool)
        for read in plan.reads:
            if read.path == check.path:
                covered[read.byte_offset : read.byte_offset + read.nbytes] = True
        is_whole = covered[check.payload_offset : check.payload_offset + check.payload_nbytes].all()
        assert (check in plan.checks) == is_whole
    assert list(plan.checks) == sorted(plan.checks)
    places = [(check.payload_offset, 0) for check in plan.checks]
    for read in plan.reads:
        for segment in read.segments:
            check = plan.checks[segment.check]
            assert check.path == read.path
            assert 0 <= segment.slab_offset < segment.slab_offset + segment.nbytes <= read.nbytes
            end, crc = places[segment.check]
            start = read.byte_offset + segment.slab_offset
            assert start == end
            part = crc32(case.files[read.path][start : start + segment.nbytes])
            places[segment.check] = (start + segment.nbytes, crc32_combine(crc, part, segment.nbytes))
    for check, (end, crc) in zip(plan.checks, places, strict=True):
        assert end == check.payload_offset + check.payload_nbytes
        assert crc == check.crc32


@given(case=loads())
@settings(max_examples=150, deadline=None)
def test_whole_payload_requests_make_every_payload_checkable(case: Load) -> None:
    """Added for what is read in part, they fill no destination and leave those of the others as they were."""
    checks = [tensor.check(case.files[tensor.path]) for tensor in case.tensors if tensor.payload_nbytes]
    both = case._replace(requests=[*case.requests, *map(whole_payload_request, checks)])
    plan = both.plan(checks)
    assert plan.checks == tuple(sorted(checks))
    found = carried_out(plan, both.requests, case.files)
    assert found == {request.position: box_of(request, case.files[request.path]) for request in case.requests}


def plan_of(*requests: ReadRequest, slab_nbytes: int = 4 << 20, gap_nbytes: int = READ_GAP_NBYTES) -> LoadChunkPlan:
    return plan_load(requests, [], slab_nbytes=slab_nbytes, gap_nbytes=gap_nbytes)


@pytest.mark.parametrize("slab_nbytes", [4096, 1 << 20, 1 << 30])
@pytest.mark.parametrize(
    ("sizes", "offsets", "lengths"),
    [
        ((4096, 1024), (100, 0), (256, 1024)),
        ((4096, 1024), (4095, 0), (1, 1024)),
        ((64, 128, 512), (3, 0, 0), (4, 128, 512)),
        ((1 << 20,), (12345,), (65536,)),
        ((16, 4096, 64), (5, 1000, 0), (1, 256, 64)),
    ],
)
def test_rows_are_read_byte_for_byte(
    sizes: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...], slab_nbytes: int
) -> None:
    """A slice along the first dimension is one run of the payload: not one byte more is read."""
    stored = row_major(sizes)
    plan = plan_of(stored.request(0, offsets, lengths), slab_nbytes=slab_nbytes)
    assert plan.nbytes == prod(lengths) * 4
    assert len(plan.reads) == -(-prod(lengths) * 4 // slab_nbytes) or slab_nbytes == 4096
    first = sum(o * s for o, s in zip(offsets, stored.strides, strict=True))
    assert plan.reads[0].byte_offset == 4096 + 4 * first
    assert all(chunk.is_dense for read in plan.reads for chunk in read.chunks)


def test_rows_of_many_tensors_cost_at_most_two_percent_more_than_their_bytes() -> None:
    """One sixteenth of each of a hundred tensors of 8 MiB in one file: what lies between is skipped."""
    tensors = [row_major((2048, 1024), payload_offset=4096 + number * (8 << 20 | 4096)) for number in range(100)]
    plan = plan_of(*(tensor.request(number, (256, 0), (128, 1024)) for number, tensor in enumerate(tensors)))
    assert plan.nbytes <= 1.02 * 100 * 128 * 4096


def test_neighbouring_small_tensors_are_read_together() -> None:
    """Their envelopes lie in short gaps: one read for thousands of them, as long as a slab has room."""
    tensors = [row_major((1024,), payload_offset=704 + number * 5000) for number in range(2000)]
    plan = plan_of(*(tensor.request(number, (0,), (1024,)) for number, tensor in enumerate(tensors)))
    assert len(plan.reads) == -(-2000 * 5000 // (4 << 20))
    assert plan.nbytes <= 2000 * 5000


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("gap_nbytes", "is_covered"), [(899, False), (900, True), (901, True)])
def test_columns_are_read_as_one_run_or_one_by_one_as_the_gap_says(
    gap_nbytes: int, is_covered: bool, is_transposed: bool
) -> None:
    """100 columns of 1000: the 900 bytes between two rows are read if the gap allows 900, and skipped if not."""
    stored = row_major((50, 1000), torch.int8)
    request = stored.request(0, (10, 300), (20, 100))
    if is_transposed:
        stored = stored._replace(sizes=(1000, 50), strides=(1, 1000))
        request = stored.request(0, (300, 10), (100, 20))
    plan = plan_of(request, gap_nbytes=gap_nbytes)
    if is_covered:
        (read,) = plan.reads
        assert (read.byte_offset, read.nbytes) == (4096 + 10 * 1000 + 300, 19 * 1000 + 100)
        assert len(read.chunks) == 1
    else:
        assert [(read.byte_offset, read.nbytes) for read in plan.reads] == [
            (4096 + row * 1000 + 300, 100) for row in range(10, 30)
        ]
    assert all(len(read.chunks) == 1 for read in plan.reads)


def test_a_covering_run_longer_than_a_slab_is_cut_between_rows() -> None:
    """As many whole rows to a read as a slab holds."""
    stored = row_major((50, 1000), torch.int8)
    plan = plan_of(stored.request(0, (0, 0), (50, 900)), slab_nbytes=4096)
    assert [(read.byte_offset - 4096, read.nbytes) for read in plan.reads] == [
        (4000 * number, 3900 if number < 12 else 1900) for number in range(13)
    ]


def test_gaps_inside_the_rows_of_a_run_count_as_well() -> None:
    """A box whose blocks lie side by side, and whose rows inside a block do not, is no gapless box."""
    stored = Stored("file", 0, 2000, torch.int8, (2, 2, 100), (1000, 900, 1), 0)
    plan = plan_of(stored.request(0, (0, 0, 0), (2, 2, 100)), gap_nbytes=64)
    assert [(read.byte_offset, read.nbytes) for read in plan.reads] == [(0, 100), (900, 200), (1900, 100)]


def test_the_cost_model_is_the_one_that_is_stated() -> None:
    """A gap of 64 KiB is read, a longer one skipped: the constants are part of what is promised."""
    assert READ_GAP_NBYTES == 64 << 10
    assert STRAIGHT_NBYTES == 256 << 10
    rows = row_major((8, (64 << 10) + 1024), torch.int8)
    assert len(plan_of(rows.request(0, (0, 0), (8, 1024))).reads) == 1
    assert len(plan_of(rows.request(0, (0, 0), (8, 1023))).reads) == 8


def test_a_large_gapless_chunk_gets_a_read_of_its_own() -> None:
    """From 256 KiB on, so that it can go straight into its destination; smaller ones beside it do not."""
    large = row_major((STRAIGHT_NBYTES,), torch.int8)
    small = row_major((100,), torch.int8, payload_offset=4096 + STRAIGHT_NBYTES + 64)
    plan = plan_of(small.request(1, (0,), (100,)), large.request(0, (0,), (STRAIGHT_NBYTES,)))
    assert [(read.is_straight, read.nbytes) for read in plan.reads] == [(True, STRAIGHT_NBYTES), (False, 100)]
    columns = row_major((1024, 512), torch.int8)
    assert not plan_of(columns.request(0, (0, 0), (1024, 511))).reads[0].is_straight


def test_a_tensor_larger_than_a_slab_is_cut_into_reads_that_tile_it() -> None:
    """Whole rows as far as they fit, every byte once."""
    stored = row_major((100, 3000), torch.float32)
    plan = plan_of(stored.request(0, (0, 0), (100, 3000)), slab_nbytes=1 << 16)
    end = 4096
    for read in plan.reads:
        assert read.byte_offset == end
        end += read.nbytes
    assert end == 4096 + stored.payload_nbytes


def test_a_transposed_tensor_is_cut_along_its_outermost_dimension_in_memory() -> None:
    """Not along its first one, which would make a chunk of every element."""
    stored = row_major((300, 1000), torch.int16)._replace(sizes=(1000, 300), strides=(1, 1000))
    plan = plan_of(stored.request(0, (0, 0), (1000, 300)), slab_nbytes=1 << 16)
    assert [(read.byte_offset - 4096, read.nbytes) for read in plan.reads] == [
        (number * 64_000, min(64_000, 600_000 - number * 64_000)) for number in range(10)
    ]
    assert [[chunk.lengths for chunk in read.chunks] for read in plan.reads] == [[(1000, 32)]] * 9 + [[(1000, 12)]]


def test_files_are_read_one_after_the_other_in_the_order_of_their_names() -> None:
    """Whatever the order of the requests."""
    tensors = [row_major((4,), path=path) for path in ("c", "a", "b", "a")]
    plan = plan_of(*(tensor.request(number, (0,), (4,)) for number, tensor in enumerate(tensors)))
    assert [read.path for read in plan.reads] == ["a", "b", "c"]
    assert [chunk.position for chunk in plan.reads[0].chunks] == [1, 3]


def test_no_requests_give_no_reads() -> None:
    """And then nothing is covered, but a payload of no bytes."""
    check = PayloadCheck("file", 5, 1, 0, "fqn")
    plan = plan_load([], [check], slab_nbytes=4096, gap_nbytes=0)
    assert (plan.reads, plan.checks, plan.empty_positions, plan.nbytes) == ((), (), (), 0)


def test_a_read_longer_than_a_slab_is_no_plan() -> None:
    """The message names the file, the place and both lengths."""
    chunk = ChunkRead(0, 7, 100, torch.int8, (1,), (0,), (100,), True)
    read = SlabRead("some path", 7, 100, (chunk,), False)
    LoadChunkPlan(reads=(read,), empty_positions=(), checks=(), slab_nbytes=100)
    with pytest.raises(PlanError, match=r"^some path: a read of 100 bytes at 7, a slab has 99$"):
        LoadChunkPlan(reads=(read,), empty_positions=(), checks=(), slab_nbytes=99)


@given(
    start=st.integers(0, 5000),
    nbytes=st.integers(1, 9000),
    beyond=st.integers(-3, 5000),
    block=st.sampled_from([1, 64, 4096]),
)
def test_a_read_in_blocks_is_the_same_read_up_to_a_block_longer_at_either_end(
    start: int, nbytes: int, beyond: int, block: int
) -> None:
    """Its chunks are those of before, its segments the same bytes of the file; the file's end is never passed."""
    end = start + nbytes
    chunk = ChunkRead(0, start, nbytes, torch.uint8, (1,), (0,), (nbytes,), True)
    segments = (Segment(0, 0, nbytes // 2), Segment(1, nbytes // 2, nbytes - nbytes // 2))
    read = SlabRead("file", start, nbytes, (chunk,), True, segments)
    found = read.in_blocks(block_nbytes=block, file_nbytes=end + beyond)
    found_end = found.byte_offset + found.nbytes
    assert 0 <= start - found.byte_offset < block
    assert found.byte_offset % block == 0
    if beyond >= 0:
        assert found_end == min(-(-end // block) * block, end + beyond)
    else:
        assert found_end == end, "what the file lacks is asked for, and told of by whoever reads it"
    assert (found.path, found.chunks) == (read.path, read.chunks)
    assert [(s.check, found.byte_offset + s.slab_offset, s.nbytes) for s in found.segments] == [
        (s.check, start + s.slab_offset, s.nbytes) for s in segments
    ]
    assert (found is read) == ((found.byte_offset, found_end) == (start, end))
    assert found is read or not found.is_straight, "its bytes are not the chunk's alone"


def test_a_plan_is_a_value() -> None:
    """The same requests give the same plan, which survives pickling; huge tensors cost no memory."""
    stored = row_major((1 << 30, 1 << 20), torch.bfloat16)
    first = plan_of(stored.request(0, (1 << 29, 0), (3, 1 << 20)))
    again = plan_of(stored.request(0, (1 << 29, 0), (3, 1 << 20)))
    assert first == again == pickle.loads(pickle.dumps(first))
    assert first.nbytes == 3 << 21


def test_large_chunks_share_a_read_where_nothing_is_read_straight() -> None:
    """A slab on a device is unpacked at once, whatever lies in it; the same bytes are read."""
    nbytes = STRAIGHT_NBYTES
    requests = [
        ReadRequest(number, "file", number * nbytes, torch.uint8, (1,), 0, (0,), (nbytes,)) for number in range(8)
    ]
    apart, together = (
        plan_load(requests, [], slab_nbytes=4 * nbytes, gap_nbytes=0, large_apart=each) for each in (True, False)
    )
    assert [(read.nbytes, read.is_straight) for read in apart.reads] == [(nbytes, True)] * 8
    assert [(read.byte_offset, read.nbytes, read.is_straight) for read in together.reads] == [
        (0, 4 * nbytes, False),
        (4 * nbytes, 4 * nbytes, False),
    ]
    assert [chunk for read in together.reads for chunk in read.chunks] == [read.chunks[0] for read in apart.reads]
