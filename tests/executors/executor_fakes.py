"""What the executors' suite runs against: files that record, sources and targets that record, and a naive reference."""

from __future__ import annotations

import ctypes
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from gpudcp.chunkplan.save import LiteralWrite, SaveChunkPlan, SaveFilePlan, plan_save
from gpudcp.errors import CheckpointNotFoundError, TransferError
from gpudcp.executors.devices import Event, InterpretedDevice, Stream
from gpudcp.executors.slabs import HostSlab
from gpudcp.files.base import FileReader, FileWriter
from gpudcp.files.posix import PosixReader, PosixWriter


class Call(NamedTuple):
    """One call to a file."""

    kind: str
    path: str
    byte_offset: int
    nbytes: int
    address: int


class Backend(Protocol):
    """A place for files."""

    alignment_nbytes: int

    def create(self, file: SaveFilePlan) -> FileWriter: ...

    def open(self, path: str) -> FileReader: ...

    def put(self, path: str, data: bytes) -> None: ...

    def content(self, path: str) -> bytes: ...

    def names(self) -> list[str]: ...


class Files:
    """A backend with each call recorded; ``on_call`` may block a call, or make it fail, before the backend sees it."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.put, self.content, self.names = backend.put, backend.content, backend.names
        self.alignment_nbytes = backend.alignment_nbytes
        self.calls: list[Call] = []
        self.running = 0
        """Calls that have begun and not ended."""
        self.nopen = 0
        """Writers inside their context."""
        self.on_call: Callable[[Call], None] = lambda _: None
        self._guard = threading.Lock()

    def open_writer(self, file: SaveFilePlan) -> FileWriter:
        with self._recorded(Call("create", file.path, 0, file.nbytes, 0)):
            return _RecordingWriter(self, self._backend.create(file))

    def open_reader(self, path: str) -> FileReader:
        with self._recorded(Call("open", path, 0, 0, 0)):
            return _RecordingReader(self, self._backend.open(path))

    def calls_of(self, kind: str) -> list[Call]:
        return [call for call in self.calls if call.kind == kind]

    @contextmanager
    def _recorded(self, call: Call) -> Iterator[None]:
        with self._guard:
            self.calls.append(call)
            self.running += 1
        try:
            self.on_call(call)
            yield
        finally:
            with self._guard:
                self.running -= 1


class _RecordingWriter:
    def __init__(self, files: Files, inner: FileWriter) -> None:
        self._files, self._inner = files, inner
        self.path, self.alignment_nbytes = inner.path, inner.alignment_nbytes

    def write(self, data: memoryview, byte_offset: int) -> None:
        with self._files._recorded(Call("write", self.path, byte_offset, len(data), _address(data))):
            self._inner.write(data, byte_offset)

    def finish(self, nbytes: int) -> None:
        with self._files._recorded(Call("finish", self.path, 0, nbytes, 0)):
            self._inner.finish(nbytes)

    def __enter__(self) -> FileWriter:
        self._files.nopen += 1
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._files.running == 0, "the file is left while one of its writes is running"
        self._files.nopen -= 1
        self._inner.__exit__(kind, error, trace)


class _RecordingReader:
    def __init__(self, files: Files, inner: FileReader) -> None:
        self._files, self._inner = files, inner
        self.path, self.close = inner.path, inner.close
        self.nbytes, self.alignment_nbytes = inner.nbytes, inner.alignment_nbytes

    def read(self, into: memoryview, byte_offset: int) -> None:
        with self._files._recorded(Call("read", self.path, byte_offset, len(into), _address(into))):
            self._inner.read(into, byte_offset)


def _address(data: memoryview) -> int:
    return int(np.frombuffer(data, dtype=np.uint8).ctypes.data)


class MemoryBackend:
    """Files in memory, which refuse what the contract of a files backend forbids."""

    def __init__(self, *, alignment_nbytes: int = 4096) -> None:
        self.alignment_nbytes = alignment_nbytes
        self._files: dict[str, bytes] = {}

    def create(self, file: SaveFilePlan) -> FileWriter:
        self._files[file.path] = b""
        return _MemoryWriter(self, file.path, self.alignment_nbytes)

    def open(self, path: str) -> FileReader:
        if path not in self._files:
            raise CheckpointNotFoundError(path)
        return _MemoryReader(path, self._files[path])

    def put(self, path: str, data: bytes) -> None:
        self._files[path] = bytes(data)

    def content(self, path: str) -> bytes:
        return self._files[path]

    def names(self) -> list[str]:
        return sorted(self._files)


class _MemoryWriter:
    def __init__(self, backend: MemoryBackend, path: str, alignment_nbytes: int) -> None:
        self.path = path
        self.alignment_nbytes = alignment_nbytes
        self._backend = backend
        self._data = bytearray()
        self._is_finished = False
        self._guard = threading.Lock()

    def write(self, data: memoryview, byte_offset: int) -> None:
        for number in (byte_offset, len(data), _address(data)):
            assert number % self.alignment_nbytes == 0, f"{number} is not on a block"
        with self._guard:
            end = byte_offset + len(data)
            # What no write reaches must not look like the zeros that the plan asks for.
            self._data.extend(b"\xa5" * (end - len(self._data)))
            self._data[byte_offset:end] = data

    def finish(self, nbytes: int) -> None:
        self._data.extend(b"\xa5" * (nbytes - len(self._data)))
        self._backend.put(self.path, bytes(self._data[:nbytes]))
        self._is_finished = True

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_finished:
            del self._backend._files[self.path]


class _MemoryReader:
    alignment_nbytes = 1

    def __init__(self, path: str, data: bytes) -> None:
        self.path, self.nbytes = path, len(data)
        self._data = data
        self.close: Callable[[], object] = lambda: None

    def read(self, into: memoryview, byte_offset: int) -> None:
        data = self._data[byte_offset : byte_offset + len(into)]
        if len(data) != len(into):
            raise TransferError(f"{self.path}: {len(data)} of {len(into)} bytes are there", path=self.path)
        into[:] = data


class DeviceFiles(MemoryBackend):
    """Files that take device memory too, and refuse what KvikIO would."""

    def __init__(self) -> None:
        super().__init__(alignment_nbytes=4096)
        self.moved: list[Call] = []

    def create(self, file: SaveFilePlan) -> FileWriter:
        writer: Any = super().create(file)

        def write_device(tensor: torch.Tensor, byte_offset: int) -> None:
            assert tensor.dtype == torch.uint8
            self.moved.append(Call("write", file.path, byte_offset, tensor.nbytes, tensor.data_ptr()))
            writer.write(memoryview(tensor.numpy()), byte_offset)

        writer.write_device = write_device
        return writer  # type: ignore[no-any-return]

    def open(self, path: str) -> FileReader:
        reader: Any = super().open(path)

        def read_device(into: torch.Tensor, byte_offset: int) -> None:
            assert into.data_ptr() % 4096 == byte_offset % 4096 == 0
            self.moved.append(Call("read", path, byte_offset, into.nbytes, into.data_ptr()))
            reader.read(memoryview(into.numpy()), byte_offset)

        reader.alignment_nbytes = 4096
        reader.read_device = read_device
        return reader  # type: ignore[no-any-return]


class BlockFiles(MemoryBackend):
    """Files that are read by whole blocks, as past the page cache, and refuse every other read."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[Call] = []

    def open(self, path: str) -> FileReader:
        reader: Any = super().open(path)
        inner = reader.read

        def read(into: memoryview, byte_offset: int) -> None:
            end = byte_offset + len(into)
            assert _address(into) % 4096 == byte_offset % 4096 == 0
            assert end % 4096 == 0 or end >= reader.nbytes, f"bytes up to {end} of {reader.nbytes}"
            self.moved.append(Call("read", path, byte_offset, len(into), _address(into)))
            inner(into, byte_offset)

        reader.alignment_nbytes = 4096
        reader.read = read
        return reader  # type: ignore[no-any-return]


