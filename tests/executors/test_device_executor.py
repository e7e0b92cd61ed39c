"""The device executor beyond what all executors do: two kinds of memory, device files, order, a full device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from executor_fakes import (
    OUT_OF_MEMORY,
    BlockFiles,
    DeviceFiles,
    Entry,
    Files,
    MemoryBackend,
    Source,
    Target,
    naive_file,
    random_tensor,
    save_of,
)
from executor_rings import _interpreted, executor_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import gpudcp
from gpudcp.boxes import row_major_strides
from gpudcp.chunkplan.load import LoadChunkPlan, PayloadCheck, ReadRequest, plan_load
from gpudcp.chunkplan.save import ChunkWrite
from gpudcp.errors import CorruptCheckpointError, TransferError
from gpudcp.executors import compiling, devicepacking, deviceunpacking
from gpudcp.executors import lanes as lanes_of_process
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.cuda import DeviceExecutor
from gpudcp.executors.deviceloading import DeviceLoad
from gpudcp.executors.devices import Event, InterpretedDevice, Stream
from gpudcp.executors.slabs import HostSlab
from gpudcp.formats.checksum import crc32
from gpudcp.report import Stopwatch

MIB = 1 << 20


class MixedDevice(InterpretedDevice):
    """Host memory, but tensors on an odd multiple of 16 bytes are not the device's."""

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.data_ptr() // 16 % 2 == 0


def placed(tensor: torch.Tensor, *, is_on_device: bool) -> torch.Tensor:
    """A copy, as `MixedDevice` sees it on the device or on the host."""
    memory = torch.zeros(tensor.nbytes + 64, dtype=torch.uint8)
    first = -memory.data_ptr() % 32 + (0 if is_on_device else 16)
    return memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def saved_by(executor: DeviceExecutor, entries: Sequence[Entry], backend: MemoryBackend) -> Source:
    """Save, and compare with the naive reference."""
    plan, source = save_of(entries, slab_nbytes=executor.slab_nbytes)
    receipts = executor.save(plan, source, backend.create, Stopwatch())
    expected, crcs = naive_file(plan.files[0], source)
    assert backend.content("file") == expected
    assert receipts[0].crcs == crcs
    return source


def load_plan_of(entries: Sequence[torch.Tensor], *, slab_nbytes: int) -> LoadChunkPlan:
    """Reads all tensors of `save_of`'s file whole, each checked."""
    plan, _ = save_of(entries, slab_nbytes=slab_nbytes)
    requests, checks = [], []
    for write in plan.files[0].writes:
        assert isinstance(write, ChunkWrite)
        sizes = tuple(write.sizes)
        requests.append(
            ReadRequest(
                write.position,
                "file",
                write.payload_offset,
                write.dtype,
                row_major_strides(sizes),
                0,
                (0,) * len(sizes),
                sizes,
            )
        )
        data = entries[write.position].contiguous().view(-1).view(torch.uint8).numpy()
        checks.append(
            PayloadCheck("file", write.payload_offset, data.nbytes, crc32(memoryview(data)), f"item.{write.position}")
        )
    return plan_load(requests, checks, slab_nbytes=slab_nbytes, gap_nbytes=4096)


def put_file(backend: MemoryBackend, entries: Sequence[Entry]) -> None:
    """The file that a save of the entries makes, by the naive reference."""
    plan, source = save_of(entries, slab_nbytes=4096)
    backend.put("file", naive_file(plan.files[0], source)[0])


# --- host and device memory in one slab ------------------------------------------------------------------------------

kinds = st.tuples(
    st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]), st.integers(0, 3000), st.booleans(), st.booleans()
)


@given(
    wanted=st.lists(st.one_of(st.binary(max_size=3000), kinds), min_size=1, max_size=6),
    blocks=st.integers(1, 4),
    lanes=st.integers(1, 3),
)
@settings(deadline=None, max_examples=12)
def test_any_mixture_is_the_cpu_executors_file(wanted: list[Any], blocks: int, lanes: int) -> None:
    """Host tensors, device tensors, casts and objects, in slabs of any length."""
    entries: list[Entry] = []
    for each in wanted:
        if isinstance(each, bytes):
            entries.append(each)
            continue
        dtype, numel, is_on_device, is_cast = each
        tensor = placed(random_tensor(numel, dtype=dtype), is_on_device=is_on_device)
        entries.append((tensor, torch.bfloat16) if is_cast and dtype == torch.float32 else tensor)
    plan, _ = save_of(entries, slab_nbytes=4096 * blocks)
    if not plan.files:
        return
    files, receipts = [], []
    for executor in (
        executor_of(MixedDevice(), slab_nbytes=4096 * blocks, lanes=lanes),
        CpuExecutor(lanes=2, threads=2, slab_nbytes=8192, has_checksum=True),
    ):
        backend = MemoryBackend()
        own_plan, source = save_of(entries, slab_nbytes=executor.slab_nbytes)
        receipts.append(executor.save(own_plan, source, backend.create, Stopwatch()))
        files.append(backend.content("file"))
    assert files[0] == files[1]
    assert receipts[0] == receipts[1]


