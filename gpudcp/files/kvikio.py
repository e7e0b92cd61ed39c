"""KvikIO files: device memory to and from files, by GPUDirect Storage or by KvikIO's compat mode, as KvikIO decides.

The only module that imports kvikio, and only when the first file is opened. Which of the two ways it is, `trial` finds
out. Our own threads call the ``raw_*`` functions, each a single synchronous transfer, so neither KvikIO's thread pool
nor any other default of the process is touched. Host memory takes the POSIX descriptor of the same file: KvikIO would
take it through that pool and through pinned memory of its own, and can do no more than pwrite does.
"""

from __future__ import annotations

import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch

from gpudcp.cudadriver import new_stream
from gpudcp.errors import PlanError, TransferError
from gpudcp.files.posix import PosixReader, PosixWriter
from gpudcp.files.settings import ProcessSetting
from gpudcp.options import SLAB_ALIGNMENT_NBYTES

_registered: dict[int, torch.Tensor] = {}
"""Registered device memory by address. cuFile's own table is the process's, and so is this one."""

_bound = threading.local()

CompatMode = Literal["ON", "OFF"]
"""ON: by POSIX calls, for measuring them. OFF: by cuFile or not at all. KvikIO else decides for each file."""

_compat_mode = ProcessSetting(
    "KvikIO's compat mode",
    lambda: _defaults().get("compat_mode"),
    lambda mode: _defaults().set("compat_mode", mode),
)
"""The default of the process, by which KvikIO opens files, and registers and deregisters memory or does nothing."""


class KvikioWriter:
    """A new file, which must not exist yet, for device and host memory; without `finish` it is removed on leaving.

    ``is_direct`` is for writes from host memory; device memory goes the way that KvikIO chooses.
    """

    alignment_nbytes = SLAB_ALIGNMENT_NBYTES

    def __init__(
        self, path: str, *, nbytes: int, is_direct: bool, fsync: bool, compat_mode: CompatMode | None = None
    ) -> None:
        self.path = path
        # cuFile writes directly, and so does compat mode where it can.
        self._file = PosixWriter(path, nbytes=nbytes, is_direct=is_direct, fsync=fsync, is_reserved=True)
        try:
            self._handle = open_handle(self._file.fileno(), path, "r+", compat_mode=compat_mode)
        except BaseException:
            self._file.__exit__(None, None, None)
            raise

    def write(self, data: memoryview, byte_offset: int) -> None:
        self._file.write(data, byte_offset)

    def write_device(self, tensor: torch.Tensor, byte_offset: int) -> None:
        _check_alignment(self.path, tensor, byte_offset)
        if tensor.nbytes % SLAB_ALIGNMENT_NBYTES:
            raise PlanError(f"{self.path}: {tensor.nbytes} bytes are no multiple of {SLAB_ALIGNMENT_NBYTES}")
        write_raw(self._handle, self.path, tensor, byte_offset)

    def finish(self, nbytes: int) -> None:
        # cuFile lets go of the file before it gets its length and is synced.
        self._handle.close()
        self._file.finish(nbytes)

    def __enter__(self) -> KvikioWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.close()
        self._file.__exit__(kind, error, trace)


