"""The device executor over several devices: a ring of lanes on each, one thread, the cpu executor's bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from executor_fakes import (
    OUT_OF_MEMORY,
    DeviceFiles,
    Entry,
    Files,
    MemoryBackend,
    OneOfSeveral,
    Source,
    Target,
    naive_file,
    naive_payload,
    random_tensor,
    save_of,
)
from executor_rings import executor_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.boxes import row_major_strides
from gpudcp.chunkplan.load import LoadChunkPlan, PayloadCheck, ReadRequest, plan_load
from gpudcp.chunkplan.save import ChunkWrite, SaveChunkPlan
from gpudcp.errors import CorruptCheckpointError
from gpudcp.executors import devicepacking, deviceunpacking
from gpudcp.executors import lanes as lanes_of_process
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.cuda import DeviceExecutor
from gpudcp.formats.checksum import crc32
from gpudcp.report import Stopwatch

MIB = 1 << 20
PATHS = ["first", "second", "third"]


@pytest.fixture(autouse=True)
def _no_lanes_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_of_process, "_free", {})


def devices_of(count: int) -> list[OneOfSeveral]:
    return [OneOfSeveral(number) for number in range(count)]


def grouped(
    entries: Sequence[Entry], groups: Sequence[int], *, slab_nbytes: int = 8192
) -> tuple[SaveChunkPlan, Source]:
    """The plan that writes the entries, those of each group into a file of its own, and their source."""
    return save_of(entries, slab_nbytes=slab_nbytes, path=PATHS[0], more_paths=PATHS[1:], groups=groups)


def check_saved(
    executor: DeviceExecutor, plan: SaveChunkPlan, source: Source, backend: Any, again: Callable[[], Source]
) -> None:
    """Save, and compare with the naive reference and with the cpu executor's files of the same plan."""
    receipts = executor.save(plan, source, backend.create, Stopwatch())
    by_cpu = MemoryBackend()
    expected = CpuExecutor(lanes=2, threads=2, slab_nbytes=8192, has_checksum=True).save(
        plan, again(), by_cpu.create, Stopwatch()
    )
    assert receipts == expected
    assert backend.names() == by_cpu.names()
    for file, receipt in zip(plan.files, receipts, strict=True):
        content, crcs = naive_file(file, source)
        assert backend.content(file.path) == by_cpu.content(file.path) == content
        assert receipt.crcs == crcs


def mixed(devices: Sequence[OneOfSeveral], *, last: int) -> tuple[list[Entry], list[int]]:
    """Tensors of the first and the last device, of the host and of no element; casts; objects."""
    first, other = devices[0], devices[last]
    entries: list[tuple[Entry, int]] = [
        (first.place(random_tensor(3000)), 0),
        (other.place(random_tensor(5000, seed=1)), last),
        (b"an object", 0),
        (random_tensor(700, seed=2), 0),
        (other.place(random_tensor(0)), last),
        ((other.place(torch.arange(900) / 7), torch.bfloat16), last),
        ((torch.arange(40) / 7, torch.float64), 0),
        (first.place(random_tensor(30, 20, seed=5)).t(), 0),
        (random_tensor(100, seed=6), last),
        (first.place(random_tensor(100, seed=7)), last),
    ]
    return [entry for entry, _ in entries], [group for _, group in entries]