def test_a_slab_of_host_memory_alone_is_never_on_the_device() -> None:
    """Nothing is launched for it, and its memory takes no way over the device."""

    class Untouchable(MixedDevice):
        def on_device(self, data: torch.Tensor) -> torch.Tensor:
            raise AssertionError(f"{data.nbytes} bytes on the device")

    saved_by(executor_of(Untouchable()), [placed(random_tensor(3000), is_on_device=False), b"object"], MemoryBackend())


@pytest.mark.parametrize("make_backend", [MemoryBackend, BlockFiles, DeviceFiles])
def test_host_and_device_destinations_share_a_read(make_backend: Callable[[], MemoryBackend]) -> None:
    """Each gets its bytes, cast or not, and each payload is checked."""
    entries = [random_tensor(n, dtype=torch.int32) for n in (100, 1500, 700, 5)]
    backend = make_backend()
    put_file(backend, entries)
    plan = load_plan_of(entries, slab_nbytes=8192)
    empty = [
        torch.zeros(each.shape, dtype=torch.int64 if n % 3 == 0 else torch.int32) for n, each in enumerate(entries)
    ]
    target = Target({n: placed(each, is_on_device=n % 2 == 0) for n, each in enumerate(empty)})
    executor_of(MixedDevice()).load(plan, target, backend.open, Stopwatch())
    for n, entry in enumerate(entries):
        assert target.destinations[n].tolist() == entry.tolist()
    assert sorted(target.positions("commit")) == [0, 1, 2, 3]