class KvikioReader:
    """An open file for device and host memory. Host memory is read through the page cache, at any alignment.

    ``file`` is the file, if it is open already; it is closed with this one.
    """

    alignment_nbytes = SLAB_ALIGNMENT_NBYTES

    def __init__(self, path: str, *, file: PosixReader | None = None, compat_mode: CompatMode | None = None) -> None:
        self.path = path
        self._file = file or PosixReader(path)
        try:
            self._handle = open_handle(self._file.fileno(), path, "r", compat_mode=compat_mode)
        except BaseException:
            self._file.close()
            raise
        self.nbytes = self._file.nbytes
        self.close = weakref.finalize(self, _close, self._handle, self._file)
        """Close the file; a second call does nothing."""

    def read(self, into: memoryview, byte_offset: int) -> None:
        self._file.read(into, byte_offset)

    def read_device(self, into: torch.Tensor, byte_offset: int) -> None:
        _check_alignment(self.path, into, byte_offset)
        if not self.close.alive:
            raise TransferError(f"{self.path}: the file is closed", path=self.path, byte_offset=byte_offset)
        body_nbytes = into.nbytes - into.nbytes % SLAB_ALIGNMENT_NBYTES
        if body_nbytes:
            read_raw(self._handle, self.path, into[:body_nbytes], byte_offset)
        if body_nbytes < into.nbytes:
            self._read_tail(into[body_nbytes:], byte_offset + body_nbytes)

    def _read_tail(self, into: torch.Tensor, byte_offset: int) -> None:
        # Less than a block: cuFile would take it through a bounce buffer of its own, and so more slowly.
        data = bytearray(into.nbytes)
        self._file.read(memoryview(data), byte_offset)
        copy_and_wait(torch.frombuffer(data, dtype=torch.uint8), into)


def register(tensor: torch.Tensor) -> None:
    """Register device memory with cuFile: a uint8 tensor that is one whole allocation of its own. Compat mode: a no-op.

    Never a tensor of the caching allocator: cuFile would pin the whole segment that it lies in. The tensor is kept
    alive until `deregister`.
    """
    with _current(tensor.device), _compat_mode.as_found():
        _kvikio().memory_register(_DeviceBytes(tensor.data_ptr(), tensor.nbytes))
    _registered[tensor.data_ptr()] = tensor


def deregister(tensor: torch.Tensor) -> None:
    """Undo `register`, before the memory is freed and when no transfer uses it any more.

    After an error the tensor is kept alive for good: cuFile may still know its memory.
    """
    with _current(tensor.device), _compat_mode.as_found():  # KvikIO does nothing in compat mode, and does not say so
        _kvikio().memory_deregister(_DeviceBytes(tensor.data_ptr(), tensor.nbytes))
    del _registered[tensor.data_ptr()]


class CuFileFacts(NamedTuple):
    """What KvikIO and cuFile say of themselves in this process."""

    is_compat_mode: bool
    """KvikIO moves bytes by POSIX calls through pinned memory."""
    is_nvidia_fs_loaded: bool
    may_fall_back: bool
    """cuFile itself may move bytes by POSIX calls, without a word."""
    device_cache_nbytes: int
    """Memory that cuFile may take on each device for itself, beside whatever a transfer takes."""


def cufile_facts() -> CuFileFacts:
    """What is in use; opens the cuFile driver unless KvikIO is in compat mode."""
    import kvikio.cufile_driver

    with _compat_mode.as_found():
        is_compat_mode = _defaults().is_compat_mode_preferred()
    if is_compat_mode:
        return CuFileFacts(True, False, False, 0)
    driver = kvikio.cufile_driver
    return CuFileFacts(
        False,
        bool(driver.get("is_gds_available")),
        bool(driver.get("allow_compat_mode")),
        int(driver.get("max_device_cache_size")) << 10,
    )


def open_handle(fd: int, path: str, flags: str, *, compat_mode: CompatMode | None = None) -> Any:
    """KvikIO's handle of a file that is open already, whatever has become of its name.

    Raises:
        TransferError: KvikIO cannot open it.
    """
    kvikio = _kvikio()
    # What a file is opened by is its own from then on, but KvikIO lets no one file be told of it.
    mode = _compat_mode.kept() if compat_mode is None else _compat_mode.changed(getattr(kvikio.CompatMode, compat_mode))
    try:
        with mode:
            return kvikio.CuFile(f"/proc/self/fd/{fd}", flags)
    except (RuntimeError, OSError) as err:
        raise TransferError(f"{path}: KvikIO cannot open it: {err}", path=path) from err


def write_raw(handle: Any, path: str, tensor: torch.Tensor, byte_offset: int) -> None:
    """Write all of ``tensor``; KvikIO's errors and short transfers become TransferErrors."""
    _move(handle.raw_write, "write", path, tensor, byte_offset)


