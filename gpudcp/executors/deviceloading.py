"""One load of the device executor: reads, then the device's work on what was read, then commits."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch

from gpudcp.chunkplan.load import NO_DESTINATION, ChunkRead, LoadChunkPlan, SlabRead
from gpudcp.executors.base import LoadTarget
from gpudcp.executors.devices import Device, Event
from gpudcp.executors.deviceunpacking import checksum_segments, unpack
from gpudcp.executors.lanes import Lane
from gpudcp.executors.unpacking import Destinations, unpack_host
from gpudcp.executors.verifying import Checksums
from gpudcp.files.base import DeviceFileReader, FileReader
from gpudcp.formats.checksum import crc32
from gpudcp.report import Stopwatch
from gpudcp.workers import Workers


class DeviceLoad:
    """Reads, the devices' work and commits overlap; each of them is in the plan's order.

    So a read waits for a lane of its own device even while another one has lanes to spare.
    """

    def __init__(
        self, plan: LoadChunkPlan, target: LoadTarget, devices: Sequence[Device], stopwatch: Stopwatch
    ) -> None:
        self._plan = plan
        self._devices = devices
        self._owners = _owners(plan, target, [device.torch_device for device in devices])
        self._free: dict[torch.device, list[Lane]] = {}
        self._stopwatch = stopwatch
        self._destinations = Destinations(plan, target)
        self._checksums = Checksums(plan.checks)
        self._reading: deque[_Step] = deque()
        self._unpacking: deque[_Step] = deque()
        self._unpacked: dict[torch.device, Event] = {}
        self._nunpacked = 0
        self._ncommitted = 0
        """Reads from the first one on whose payloads were checked, and whose items were committed if they are whole."""

    def reads_by_device(self) -> dict[Device, int]:
        """How many reads each of those has that have any."""
        counts = Counter(self._owners)
        return {device: counts[device.torch_device] for device in self._devices if device.torch_device in counts}

    def rest(self) -> LoadChunkPlan:
        """What is left to do after an error. The lanes are let go of: their memory is what the error was about."""
        for lanes in (self._free, self._reading, self._unpacking, self._unpacked):
            lanes.clear()
        return replace(self._plan, reads=self._plan.reads[self._ncommitted :])

    def uncommitted(self) -> dict[int, torch.Tensor]:
        """The destinations that the rest begins with; they may have bytes already."""
        return self._destinations.uncommitted()

    def run(
        self,
        rings: Mapping[torch.device, Sequence[Lane]],
        pool: Workers,
        open_file: Callable[[str], FileReader],
    ) -> None:
        """Do all that the plan says, with at least one lane for each of `reads_by_device`."""
        self._free = {device: list(lanes) for device, lanes in rings.items()}
        for read, owner in zip(self._plan.reads, self._owners, strict=True):
            free = self._free[owner]
            while not free:
                self._settle() if self._unpacking else self._unpack()
            lane, file = free.pop(), open_file(read.path)
            blocks = read.in_blocks(block_nbytes=file.alignment_nbytes, file_nbytes=file.nbytes)
            lane.future = pool.submit(_read, file, blocks, lane)
            self._reading.append(_Step(blocks, lane))
            while self._reading and (future := self._reading[0].lane.future) is not None and future.done():
                self._unpack()
        while self._reading:
            self._unpack()
        while self._unpacking:
            self._settle()
        with self._stopwatch.phase("unpack"):
            self._destinations.commit_empty(self._plan.empty_positions)

    def _unpack(self) -> None:
        """Begin the device's work on the oldest read."""
        read, lane, *_ = self._reading.popleft()
        device = lane.device.torch_device
        with self._stopwatch.phase("read"):
            is_in_device_slab = lane.wait()
        with self._stopwatch.phase("unpack"):
            chunks = [chunk for chunk in read.chunks if chunk.position != NO_DESTINATION]
            pairs = [(chunk, self._destinations.box(chunk)) for chunk in chunks]
            on_device = [pair for pair in pairs if lane.device.owns(pair[1])]
            # Those of another device too: by the host's casts, and in pieces of a slab, as on the cpu executor.
            on_host = [pair for pair in pairs if not lane.device.owns(pair[1])]
            elsewhere = self._reached_by(on_host, but=device)
            if not is_in_device_slab and not on_device:
                crcs = [crc32(lane.host.view[s.slab_offset : s.slab_offset + s.nbytes]) for s in read.segments]
                found = torch.tensor(crcs, dtype=torch.int64, device="cpu")
                self._unpacking.append(_Step(read, lane, on_host, elsewhere, found))
                return
            # Where destinations share memory, the last read wins, whichever way its bytes and those before it go.
            while any(device in earlier.elsewhere for earlier in self._unpacking):
                self._settle()
            lane.stream.wait_for_caller()  # who may still be using the destinations
            if (unpacked := self._unpacked.get(device)) is not None:
                lane.stream.wait_for(unpacked)
            with lane.stream.current():
                slab, host = lane.slab(read.nbytes), lane.host.tensor[: read.nbytes]
                if not is_in_device_slab:
                    slab.copy_(host, non_blocking=True)
                elif on_host:
                    host.copy_(slab, non_blocking=True)
                crcs_on_host = lane.device.on_host(checksum_segments(lane, read, stopwatch=self._stopwatch))
                unpack(lane, read, on_device, stopwatch=self._stopwatch)
                lane.event = self._unpacked[device] = lane.stream.record()
            self._unpacking.append(_Step(read, lane, on_host, elsewhere, crcs_on_host))

    def _reached_by(self, on_host: Sequence[_Pair], *, but: torch.device) -> set[torch.device]:
        """The devices, but for this one, that own some of the destinations."""
        others = [device for device in self._devices if device.torch_device != but]
        return {device.torch_device for device in others if any(device.owns(box) for _, box in on_host)}

    def _settle(self) -> None:
        """Wait for the device's oldest work; check, and commit what has come whole and right."""
        read, lane, on_host, _, crcs = self._unpacking.popleft()
        with self._stopwatch.phase("unpack"):
            lane.wait()
            for chunk, box in on_host:
                unpack_host(lane.host, chunk.byte_offset - read.byte_offset, chunk, box)
            self._checksums.add(read.segments, [crc & 0xFFFFFFFF for crc in crcs.tolist()])
            self._destinations.count(read)
            self._nunpacked += 1
            if self._checksums.are_settled:
                self._destinations.commit_filled()
                self._ncommitted = self._nunpacked
        self._free[lane.device.torch_device].append(lane)


