"""What is the cpu executor's own: how much memory it takes, which reads need no slab, on which threads it works."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from executor_fakes import (
    Call,
    Entry,
    Files,
    MemoryBackend,
    Target,
    memory_of,
    naive_file,
    naive_payload,
    random_tensor,
    save_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.chunkplan.load import PayloadCheck, ReadRequest, plan_load
from gpudcp.chunkplan.save import SaveChunkPlan
from gpudcp.executors import cpu, packing
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.slabs import HostSlab
from gpudcp.formats.checksum import crc32
from gpudcp.report import Stopwatch


class CountedSlab(HostSlab):
    """A slab that is counted for as long as it lives."""

    alive = most_alive = 0

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        CountedSlab.alive += 1
        CountedSlab.most_alive = max(CountedSlab.most_alive, CountedSlab.alive)

    def __del__(self) -> None:
        CountedSlab.alive -= 1


@pytest.fixture
def slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[CountedSlab]]:
    """Every slab of the executor is counted."""
    CountedSlab.alive = CountedSlab.most_alive = 0
    for module in (cpu, packing):
        monkeypatch.setattr(module, "HostSlab", CountedSlab)
    yield CountedSlab
    assert CountedSlab.alive == 0, "every slab is gone when the transfer is over"


@pytest.fixture
def files() -> Files:
    """Recording files in memory: what is shown here does not depend on the backend."""
    return Files(MemoryBackend())


def executor_of(lanes: int = 3, threads: int = 2) -> CpuExecutor:
    """An executor with checksums."""
    return CpuExecutor(lanes=lanes, threads=threads, slab_nbytes=4096, has_checksum=True)


def requests_of(tensors: list[torch.Tensor]) -> tuple[bytes, list[ReadRequest], list[PayloadCheck]]:
    """One file of payloads one after the other, a request for each, and their checksums."""
    data, requests, checks = bytearray(), [], []
    for position, tensor in enumerate(tensors):
        payload, start = memory_of(tensor).tobytes(), len(data)
        sizes = tuple(tensor.shape)
        requests.append(
            ReadRequest(position, "file", start, tensor.dtype, tensor.stride(), 0, (0,) * len(sizes), sizes)
        )
        checks.append(PayloadCheck("file", start, len(payload), crc32(payload), f"tensor.{position}"))
        data += payload
    return bytes(data), requests, checks


@pytest.mark.parametrize("nslabs", [1, 2, 3, 4, 50])
def test_a_save_takes_as_many_slabs_as_it_has_lanes_whatever_its_size(
    slabs: type[CountedSlab], files: Files, nslabs: int
) -> None:
    """Memory is lanes x slab bytes, and less for a small file."""
    plan, source = save_of([b"x" * (4096 * nslabs)], slab_nbytes=4096)
    executor_of(lanes=3).save(plan, source, files.open_writer, Stopwatch())
    assert slabs.most_alive == min(3, nslabs)


@pytest.mark.parametrize(("lanes", "threads"), [(2, 2), (4, 2), (5, 2), (3, 1), (6, 6)])
def test_several_files_share_the_lanes(slabs: type[CountedSlab], files: Files, lanes: int, threads: int) -> None:
    """Files are written side by side, as many as there are threads, and memory is that of one file."""
    plans = [save_of([random_tensor(20_000)], slab_nbytes=4096, path=path) for path in ("one", "two", "three")]
    source = plans[0][1]

    class SameSource:
        keeps_memory = True

        def resolve(self, position: int) -> torch.Tensor:
            return source.tensors[position]

    plan = SaveChunkPlan(files=tuple(plan.files[0] for plan, _ in plans))
    executor_of(lanes=lanes, threads=threads).save(plan, SameSource(), files.open_writer, Stopwatch())
    assert slabs.most_alive == lanes
    assert [files.content(file.path) == naive_file(file, source)[0] for file in plan.files] == [True] * 3


@pytest.mark.parametrize("nslabs", [0, 1, 2, 50])
def test_a_load_takes_as_many_slabs_as_it_has_lanes_whatever_its_size(
    slabs: type[CountedSlab], files: Files, nslabs: int
) -> None:
    """The ring runs backwards, with the same memory."""
    stored = random_tensor(1024 * nslabs)
    data, requests, checks = requests_of([stored])
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=4096, gap_nbytes=0)
    target = Target({0: torch.zeros_like(stored)})
    executor_of(lanes=3).load(plan, target, files.open_reader, Stopwatch())
    assert slabs.most_alive == min(3, nslabs)
    assert target.committed == {0: data}


def test_large_plain_memory_is_written_as_it_is_where_the_file_takes_any_alignment() -> None:
    """No byte of it goes through a slab; it goes in calls of a slab's size all the same."""
    tensor, small = random_tensor(300, 1000), random_tensor(77)
    plan, source = save_of([small, tensor, tensor.t(), small], slab_nbytes=128 << 10)
    files = Files(MemoryBackend(alignment_nbytes=1))
    executor_of(lanes=3).save(plan, source, files.open_writer, Stopwatch())
    assert files.content("file") == naive_file(plan.files[0], source)[0]
    inside = range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    straight = [call for call in files.calls_of("write") if call.address in inside]
    assert {call.address - call.byte_offset for call in straight} == {
        tensor.data_ptr() - plan.files[0].writes[1].payload_offset
    }
    assert sum(call.nbytes for call in straight) == tensor.nbytes
    assert max(call.nbytes for call in straight) == 128 << 10


