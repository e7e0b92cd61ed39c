"""The cpu executor in a process of its own, which packs, checksums and writes beside training without sharing its
interpreter. Saves only; tensors travel as places in shared memory, everything else by a socket.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from gpudcp.boxes import extent_of_box
from gpudcp.chunkplan.load import LoadChunkPlan
from gpudcp.chunkplan.save import ChunkWrite, SaveChunkPlan, SaveFilePlan
from gpudcp.errors import TransferError
from gpudcp.executors.base import FileReceipt, LoadTarget, SaveSource
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.sharedmemory import SharedPlace, map_shared, shared_place
from gpudcp.files.base import FileReader, FileWriter
from gpudcp.files.figures import Way
from gpudcp.files.ways import open_writer
from gpudcp.formats import checksum
from gpudcp.report import Stopwatch

_START = "import sys; sys.path[:] = sys.argv[1:]; from gpudcp.executors.remote import serve; serve()"
_LENGTH_NBYTES = 8


class _Tensor(NamedTuple):
    """A tensor of another process."""

    place: SharedPlace | None
    data: bytes
    """Its elements, row-major, where it has no place."""
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class _Job(NamedTuple):
    plan: SaveChunkPlan
    tensors: dict[int, _Tensor]
    directory: str
    way: Way
    fsync: bool
    executor: dict[str, Any]


class WriterProcess:
    """One child, started at the first save and again when it has died; it ends with this process."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._guard = threading.Lock()
        atexit.register(self.close)

    def run(self, job: _Job) -> tuple[list[FileReceipt], dict[str, float]]:
        """What came of a save over there; raises what it raised.

        Raises:
            TransferError: the process died.
        """
        with self._guard:
            channel = self._started()
            try:
                _send(channel, pickle.dumps(job))
                answer = _receive(channel)
            except OSError:  # nobody reads
                answer = None
            if answer is None:
                status = self.close()
                raise TransferError(
                    f"{job.directory}: the writing process ended with status {status}", path=job.directory
                )
        found = pickle.loads(answer)
        if isinstance(found, BaseException):
            raise found
        receipts: tuple[list[FileReceipt], dict[str, float]] = found
        return receipts

    def close(self) -> int | None:
        """End the child, when it has ended its work; returns its status."""
        child, self._child = self._child, None
        channel, self._channel = self._channel, None
        if channel is not None:
            with suppress(OSError), channel:
                # Not by closing alone: a process that another thread is just forking may have the descriptor too.
                channel.shutdown(socket.SHUT_RDWR)
        return None if child is None else child.wait()

    def forget_in_child(self) -> None:
        """After a fork: the process is the parent's, and must end with it."""
        self._child = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._guard = threading.Lock()

    def _started(self) -> socket.socket:
        if self._channel is not None and self._child is not None and self._child.poll() is None:
            return self._channel
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            for end in (ours, theirs):
                end.settimeout(None)  # whatever socket.setdefaulttimeout says
            self._channel = ours
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, *_search_path()],
                cwd="/",  # this process's own may have been removed; paths that are sent are absolute
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                # No GPU of this process is the child's business.
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        return ours


def _search_path() -> list[str]:
    """``sys.path`` as another directory sees it; what is relative to one that is gone leads nowhere."""
    try:
        return [os.path.abspath(path) for path in sys.path]
    except FileNotFoundError:
        return [path for path in sys.path if os.path.isabs(path)]