class PosixBackend:
    """The real thing, in a directory."""

    def __init__(self, directory: Path, *, is_direct: bool) -> None:
        self._directory = directory
        self._is_direct = is_direct
        self.alignment_nbytes = 4096 if is_direct else 1

    def create(self, file: SaveFilePlan) -> FileWriter:
        path = str(self._directory / file.path)
        return PosixWriter(path, nbytes=file.nbytes, is_direct=self._is_direct, fsync=False)

    def open(self, path: str) -> FileReader:
        return PosixReader(str(self._directory / path), is_direct=self._is_direct)

    def put(self, path: str, data: bytes) -> None:
        (self._directory / path).write_bytes(data)

    def content(self, path: str) -> bytes:
        return (self._directory / path).read_bytes()

    def names(self) -> list[str]:
        return sorted(os.listdir(self._directory))


class OneOfSeveral(InterpretedDevice):
    """Host memory as one of several devices: its own tensors are those that were placed on it.

    Its streams wait for no other device's events, and a pool's threads for none unless they are bound to its device.
    """

    def __init__(self, number: int, *, most_nbytes: int = 1 << 40) -> None:
        self.torch_device = torch.device("cpu", number)
        self.most_nbytes = most_nbytes
        """Of one slab, with its margins, beyond which the device has no room."""
        self._placed: dict[int, torch.Tensor] = {}
        self._slabs: list[torch.Tensor] = []

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that is the device's, as long as the device lives."""
        copy = tensor.clone()
        self._placed[copy.untyped_storage().data_ptr()] = copy
        return copy

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._placed

    def holds(self, address: int) -> bool:
        """Whether a lane of this device has this address in one of its slabs."""
        return any(slab.data_ptr() <= address < slab.data_ptr() + slab.nbytes for slab in self._slabs)

    def new_slab(self, nbytes: int) -> torch.Tensor:
        if nbytes > self.most_nbytes:
            raise torch.OutOfMemoryError("full")
        self._slabs.append(super().new_slab(nbytes))
        return self._slabs[-1]

    def new_host_slab(self, nbytes: int) -> HostSlab:
        slab = super().new_host_slab(nbytes)
        self._slabs.append(slab.tensor)
        return slab

    def new_stream(self) -> Stream:
        return _StreamOfOne(self.torch_device, super().new_stream())

    def bind_thread(self) -> None:
        _bound.device = self.torch_device