def test_a_buffer_that_is_used_again_for_the_next_tensor_is_not_written_as_it_is() -> None:
    """A planner may resolve into one scratch buffer: its memory is good until the next call alone."""
    tensors = [random_tensor(300, 1000, seed=seed) for seed in range(6)]
    plan, source = save_of(tensors, slab_nbytes=128 << 10)
    scratch = torch.empty_like(tensors[0])

    class Scratch:
        keeps_memory = False

        def resolve(self, position: int) -> torch.Tensor:
            return scratch.copy_(tensors[position])

    files = Files(MemoryBackend(alignment_nbytes=1))
    files.on_call = lambda call: threading.Event().wait(0.005) if call.kind == "write" else None
    executor_of(lanes=3).save(plan, Scratch(), files.open_writer, Stopwatch())
    assert files.content("file") == naive_file(plan.files[0], source)[0]


@pytest.mark.parametrize("lanes", [1, 2])
def test_memory_that_is_written_as_it_is_stays_alive_until_then_and_no_longer(lanes: int) -> None:
    """A planner may resolve to tensors that nobody else holds: a ring of them is alive, and the one at hand."""
    alive = most_alive = 0

    def die() -> None:
        nonlocal alive
        alive -= 1

    class Fleeting:
        keeps_memory = True

        def resolve(self, position: int) -> torch.Tensor:
            nonlocal alive, most_alive
            alive += 1
            most_alive = max(most_alive, alive)
            tensor = random_tensor(300, 1000, seed=position)
            weakref.finalize(tensor, die)
            return tensor

    plan, source = save_of([random_tensor(300, 1000, seed=seed) for seed in range(8)], slab_nbytes=1 << 20)
    files = Files(MemoryBackend(alignment_nbytes=1))
    files.on_call = lambda call: threading.Event().wait(0.01) if call.kind == "write" else None
    executor_of(lanes=lanes, threads=1).save(plan, Fleeting(), files.open_writer, Stopwatch())
    assert files.content("file") == naive_file(plan.files[0], source)[0]
    assert most_alive <= lanes + 1
    assert alive == 0


