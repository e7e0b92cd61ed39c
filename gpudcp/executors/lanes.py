"""Lanes: a stream, a device slab, a host slab, and the I/O that is in flight with them. Kept for the next transfer.

Allocating and pinning memory takes as long as moving a good part of a checkpoint, and freeing device memory waits for
everything else that the device does; so lanes outlive a transfer, at most as many as one transfer had.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch

from gpudcp.executors.devices import Device, Event
from gpudcp.options import SLAB_ALIGNMENT_NBYTES

_logger = logging.getLogger("gpudcp")

MARGIN_NBYTES = SLAB_ALIGNMENT_NBYTES
"""Before and after a device slab's own bytes: CRC patches may begin before them or end after them, reads of whole
blocks may be a block longer, and kernels read some bytes more than they use."""
SPARE_NBYTES = 32 << 20
"""What taking lanes leaves free on the device: kernels' code, tables and checksums are allocated later."""
LEAST_SLAB_NBYTES = 1 << 20
"""On a full device slabs are halved down to this; where not even it fits, the cpu executor takes over."""


class NoRoomError(Exception):
    """A device has no room for a slab; says what it answered last, which may be about something else than room."""


class Lane:
    """One lane of a device. Whoever has acquired it has it alone."""

    def __init__(self, device: Device, slab_nbytes: int) -> None:
        self.device = device
        self.slab_nbytes = slab_nbytes
        self.memory = device.new_slab(_with_margins(slab_nbytes))
        """The device slab, from `MARGIN_NBYTES` on, and its margins."""
        self.host = device.new_host_slab(slab_nbytes + MARGIN_NBYTES)
        """The host slab, and room for reads of whole blocks."""
        self.stream = device.new_stream()
        self.event: Event | None = None
        """The end of the device's last work with this lane."""
        self.future: Future[Any] | None = None
        """The last I/O with this lane."""
        self.kept: list[Any] = []
        """What the work in flight uses: tensors, and memory of the host."""
        self._is_registered = False

    def register(self) -> None:
        """Tell cuFile of the device slab, once: it then needs no bounce buffer of its own."""
        if not self._is_registered:
            from gpudcp.files.kvikio import register  # imports kvikio

            register(self.memory)
            self._is_registered = True

    def release(self) -> None:
        """The lane is given up: cuFile forgets the slab before its memory is freed, or the memory stays allocated."""
        if self._is_registered:
            from gpudcp.files.kvikio import deregister

            self._is_registered = False
            try:
                deregister(self.memory)
            except (RuntimeError, OSError, ValueError) as err:
                # The transfer is over, and all its bytes are where they belong.
                _logger.warning("a slab stays in device memory, as cuFile does not let go of it: %s", err)

    def slab(self, nbytes: int) -> torch.Tensor:
        """The first bytes of the device slab."""
        return self.memory[MARGIN_NBYTES : MARGIN_NBYTES + nbytes]

    def wait(self) -> Any:
        """Wait for everything in flight, and let go of what it used; returns, or raises, what the I/O did."""
        future, self.future = self.future, None
        event, self.event = self.event, None
        try:
            return None if future is None else future.result()
        finally:
            if event is not None:
                event.synchronize()
            self.kept.clear()


def _with_margins(slab_nbytes: int) -> int:
    """One margin before the slab, one for reads of whole blocks, one for what kernels read beyond the end."""
    return slab_nbytes + 3 * MARGIN_NBYTES


@contextmanager
def acquired(
    device: Device, most: int, *, nbytes: int, slab_nbytes: int, least_nbytes: int
) -> Iterator[Sequence[Lane]]:
    """Lanes with slabs of one size: ``slab_nbytes``, halved as long as the device has no room for one.

    As many as hold ``nbytes`` at once, up to ``most``; so many are kept, too. `SPARE_NBYTES` stay free, for which lanes
    of earlier transfers are given up, and then what torch keeps for its next tensors. On leaving, everything in flight
    has ended.

    Raises:
        NoRoomError: ``least_nbytes`` does not fit even so.
    """
    errors: list[str] = []

    def taken() -> list[Lane]:
        size = slab_nbytes
        lanes = _take(device, nbytes, most, size, errors)
        while not lanes and size // 2 >= least_nbytes:
            size = size // 2 // SLAB_ALIGNMENT_NBYTES * SLAB_ALIGNMENT_NBYTES
            lanes = _take(device, nbytes, most, size, errors)
        return lanes

    lanes = taken()
    if not lanes and device.spare_nbytes() - device.free_nbytes() >= _with_margins(least_nbytes):
        device.reclaim()
        lanes = taken()
    if not lanes:
        raise NoRoomError(": ".join([f"no room for slabs on {device.torch_device}", *errors[-1:]]))
    try:
        yield lanes
    finally:
        for lane in lanes:
            _settle(lane)
        _give_back(lanes, most)


_free: dict[tuple[torch.device, type], list[Lane]] = {}
_guard = threading.Lock()


def _take(device: Device, nbytes: int, most: int, slab_nbytes: int, errors: list[str]) -> list[Lane]:
    """Lanes with slabs of this size; what kept there from being more is added to the errors."""
    count = max(1, min(most, -(-nbytes // slab_nbytes)))
    with _guard:
        known = _free.pop((device.torch_device, type(device)), [])
    fitting = [lane for lane in known if lane.slab_nbytes == slab_nbytes][:most]
    lanes, idle = fitting[:count], fitting[count:]
    _drop([lane for lane in known if lane not in fitting])
    del known, fitting  # those of another size: their memory may be what is needed
    needed_nbytes = _with_margins(slab_nbytes) + SPARE_NBYTES
    try:
        while len(lanes) < count and device.free_nbytes() >= needed_nbytes:
            lanes.append(Lane(device, slab_nbytes))
    except torch.OutOfMemoryError as err:
        errors.append(str(err))  # the text alone: a traceback would keep what was allocated
    # Less may be left than was counted on: the driver rounds up, and others allocate at the same time.
    while (idle or lanes) and device.spare_nbytes() < SPARE_NBYTES:
        _drop([(idle or lanes).pop()])
    _give_back(idle, most)
    return lanes


def give_up_idle(device: Device) -> None:
    """Free the device's lanes that no transfer has: somebody needs the memory more."""
    with _guard:
        idle = _free.pop((device.torch_device, type(device)), [])
    _drop(idle)


def _give_back(lanes: Sequence[Lane], most: int) -> None:
    if not lanes:
        return
    key = lanes[0].device.torch_device, type(lanes[0].device)
    with _guard:
        kept = _free.setdefault(key, [])
        room = max(0, most - len(kept))
        kept += lanes[:room]
    _drop(lanes[room:])


def _drop(lanes: Sequence[Lane]) -> None:
    for lane in lanes:
        lane.release()


def _settle(lane: Lane) -> None:
    """Wait for what is in flight after an error, whose cause is known already."""
    if lane.future is not None:
        lane.future.cancel()
        if not lane.future.cancelled():
            lane.future.exception()
    lane.future = None
    lane.event = lane.stream.record()  # also of what an error kept from being recorded
    lane.wait()