def read_raw(handle: Any, path: str, into: torch.Tensor, byte_offset: int) -> None:
    """Fill all of ``into``; KvikIO's errors and short transfers become TransferErrors."""
    _move(handle.raw_read, "read", path, into, byte_offset)


def _move(call: Any, what: str, path: str, tensor: torch.Tensor, byte_offset: int) -> None:
    memory, dev_offset = _base_of(tensor)
    try:
        with _current(tensor.device):
            moved = call(memory, tensor.nbytes, byte_offset, dev_offset)
    except (RuntimeError, OSError, ValueError) as err:
        raise TransferError(
            f"{path}: KvikIO: {what} of {tensor.nbytes} bytes at {byte_offset} failed: {err}",
            path=path,
            byte_offset=byte_offset,
            expected_nbytes=tensor.nbytes,
        ) from err
    if moved != tensor.nbytes:
        raise TransferError(
            f"{path}: KvikIO: {what} of {tensor.nbytes} bytes at {byte_offset} moved {moved}",
            path=path,
            byte_offset=byte_offset,
            expected_nbytes=tensor.nbytes,
            moved_nbytes=moved,
        )


def _current(device: torch.device) -> AbstractContextManager[object]:
    """The device is this thread's current one meanwhile, with its context."""
    if device.type != "cuda":
        return nullcontext()
    _stream_of(device)
    return torch.cuda.device(device)


def _base_of(tensor: torch.Tensor) -> tuple[_DeviceBytes, int]:
    """Memory as KvikIO wants it: for registered memory the registered address, and the offset apart."""
    address = tensor.data_ptr()
    for base, whole in tuple(_registered.items()):
        if base <= address and address + tensor.nbytes <= base + whole.nbytes:
            return _DeviceBytes(base, whole.nbytes), address - base
    return _DeviceBytes(address, tensor.nbytes), 0


class _DeviceBytes:
    """Device memory, as the CUDA array interface describes it: no stream to wait for, the caller has done that."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def copy_and_wait(source: torch.Tensor, into: torch.Tensor) -> None:
    """Copy between the host and a device; on return the bytes are there. Waits for nothing else on the device."""
    on_device = source if source.is_cuda else into
    if not on_device.is_cuda:
        into.copy_(source)
        return
    stream = _stream_of(on_device.device)
    with torch.cuda.stream(stream):
        into.copy_(source)
    stream.synchronize()


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """A stream of this thread's own: its current one is most likely the training's. Binds the thread to the device."""
    streams: dict[torch.device, torch.cuda.Stream] = _bound.__dict__.setdefault("streams", {})
    if device not in streams:
        # A new thread has no CUDA context, and torch makes none current when it is asked for the device that is the
        # thread's already, as device 0 is; cuFile wants one. Asking for the free memory is the cheapest call that
        # does it, and no stream is touched.
        torch.cuda.mem_get_info(device)
        streams[device] = new_stream(device)
    return streams[device]


def _check_alignment(path: str, tensor: torch.Tensor, byte_offset: int) -> None:
    if tensor.dtype != torch.uint8 or tensor.ndim != 1 or not tensor.is_contiguous():
        raise PlanError(f"{path}: {tensor.dtype} of shape {tuple(tensor.shape)}: contiguous bytes were expected")
    if tensor.data_ptr() % SLAB_ALIGNMENT_NBYTES or byte_offset % SLAB_ALIGNMENT_NBYTES:
        raise PlanError(
            f"{path}: device memory at {tensor.data_ptr():#x} for byte {byte_offset}: "
            f"both must be multiples of {SLAB_ALIGNMENT_NBYTES}"
        )


def _close(handle: Any, file: PosixReader) -> None:
    handle.close()
    file.close()


def _kvikio() -> Any:
    import kvikio

    return kvikio


def _defaults() -> Any:
    import kvikio.defaults

    return kvikio.defaults