@settings(deadline=None, max_examples=100)
@given(
    entries=st.lists(
        st.tuples(st.sampled_from(["plain", "bytes", "strided", "cast", "literal"]), st.integers(0, 6000)),
        min_size=1,
        max_size=8,
    ),
    threshold=st.integers(1, 10_000),
    nblocks=st.integers(1, 3),
    lanes=st.integers(1, 3),
    alignment_nbytes=st.sampled_from([1, 4096]),
)
def test_bytes_are_the_same_whichever_of_them_go_past_the_slabs(
    entries: list[tuple[str, int]], threshold: int, nblocks: int, lanes: int, alignment_nbytes: int
) -> None:
    """Any mix of small and large, plain and strided, with a slab begun or not: compared with the naive file."""
    plan, source = save_of([entry_of(kind, size) for kind, size in entries], slab_nbytes=nblocks * 4096)
    files = Files(MemoryBackend(alignment_nbytes=alignment_nbytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "STRAIGHT_NBYTES", threshold)
        receipts = executor_of(lanes=lanes).save(plan, source, files.open_writer, Stopwatch())
    expected, crcs = naive_file(plan.files[0], source)
    assert files.content("file") == expected
    assert receipts == [(len(expected), crcs)]
    ranges = sorted((call.byte_offset, call.nbytes) for call in files.calls_of("write"))
    assert all(nbytes > 0 for _, nbytes in ranges)
    assert [start for start, _ in ranges] == [0, *(start + nbytes for start, nbytes in ranges)][: len(ranges)]


def entry_of(kind: str, size: int) -> Entry:
    """Something of about that many elements to save."""
    tensor = torch.arange(float(size)) - 3000
    if kind == "literal":
        return b"literal" * (size // 7)
    if kind == "cast":
        return tensor, torch.bfloat16
    if kind == "bytes":  # they end anywhere
        return tensor.to(torch.uint8)
    return tensor if kind == "plain" else tensor.expand(2, size).t()


def test_slabs_are_gone_after_an_error_too(slabs: type[CountedSlab], files: Files) -> None:
    """A save that is tried again must not find the memory of the first one in its way."""
    plan, source = save_of([b"x" * 40_000], slab_nbytes=4096)

    def fail(call: Call) -> None:
        if call.kind == "write" and call.byte_offset == 8192:
            raise OSError("no")

    files.on_call = fail
    with pytest.raises(OSError, match="no"):
        executor_of().save(plan, source, files.open_writer, Stopwatch())
    assert slabs.most_alive == 3
    gc.collect()  # the error and the frames it went through refer to each other


def test_a_large_gapless_chunk_is_read_straight_into_its_destination(files: Files) -> None:
    """No byte of it goes through a slab: each read writes where the tensor lies."""
    stored = random_tensor(600, 500)
    data, requests, checks = requests_of([stored])
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=512 << 10, gap_nbytes=0)
    assert [read.is_straight for read in plan.reads] == [True, True, False]
    destination = torch.zeros(800, 500)[100:700]
    target = Target({0: destination})
    executor_of().load(plan, target, files.open_reader, Stopwatch())
    assert naive_payload(destination, torch.float32) == data
    straight_nbytes = sum(read.nbytes for read in plan.reads if read.is_straight)
    for call in files.calls_of("read"):
        if call.byte_offset < straight_nbytes:
            assert call.address == destination.data_ptr() + call.byte_offset


@pytest.mark.parametrize(
    "destination",
    [
        torch.zeros(300, 300, dtype=torch.float64),
        torch.zeros(300, 300).t(),
        torch.zeros(300, 600)[:, ::2],
        torch._neg_view(torch.zeros(300, 300)),
    ],
    ids=["cast", "transposed", "stepped", "negative"],
)
def test_a_destination_that_is_not_plain_memory_is_not_read_into(files: Files, destination: torch.Tensor) -> None:
    """Its bytes are not the file's."""
    stored = random_tensor(300, 300).nan_to_num()
    data, requests, checks = requests_of([stored])
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=512 << 10, gap_nbytes=0)
    assert plan.reads[0].is_straight
    executor_of().load(plan, Target({0: destination}), files.open_reader, Stopwatch())
    assert destination.equal(stored.to(destination.dtype))
    start = destination.untyped_storage().data_ptr()
    inside = range(start, start + destination.untyped_storage().nbytes())
    assert not any(call.address in inside for call in files.calls_of("read"))


