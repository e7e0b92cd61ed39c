"""The device executor: lanes of stream, device slab, host slab and I/O in flight. CUDA, or Triton's interpreter.

A slab is packed and checksummed on the device while the ones before it are copied to the host and written; a load runs
the same ring backwards. Where the device has no room for a slab, or runs out of memory later, the cpu executor takes
over: a save starts over, a load goes on after the last read that was checked and committed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from heapq import merge
from itertools import chain, repeat
from typing import Any

from gpudcp.chunkplan.load import LoadChunkPlan
from gpudcp.chunkplan.save import SaveChunkPlan, SaveFilePlan
from gpudcp.chunkplan.slabs import SlabContents, cut_into_slabs
from gpudcp.executors.base import Executor, FileReceipt, LoadTarget, SaveSource
from gpudcp.executors.deviceloading import DeviceLoad, Resumed
from gpudcp.executors.devicepacking import SlabPacker
from gpudcp.executors.devices import Device, Event, is_out_of_memory
from gpudcp.executors.lanes import LEAST_SLAB_NBYTES, Lane, acquired, give_up_idle
from gpudcp.files.base import DeviceFileWriter, FileReader, FileWriter
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.report import Stopwatch

_logger = logging.getLogger("gpudcp")

_NO_ROOM = "no room for slabs"
_RAN_OUT = "out of memory in mid-transfer"


class DeviceExecutor:
    """Packs and unpacks on one device; ``fallback`` is for a device without room.

    ``notes`` gets a sentence, for the report, for each thing that went otherwise than was chosen.
    """

    checksum = "a Triton kernel"

    def __init__(
        self,
        device: Device,
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
        self._device = device
        self._lanes = lanes
        self._threads = threads
        self._has_checksum = has_checksum
        self._fallback = fallback

    def _prepare(self, lanes: Sequence[Lane]) -> None:
        if not self._registers_slabs:
            return
        try:
            for lane in lanes:
                lane.register()
        except (RuntimeError, OSError, ValueError) as err:
            # Only slower: cuFile then moves the bytes through device memory of its own.
            self._note(f"slabs are not registered with cuFile: {err}")

    def _taken_over(self, why: str) -> Executor:
        """The fallback, which is from now on what a report names."""
        give_up_idle(self._device)
        self.name, self.checksum = self._fallback.name, self._fallback.checksum
        self._note(f"the {self.name} executor took over: {why} on {self._device.torch_device}")
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
            receipts, why = self._save(plan, source, open_file, stopwatch), _NO_ROOM
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
            receipts, why = None, _RAN_OUT
        if receipts is not None:
            return receipts
        # Not while the error is handled: its traceback keeps what the attempt had on the device.
        return self._taken_over(why).save(plan, source, open_file, stopwatch)

    def _save(
        self,
        plan: SaveChunkPlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],
        stopwatch: Stopwatch,
    ) -> list[FileReceipt] | None:
        """Save by the device; None: it has no room for slabs. After an error no file is left."""
        least = min(LEAST_SLAB_NBYTES, self.slab_nbytes)
        with ExitStack() as stack:
            with stopwatch.phase("slabs"):
                lanes = stack.enter_context(
                    acquired(self._device, self._lanes, slab_nbytes=self.slab_nbytes, least_nbytes=least)
                )
            if not lanes:
                return None
            self._prepare(lanes)
            writers = [stack.enter_context(open_file(file)) for file in plan.files]
            pool = ThreadPoolExecutor(self._threads, "gpudcp-write", initializer=self._device.bind_thread)
            stack.callback(pool.shutdown, cancel_futures=True)
            packers = [
                SlabPacker(file, source, self._device, has_checksum=self._has_checksum, stopwatch=stopwatch)
                for file in plan.files
            ]
            slab_nbytes = lanes[0].slab_nbytes
            turns = _in_turn(plan.files, slab_nbytes, is_by_file=not source.keeps_memory)
            for turn, (number, contents) in enumerate(turns):
                lane = lanes[turn % len(lanes)]
                with stopwatch.phase("write"):
                    lane.wait()
                with stopwatch.phase("pack"):
                    packed = packers[number].fill(lane, contents)
                    lane.future = _sent(pool, writers[number], lane, contents, packed)
            with stopwatch.phase("write"):
                for lane in lanes:
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
        load = DeviceLoad(plan, target, stopwatch)
        try:
            is_done, why = self._load(load, plan.slab_nbytes, open_file, stopwatch), _NO_ROOM
        except RuntimeError as err:
            if not is_out_of_memory(err):
                raise
            is_done, why = False, _RAN_OUT
        if not is_done:
            self._taken_over(why).load(load.rest(), Resumed(target, load.uncommitted()), open_file, stopwatch)

    def _load(
        self, load: DeviceLoad, slab_nbytes: int, open_file: Callable[[str], FileReader], stopwatch: Stopwatch
    ) -> bool:
        """Load by the device; False: it has no room for slabs."""
        with ExitStack() as stack:
            with stopwatch.phase("slabs"):
                # A read is as long as the plan says: halved slabs would not hold it.
                lanes = stack.enter_context(
                    acquired(self._device, self._lanes, slab_nbytes=slab_nbytes, least_nbytes=slab_nbytes)
                )
            if not lanes:
                return False
            self._prepare(lanes)
            pool = ThreadPoolExecutor(self._threads, "gpudcp-read", initializer=self._device.bind_thread)
            stack.callback(pool.shutdown, cancel_futures=True)
            load.run(lanes, pool, open_file)
        return True


def _in_turn(
    files: Sequence[SaveFilePlan], slab_nbytes: int, *, is_by_file: bool
) -> Iterator[tuple[int, SlabContents]]:
    """The slabs of all files, with the number of their file, so that all files grow at one pace.

    Or file by file: a tensor's slabs then come one after the other, and its memory is done with before the next one's.
    """
    numbered = [zip(repeat(number), cut_into_slabs(file, slab_nbytes=slab_nbytes)) for number, file in enumerate(files)]
    if is_by_file:
        return chain.from_iterable(numbered)
    return merge(*numbered, key=lambda each: each[1].byte_offset)


def _sent(
    pool: ThreadPoolExecutor, writer: FileWriter, lane: Lane, contents: SlabContents, packed: Event | None
) -> Future[None]:
    """Begin to write a slab, on the device or (``packed`` None) on the host, when it is filled."""
    nbytes = contents.nbytes
    # Whole blocks; what the last one of the file has too much is cut off by the writer's `finish`.
    end = nbytes if writer.alignment_nbytes == 1 else -(-nbytes // SLAB_ALIGNMENT_NBYTES) * SLAB_ALIGNMENT_NBYTES
    host = lane.host.view[:end]
    if packed is None:
        return pool.submit(writer.write, host, contents.byte_offset)
    if isinstance(writer, DeviceFileWriter):
        return pool.submit(_after, packed, writer.write_device, lane.slab(end), contents.byte_offset)
    with lane.stream.current():
        lane.host.tensor[:nbytes].copy_(lane.slab(nbytes), non_blocking=True)
        lane.event = lane.stream.record()
    return pool.submit(_after, lane.event, writer.write, host, contents.byte_offset)


def _after(event: Event, act: Callable[..., None], *args: Any) -> None:
    event.synchronize()
    act(*args)
