"""Measure how fast files in a directory are written and read, by every way that works here. Only ever on request.

Random bytes, so that no file system compresses them; writes are timed with their fsync, reads after the file has left
the page cache, as far as the kernel lets go of it. The files are removed.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from gpudcp.errors import BackendUnavailableError, TransferError
from gpudcp.files.base import FileReader, FileWriter
from gpudcp.files.figures import Direction, Figure, Way
from gpudcp.files.filesystems import opens_named_file_directly, supports_direct_io
from gpudcp.files.gds import unavailable_reason
from gpudcp.files.kvikio import CompatMode, KvikioReader, KvikioWriter, deregister, register
from gpudcp.files.posix import PosixReader, PosixWriter
from gpudcp.files.trial import TRIAL_NBYTES, try_device_io
from gpudcp.options import SLAB_ALIGNMENT_NBYTES
from gpudcp.workers import Workers

THREADS = (1, 2, 4, 8)
REQUESTS_NBYTES = (1 << 20, 4 << 20, 16 << 20)
_MIDDLE_THREADS, _MIDDLE_REQUEST_NBYTES = 4, 4 << 20


_Allocate = Callable[[int, torch.device], torch.Tensor]


class Measurements(NamedTuple):
    """What was measured and, for the ways that were not, why not."""

    figures: tuple[Figure, ...]
    not_measured: dict[Way, str]


def settings(threads: Sequence[int], requests_nbytes: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of threads and request size to try: each varied alone, from the middle, for a full grid takes too long."""
    middle = (
        min(threads, key=lambda each: abs(each - _MIDDLE_THREADS)),
        min(requests_nbytes, key=lambda each: abs(each - _MIDDLE_REQUEST_NBYTES)),
    )
    return sorted({(each, middle[1]) for each in threads} | {(middle[0], each) for each in requests_nbytes})


def measure(
    directory: str,
    device: torch.device,
    *,
    nbytes: int,
    threads: Sequence[int],
    requests_nbytes: Sequence[int],
    allocate: _Allocate,
) -> Measurements:
    """Write and read ``nbytes`` in ``directory`` for every way and setting; memory of ``device``.

    ``allocate`` gives memory of a GPU as slabs are: flat bytes, from the first one of an allocation on.

    Raises:
        TransferError: there is no room, or a transfer failed that should have worked.
    """
    _check_room(directory, nbytes)
    ways, not_measured = _ways(directory, device, allocate)
    figures: list[Figure] = []
    for way in ways:
        for nthreads, request_nbytes in settings(threads, requests_nbytes):
            figures += _measure_one(directory, way, nbytes=nbytes, threads=nthreads, request_nbytes=request_nbytes)
    return Measurements(tuple(figures), not_measured)