class Reusing(Source):
    """Gives all that it is asked for in one piece of memory, on the device or (odd positions) on the host."""

    def __init__(self, tensors: dict[int, torch.Tensor]) -> None:
        super().__init__(tensors, keeps_memory=False)
        self._memory = torch.zeros(max(tensor.nbytes for tensor in tensors.values()) + 64, dtype=torch.uint8)

    def resolve(self, position: int) -> torch.Tensor:
        tensor = super().resolve(position)
        self._memory.fill_(0xA5)
        first = position % 2 * 16 + -self._memory.data_ptr() % 32
        return self._memory[first : first + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Allocations(TorchDispatchMode):
    """The most bytes that one call of torch allocated."""

    most_nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        if isinstance(found, torch.Tensor) and found.untyped_storage().data_ptr() not in known:
            self.most_nbytes = max(self.most_nbytes, found.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("more_paths", [[], ["second"]], ids=["one file", "two files"])
def test_a_source_that_reuses_its_memory_is_waited_for_and_not_copied(more_paths: list[str]) -> None:
    """For host and device memory alike, in one slab and over several: memory stays within the lanes."""
    entries: list[Entry] = [random_tensor(n, seed=n) for n in (1000, 5000, 5000, 700, 300, 5000, 5001)]
    plan, source = save_of(entries, slab_nbytes=8192, more_paths=more_paths)
    backend, reusing = MemoryBackend(), Reusing(source.tensors)
    with Allocations() as allocations:
        executor_of(MixedDevice()).save(plan, reusing, backend.create, Stopwatch())
    for file in plan.files:
        assert backend.content(file.path) == naive_file(file, source)[0]
    assert 0 < allocations.most_nbytes <= 8192


def test_what_a_device_does_not_pack_itself_goes_through_the_host_by_parts() -> None:
    """Another device's tensors, casts that are torch's, conjugates: never a whole tensor at once."""
    numbers = random_tensor(20_000, dtype=torch.int32)
    entries: list[Entry] = [
        placed(numbers, is_on_device=False),
        (placed(numbers % 100, is_on_device=True), torch.int8),
        placed(numbers.view(torch.complex64), is_on_device=True).conj(),
        (placed(numbers.to(torch.float64), is_on_device=False), torch.bfloat16),
    ]
    plan, source = save_of(entries, slab_nbytes=8192)
    backend = MemoryBackend()
    with Allocations() as allocations:
        executor_of(MixedDevice()).save(plan, source, backend.create, Stopwatch())
    assert backend.content("file") == naive_file(plan.files[0], source)[0]
    assert allocations.most_nbytes <= 8192 * 4, "a slab's elements, as they are in memory"


def boxes_by_launch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many boxes each launch of a load will have unpacked."""
    launches: list[int] = []
    inner = deviceunpacking._unpack_by_kernel
    monkeypatch.setattr(
        deviceunpacking,
        "_unpack_by_kernel",
        lambda lane, pairs, *rest: (launches.append(len(list(pairs))), inner(lane, pairs, *rest)),
    )
    return launches


def test_tied_destinations_take_what_comes_last_and_cost_one_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the cpu executor; the others of the slab still go together."""
    launches = boxes_by_launch(monkeypatch)
    entries = [random_tensor(50, seed=n) for n in range(5)]
    backend = MemoryBackend()
    put_file(backend, entries)
    tied = torch.zeros(50)
    target = Target({0: torch.zeros(50), 1: tied, 2: torch.zeros(50), 3: tied, 4: torch.zeros(50)})
    executor_of(InterpretedDevice()).load(load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch())
    assert launches == [3, 2]
    assert torch.equal(tied.view(torch.int32), entries[3].view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_destinations_that_overlap_in_part_take_what_comes_last(tmp_path: Path, dtype: torch.dtype) -> None:
    """From whichever bytes on; one is cast and the other is not, or both."""
    saved = {"a": torch.arange(50.0), "b": -torch.arange(52, dtype=dtype), "c": torch.arange(9.0) + 0.5}
    dcp.save(saved, checkpoint_id=tmp_path)
    for executor in ("cpu", "interpret"):
        place = torch.zeros(52)
        places = {"a": place[1:51], "b": place, "c": place[20:29]}
        gpudcp.load(places, tmp_path, options=gpudcp.Options(executor=executor))  # type: ignore[arg-type]
        assert place[:20].tolist() == saved["b"][:20].tolist()
        assert place[20:29].tolist() == saved["c"].tolist()
        assert place[29:].tolist() == saved["b"][29:].tolist()


def test_columns_of_one_tensor_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie between one another, and share nothing."""
    launches = boxes_by_launch(monkeypatch)
    entries = [random_tensor(20, 5, seed=n) for n in range(6)]
    backend = MemoryBackend()
    put_file(backend, entries)
    whole = torch.zeros(20, 30)
    target = Target(dict(enumerate(whole.split(5, dim=1))))
    executor_of(InterpretedDevice()).load(load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch())
    assert launches == [6]
    assert torch.equal(whole.view(torch.int32), torch.cat(entries, dim=1).view(torch.int32))


@pytest.mark.parametrize("executor", ["cpu", "interpret"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_destination_whose_elements_share_memory_is_refused(
    tmp_path: Path, executor: Any, dtype: torch.dtype
) -> None:
    """As torch refuses to write to it: whichever element came last would stand for all."""
    dcp.save({"a": torch.arange(6.0).view(2, 3)}, checkpoint_id=tmp_path)
    place = torch.zeros(1, 3, dtype=dtype).expand(2, 3)
    with pytest.raises((RuntimeError, gpudcp.errors.GpuDcpError), match="more than one element"):
        gpudcp.load({"a": place}, tmp_path, options=gpudcp.Options(executor=executor))


def test_a_nan_is_cast_into_a_negative_view() -> None:
    """What kernels do not write goes by the same rule through torch."""
    entries = [torch.tensor([1.5, torch.nan], dtype=torch.bfloat16)]
    backend = MemoryBackend()
    put_file(backend, entries)
    negative = torch.zeros(2, dtype=torch.complex64).conj().imag
    target = Target({0: negative})
    executor_of(InterpretedDevice()).load(load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch())
    assert negative[0] == 1.5
    assert bool(negative[1].isnan())


def test_what_the_host_packs_comes_from_a_lanes_own_pinned_memory() -> None:
    """One copy for a slab, of what is already pinned: nothing else is allocated for it."""

    class Counting(MixedDevice):
        def __init__(self) -> None:
            self.slabs: list[HostSlab] = []
            self.copied: list[torch.Tensor] = []

        def new_host_slab(self, nbytes: int) -> HostSlab:
            self.slabs.append(super().new_host_slab(nbytes))
            return self.slabs[-1]

        def on_device(self, data: torch.Tensor) -> torch.Tensor:
            self.copied.append(data)
            return super().on_device(data)

    device = Counting()
    entries: list[Entry] = [placed(random_tensor(900), is_on_device=n % 2 == 0) for n in range(4)]
    saved_by(executor_of(device), entries, MemoryBackend())
    assert len(device.copied) == 2, "one for each slab that is not the host's alone, as the third is"
    for data in device.copied:
        assert any(slab.address <= data.data_ptr() < slab.address + slab.nbytes for slab in device.slabs)


# --- files that take device memory ------------------------------------------------------------------------------------


def test_device_files_get_whole_blocks_of_device_memory_and_the_right_bytes() -> None:
    """Address, offset and length: the last slab of the file too, whose rest is cut off."""
    backend = DeviceFiles()
    saved_by(executor_of(InterpretedDevice()), [random_tensor(5000), random_tensor(77), b"object"], backend)
    assert backend.moved
    for call in backend.moved:
        assert call.byte_offset % 4096 == call.nbytes % 4096 == call.address % 4096 == 0


@pytest.mark.parametrize("make_backend", [BlockFiles, DeviceFiles])
@pytest.mark.parametrize("before", [0, 1, 17, 4095])
def test_a_read_as_long_as_a_slab_from_any_byte_of_a_file_that_is_read_by_blocks(
    before: int, make_backend: Callable[[], BlockFiles | DeviceFiles]
) -> None:
    """The slab, on the host or on the device, holds up to a block more than the read is long."""
    data = random_tensor(2 * 8192, dtype=torch.uint8)
    backend = make_backend()
    backend.put("file", bytes(before) + data.numpy().tobytes() + b"after")
    request = ReadRequest(0, "file", before, torch.uint8, (1,), 0, (0,), (data.numel(),))
    check = PayloadCheck("file", before, data.nbytes, crc32(memoryview(data.numpy())), "item")
    plan = plan_load([request], [check], slab_nbytes=8192, gap_nbytes=0)
    assert {read.nbytes for read in plan.reads} == {8192}
    target = Target({0: torch.zeros_like(data)})
    executor_of(InterpretedDevice()).load(plan, target, backend.open, Stopwatch())
    assert torch.equal(target.destinations[0], data)
    assert {call.kind for call in backend.moved} == {"read"}


def test_slabs_that_cufile_does_not_register_are_used_as_they_are(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A save and a load, each with one line in the log and one in the report."""
    notes: list[str] = []
    executor = executor_of(InterpretedDevice(), notes=notes)
    executor._registers_slabs = True

    def refuse(_: object) -> None:
        raise RuntimeError("GPU memory pinning failed")

    monkeypatch.setattr("gpudcp.files.kvikio.register", refuse)
    entries = [random_tensor(3000), random_tensor(10)]
    backend = DeviceFiles()
    saved_by(executor, entries, backend)
    target = Target({n: torch.zeros(each.shape) for n, each in enumerate(entries)})
    executor.load(load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch())
    assert [target.committed[n] for n in (0, 1)] == [each.numpy().tobytes() for each in entries]
    assert executor.name == "interpret"
    assert notes == ["slabs on cpu are not registered with cuFile: GPU memory pinning failed"] * 2
    assert len(caplog.records) == 2


# --- a device that is full --------------------------------------------------------------------------------------------


class FullDevice(InterpretedDevice):
    """Has room for slabs of up to so many bytes, margins included."""

    def __init__(self, most_nbytes: int) -> None:
        self.most_nbytes = most_nbytes

    def new_slab(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.most_nbytes:
            raise torch.OutOfMemoryError("full")
        return super().new_slab(nbytes)


@pytest.fixture(autouse=True)
def _no_lanes_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_of_process, "_free", {})


def test_on_a_full_device_slabs_are_halved_and_the_file_is_the_same() -> None:
    """The plan's slabs were larger: what is written does not depend on it."""
    executor = executor_of(FullDevice(MIB + 5 * 4096), slab_nbytes=4 * MIB)
    files = Files(MemoryBackend())
    entries: list[Entry] = [random_tensor(600_000, dtype=torch.uint8), random_tensor(700_000, dtype=torch.uint8)]
    plan, source = save_of(entries, slab_nbytes=4 * MIB)
    executor.save(plan, source, files.open_writer, Stopwatch())
    assert files.content("file") == naive_file(plan.files[0], source)[0]
    assert max(call.nbytes for call in files.calls_of("write")) == MIB
    assert executor.name == "interpret"


@pytest.mark.parametrize("make_backend", [MemoryBackend, BlockFiles])
def test_without_room_the_fallback_takes_over_and_a_report_can_say_so(
    make_backend: Callable[[], MemoryBackend],
) -> None:
    """For a save and for a load: same bytes, and the names of who did it."""
    entries = [random_tensor(3000), random_tensor(10)]
    backend = make_backend()
    executor = executor_of(FullDevice(0))
    saved_by(executor, entries, backend)
    assert (executor.name, executor.checksum) == ("cpu", CpuExecutor.checksum)
    executor = executor_of(FullDevice(0))
    target = Target({n: torch.zeros(each.shape) for n, each in enumerate(entries)})
    executor.load(load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch())
    assert (executor.name, executor.checksum) == ("cpu", CpuExecutor.checksum)
    assert [target.committed[n] for n in (0, 1)] == [each.numpy().tobytes() for each in entries]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "triton"])
@pytest.mark.parametrize("place", ["new_slots", "add_parts", "write_patches", "pack_cast"])
def test_a_save_whose_device_fills_up_on_the_way_starts_over_on_the_fallback(
    place: str, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own files are gone before, its lanes too; the report can say what happened."""
    notes: list[str] = []
    executor, files = executor_of(InterpretedDevice(), notes=notes), Files(MemoryBackend())
    plan, source = save_of([random_tensor(3000), b"object", random_tensor(3000)], slab_nbytes=8192)
    expected, crcs = naive_file(plan.files[0], source)
    inner, calls = getattr(devicepacking, place), []

    def fill_up(*args: Any, **kwargs: Any) -> Any:
        calls.append(place)
        if place == "new_slots" or len(calls) == 2:
            raise error
        return inner(*args, **kwargs)

    monkeypatch.setattr(devicepacking, place, fill_up)
    receipts = executor.save(plan, Twice(source.tensors), files.open_writer, Stopwatch())
    assert (files.content("file"), receipts[0].crcs) == (expected, crcs)
    assert len(files.calls_of("create")) == 2
    assert files.nopen == 0
    assert (executor.name, executor.checksum) == ("cpu", CpuExecutor.checksum)
    assert notes == [f"the cpu executor took over: out of memory in mid-transfer: {error}"]
    assert not lanes_of_process._free


class Twice(Source):
    """May be asked again by whoever starts over."""

    def resolve(self, position: int) -> torch.Tensor:
        return self.tensors[position]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "triton"])
@pytest.mark.parametrize("nth", range(1, 5))
def test_a_load_whose_device_fills_up_on_the_way_goes_on_with_the_fallback(
    nth: int, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every item is resolved once and committed once; one that was half there keeps what it had."""
    notes: list[str] = []
    entries = [random_tensor(n, seed=n) for n in (1800, 5000, 300, 7)]
    backend = MemoryBackend()
    put_file(backend, entries)
    plan = load_plan_of(entries, slab_nbytes=8192)
    assert len(plan.reads) == 4
    target = Target({n: torch.zeros(each.shape) for n, each in enumerate(entries)})
    inner, calls = deviceunpacking.unpack, []

    def fill_up(*args: Any, **kwargs: Any) -> None:
        calls.append(nth)
        if len(calls) == nth:
            raise error
        inner(*args, **kwargs)

    monkeypatch.setattr("gpudcp.executors.deviceloading.unpack", fill_up)
    executor = executor_of(InterpretedDevice(), notes=notes)
    executor.load(plan, target, backend.open, Stopwatch())
    for kind in ("resolve", "commit"):
        assert sorted(target.positions(kind)) == [0, 1, 2, 3]
    assert [target.committed[n] for n in range(4)] == [each.numpy().tobytes() for each in entries]
    assert executor.name == "cpu"
    assert len(notes) == 1


def test_a_load_that_another_executor_ends_still_finds_what_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a payload that both of them read a part of."""
    entries = [random_tensor(5000)]
    backend = MemoryBackend()
    put_file(backend, entries)
    plan = load_plan_of(entries, slab_nbytes=8192)
    content = bytearray(backend.content("file"))
    content[plan.reads[0].byte_offset] ^= 1
    backend.put("file", bytes(content))

    def fill_up(lane: Any, read: Any, *rest: Any, **kwargs: Any) -> None:
        if read is plan.reads[1]:
            raise OUT_OF_MEMORY[0]
        inner(lane, read, *rest, **kwargs)

    inner = deviceunpacking.unpack
    monkeypatch.setattr("gpudcp.executors.deviceloading.unpack", fill_up)
    target = Target({0: torch.zeros(5000)})
    with pytest.raises(CorruptCheckpointError):
        executor_of(InterpretedDevice()).load(plan, target, backend.open, Stopwatch())
    assert not target.committed


# --- order on streams -------------------------------------------------------------------------------------------------


class Log:
    """What happened, in order, on all threads."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []
        self._guard = threading.Lock()

    def add(self, *entry: Any) -> None:
        with self._guard:
            self.entries.append(entry)

    def of(self, stream: int) -> list[tuple[Any, ...]]:
        return [entry for entry in self.entries if entry[1] == stream]


class LoggedEvent:
    def __init__(self, log: Log, stream: int, number: int) -> None:
        self._log, self.key = log, (stream, number)

    def synchronize(self) -> None:
        self._log.add("synchronize", *self.key, threading.current_thread().name)


class LoggedStream:
    def __init__(self, log: Log, number: int, inner: Stream) -> None:
        self._log, self._number, self._inner, self._nevents = log, number, inner, 0

    @contextmanager
    def current(self) -> Iterator[None]:
        self._log.add("begin", self._number)
        with self._inner.current():
            yield
        self._log.add("end", self._number)

    def wait_for_caller(self) -> None:
        self._log.add("wait for caller", self._number)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, LoggedEvent)
        self._log.add("wait for", self._number, event.key)

    def record(self) -> Event:
        self._nevents += 1
        self._log.add("record", self._number, (self._number, self._nevents))
        return LoggedEvent(self._log, self._number, self._nevents)


class LoggedDevice(InterpretedDevice):
    """Each stream logs what it is told, and each thread that is bound."""

    def __init__(self) -> None:
        self.log = Log()
        self._nstreams = 0

    def new_stream(self) -> Stream:
        self._nstreams += 1
        return LoggedStream(self.log, self._nstreams, super().new_stream())

    def bind_thread(self) -> None:
        self.log.add("bind", 0, threading.current_thread().name)


def test_packing_waits_for_the_caller_and_writing_for_the_copy() -> None:
    """Caller, then the slab before it, then work, then its end; the pool waits for that before it writes."""
    device = LoggedDevice()
    saved_by(executor_of(device, lanes=2), [random_tensor(5000)], MemoryBackend())
    turns = [entry for entry in device.log.entries if entry[0] in ("wait for caller", "wait for", "begin", "record")]
    # Three slabs in turn: packed on lanes 1, 2, 1, each after the packing before it, then copied to the host.
    first, second, third = ((1, 1), (2, 1), (1, 3))
    assert turns[:14] == [
        *[("wait for caller", 1), ("begin", 1), ("record", 1, first), ("begin", 1), ("record", 1, (1, 2))],
        *[("wait for caller", 2), ("wait for", 2, first), ("begin", 2), ("record", 2, second)],
        *[("begin", 2), ("record", 2, (2, 2))],
        *[("wait for caller", 1), ("wait for", 1, second), ("begin", 1)],
    ]
    assert ("record", 1, third) in turns
    waited = {entry[1:3] for entry in device.log.entries if entry[0] == "synchronize" and "gpudcp-write" in entry[3]}
    assert {(1, 2), (2, 2), (1, 4)} <= waited, "each copy's end, by the thread that writes"


def test_a_lane_is_not_filled_again_before_its_write_and_its_events_have_ended() -> None:
    """Whichever thread is the slower one."""
    device = LoggedDevice()
    files = Files(MemoryBackend())
    files.on_call = lambda call: device.log.add("write", 0, call.byte_offset) if call.kind == "write" else None
    plan, source = save_of([random_tensor(9000)], slab_nbytes=8192)
    executor_of(device, lanes=1).save(plan, source, files.open_writer, Stopwatch())
    events = [entry for entry in device.log.entries if entry[0] in ("write", "wait for caller")]
    assert [entry[0] for entry in events] == ["wait for caller", "write"] * (len(events) // 2)
    assert files.content("file") == naive_file(plan.files[0], source)[0]


def test_unpacking_waits_for_the_caller_and_for_the_read_before_it() -> None:
    """And items are committed when the host has waited for the end of their unpacking."""
    device = LoggedDevice()
    entries = [random_tensor(2000, seed=n) for n in range(3)]
    backend = MemoryBackend()
    put_file(backend, entries)
    target = Target({n: torch.zeros(2000) for n in range(3)})
    target.on_event = lambda kind, position: device.log.add(kind, 0, position)
    executor_of(device).load(load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch())
    streams = [entry[1] for entry in device.log.entries if entry[0] == "wait for caller"]
    assert len(streams) == 3
    records = [entry for entry in device.log.entries if entry[0] == "record"][:3]
    waits = [entry for entry in device.log.entries if entry[0] == "wait for"]
    assert [entry[2] for entry in waits] == [entry[2] for entry in records[:2]]
    for position, record in enumerate(records):
        synchronized = next(
            n for n, e in enumerate(device.log.entries) if e[0] == "synchronize" and e[1:3] == record[2]
        )
        assert synchronized < device.log.entries.index(("commit", 0, position))
        resolved = device.log.entries.index(("resolve", 0, position))
        assert resolved < [n for n, e in enumerate(device.log.entries) if e[0] == "wait for caller"][position]


def test_threads_that_wait_for_events_are_bound_to_the_device() -> None:
    """Else the first of their calls makes a context on device 0."""
    device = LoggedDevice()
    backend = MemoryBackend()
    saved_by(executor_of(device), [random_tensor(5000)], backend)
    bound = {entry[2] for entry in device.log.entries if entry[0] == "bind"}
    waiting = {entry[3] for entry in device.log.entries if entry[0] == "synchronize" and "gpudcp" in entry[3]}
    assert waiting
    assert waiting <= bound


# --- errors, and what they leave --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["source", "file", "device"])
def test_a_save_that_fails_leaves_its_lanes_usable_and_idle(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first error is raised, all that streams were given has ended, and the next save is right."""
    device, files = LoggedDevice(), Files(MemoryBackend())
    executor = executor_of(device)
    entries: list[Entry] = [random_tensor(3000), random_tensor(3000)]
    plan, source = save_of(entries, slab_nbytes=8192)

    def fail(*_: object, **__: object) -> None:
        raise ValueError(place)

    with monkeypatch.context() as patch:
        if place == "source":
            del source.tensors[1]
        elif place == "file":
            files.on_call = lambda call: fail() if call.kind == "write" and call.byte_offset else None
        else:
            patch.setattr("gpudcp.executors.devicepacking.write_patches", fail)
        with pytest.raises(KeyError if place == "source" else ValueError):
            executor.save(plan, source, files.open_writer, Stopwatch())
    assert files.running == files.nopen == 0
    assert files.names() == []
    check_idle(device)
    files.on_call = lambda _: None
    saved_by(executor, entries, MemoryBackend())
    assert device._nstreams == 2, "the same lanes"


@pytest.mark.parametrize("place", ["target", "file", "device", "checksum"])
def test_a_load_that_fails_leaves_its_lanes_usable_and_idle(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may still be writing into a destination when the caller hears of it."""
    device, files = LoggedDevice(), Files(MemoryBackend())
    executor = executor_of(device)
    entries = [random_tensor(1800, seed=n) for n in range(4)]
    plan, source = save_of(entries, slab_nbytes=8192)
    content = bytearray(naive_file(plan.files[0], source)[0])
    files.put("file", bytes(content))
    load_plan = load_plan_of(entries, slab_nbytes=8192)
    target = Target({n: torch.zeros(1800) for n in range(4)})

    def fail(*_: object, **__: object) -> None:
        raise ValueError(place)

    with monkeypatch.context() as patch:
        if place == "target":
            target.on_event = lambda kind, position: fail() if (kind, position) == ("resolve", 2) else None
        elif place == "file":
            last = load_plan.reads[-1].byte_offset
            files.on_call = lambda call: fail() if call.kind == "read" and call.byte_offset == last else None
        elif place == "device":
            patch.setattr("gpudcp.executors.deviceloading.unpack", fail)
        else:
            content[load_plan.checks[1].payload_offset] ^= 1
            files.put("file", bytes(content))
        with pytest.raises(CorruptCheckpointError if place == "checksum" else ValueError):
            executor.load(load_plan, target, files.open_reader, Stopwatch())
    assert files.running == 0
    assert 3 not in target.committed
    check_idle(device)
    files.on_call = lambda _: None
    put_file(files, entries)  # type: ignore[arg-type]
    again = Target({n: torch.zeros(1800) for n in range(4)})
    executor.load(load_plan, again, files.open_reader, Stopwatch())
    assert [again.committed[n] for n in range(4)] == [each.numpy().tobytes() for each in entries]
    assert device._nstreams == 2, "the same lanes"


def check_idle(device: LoggedDevice) -> None:
    """On every stream the last thing begun was recorded after it, and waited for."""
    for stream in range(1, device._nstreams + 1):
        log = device.log.of(stream)
        begun = max((n for n, entry in enumerate(log) if entry[0] == "begin"), default=-1)
        recorded = [n for n, entry in enumerate(log) if entry[0] == "record" and n > begun]
        assert recorded, "the end of the last work"
        key = log[recorded[-1]][2]
        assert [entry for entry in log[recorded[-1] :] if entry[0] == "synchronize" and entry[1:3] == key]
    for lanes in lanes_of_process._free.values():
        assert all(lane.event is lane.future is None and not lane.kept for lane in lanes)


def test_transfers_of_several_threads_do_not_disturb_each_other() -> None:
    """They have lanes of their own, and take turns with what there is one of."""
    entries = [[random_tensor(2000, seed=n), random_tensor(300, seed=n)] for n in range(3)]
    executor = _interpreted(lanes=2, threads=2, slab_nbytes=8192, has_checksum=True)

    def transfer(own: list[torch.Tensor]) -> None:
        backend = MemoryBackend()
        saved_by(executor, own, backend)  # type: ignore[arg-type]
        target = Target({n: torch.zeros(each.shape) for n, each in enumerate(own)})
        executor.load(load_plan_of(own, slab_nbytes=8192), target, backend.open, Stopwatch())
        assert [target.committed[n] for n in range(2)] == [each.numpy().tobytes() for each in own]

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(transfer, entries))
    assert [len(kept) for kept in lanes_of_process._free.values()] == [2]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_only_the_tensors_of_the_ring_are_alive_at_once() -> None:
    """A planner that makes its tensors when asked does not have them all in memory."""
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []

    class Making(Source):
        def resolve(self, position: int) -> torch.Tensor:
            memory = super().resolve(position).numpy().copy()
            tensor = torch.from_numpy(memory)  # keeps the array, through whatever views are made of it
            made.append(weakref.ref(memory))
            del memory
            alive.append(sum(each() is not None for each in made))
            return tensor

    shared = random_tensor(1500)
    plan, source = save_of([shared] * 12, slab_nbytes=8192)
    backend = MemoryBackend()
    executor_of(InterpretedDevice()).save(plan, Making(source.tensors), backend.create, Stopwatch())
    assert backend.content("file") == naive_file(plan.files[0], source)[0]
    assert max(alive) <= 6, "of 12: those of two slabs in flight and the one that is packed"


def test_a_short_file_is_a_transfer_error() -> None:
    """From device files as from others."""
    entries = [random_tensor(3000)]
    backend = DeviceFiles()
    put_file(backend, entries)
    backend.put("file", backend.content("file")[:5000])
    target = Target({0: torch.zeros(3000)})
    with pytest.raises(TransferError):
        executor_of(InterpretedDevice()).load(
            load_plan_of(entries, slab_nbytes=8192), target, backend.open, Stopwatch()
        )
    assert not target.committed


# --- what a report says ----------------------------------------------------------------------------------------------


def test_every_kernel_of_a_save_and_a_load_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scatter, pack, checksum, patches; checksum, unpack."""
    launched: set[Any] = set()
    monkeypatch.setattr(compiling, "_launched", {torch.device("cpu"): launched})
    executor = _interpreted(lanes=1, threads=1, slab_nbytes=65536, has_checksum=True)
    tensors = [random_tensor(10_000), random_tensor(5, dtype=torch.uint8)]
    backend = MemoryBackend()
    saved_by(executor, tensors, backend)  # type: ignore[arg-type]
    assert {each[0] if isinstance(each, tuple) else each for each in launched} == {"pack", "checksum", "patch"}
    assert {each for each in launched if isinstance(each, tuple) and each[:2] == ("pack", torch.uint8)}
    launched.clear()
    target = Target({n: torch.zeros_like(tensor) for n, tensor in enumerate(tensors)})
    executor.load(load_plan_of(tensors, slab_nbytes=65536), target, backend.open, Stopwatch())
    assert {each[0] for each in launched if isinstance(each, tuple)} == {"checksum", "unpack"}


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.float32), (torch.float32, torch.int64)])
def test_the_last_of_tied_destinations_wins_whoever_casts(tmp_path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    """A cast that the rule leaves to torch comes in its turn among those of the kernels."""
    saved = {"a": torch.arange(3).to(dtypes[0]), "b": torch.arange(3).to(dtypes[1]) * 10}
    dcp.save(saved, checkpoint_id=tmp_path)
    for executor in ("cpu", "interpret"):
        tied = torch.zeros(3)
        gpudcp.load({"a": tied, "b": tied}, tmp_path, options=gpudcp.Options(executor=executor))  # type: ignore[arg-type]
        assert tied.tolist() == saved["b"].tolist()


@pytest.mark.parametrize("executor", ["cpu", "interpret"])
def test_the_callers_modes_and_defaults_change_nothing(tmp_path: Path, executor: Any) -> None:
    """Inference mode, which ends before the next transfer, and a default device, which host memory must not follow."""
    options = gpudcp.Options(executor=executor, slab_nbytes=4096)
    saved = {"a": torch.arange(3000.0), "bf16": torch.arange(70).bfloat16().view(7, 10).t(), "b": torch.tensor(3.0)}
    places = {name: torch.zeros_like(each) for name, each in saved.items()}
    with torch.inference_mode():
        gpudcp.save(dict(saved), tmp_path, options=options)
    with torch.device("meta"):
        gpudcp.save(dict(saved), tmp_path, options=options)
        gpudcp.load(dict(places), tmp_path, options=options)
        gpudcp.async_save(dict(saved), tmp_path / "later", options=options).result()
    for directory in (tmp_path, tmp_path / "later"):
        found = {name: torch.zeros_like(each) for name, each in saved.items()}
        gpudcp.load(found, directory, options=options)
        assert all(torch.equal(found[name], each) for name, each in saved.items())
    assert all(torch.equal(places[name], each) for name, each in saved.items())


def test_a_tensor_is_kept_until_the_device_has_packed_it() -> None:
    """A planner may give one that nobody else holds, whose memory would be another's by then."""

    class Checked(InterpretedDevice):
        def new_stream(self) -> Any:
            return StreamOfEvents()

    given: list[weakref.ref[Any]] = []
    alive: list[int] = []

    class StreamOfEvents:
        def current(self) -> Any:
            return nullcontext()

        def wait_for_caller(self) -> None:
            pass

        def wait_for(self, event: Event) -> None:
            pass

        def record(self) -> Any:
            return EventOfPacking(len(given))

    class EventOfPacking:
        def __init__(self, count: int) -> None:
            self.count = count

        def synchronize(self) -> None:
            alive.append(sum(each() is not None for each in given[: self.count]))

    class Fresh(Source):
        def resolve(self, position: int) -> torch.Tensor:
            memory = self.tensors[position].numpy().copy()
            given.append(weakref.ref(memory))
            return torch.from_numpy(memory)

    entries = [random_tensor(1500, seed=number) for number in range(6)]
    plan, source = save_of(entries, slab_nbytes=8192)
    fresh = Fresh(source.tensors)
    backend = MemoryBackend()
    executor_of(Checked(), lanes=1).save(plan, fresh, backend.create, Stopwatch())
    assert backend.content("file") == naive_file(plan.files[0], source)[0]
    assert alive[0] == 2, (
        "the first slab has all of one tensor, which nothing else needs any more, and a part of another"
    )
    assert not any(each() is not None for each in given)


def test_what_the_host_packs_takes_little_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is copied there in pieces, in one where that is enough."""
    monkeypatch.setattr(devicepacking, "_SCATTER_NBYTES", 1000)
    copied: list[int] = []

    class Counting(MixedDevice):
        def on_device(self, data: torch.Tensor) -> torch.Tensor:
            copied.append(data.nbytes)
            return super().on_device(data)

    entries = [
        placed(random_tensor(600), is_on_device=False),
        placed(random_tensor(500, seed=1), is_on_device=True),
        *(torch.tensor(float(step)) for step in range(20)),
    ]
    plan, source = save_of(entries, slab_nbytes=16384)
    backend = MemoryBackend()
    executor_of(Counting(), slab_nbytes=16384).save(plan, source, backend.create, Stopwatch())
    assert backend.content("file") == naive_file(plan.files[0], source)[0]
    assert max(copied) == 1000 < sum(copied)


def test_after_an_error_a_load_lets_go_of_its_lanes() -> None:
    """Whoever takes over may need the memory."""
    tensors = [random_tensor(10_000)]
    plan = load_plan_of(tensors, slab_nbytes=65536)
    load = DeviceLoad(plan, Target({0: torch.zeros_like(tensors[0])}), [InterpretedDevice()], Stopwatch())
    load._free = {torch.device("cpu"): [object()]}  # type: ignore[list-item]
    assert load.rest().reads == plan.reads
    assert [*load._free, *load._reading, *load._unpacking, *load._unpacked] == []
