"""The cpu executor in a process of its own, which packs, checksums and writes beside training without sharing its
interpreter. Saves only; tensors travel as places in shared memory, everything else by a pipe.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple, cast

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
        self._guard = threading.Lock()
        atexit.register(self.close)

    def run(self, job: _Job) -> tuple[list[FileReceipt], dict[str, float]]:
        """What came of a save over there; raises what it raised.

        Raises:
            TransferError: the process died.
        """
        with self._guard:
            child = self._started()
            try:
                _send(cast(BinaryIO, child.stdin), pickle.dumps(job))
                answer = _receive(cast(BinaryIO, child.stdout))
            except OSError:  # a broken pipe
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
        if child is None:
            return None
        for pipe in (child.stdin, child.stdout):
            with suppress(OSError):  # of what it did not read
                cast(BinaryIO, pipe).close()
        return child.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self.close()
            # No GPU of this process is the child's business.
            self._child = subprocess.Popen(
                [sys.executable, "-c", _START, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
        return self._child


class RemoteExecutor:
    """Saves by a `WriterProcess`."""

    name = "cpu, in a process of its own"
    checksum = checksum.LIBRARY

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
    """The child's part: saves from standard input until that ends."""
    orders = sys.stdin.buffer
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    mapped: dict[str, torch.Tensor] = {}
    while (order := _receive(orders)) is not None:
        try:
            answer = pickle.dumps(_saved(pickle.loads(order), mapped))
        except BaseException as error:
            answer = _pickled(error, pickle.loads(order).directory)
        _send(answers, answer)


def _saved(job: _Job, mapped: dict[str, torch.Tensor]) -> tuple[list[FileReceipt], dict[str, float]]:
    stopwatch = Stopwatch()

    def open_file(file: SaveFilePlan) -> FileWriter:
        return open_writer(os.path.join(job.directory, file.path), job.way, nbytes=file.nbytes, fsync=job.fsync)

    receipts = CpuExecutor(**job.executor).save(job.plan, _Source(job.tensors, mapped), open_file, stopwatch)
    return receipts, stopwatch.seconds


class _Source:
    keeps_memory = True

    def __init__(self, tensors: dict[int, _Tensor], mapped: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        used = {tensor.place.path: tensor.place.nbytes for tensor in tensors.values() if tensor.place is not None}
        for path in [path for path in mapped if path not in used or mapped[path].nbytes != used[path]]:
            del mapped[path]
        for path, nbytes in used.items():
            if path not in mapped:
                mapped[path] = map_shared(path, nbytes)
        self._mapped = mapped

    def resolve(self, position: int) -> torch.Tensor:
        place, data, dtype, sizes, strides = self._tensors[position]
        if place is None:
            if not data:
                return torch.empty(sizes, dtype=dtype)
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


def _send(pipe: BinaryIO, data: bytes) -> None:
    pipe.write(len(data).to_bytes(_LENGTH_NBYTES, "little"))
    pipe.write(data)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes | None:
    """A message; None: there is nobody at the other end any more."""
    length = int.from_bytes(head, "little") if len(head := pipe.read(_LENGTH_NBYTES)) == _LENGTH_NBYTES else 0
    data = pipe.read(length)
    return data if length and len(data) == length else None


def _pickled(error: BaseException, directory: str) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:  # some errors do not travel
        text = f"{directory}: the writing process failed: {type(error).__name__}: {error}"
        return pickle.dumps(TransferError(text, path=directory))