class _Slot(Protocol):
    """One thread's memory, and how it gets into a file and back."""

    def write(self, writer: Any, byte_offset: int) -> None: ...

    def read(self, reader: Any, byte_offset: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    name: Way
    make_slot: Callable[[int], _Slot]
    open_writer: Callable[[str, int], FileWriter]
    open_reader: Callable[[str], FileReader]


class _HostSlot:
    def __init__(self, request_nbytes: int) -> None:
        self._memory = mmap.mmap(-1, request_nbytes)
        self._memory.write(os.urandom(request_nbytes))
        self._view = memoryview(self._memory)

    def write(self, writer: FileWriter, byte_offset: int) -> None:
        writer.write(self._view, byte_offset)

    def read(self, reader: FileReader, byte_offset: int) -> None:
        reader.read(self._view, byte_offset)

    def close(self) -> None:
        pass


class _PinnedSlot:
    """Device memory by way of pinned memory."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._pinned = _pinned(memory.nbytes)
        self._pinned.copy_(_random_bytes(memory.nbytes))
        self._device = memory
        self._device.copy_(self._pinned)
        self._view = self._pinned.numpy().data

    def write(self, writer: FileWriter, byte_offset: int) -> None:
        self._pinned.copy_(self._device)
        writer.write(self._view, byte_offset)

    def read(self, reader: FileReader, byte_offset: int) -> None:
        reader.read(self._view, byte_offset)
        self._device.copy_(self._pinned)

    def close(self) -> None:
        pass


class _DeviceSlot:
    """Device memory that cuFile knows, as it knows the slabs of a transfer."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._device = memory
        self._device.copy_(_random_bytes(memory.nbytes))
        self._is_registered = True
        try:
            register(self._device)
        except (RuntimeError, OSError, ValueError):  # a transfer too goes on without
            self._is_registered = False

    def write(self, writer: KvikioWriter, byte_offset: int) -> None:
        writer.write_device(self._device, byte_offset)

    def read(self, reader: KvikioReader, byte_offset: int) -> None:
        reader.read_device(self._device, byte_offset)

    def close(self) -> None:
        if self._is_registered:
            # An error leaves the memory allocated, and says nothing of how fast it was.
            with suppress(RuntimeError, OSError, ValueError):
                deregister(self._device)


def _pinned(nbytes: int) -> torch.Tensor:
    memory = torch.empty(nbytes + SLAB_ALIGNMENT_NBYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    start = -memory.data_ptr() % SLAB_ALIGNMENT_NBYTES
    return memory[start : start + nbytes]


def _random_bytes(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(os.urandom(nbytes)), dtype=torch.uint8)


def _ways(directory: str, device: torch.device, allocate: _Allocate) -> tuple[list[_Way], dict[Way, str]]:
    """The ways that work here, and why the others do not."""
    found: list[_Way] = []
    missing: dict[Way, str] = {}
    _add_kvikio(directory, device, allocate, found, missing)

    def make_slot(request_nbytes: int) -> _Slot:
        return _PinnedSlot(allocate(request_nbytes, device)) if device.type == "cuda" else _HostSlot(request_nbytes)

    def add_posix(name: Way, *, is_direct: bool) -> None:
        found.append(
            _Way(
                name=name,
                make_slot=make_slot,
                open_writer=lambda path, nbytes: PosixWriter(path, nbytes=nbytes, is_direct=is_direct, fsync=True),
                open_reader=lambda path: PosixReader(path, is_direct=is_direct),
            )
        )

    if supports_direct_io(directory) or opens_named_file_directly(directory):
        add_posix("direct", is_direct=True)
    else:
        missing["direct"] = "this file system opens no file with O_DIRECT"
    add_posix("buffered", is_direct=False)
    return found, missing


def _add_kvikio(
    directory: str, device: torch.device, allocate: _Allocate, found: list[_Way], missing: dict[Way, str]
) -> None:
    why = "there is no GPU memory to move" if device.type != "cuda" else unavailable_reason("kvikio")
    if why is not None:
        missing["gds"] = missing["compat"] = why
        return

    def way(name: Way, compat_mode: CompatMode | None) -> _Way:
        return _Way(
            name=name,
            make_slot=lambda request_nbytes: _DeviceSlot(allocate(request_nbytes, device)),
            open_writer=lambda path, nbytes: KvikioWriter(
                path, nbytes=nbytes, is_direct=False, fsync=True, compat_mode=compat_mode
            ),
            open_reader=lambda path: KvikioReader(path, compat_mode=compat_mode),
        )

    try:
        tried = try_device_io(directory, allocate(TRIAL_NBYTES, device))
    except (BackendUnavailableError, torch.OutOfMemoryError) as err:
        missing["gds"] = missing["compat"] = str(err)
        return
    if tried.is_gds:
        found.append(way("gds", None))
    else:
        missing["gds"] = unavailable_reason("gds") or tried.reason
    found.append(way("compat", "ON"))


def _measure_one(directory: str, way: _Way, *, nbytes: int, threads: int, request_nbytes: int) -> Iterator[Figure]:
    requests = list(range(0, nbytes - nbytes % request_nbytes, request_nbytes)) or [0]
    moved_nbytes = len(requests) * request_nbytes
    seconds: dict[Direction, float] = {}
    with ExitStack() as stack:
        slots: list[_Slot] = []
        for _ in range(min(threads, len(requests))):
            slots.append(way.make_slot(request_nbytes))
            stack.callback(slots[-1].close)
        path = stack.enter_context(_scratch_path(directory))
        start = time.perf_counter()
        # Threads within the file's context: none is left when its descriptor is closed, and may be anybody's.
        with way.open_writer(path, moved_nbytes) as writer, Workers(len(slots), "gpudcp-tune") as pool:
            _move_all(pool, slots, requests, lambda slot, byte_offset: slot.write(writer, byte_offset))
            writer.finish(moved_nbytes)
        seconds["write"] = time.perf_counter() - start
        _leave_page_cache(path)
        start = time.perf_counter()
        with closing(way.open_reader(path)) as reader, Workers(len(slots), "gpudcp-tune") as pool:
            _move_all(pool, slots, requests, lambda slot, byte_offset: slot.read(reader, byte_offset))
            seconds["read"] = time.perf_counter() - start
    for direction, taken in seconds.items():
        yield Figure(
            direction=direction,
            way=way.name,
            threads=threads,
            request_nbytes=request_nbytes,
            gb_per_s=moved_nbytes / taken / 1e9,
            ntransfers=1,
        )


def _move_all(
    pool: Workers, slots: Sequence[_Slot], requests: Sequence[int], move: Callable[[_Slot, int], None]
) -> None:
    """Each slot's share of the requests in a thread of its own. Raises the first error; the others then soon stop."""
    is_over = threading.Event()

    def share(number: int) -> None:
        for byte_offset in requests[number :: len(slots)]:
            if is_over.is_set():
                return
            try:
                move(slots[number], byte_offset)
            except BaseException:
                is_over.set()
                raise

    try:
        for done in as_completed([pool.submit(share, number) for number in range(len(slots))]):
            done.result()
    finally:
        is_over.set()


@contextmanager
def _scratch_path(directory: str) -> Iterator[str]:
    path = os.path.join(directory, f".gpudcp-tune-{secrets.token_hex(8)}")
    try:
        yield path
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _leave_page_cache(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _check_room(directory: str, nbytes: int) -> None:
    try:
        system = os.statvfs(directory)
    except OSError as err:
        raise TransferError(f"{directory}: {err.strerror}", path=directory, errno=err.errno) from err
    if (free_nbytes := system.f_bavail * system.f_frsize) < 2 * nbytes:
        raise TransferError(
            f"{directory}: {free_nbytes} bytes are free, measuring with {nbytes} asks for twice that", path=directory
        )
