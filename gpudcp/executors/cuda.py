"""The device executor: lanes of stream, device slab, host slab and I/O in flight. CUDA, or Triton's interpreter.

A slab is packed and checksummed on the device while the ones before it are copied to the host and written; a load runs
the same ring backwards. Several devices have a ring each, all of them driven by the calling thread. Where a device has
no room for a slab, or runs out of memory later, the cpu executor takes over: a save starts over, a load goes on after
the last read that was checked and committed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from heapq import merge
from itertools import chain, cycle, repeat
from typing import Any

import torch

from gpudcp.chunkplan.load import LoadChunkPlan
from gpudcp.chunkplan.save import SaveChunkPlan, SaveFilePlan
from gpudcp.chunkplan.slabs import SlabContents, cut_into_slabs
from gpudcp.executors.base import Executor, FileReceipt, LoadTarget, SaveSource
from gpudcp.executors.deviceloading import DeviceLoad, Resumed
from gpudcp.executors.devicepacking import SlabPacker
from gpudcp.executors.devices import Device, Event, is_out_of_memory
from gpudcp.executors.lanes import LEAST_SLAB_NBYTES, Lane, NoRoomError, acquired, give_up_idle
from gpudcp.files.base import DeviceFileWriter, FileReader, FileWriter
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.report import Stopwatch
from gpudcp.workers import Workers

_logger = logging.getLogger("gpudcp")

_Rings = Mapping[torch.device, Sequence[Lane]]


class DeviceExecutor:
    """Packs and unpacks on devices, each with ``lanes`` slabs of its own; ``fallback`` is for one without room.

    A file of a save is packed on the device of its group. A read of a load is unpacked on the device to which most of
    its bytes go. What is on no device of these, or on another one than the file or the read is for, goes through the
    host, a slab's part at a time.

    ``notes`` gets a sentence, for the report, for each thing that went otherwise than was chosen.
    """

    checksum = "a Triton kernel"

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        name: str,
        lanes: int,
        threads: int,
        slab_nbytes: int,
        has_checksum: bool,
        registers_slabs: bool,
        fallback: Executor,
        notes: list[str],
    ) -> None:
        self.name = name
        self._notes = notes
        self._registers_slabs = registers_slabs
        self.slab_nbytes = slab_nbytes
        # One device unpacks a whole slab at once; of several each is to get its own tensors.
        self.reads_large_apart = len(devices) > 1
        self._devices = devices
        self._lanes = lanes
        self._threads = threads
        self._has_checksum = has_checksum
        self._fallback = fallback

    def _rings(self, stack: ExitStack, nbytes: Mapping[Device, int], *, slab_nbytes: int, least_nbytes: int) -> _Rings:
        """Lanes of each of the devices, as long as the stack says, for so many bytes.

        Raises:
            NoRoomError: one of them has no room for a slab.
        """
        rings: dict[torch.device, Sequence[Lane]] = {}
        for device, own_nbytes in nbytes.items():
            rings[device.torch_device] = stack.enter_context(
                acquired(device, self._lanes, nbytes=own_nbytes, slab_nbytes=slab_nbytes, least_nbytes=least_nbytes)
            )
        if self._registers_slabs:
            for lanes in rings.values():
                self._register(lanes)
        return rings

    def _register(self, lanes: Sequence[Lane]) -> None:
        try:
            for lane in lanes:
                lane.register()
        except (RuntimeError, OSError, ValueError) as err:
            # Only slower: cuFile then moves the bytes through device memory of its own.
            self._note(f"slabs on {lanes[0].device.torch_device} are not registered with cuFile: {err}")

    def _taken_over(self, why: str) -> Executor:
        """The fallback, which is from now on what a report names."""
        for device in self._devices:
            give_up_idle(device)
        self.name, self.checksum = self._fallback.name, self._fallback.checksum
        self._note(f"the {self.name} executor took over: {why}")
        return self._fallback

    def _note(self, text: str) -> None:
        self._notes.append(text)
        _logger.warning("%s", text)

    def save(
        self,
        plan: SaveChunkPlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> list[FileReceipt]:
        try:
            return self._save(plan, source, open_file, stopwatch)
        except NoRoomError as err:
            why = str(err)
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
            why = f"out of memory in mid-transfer: {err}"
        # Not while the error is handled: its traceback keeps what the attempt had on the device.
        return self._taken_over(why).save(plan, source, open_file, stopwatch)

    def _save(
        self,
        plan: SaveChunkPlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> list[FileReceipt]:
        """Save by the devices. After an error no file is left."""
        least = min(LEAST_SLAB_NBYTES, self.slab_nbytes)
        devices = [self._devices[file.group] for file in plan.files]
        with ExitStack() as stack:
            with stopwatch.phase("slabs"):
                nbytes: Counter[Device] = Counter()
                for file, device in zip(plan.files, devices, strict=True):
                    nbytes[device] += file.nbytes
                rings = self._rings(stack, nbytes, slab_nbytes=self.slab_nbytes, least_nbytes=least)
            writers = [stack.enter_context(open_file(file)) for file in plan.files]
            pool = stack.enter_context(Workers(self._threads, "gpudcp-write"))
            packers = [
                SlabPacker(file, source, device, has_checksum=self._has_checksum, stopwatch=stopwatch)
                for file, device in zip(plan.files, devices, strict=True)
            ]
            own_lanes = {device: cycle(lanes) for device, lanes in rings.items()}
            # A full device has smaller slabs than the others.
            slab_nbytes = [rings[device.torch_device][0].slab_nbytes for device in devices]
            for number, contents in _in_turn(plan.files, slab_nbytes, is_by_file=not source.keeps_memory):
                lane = next(own_lanes[devices[number].torch_device])
                with stopwatch.phase("write"):
                    lane.wait()
                with stopwatch.phase("pack"):
                    packed = packers[number].fill(lane, contents)
                    lane.future = _sent(pool, writers[number], lane, contents, packed)
            with stopwatch.phase("write"):
                for lane in chain.from_iterable(rings.values()):
                    lane.wait()
            crcs = [packer.crcs() for packer in packers]
            with stopwatch.phase("fsync"):
                for file, writer in zip(plan.files, writers, strict=True):
                    writer.finish(file.nbytes)
        return [FileReceipt(file.nbytes, own) for file, own in zip(plan.files, crcs, strict=True)]

    def load(
        self,
        plan: LoadChunkPlan,
        target: LoadTarget,
        open_file: Callable[[str], FileReader],
        stopwatch: Stopwatch,
    ) -> None:
        load = DeviceLoad(plan, target, self._devices, stopwatch)
        try:
            self._load(load, plan.slab_nbytes, open_file, stopwatch)
            return
        except NoRoomError as err:
            why = str(err)
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
            why = f"out of memory in mid-transfer: {err}"
        self._taken_over(why).load(load.rest(), Resumed(target, load.uncommitted()), open_file, stopwatch)

    def _load(
        self, load: DeviceLoad, slab_nbytes: int, open_file: Callable[[str], FileReader], stopwatch: Stopwatch
    ) -> None:
        with ExitStack() as stack:
            with stopwatch.phase("slabs"):
                # A read is as long as the plan says: halved slabs would not hold it. A short one takes a lane, too.
                nbytes = {device: count * slab_nbytes for device, count in load.reads_by_device().items()}
                rings = self._rings(stack, nbytes, slab_nbytes=slab_nbytes, least_nbytes=slab_nbytes)
            pool = stack.enter_context(Workers(self._threads, "gpudcp-read"))
            load.run(rings, pool, open_file)


def _in_turn(
    files: Sequence[SaveFilePlan], slab_nbytes: Sequence[int], *, is_by_file: bool
) -> Iterator[tuple[int, SlabContents]]:
    """The slabs of all files, of each file's own length, with its number, so that all files grow at one pace.

    Or file by file: a tensor's slabs then come one after the other, and its memory is done with before the next one's.
    """
    numbered = [
        zip(repeat(number), cut_into_slabs(file, slab_nbytes=nbytes))
        for number, (file, nbytes) in enumerate(zip(files, slab_nbytes, strict=True))
    ]
    if is_by_file:
        return chain.from_iterable(numbered)
    return merge(*numbered, key=lambda each: each[1].byte_offset)


def _sent(pool: Workers, writer: FileWriter, lane: Lane, contents: SlabContents, packed: Event | None) -> Future[None]:
    """Begin to write a slab, on the device or (``packed`` None) on the host, when it is filled."""
    nbytes = contents.nbytes
    # Whole blocks; what the last one of the file has too much is cut off by the writer's `finish`.
    end = nbytes if writer.alignment_nbytes == 1 else -(-nbytes // SLAB_ALIGNMENT_NBYTES) * SLAB_ALIGNMENT_NBYTES
    host = lane.host.view[:end]
    if packed is None:
        return pool.submit(writer.write, host, contents.byte_offset)
    if isinstance(writer, DeviceFileWriter):
        return pool.submit(_after, lane.device, packed, writer.write_device, lane.slab(end), contents.byte_offset)
    with lane.stream.current():
        lane.host.tensor[:nbytes].copy_(lane.slab(nbytes), non_blocking=True)
        lane.event = lane.stream.record()
    return pool.submit(_after, lane.device, lane.event, writer.write, host, contents.byte_offset)


def _after(device: Device, event: Event, act: Callable[..., None], *args: Any) -> None:
    device.bind_thread()
    event.synchronize()
    act(*args)