def _owners(plan: LoadChunkPlan, target: LoadTarget, devices: Sequence[torch.device]) -> list[torch.device]:
    """For each read the device to which most of its bytes go, as far as the target knows; the first one at a draw.

    What goes to no device goes with the read before it: no device without bytes of its own gets lanes.
    """
    if len(devices) == 1:
        return [devices[0]] * len(plan.reads)
    owners: list[torch.device | None] = []
    for read in plan.reads:
        nbytes: Counter[torch.device | None] = Counter()
        for chunk in read.chunks:
            if chunk.position != NO_DESTINATION:
                nbytes[target.device_of(chunk.position)] += prod(chunk.lengths) * chunk.dtype.itemsize
        most = max(devices, key=nbytes.__getitem__)
        owners.append(most if nbytes[most] else None)
    last = next(filter(None, owners), devices[0])
    return [last := owner or last for owner in owners]


class Resumed:
    """The target of a load that another executor goes on with: what was resolved for it is not resolved again."""

    def __init__(self, target: LoadTarget, resolved: dict[int, torch.Tensor]) -> None:
        self._resolved = resolved
        self._target = target
        self.device_of = target.device_of
        self.commit = target.commit

    def resolve(self, position: int) -> torch.Tensor:
        tensor = self._resolved.pop(position, None)
        return self._target.resolve(position) if tensor is None else tensor


_Pair = tuple[ChunkRead, torch.Tensor]


class _Step(NamedTuple):
    read: SlabRead
    """By whole blocks, where the file is read by them."""
    lane: Lane
    on_host: Sequence[_Pair] = ()
    """What the host unpacks, from the host slab."""
    elsewhere: Collection[torch.device] = ()
    """Other devices with lanes that it unpacks to."""
    crcs: torch.Tensor = torch.empty(0, device="cpu")
    """Of the read's segments, when the lane's work has ended."""


def _read(file: FileReader, read: SlabRead, lane: Lane) -> bool:
    """Fill the lane's device slab, where the file can (True), or its host slab."""
    if not isinstance(file, DeviceFileReader):
        file.read(lane.host.view[: read.nbytes], read.byte_offset)
        return False
    # Into the slab also where the read and its destination are aligned alike (`SlabRead.is_straight`). A destination is
    # never registered, so cuFile would move its bytes through buffers of its own: a copy on the device either way (only
    # compat mode would save one), and that should be far faster than any file. Memory of expandable segments would need
    # a trial of its own, tied destinations would have to take turns, and none of it has run on a GPU yet.
    lane.device.bind_thread()
    file.read_device(lane.slab(read.nbytes), read.byte_offset)
    return True
