"""Lanes: taken, bounded, given back, and never with anything in flight."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES

from gpudcp.executors import lanes as lanes_of_process
from gpudcp.executors.devices import Event, InterpretedDevice
from gpudcp.executors.lanes import MARGIN_NBYTES, SPARE_NBYTES, Lane, NoRoomError, acquired, give_up_idle
from gpudcp.files import kvikio

MIB = 1 << 20
MANY = 1 << 40
"""Bytes for as many lanes as there may be."""


class RecordingEvent:
    """Remembers that somebody waited."""

    def __init__(self) -> None:
        self.is_passed = False

    def synchronize(self) -> None:
        self.is_passed = True


class RecordingStream:
    """Remembers the events that it gave."""

    def __init__(self) -> None:
        self.events: list[RecordingEvent] = []

    def current(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def wait_for_caller(self) -> None:
        pass

    def wait_for(self, event: Event) -> None:
        pass

    def record(self) -> Event:
        self.events.append(RecordingEvent())
        return self.events[-1]


class SmallDevice(InterpretedDevice):
    """A device with room for so many bytes of slabs."""

    def __init__(self, room_nbytes: int = 1 << 40) -> None:
        self.room_nbytes = room_nbytes
        self.made: list[int] = []

    def new_slab(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.room_nbytes:
            raise torch.OutOfMemoryError("no room")
        self.room_nbytes -= nbytes
        self.made.append(nbytes)
        return super().new_slab(nbytes)

    def new_stream(self) -> RecordingStream:
        return RecordingStream()


class FilledDevice(SmallDevice):
    """A device that says in turn how much is free, and after that has plenty."""

    free: tuple[int, ...] = ()

    def free_nbytes(self) -> int:
        first, *rest = self.free or (1 << 40,)
        self.free = tuple(rest)
        return first


@pytest.fixture(autouse=True)
def _no_lanes_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_of_process, "_free", {})


def test_lanes_are_kept_for_the_next_transfer() -> None:
    """The second one allocates nothing."""
    device = SmallDevice()
    with acquired(device, 3, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as first:
        assert len({id(lane) for lane in first}) == 3
    with acquired(device, 3, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as second:
        assert {id(lane) for lane in second} == {id(lane) for lane in first}
    assert len(device.made) == 3


def test_transfers_at_once_have_lanes_of_their_own_and_only_those_of_one_are_kept() -> None:
    """Memory that is kept does not grow with the most that ever ran at once."""
    device = SmallDevice()
    with ExitStack() as stack:
        taken = [
            lane
            for _ in range(3)
            for lane in stack.enter_context(acquired(device, 2, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192))
        ]
        assert len({id(lane) for lane in taken}) == 6
        assert len({lane.memory.data_ptr() for lane in taken}) == 6
    assert [len(kept) for kept in lanes_of_process._free.values()] == [2]


def test_slabs_are_registered_once_and_forgotten_before_they_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuFile knows the slabs of kept lanes; those that are given up, for another size or as too many, it must not."""
    known: list[int] = []
    monkeypatch.setattr(kvikio, "register", lambda tensor: known.append(tensor.data_ptr()))
    monkeypatch.setattr(kvikio, "deregister", lambda tensor: known.remove(tensor.data_ptr()))
    device = SmallDevice()
    for _ in range(2):
        with acquired(device, 2, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as own:
            for lane in own:
                lane.register()
            expected = sorted(lane.memory.data_ptr() for lane in own)
        assert sorted(known) == expected
    with acquired(device, 2, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096):
        assert known == []
    with ExitStack() as stack:
        for _ in range(2):
            for lane in stack.enter_context(acquired(device, 2, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096)):
                lane.register()
    assert len(known) == 2
    kept = [lane.memory.data_ptr() for lanes in lanes_of_process._free.values() for lane in lanes]
    assert sorted(known) == sorted(kept)
    for lanes in lanes_of_process._free.values():
        for lane in lanes:
            lane.release()


def test_memory_that_cufile_does_not_let_go_of_is_never_freed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the transfer, which is over by then, does not fail for it."""

    def refuse(_: object) -> None:
        raise RuntimeError("cuFile said no")

    package = SimpleNamespace(memory_register=lambda _: None, memory_deregister=refuse)
    monkeypatch.setattr(kvikio, "_kvikio", lambda: package)
    monkeypatch.setattr(kvikio, "_registered", {})
    with acquired(SmallDevice(), 1, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as taken:
        memory = taken[0].memory
        taken[0].register()
    with acquired(SmallDevice(), 1, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096):
        assert [tensor is memory for tensor in kvikio._registered.values()] == [True]
    assert "cuFile said no" in caplog.text


def test_threads_never_share_a_lane() -> None:
    """Many transfers, taking and giving back as they please."""
    device, in_use, guard = InterpretedDevice(), set(), threading.Lock()

    def transfer(_: int) -> None:
        with acquired(device, 2, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096) as own:
            with guard:
                assert not in_use & set(map(id, own))
                in_use.update(map(id, own))
            with guard:
                in_use.difference_update(map(id, own))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(transfer, range(200)))


def test_without_room_slabs_are_halved() -> None:
    """All lanes of a transfer have slabs of one size; there may be fewer of them."""
    with acquired(SmallDevice(5 * MIB), 4, nbytes=MANY, slab_nbytes=8 * MIB, least_nbytes=MIB) as taken:
        assert {lane.slab_nbytes for lane in taken} == {4 * MIB}
        assert len(taken) == 1


class FillingDevice(SmallDevice):
    """Says how much is free, as the driver does."""

    def free_nbytes(self) -> int:
        return self.room_nbytes


@pytest.mark.parametrize(
    ("free_nbytes", "expected"),
    [(SPARE_NBYTES + 9 * MIB, [4 * MIB] * 2), (SPARE_NBYTES + 5 * MIB, [4 * MIB]), (SPARE_NBYTES + 3 * MIB, [2 * MIB])],
)
def test_lanes_leave_room_for_what_is_allocated_later(free_nbytes: int, expected: list[int]) -> None:
    """Kernels, tables and checksums: fewer lanes first, then smaller slabs."""
    with acquired(FillingDevice(free_nbytes), 3, nbytes=MANY, slab_nbytes=4 * MIB, least_nbytes=MIB) as taken:
        assert [lane.slab_nbytes for lane in taken] == expected


def test_a_device_whose_spare_room_is_taken_has_no_lanes() -> None:
    """Though a slab would fit: the kernels would not."""
    with pytest.raises(NoRoomError, match=r"^no room for slabs on cpu$"):
        acquired(FillingDevice(SPARE_NBYTES), 3, nbytes=MANY, slab_nbytes=4 * MIB, least_nbytes=MIB).__enter__()


def test_lanes_of_earlier_transfers_are_given_up_for_that_room() -> None:
    """Training may have taken it since."""

    device = FilledDevice()
    with acquired(device, 3, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192):
        pass
    device.free = (0, 0, SPARE_NBYTES)
    with acquired(device, 3, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as taken:
        assert len(taken) == 1


def test_idle_lanes_can_be_given_up() -> None:
    """Those of one device; lanes in use stay."""
    device = SmallDevice()
    with acquired(device, 1, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as taken:
        with acquired(device, 2, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192):
            pass
        give_up_idle(device)
        assert not lanes_of_process._free
        assert len(taken) == 1


@pytest.mark.parametrize(("nbytes", "count"), [(0, 1), (1, 1), (8192, 1), (8193, 2), (24576, 3), (MANY, 4)])
def test_there_are_as_many_lanes_as_the_bytes_fill(nbytes: int, count: int) -> None:
    """Up to so many; one at least."""
    device = SmallDevice()
    with acquired(device, 4, nbytes=nbytes, slab_nbytes=8192, least_nbytes=8192) as taken:
        assert len(taken) == len(device.made) == count


def test_a_small_transfer_keeps_the_lanes_of_a_large_one() -> None:
    """Those that it does not need lie idle meanwhile, for the next large one; but never more than options say."""
    device = SmallDevice()
    with acquired(device, 4, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as large:
        pass
    with acquired(device, 4, nbytes=1, slab_nbytes=8192, least_nbytes=8192) as small:
        assert len(small) == 1
        with acquired(device, 4, nbytes=16384, slab_nbytes=8192, least_nbytes=8192) as other:
            assert len({*small, *other}) == 3
    with acquired(device, 4, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as again:
        assert {*again} == {*large}
    assert len(device.made) == 4
    with acquired(device, 2, nbytes=1, slab_nbytes=8192, least_nbytes=8192):
        pass
    assert [len(kept) for kept in lanes_of_process._free.values()] == [2]


def test_kept_lanes_stay_where_torch_has_room_for_what_comes_later() -> None:
    """The driver knows nothing of memory that torch keeps: by its figure a lane would be lost at every transfer."""

    class Trained(SmallDevice):
        def free_nbytes(self) -> int:
            return 0 if len(self.made) >= 3 else 1 << 40

        def spare_nbytes(self) -> int:
            return SPARE_NBYTES

    device = Trained()
    for _ in range(5):
        with acquired(device, 3, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192) as taken:
            assert len(taken) == 3
    assert len(device.made) == 3


def test_torch_gives_back_what_it_keeps_before_there_are_no_lanes() -> None:
    """Once smaller slabs find no room either; and not where that would not be enough."""

    class Trained(SmallDevice):
        def __init__(self, kept_nbytes: int) -> None:
            super().__init__(0)
            self.kept_nbytes = kept_nbytes

        def free_nbytes(self) -> int:
            return self.room_nbytes

        def spare_nbytes(self) -> int:
            return self.room_nbytes + self.kept_nbytes

        def reclaim(self) -> None:
            self.room_nbytes, self.kept_nbytes = self.room_nbytes + self.kept_nbytes, 0

    with acquired(Trained(1 << 30), 3, nbytes=MANY, slab_nbytes=4 * MIB, least_nbytes=MIB) as taken:
        assert [lane.slab_nbytes for lane in taken] == [4 * MIB] * 3
    device = Trained(MIB // 2)
    with pytest.raises(NoRoomError):
        acquired(device, 3, nbytes=MANY, slab_nbytes=8 * MIB, least_nbytes=2 * MIB).__enter__()
    assert device.kept_nbytes == MIB // 2


@pytest.mark.parametrize("name", ["memory", "host"])
def test_lanes_made_under_inference_mode_serve_later_transfers(name: str) -> None:
    """Their memory outlives the mode, and is written to in place."""
    device = InterpretedDevice()
    with torch.inference_mode(), acquired(device, 1, nbytes=1, slab_nbytes=8192, least_nbytes=8192):
        pass
    with acquired(device, 1, nbytes=1, slab_nbytes=8192, least_nbytes=8192) as (lane,):
        memory = lane.memory if name == "memory" else lane.host.tensor
        assert not memory.is_inference()
        memory.zero_()


def test_idle_lanes_are_given_up_before_those_that_are_needed() -> None:
    """On a device that has filled up meanwhile."""

    device = FilledDevice()
    with acquired(device, 3, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192):
        pass
    device.free = (0, 0, SPARE_NBYTES)
    with acquired(device, 3, nbytes=1, slab_nbytes=8192, least_nbytes=8192) as taken:
        assert len(taken) == 1
        assert not any(lanes_of_process._free.values())


def test_without_room_for_the_least_there_are_no_lanes() -> None:
    """And nothing was allocated on the way."""
    device = SmallDevice(MIB)
    with pytest.raises(NoRoomError):
        acquired(device, 4, nbytes=MANY, slab_nbytes=8 * MIB, least_nbytes=MIB).__enter__()
    assert device.made == []


@pytest.mark.parametrize("what", ["new_slab", "new_host_slab", "new_stream"])
def test_without_lanes_the_device_is_quoted(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Memory that may not be pinned, or a stream that is not made, is no matter of room: the driver's words say so."""
    nfailed = 0

    def fail(_device: object, *_nbytes: int) -> None:
        nonlocal nfailed
        nfailed += 1
        raise torch.OutOfMemoryError(f"driver error 800, the {nfailed}.")

    monkeypatch.setattr(SmallDevice, what, fail)
    with pytest.raises(NoRoomError, match=r"^no room for slabs on cpu: driver error 800, the 4\.$"):
        acquired(SmallDevice(), 2, nbytes=MANY, slab_nbytes=8 * MIB, least_nbytes=MIB).__enter__()


def test_lanes_of_another_size_make_room() -> None:
    """What is kept from a transfer with larger slabs is not kept beside the new ones."""
    device = SmallDevice()
    with acquired(device, 2, nbytes=MANY, slab_nbytes=MIB, least_nbytes=MIB):
        pass
    with acquired(device, 2, nbytes=MANY, slab_nbytes=8192, least_nbytes=8192):
        assert not lanes_of_process._free
    assert {lane.slab_nbytes for kept in lanes_of_process._free.values() for lane in kept} == {8192}


def test_an_error_of_the_device_other_than_no_room_is_raised() -> None:
    """It is no reason to make slabs smaller."""

    class BrokenDevice(InterpretedDevice):
        def new_slab(self, nbytes: int) -> torch.Tensor:
            raise RuntimeError(f"sticky, {nbytes}")

    with (
        pytest.raises(RuntimeError, match="sticky"),
        acquired(BrokenDevice(), 1, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096),
    ):
        pass


def test_leaving_waits_for_all_that_streams_were_given() -> None:
    """Also for work whose end nobody recorded: it reads and writes memory of the caller."""
    device = SmallDevice()
    with acquired(device, 2, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096) as taken:
        taken[0].kept.append(torch.zeros(1))
    for lane in taken:
        assert isinstance(lane.stream, RecordingStream)
        assert lane.stream.events, "the end of the stream's work"
        assert lane.stream.events[-1].is_passed
        assert lane.event is lane.future is None
        assert not lane.kept


@pytest.mark.parametrize("state", ["waiting", "done", "failed", "cancelled"])
def test_io_of_any_state_is_settled_on_leaving(state: str) -> None:
    """Nothing that it did is raised: an error has ended the transfer, and its cause is known already."""
    device, future = SmallDevice(), Future()
    if state == "done":
        future.set_result(None)
    if state == "failed":
        future.set_exception(OSError("second"))
    if state == "cancelled":
        future.cancel()
    with acquired(device, 1, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096) as taken:
        taken[0].future = future
    assert future.done()
    with acquired(device, 1, nbytes=MANY, slab_nbytes=4096, least_nbytes=4096) as again:
        assert again[0] is taken[0]


def test_waiting_gives_what_the_io_did_and_lets_go() -> None:
    """Its result, or its error; in both cases the device was waited for and nothing is kept alive."""
    lane = Lane(SmallDevice(), 4096)
    for error in (None, OSError("disk")):
        event = RecordingEvent()
        lane.future, lane.event = Future(), event
        lane.kept.append(torch.zeros(1))
        if error is None:
            lane.future.set_result(7)
            assert lane.wait() == 7
        else:
            lane.future.set_exception(error)
            with pytest.raises(OSError, match="disk"):
                lane.wait()
        assert event.is_passed
        assert not lane.kept
        assert lane.wait() is None


def test_slabs_are_on_blocks_and_have_room_for_the_longest_read_of_whole_blocks() -> None:
    """And the one on the device for what kernels read beyond its end."""
    lane = Lane(InterpretedDevice(), 8192)
    longest = lane.slab(MARGIN_NBYTES + 8192)
    assert longest.data_ptr() % 4096 == 0
    after = lane.memory.data_ptr() + lane.memory.nbytes - longest.data_ptr() - longest.nbytes
    assert after >= MARGIN_NBYTES >= SLAB_PADDING_NBYTES
    assert lane.host.address % 4096 == 0
    assert lane.host.nbytes >= MARGIN_NBYTES + 8192