# --- saves ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_device_files", [False, True], ids=["host files", "device files"])
def test_each_file_is_packed_by_the_lanes_of_its_own_device(has_device_files: bool) -> None:
    """Of three devices, of which one has nothing to save and takes no memory; what is elsewhere goes by the host."""
    devices = devices_of(3)
    entries, groups = mixed(devices, last=2)
    plan, source = grouped(entries, groups)
    assert [(file.path, file.group) for file in plan.files] == [("first", 0), ("third", 2)]
    backend = DeviceFiles() if has_device_files else MemoryBackend()
    files = Files(backend)
    create = backend.create if has_device_files else files.open_writer
    executor = executor_of(*devices)
    receipts = executor.save(plan, source, create, Stopwatch())
    for file, receipt in zip(plan.files, receipts, strict=True):
        assert (backend.content(file.path), receipt.crcs) == naive_file(file, source)
    calls = backend.moved if isinstance(backend, DeviceFiles) else files.calls_of("write")
    assert {call.path for call in calls} == {"first", "third"}
    for call in calls:
        owner = {"first": 0, "third": 2}[call.path]
        assert [device.holds(call.address) for device in devices] == [number == owner for number in range(3)]
    assert {str(key[0]): len(lanes) for key, lanes in lanes_of_process._free.items()} == {"cpu:0": 2, "cpu:2": 2}
    assert executor.name == "interpret"


def test_the_files_are_the_cpu_executors() -> None:
    """Of the same plan, byte for byte."""
    devices = devices_of(2)
    entries, groups = mixed(devices, last=1)
    plan, source = grouped(entries, groups)
    check_saved(executor_of(*devices), plan, source, MemoryBackend(), lambda: grouped(entries, groups)[1])


@given(
    wanted=st.lists(
        st.tuples(st.integers(0, 2), st.integers(-1, 2), st.integers(0, 3000), st.booleans()), min_size=1, max_size=6
    ),
    lanes=st.integers(1, 3),
    threads=st.integers(1, 2),
)
@settings(deadline=None, max_examples=10)
def test_any_division_among_devices_is_saved(
    wanted: list[tuple[int, int, int, bool]], lanes: int, threads: int
) -> None:
    """Whatever is in whichever group: on its device, on another one, on the host, an object."""
    devices = devices_of(3)
    entries: list[Entry] = []
    for _, place, numel, is_object in wanted:
        tensor = random_tensor(numel)
        entries.append(bytes(numel) if is_object else tensor if place < 0 else devices[place].place(tensor))
    groups = [group for group, *_ in wanted]
    plan, source = grouped(entries, groups)
    executor = executor_of(*devices, lanes=lanes, threads=threads)
    check_saved(executor, plan, source, MemoryBackend(), lambda: grouped(entries, groups)[1])