def test_a_read_straight_into_memory_waits_for_earlier_ones_that_are_unpacked_there(files: Files) -> None:
    """Else what comes first in the file would be what stands there at the end."""
    stored = [random_tensor(50), random_tensor(100_000, seed=1)]
    data, requests, checks = requests_of(stored)
    files.put("file", data)
    plan = plan_load(requests, checks, slab_nbytes=512 << 10, gap_nbytes=0)
    assert [read.is_straight for read in plan.reads] == [False, True]
    has_read_second = threading.Event()

    def on_call(call: Call) -> None:
        if call.kind == "read" and call.nbytes > 200:
            has_read_second.set()
        elif call.kind == "read":
            has_read_second.wait(0.3)

    files.on_call = on_call
    destination = torch.zeros(100_000)
    target = Target({0: destination[7:57], 1: destination})
    executor_of(lanes=4, threads=2).load(plan, target, files.open_reader, Stopwatch())
    assert naive_payload(destination, torch.float32) == naive_payload(stored[1], torch.float32)


def test_files_are_touched_by_as_many_threads_as_the_options_say(files: Files) -> None:
    """Writes and reads are the pool's, all else is the caller's."""
    threads: dict[str, set[int]] = {}
    is_first = threading.Barrier(2, timeout=5)

    def record(call: Call) -> None:
        seen = threads.setdefault(call.kind, set())
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            if call.kind in ("write", "read"):
                is_first.wait()  # two of them run at once, or this breaks

    files.on_call = record
    plan, source = save_of([b"x" * 40_000, random_tensor(9000)], slab_nbytes=4096)
    executor_of(lanes=4, threads=2).save(plan, source, files.open_writer, Stopwatch())
    data, requests, checks = requests_of([random_tensor(9000)])
    files.put("file", data)
    target = Target({0: torch.zeros(9000)})
    load_plan = plan_load(requests, checks, slab_nbytes=4096, gap_nbytes=0)
    executor_of(lanes=4, threads=2).load(load_plan, target, files.open_reader, Stopwatch())
    own = {threading.get_ident()}
    assert threads["create"] == threads["finish"] == threads["open"] == own
    assert len(threads["write"]) == len(threads["read"]) == 2
    assert not (threads["write"] | threads["read"]) & own


def test_no_thread_outlives_a_transfer(files: Files) -> None:
    """A training loop saves thousands of times."""
    before = threading.active_count()
    plan, source = save_of([b"x" * 40_000], slab_nbytes=4096)
    executor_of().save(plan, source, files.open_writer, Stopwatch())
    assert threading.active_count() == before


def test_the_stopwatch_gets_the_phases_of_a_transfer(files: Files) -> None:
    """They are the report's: what the calling thread did, and what it waited for."""
    stopwatch = Stopwatch()
    plan, source = save_of([b"x" * 40_000], slab_nbytes=4096)
    executor_of(lanes=1).save(plan, source, files.open_writer, stopwatch)
    assert set(stopwatch.seconds) == {"pack", "write", "fsync"}
    data, requests, checks = requests_of([random_tensor(5000)])
    files.put("file", data)
    stopwatch = Stopwatch()
    load_plan = plan_load(requests, checks, slab_nbytes=4096, gap_nbytes=0)
    executor_of().load(load_plan, Target({0: torch.zeros(5000)}), files.open_reader, stopwatch)
    assert set(stopwatch.seconds) == {"resolve", "read", "unpack"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_on_a_device_are_saved_and_loaded_in_pieces(
    slabs: type[CountedSlab], files: Files, dtype: torch.dtype
) -> None:
    """The fallback where there is no executor for the device: the ring is all the host memory it takes."""
    tensor = torch.arange(30_000.0, device="cuda").view(150, 200)
    plan, source = save_of([(tensor, dtype), (tensor.t(), dtype)], slab_nbytes=4096)
    executor_of(lanes=2).save(plan, source, files.open_writer, Stopwatch())
    source.tensors = {position: tensor.cpu() for position, tensor in source.tensors.items()}
    assert files.content("file") == naive_file(plan.files[0], source)[0]
    assert slabs.most_alive == 2

    write = plan.files[0].writes[0]
    request = ReadRequest(0, "file", write.payload_offset, dtype, (200, 1), 0, (0, 0), (150, 200))
    destination = torch.zeros(200, 150, device="cuda").t()
    load_plan = plan_load([request], [], slab_nbytes=4096, gap_nbytes=0)
    executor_of(lanes=2).load(load_plan, Target({0: destination}), files.open_reader, Stopwatch())
    assert destination.equal(tensor.to(dtype).to(torch.float32))