class RemoteExecutor:
    """Saves by a `WriterProcess`."""

    name = "cpu, in a process of its own"
    checksum = checksum.LIBRARY
    reads_large_apart = True

    def __init__(
        self, process: WriterProcess, *, directory: str, way: Way, fsync: bool, slab_nbytes: int, **executor: Any
    ) -> None:
        self.slab_nbytes = slab_nbytes
        self._process = process
        self._directory = directory
        self._way: Way = way
        self._fsync = fsync
        self._executor = {**executor, "slab_nbytes": slab_nbytes}

    def save(
        self,
        plan: SaveChunkPlan,
        source: SaveSource,
        open_file: Callable[[SaveFilePlan], FileWriter],  # noqa: ARG002
        stopwatch: Stopwatch,
    ) -> list[FileReceipt]:
        with stopwatch.phase("send"):
            positions = [
                write.position for file in plan.files for write in file.writes if isinstance(write, ChunkWrite)
            ]
            tensors = {position: _described(source.resolve(position)) for position in positions}
            job = _Job(plan, tensors, self._directory, self._way, self._fsync, self._executor)
        with stopwatch.phase("write"):
            receipts, seconds = self._process.run(job)
        for phase, spent in seconds.items():
            stopwatch.seconds[f"{phase} there"] = spent
        return receipts

    def load(
        self,
        plan: LoadChunkPlan,
        target: LoadTarget,
        open_file: Callable[[str], FileReader],
        stopwatch: Stopwatch,
    ) -> None:
        raise NotImplementedError("loads are not made in the background")


def serve() -> None:
    """The child's part: saves from the socket that is its standard input, until that ends."""
    # Of a Ctrl-C the parent hears too, and decides what becomes of a save in flight.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=os.dup(sys.stdin.fileno())) as channel, suppress(BrokenPipeError):
        while (order := _receive(channel)) is not None:
            try:
                answer = pickle.dumps(_saved(pickle.loads(order)))
            except BaseException as error:
                answer = _pickled(error, pickle.loads(order).directory)
            _send(channel, answer)


def _saved(job: _Job) -> tuple[list[FileReceipt], dict[str, float]]:
    stopwatch = Stopwatch()

    def open_file(file: SaveFilePlan) -> FileWriter:
        return open_writer(os.path.join(job.directory, file.path), job.way, nbytes=file.nbytes, fsync=job.fsync)

    receipts = CpuExecutor(**job.executor).save(job.plan, _Source(job.tensors), open_file, stopwatch)
    return receipts, stopwatch.seconds


class _Source:
    keeps_memory = True

    def __init__(self, tensors: dict[int, _Tensor]) -> None:
        self._tensors = tensors
        # Anew for each save: what is kept mapped stays in memory, and a path may be of another slab by then.
        places = {tensor.place.path: tensor.place.nbytes for tensor in tensors.values() if tensor.place is not None}
        self._mapped = {path: map_shared(path, nbytes) for path, nbytes in places.items()}

    def resolve(self, position: int) -> torch.Tensor:
        place, data, dtype, sizes, strides = self._tensors[position]
        if place is None:
            if not data:
                return torch.empty(sizes, dtype=dtype, device="cpu")
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).view(sizes)
        nbytes = extent_of_box(strides, sizes) * dtype.itemsize
        memory = self._mapped[place.path][place.byte_offset : place.byte_offset + nbytes]
        return memory.view(dtype).as_strided(sizes, strides)


def _described(tensor: torch.Tensor) -> _Tensor:
    sizes, strides = tuple(tensor.shape), tensor.stride()
    is_conj = tensor.is_conj() or tensor.is_neg()
    nbytes = extent_of_box(strides, sizes) * tensor.itemsize
    place = shared_place(tensor.data_ptr(), nbytes) if tensor.is_cpu and nbytes and not is_conj else None
    data = b""
    if place is None and tensor.numel():
        whole = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = whole.view(-1).view(torch.uint8).numpy().tobytes()
    return _Tensor(place, data, tensor.dtype, sizes, strides)


def _send(channel: socket.socket, data: bytes) -> None:
    channel.sendall(len(data).to_bytes(_LENGTH_NBYTES, "little"))
    channel.sendall(data)


def _receive(channel: socket.socket) -> bytearray | None:
    """A message; None: there is nobody at the other end any more."""
    length = _read(channel, _LENGTH_NBYTES)
    return None if length is None else _read(channel, int.from_bytes(length, "little"))


def _read(channel: socket.socket, nbytes: int) -> bytearray | None:
    data = bytearray(nbytes)
    left = memoryview(data)
    while left:
        received = channel.recv_into(left)
        if not received:
            return None
        left = left[received:]
    return data


def _pickled(error: BaseException, directory: str) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # some errors do not travel
        text = f"{directory}: the writing process failed: {type(error).__name__}: {error}"
        return pickle.dumps(TransferError(text, path=directory))