def test_files_of_several_devices_grow_at_one_pace() -> None:
    """Each with one lane: no device waits for another one's file to be finished."""
    devices = devices_of(2)
    entries: list[Entry] = [device.place(random_tensor(12_000)) for device in devices]
    plan, source = grouped(entries, [0, 1])
    files = Files(MemoryBackend())
    executor_of(*devices, lanes=1, threads=1).save(plan, source, files.open_writer, Stopwatch())
    turns = [(call.path, call.byte_offset) for call in files.calls_of("write")]
    assert turns == [(path, 8192 * slab) for slab in range(len(turns) // 2) for path in PATHS[:2]]


class Reusing(Source):
    """Gives what it is asked for in one piece of memory of each device."""

    def __init__(self, tensors: dict[int, torch.Tensor], memory: Sequence[torch.Tensor], groups: Sequence[int]) -> None:
        super().__init__(tensors, keeps_memory=False)
        self._memory, self._groups = memory, groups

    def resolve(self, position: int) -> torch.Tensor:
        tensor = super().resolve(position)
        for memory in self._memory:
            memory.fill_(0xA5)
        scratch = self._memory[self._groups[position]][: tensor.nbytes]
        return scratch.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def test_a_source_that_reuses_its_memory_is_asked_file_by_file() -> None:
    """Though the files are of two devices."""
    devices = devices_of(2)
    memory = [device.place(torch.zeros(20_000, dtype=torch.uint8)) for device in devices]
    groups = [0, 1, 0, 1, 1]
    entries: list[Entry] = [random_tensor(n, seed=n) for n in (1000, 5000, 5000, 700, 300)]
    plan, source = grouped(entries, groups)
    reusing = Reusing(source.tensors, memory, groups)
    backend = MemoryBackend()
    executor_of(*devices).save(plan, reusing, backend.create, Stopwatch())
    for file in plan.files:
        assert backend.content(file.path) == naive_file(file, source)[0]
    assert reusing.resolved == [0, 2, 1, 3, 4]


# --- loads ------------------------------------------------------------------------------------------------------------


def load_of(entries: Sequence[torch.Tensor], backend: MemoryBackend, *, slab_nbytes: int = 8192) -> LoadChunkPlan:
    """One file with the tensors, one after the other, and the plan that reads them, each checked."""
    plan, source = save_of(entries, slab_nbytes=slab_nbytes)
    (file,) = plan.files
    backend.put(file.path, naive_file(file, source)[0])
    requests, checks = [], []
    for write in file.writes:
        assert isinstance(write, ChunkWrite)
        sizes, position, start = tuple(write.sizes), write.position, write.payload_offset
        strides, origin = row_major_strides(sizes), (0,) * len(sizes)
        requests.append(ReadRequest(position, file.path, start, write.dtype, strides, 0, origin, sizes))
        data = naive_payload(entries[position], write.dtype)
        checks.append(PayloadCheck(file.path, start, len(data), crc32(memoryview(data)), f"item.{position}"))
    return plan_load(requests, checks, slab_nbytes=slab_nbytes, gap_nbytes=4096)


def target_of(entries: Sequence[torch.Tensor], devices: Sequence[OneOfSeveral | None]) -> Target:
    """Empty destinations on these devices, None: on the host, where the target knows them to be."""
    blank = {n: torch.zeros_like(each) for n, each in enumerate(entries)}
    return Target(
        {n: each if (device := devices[n]) is None else device.place(each) for n, each in blank.items()},
        known_devices={n: device.torch_device for n, device in enumerate(devices) if device is not None},
    )


def check_loaded(target: Target, entries: Sequence[torch.Tensor]) -> None:
    """Everything was resolved once, in the order of the file, and committed once, with the right bytes."""
    for kind in ("resolve", "commit"):
        assert target.positions(kind) == list(range(len(entries)))
    assert [target.committed[n] for n in range(len(entries))] == [each.numpy().tobytes() for each in entries]


@pytest.mark.parametrize("has_device_files", [False, True], ids=["host files", "device files"])
@pytest.mark.parametrize(("lanes", "threads"), [(1, 1), (3, 2)])
def test_a_read_goes_to_the_device_of_most_of_its_bytes(has_device_files: bool, lanes: int, threads: int) -> None:
    """And nothing waits for ever, whichever device's turn it is; what is elsewhere goes by the host."""
    a, b = devices = devices_of(2)
    owners = [a, a, b, None, a, b, b, None, None, b, a]
    lengths = [2000, 300, 1500, 100, 4000, 900, 900, 1900, 100, 1000, 1000]
    entries = [random_tensor(n, seed=number) for number, n in enumerate(lengths)]
    backend = DeviceFiles() if has_device_files else MemoryBackend()
    plan = load_of(entries, backend)
    target = target_of(entries, owners)
    files = Files(backend)
    open_file = backend.open if has_device_files else files.open_reader
    executor_of(*devices, lanes=lanes, threads=threads).load(plan, target, open_file, Stopwatch())
    check_loaded(target, entries)
    calls = backend.moved if isinstance(backend, DeviceFiles) else files.calls_of("read")
    expected = []
    for read in plan.reads:
        nbytes = {device: sum(c.nbytes for c in read.chunks if owners[c.position] is device) for device in devices}
        expected.append(int(nbytes[b] > nbytes[a]) if any(nbytes.values()) else expected[-1])
    assert 0 < sum(expected) < len(expected)
    first_bytes = [read.byte_offset // 4096 * 4096 if has_device_files else read.byte_offset for read in plan.reads]
    found = [(call.byte_offset, *(device.holds(call.address) for device in devices)) for call in calls]
    owned = [(first, owner == 0, owner == 1) for first, owner in zip(first_bytes, expected, strict=True)]
    assert sorted(found) == sorted(owned)


def test_the_bytes_that_count_are_those_of_the_elements() -> None:
    """Not those of the gaps between them: two columns of a row-major table span the same bytes."""
    a, b = devices = devices_of(2)
    table = random_tensor(20, 30)
    backend = MemoryBackend()
    plan, source = save_of([table], slab_nbytes=8192)
    backend.put("file", naive_file(plan.files[0], source)[0])
    (write,) = plan.files[0].writes
    assert isinstance(write, ChunkWrite)
    requests = [
        ReadRequest(number, "file", write.payload_offset, table.dtype, (30, 1), 0, (0, start), (20, stop - start))
        for number, (start, stop) in enumerate([(0, 1), (1, 30)])
    ]
    read_plan = plan_load(requests, [], slab_nbytes=8192, gap_nbytes=4096)
    assert len(read_plan.reads) == 1
    target = target_of([table[:, :1].contiguous(), table[:, 1:].contiguous()], [a, b])
    executor_of(*devices).load(read_plan, target, backend.open, Stopwatch())
    assert torch.equal(target.destinations[0].view(torch.int32), table[:, :1].view(torch.int32))
    assert torch.equal(target.destinations[1].view(torch.int32), table[:, 1:].view(torch.int32))
    assert {str(device) for device, _ in lanes_of_process._free} == {"cpu:1"}


def test_what_is_not_known_before_goes_to_the_first_device() -> None:
    """A planner that is asked for each destination may have them anywhere."""
    devices = devices_of(2)
    entries = [random_tensor(1500, seed=n) for n in range(4)]
    backend = MemoryBackend()
    plan = load_of(entries, backend)
    target = target_of(entries, [devices[n % 2] for n in range(4)])
    target.known_devices.clear()
    executor_of(*devices).load(plan, target, backend.open, Stopwatch())
    check_loaded(target, entries)
    assert {str(device) for device, _ in lanes_of_process._free} == {"cpu:0"}


def test_with_one_device_nobody_is_asked_for_it() -> None:
    """There is nothing to choose, and 20,000 destinations to ask of."""

    class Silent(Target):
        def device_of(self, position: int) -> torch.device | None:
            raise AssertionError(position)

    entries = [random_tensor(500)]
    backend = MemoryBackend()
    plan = load_of(entries, backend)
    target = Silent({0: torch.zeros(500)})
    executor_of(OneOfSeveral(0)).load(plan, target, backend.open, Stopwatch())
    check_loaded(target, entries)


@pytest.mark.parametrize("goes_by_host_first", [True, False])
def test_the_last_read_wins_where_tied_destinations_get_their_bytes_by_two_ways(goes_by_host_first: bool) -> None:
    """Out of a read of their own device, by a kernel, and out of one of another device, by the host."""
    a, b = devices = devices_of(2)
    by_host = [(1300, a), (400, b)]  # in one read, which goes to a
    by_kernel = [(400, b), (1300, b)]
    order = by_host + by_kernel if goes_by_host_first else by_kernel[::-1] + by_host[::-1]
    entries = [random_tensor(n, seed=number) for number, (n, _) in enumerate(order)]
    backend = MemoryBackend()
    plan = load_of(entries, backend)
    assert [{c.position for c in read.chunks} for read in plan.reads] == [{0, 1}, {2, 3}]
    target = target_of(entries, [device for _, device in order])
    target.destinations[2] = target.destinations[1]
    executor_of(*devices, lanes=2).load(plan, target, backend.open, Stopwatch())
    assert torch.equal(target.destinations[1].view(torch.int32), entries[2].view(torch.int32))
    assert target.positions("commit") == [0, 1, 2, 3]


def test_a_corrupt_payload_is_found_on_whichever_device() -> None:
    """Though a part of it was unpacked on another one."""
    devices = devices_of(2)
    entries = [random_tensor(1500), random_tensor(5000, seed=1)]
    backend = MemoryBackend()
    plan = load_of(entries, backend)
    content = bytearray(backend.content("file"))
    content[plan.checks[1].payload_offset + 19_999] ^= 1
    backend.put("file", bytes(content))
    target = target_of(entries, devices)
    with pytest.raises(CorruptCheckpointError, match=r"item\.1"):
        executor_of(*devices).load(plan, target, backend.open, Stopwatch())
    assert set(target.committed) == {0}


# --- a device that is full --------------------------------------------------------------------------------------------


def test_only_the_full_device_has_smaller_slabs() -> None:
    """The file of the other one is written in slabs of the length that was asked for."""
    devices = [OneOfSeveral(0), OneOfSeveral(1, most_nbytes=MIB + 5 * 4096)]
    entries: list[Entry] = [device.place(random_tensor(2_500_000, dtype=torch.uint8)) for device in devices]
    plan, source = grouped(entries, [0, 1], slab_nbytes=2 * MIB)
    files = Files(MemoryBackend())
    executor = executor_of(*devices, slab_nbytes=2 * MIB)
    executor.save(plan, source, files.open_writer, Stopwatch())
    for file in plan.files:
        assert files.content(file.path) == naive_file(file, source)[0]
    longest = {path: max(call.nbytes for call in files.calls_of("write") if call.path == path) for path in PATHS[:2]}
    assert longest == {"first": 2 * MIB, "second": MIB}
    assert executor.name == "interpret"


def test_where_one_device_has_no_room_the_fallback_moves_everything() -> None:
    """A save and a load; the report names the device and quotes it, and no lane is kept."""
    devices = [OneOfSeveral(0), OneOfSeveral(1, most_nbytes=0)]
    entries = [devices[0].place(random_tensor(3000)), devices[1].place(random_tensor(2500))]
    plan, source = grouped(entries, [0, 1])
    notes: list[str] = []
    backend = MemoryBackend()
    executor = executor_of(*devices, notes=notes)
    executor.save(plan, source, backend.create, Stopwatch())
    for file in plan.files:
        assert backend.content(file.path) == naive_file(file, source)[0]
    load_plan = load_of(entries, backend)
    target = target_of(entries, devices)
    executor_of(*devices, notes=notes).load(load_plan, target, backend.open, Stopwatch())
    check_loaded(target, entries)
    assert notes == ["the cpu executor took over: no room for slabs on cpu:1: full"] * 2
    assert executor.name == "cpu"
    assert not lanes_of_process._free


def test_a_device_without_room_that_has_nothing_to_do_is_not_asked() -> None:
    """Neither by a save nor by a load."""
    devices = [OneOfSeveral(0), OneOfSeveral(1, most_nbytes=0)]
    entries = [devices[0].place(random_tensor(300))]
    backend = MemoryBackend()
    executor = executor_of(*devices)
    plan, source = grouped(entries, [0])
    executor.save(plan, source, backend.create, Stopwatch())
    target = target_of(entries, devices)
    executor.load(load_of(entries, backend), target, backend.open, Stopwatch())
    check_loaded(target, entries)
    assert executor.name == "interpret"


@pytest.mark.parametrize("is_first", [True, False])
def test_reads_for_the_host_alone_go_to_a_device_that_has_others(is_first: bool) -> None:
    """To the one with room: the first one has none, and none of the bytes."""
    devices = [OneOfSeveral(0, most_nbytes=0), OneOfSeveral(1)]
    owners = [None, None, devices[1]] if is_first else [devices[1], None, None]
    entries = [random_tensor(1900, seed=number) for number in range(3)]
    backend = MemoryBackend()
    plan = load_of(entries, backend)
    assert len(plan.reads) == 3
    target = target_of(entries, owners)
    notes: list[str] = []
    executor_of(*devices, notes=notes).load(plan, target, backend.open, Stopwatch())
    check_loaded(target, entries)
    assert notes == []
    assert {str(device) for device, _ in lanes_of_process._free} == {"cpu:1"}


class Twice(Source):
    """May be asked again by whoever starts over."""

    def resolve(self, position: int) -> torch.Tensor:
        return self.tensors[position]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["torch", "triton"])
@pytest.mark.parametrize("place", ["new_slots", "add_parts", "pack_cast"])
def test_a_save_starts_over_where_the_second_device_fills_up(
    place: str, error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of both devices are written anew, by the fallback, and neither device keeps a lane."""
    devices = devices_of(2)
    entries, groups = mixed(devices, last=1)
    plan, source = grouped(entries, groups)
    inner, files, notes = getattr(devicepacking, place), Files(MemoryBackend()), []
    calls: list[str] = []

    def fill_up(*args: Any, **kwargs: Any) -> Any:
        slabs = [each for each in args if isinstance(each, torch.Tensor) and each.dtype == torch.uint8]
        if torch.device("cpu", 1) in args or any(devices[1].holds(slab.data_ptr()) for slab in slabs):
            calls.append(place)
            raise error
        return inner(*args, **kwargs)

    monkeypatch.setattr(devicepacking, place, fill_up)
    executor = executor_of(*devices, notes=notes)
    receipts = executor.save(plan, Twice(source.tensors), files.open_writer, Stopwatch())
    for file, receipt in zip(plan.files, receipts, strict=True):
        assert (files.content(file.path), receipt.crcs) == naive_file(file, source)
    assert calls == [place]
    assert len(files.calls_of("create")) == 4
    assert files.nopen == 0
    assert notes == [f"the cpu executor took over: out of memory in mid-transfer: {error}"]
    assert not lanes_of_process._free


@pytest.mark.parametrize("nth", range(1, 4))
def test_a_load_goes_on_where_the_second_device_fills_up(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what neither device has finished: every item is resolved once and committed once."""
    devices = devices_of(2)
    a, b = devices
    owners = [a, b, a, b, b, None, a]
    lengths = (1800, 1800, 5000, 300, 5000, 600, 7)
    entries = [random_tensor(n, seed=number) for number, n in enumerate(lengths)]
    backend = MemoryBackend()
    plan = load_of(entries, backend)
    target = target_of(entries, owners)
    inner, calls = deviceunpacking.unpack, []

    def fill_up(lane: Any, *args: Any, **kwargs: Any) -> None:
        if lane.device is b:
            calls.append(nth)
            if len(calls) == nth:
                raise OUT_OF_MEMORY[0]
        inner(lane, *args, **kwargs)

    monkeypatch.setattr("gpudcp.executors.deviceloading.unpack", fill_up)
    notes: list[str] = []
    executor = executor_of(*devices, notes=notes)
    executor.load(plan, target, backend.open, Stopwatch())
    assert len(calls) == nth
    check_loaded(target, entries)
    assert notes == [f"the cpu executor took over: out of memory in mid-transfer: {OUT_OF_MEMORY[0]}"]


@pytest.mark.parametrize("second", [0, 1])
def test_an_error_on_one_device_leaves_the_lanes_of_all_idle(second: int) -> None:
    """The first error is raised, no file is left, and the next save has the same lanes."""
    devices = devices_of(2)
    entries, groups = mixed(devices, last=1)
    plan, source = grouped(entries, groups)
    files = Files(MemoryBackend())
    executor = executor_of(*devices)

    def fail(call: Any) -> None:
        if (call.kind, call.path) == ("write", PATHS[second]):
            raise OSError("disk")

    files.on_call = fail
    with pytest.raises(OSError, match="disk"):
        executor.save(plan, source, files.open_writer, Stopwatch())
    assert files.running == files.nopen == 0
    assert files.names() == []
    kept = {id(lane) for lanes in lanes_of_process._free.values() for lane in lanes}
    assert len(kept) == 4
    for lanes in lanes_of_process._free.values():
        assert all(lane.event is lane.future is None and not lane.kept for lane in lanes)
    check_saved(executor, plan, grouped(entries, groups)[1], MemoryBackend(), lambda: grouped(entries, groups)[1])
    assert {id(lane) for lanes in lanes_of_process._free.values() for lane in lanes} == kept