_bound = threading.local()


class _StreamOfOne:
    def __init__(self, device: torch.device, inner: Stream) -> None:
        self._device, self._inner = device, inner
        self.current, self.wait_for_caller = inner.current, inner.wait_for_caller

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, _EventOfOne)
        assert event.device == self._device, "an event of another device"

    def record(self) -> Event:
        return _EventOfOne(self._device)


class _EventOfOne:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def synchronize(self) -> None:
        if threading.current_thread().name.startswith("gpudcp-"):
            assert _bound.device == self.device, "a thread that is bound to another device"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]


Entry = torch.Tensor | tuple[torch.Tensor, torch.dtype] | bytes
"""Something to save: a tensor as it is or cast, or literal bytes."""


@dataclass
class Source:
    """Gives tensors by position, once each."""

    tensors: dict[int, torch.Tensor]
    resolved: list[int] = field(default_factory=list)
    keeps_memory: bool = True

    def resolve(self, position: int) -> torch.Tensor:
        assert position not in self.resolved, "a position is resolved once"
        self.resolved.append(position)
        return self.tensors[position]


def save_of(
    entries: Sequence[Entry],
    *,
    slab_nbytes: int,
    path: str = "file",
    more_paths: Sequence[str] = (),
    groups: Sequence[int] | None = None,
) -> tuple[SaveChunkPlan, Source]:
    """The plan that writes these entries, and the source of its tensors."""
    tensors: dict[int, torch.Tensor] = {}
    literals: dict[int, bytes] = {}
    items = []
    for position, entry in enumerate(entries):
        index = MetadataIndex(f"item.{position}")
        if isinstance(entry, bytes):
            literals[position] = entry
            items.append(WriteItem(index=index, type=WriteItemType.BYTE_IO))
            continue
        tensor, dtype = entry if isinstance(entry, tuple) else (entry, entry.dtype)
        tensors[position] = tensor
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=torch.Size([0] * tensor.ndim), sizes=tensor.shape),
            properties=TensorProperties(dtype=dtype),
            size=tensor.shape,
        )
        items.append(WriteItem(index=index, type=WriteItemType.TENSOR, tensor_data=data))
    plan = plan_save(items, literals, paths=[path, *more_paths], slab_nbytes=slab_nbytes, groups=groups)
    return plan, Source(tensors)


def naive_file(plan: SaveFilePlan, source: Source, *, has_checksum: bool = True) -> tuple[bytes, list[int | None]]:
    """A file's bytes and the CRC-32 of each of its writes, one write after the other into one long buffer."""
    data = bytearray(plan.nbytes)
    crcs: list[int | None] = []
    for write in plan.writes:
        if isinstance(write, LiteralWrite):
            checked = whole = write.data
        else:
            checked = naive_payload(source.tensors[write.position], write.dtype)
            crc = zlib.crc32(checked) if has_checksum else 0
            whole = write.envelope.prefix + checked + write.envelope.suffix_with(crc)
        data[write.byte_offset : write.byte_offset + write.nbytes] = whole
        crcs.append(zlib.crc32(checked) if has_checksum else None)
    assert len(data) == plan.nbytes
    return bytes(data), crcs


def naive_payload(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """The elements in row-major order, cast, each fetched from memory by its own address."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if dtype == torch.float8_e4m3fn != tensor.dtype:
        tensor = tensor.double().clamp(-448, 448)  # torch 2.11 makes NaNs of what is larger
    tensor = tensor.to(dtype)
    memory = memory_of(tensor)
    places = np.full(tuple(tensor.shape), tensor.storage_offset(), dtype=np.int64)
    for dim, stride in enumerate(tensor.stride()):
        shape = [1] * tensor.ndim
        shape[dim] = -1
        places += np.arange(tensor.shape[dim], dtype=np.int64).reshape(shape) * stride
    return memory.reshape(-1, dtype.itemsize)[places.reshape(-1)].tobytes()


def memory_of(tensor: torch.Tensor) -> np.ndarray:
    """The whole memory behind a tensor, as bytes, whatever its dtype."""
    storage = tensor.cpu().untyped_storage()
    nbytes = storage.nbytes() // tensor.dtype.itemsize * tensor.dtype.itemsize
    return np.frombuffer(ctypes.string_at(storage.data_ptr(), nbytes) if nbytes else b"", dtype=np.uint8)


def random_tensor(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bits: for most dtypes that means NaNs and infinities too."""
    generator = torch.Generator().manual_seed(seed + sum(sizes))
    numel = int(np.prod(sizes, dtype=np.int64))
    if dtype == torch.bool:
        return torch.randint(0, 2, sizes, generator=generator, dtype=torch.uint8).view(torch.bool)
    raw = torch.randint(0, 256, (numel * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(sizes)


@dataclass
class Target:
    """Takes tensors by position, and remembers who was called when, on which thread."""

    destinations: dict[int, torch.Tensor]
    events: list[tuple[str, int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    committed: dict[int, bytes] = field(default_factory=dict)
    """What the destination held when it was committed."""
    on_event: Callable[[str, int], None] = lambda _kind, _position: None
    most_open: int = 0
    """The most positions that were resolved and not yet committed at one time."""
    known_devices: dict[int, torch.device] = field(default_factory=dict)

    def device_of(self, position: int) -> torch.device | None:
        return self.known_devices.get(position)

    def resolve(self, position: int) -> torch.Tensor:
        self._record("resolve", position)
        return self.destinations[position]

    def commit(self, position: int, tensor: torch.Tensor) -> None:
        self._record("commit", position)
        assert tensor is self.destinations[position], "the tensor that resolve gave"
        self.committed[position] = memory_of(tensor).tobytes()

    def positions(self, kind: str) -> list[int]:
        return [position for event, position in self.events if event == kind]

    def _record(self, kind: str, position: int) -> None:
        self.on_event(kind, position)
        self.events.append((kind, position))
        self.threads.add(threading.get_ident())
        self.most_open = max(self.most_open, len(self.positions("resolve")) - len(self.positions("commit")))
