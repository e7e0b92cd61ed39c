"""One aligned write and read of device memory through KvikIO, in this process, with a deadline: does it work, and how?

Tried once per file system and device, only after `gpudcp.files.gds` found nothing in the way. It takes
256 KiB of a file without a name, which nobody sees and no crash leaves behind. On file systems that have no such files,
as NFS and Lustre, a trial is made only for who asks for one: there a file gets a name, ``.gpudcp-`` and 16 digits, for
as long as the trial takes, and a process that is killed in that moment leaves it.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import torch

from gpudcp.cudadriver import relax_stream_capture
from gpudcp.errors import BackendUnavailableError, GpuDcpError, TransferError
from gpudcp.files.filesystems import has_unnamed_files
from gpudcp.files.kvikio import (
    copy_and_wait,
    cufile_facts,
    open_handle,
    read_raw,
    write_raw,
)
from gpudcp.options import SLAB_ALIGNMENT_NBYTES

DEADLINE_S = 30.0
TRIAL_NBYTES = 64 * SLAB_ALIGNMENT_NBYTES
"""Memory that a trial needs: above KvikIO's threshold of 16 KiB, under which it never uses GPUDirect Storage."""

# Whoever else moves bytes at the same time makes GPUDirect Storage look like compat mode, never the other way round.
_TIMES_COUNTED = 4

_PATTERN = bytes(i * 7 % 251 for i in range(TRIAL_NBYTES))

_answers: dict[tuple[int, torch.device], DeviceIO | str] = {}
_guard = threading.Lock()


class DeviceIO(NamedTuple):
    """How device memory moves here."""

    is_gds: bool
    """True only where it is certain that no bytes pass through host memory."""
    reason: str


def try_device_io(
    directory: str,
    tensor: torch.Tensor,
    *,
    is_asked_for: bool = True,
    deadline_s: float = DEADLINE_S,
) -> DeviceIO:
    """Move the first `TRIAL_NBYTES` of ``tensor`` to a file in ``directory`` and back, and tell how they went.

    ``tensor`` is contiguous uint8 of at least that length, in an allocation of its own, its address a multiple of 4096;
    its contents are lost. The
    answer is remembered for this process, the directory's file system and the device. Unless somebody has asked for it,
    no file with a name is made.

    Raises:
        BackendUnavailableError: it failed, gave other bytes back, or did not return in time; or it would take a name.
    """
    key = os.stat(directory).st_dev, tensor.device
    with _guard:
        if key not in _answers:
            if not is_asked_for and not has_unnamed_files(directory):
                raise BackendUnavailableError(
                    f"{directory}: all files have names there, and unasked gpudcp makes none to try KvikIO with; "
                    "run gpudcp.tune on it, or use Options(files='kvikio')"
                )
            _answers[key] = _within(deadline_s, lambda: _bound_trial(directory, tensor[:TRIAL_NBYTES]))
        answer = _answers[key]
    if isinstance(answer, str):
        raise BackendUnavailableError(f"{directory}: {answer}; use Options(files='auto') or 'posix'")
    return answer


def _within(deadline_s: float, act: Callable[[], DeviceIO]) -> DeviceIO | str:
    """What ``act`` returns, or why there is nothing. A thread that hangs is left alone, with the memory it uses."""
    answers: list[DeviceIO | str] = []

    def run() -> None:
        try:
            answers.append(act())
        except (GpuDcpError, OSError, RuntimeError) as err:
            answers.append(f"a trial transfer failed: {err}")

    thread = threading.Thread(target=run, name="gpudcp-trial", daemon=True)
    try:
        thread.start()
    except RuntimeError as err:  # at the interpreter's exit, or the system has no more
        return f"no thread for a trial transfer: {err}"
    thread.join(deadline_s)
    if thread.is_alive():
        return f"a trial transfer did not return within {deadline_s:g} s"
    return answers[0] if answers else "a trial transfer ended without an answer"


def _bound_trial(directory: str, tensor: torch.Tensor) -> DeviceIO:
    if tensor.is_cuda:
        # A new thread's device is 0, and whatever returns to it makes a context there, whoever owns that.
        torch.cuda.set_device(tensor.device)
        relax_stream_capture()
    return _trial(directory, tensor)


def _trial(directory: str, tensor: torch.Tensor) -> DeviceIO:
    path = os.path.join(directory, "(trial)")
    with _scratch_file(directory) as fd:
        with closing(open_handle(fd, path, "r+")) as handle:
            # After the opening, which opens the cuFile driver too.
            facts = cufile_facts()
            passed_by = min(_write_and_read(handle, path, fd, tensor) for _ in range(_TIMES_COUNTED)) < TRIAL_NBYTES
        if facts.is_compat_mode:
            return DeviceIO(False, "KvikIO in compat mode: POSIX calls through pinned memory")
        own = f"cuFile takes up to {facts.device_cache_nbytes >> 20} MiB of device memory for itself"
        if facts.is_nvidia_fs_loaded:
            # Whatever cuFile and KvikIO say of themselves: KvikIO may have fallen back for this very file.
            if passed_by:
                return DeviceIO(True, f"GPUDirect Storage; no byte of a trial passed through a POSIX call; {own}")
            return DeviceIO(False, "KvikIO through cuFile, but the bytes of a trial passed through POSIX calls")
        if facts.may_fall_back:
            return DeviceIO(
                False, "KvikIO through cuFile, which may fall back to POSIX; allow_compat_mode false shows whether"
            )
        try:
            _try_without_compat_mode(fd, path, tensor)
        except TransferError as err:
            return DeviceIO(False, f"KvikIO in compat mode for the files here: {err}")
    return DeviceIO(True, f"GPUDirect Storage; neither KvikIO nor cuFile may fall back in a trial; {own}")


def _try_without_compat_mode(fd: int, path: str, tensor: torch.Tensor) -> None:
    """PCI P2PDMA goes through system calls too, so only that it works where nothing may fall back shows it.

    Raises:
        TransferError: it does not.
    """
    with closing(open_handle(fd, path, "r+", compat_mode="OFF")) as handle:
        _write_and_read(handle, path, fd, tensor)


def _write_and_read(handle: object, path: str, fd: int, tensor: torch.Tensor) -> int:
    """Both ways, each checked against what the file holds; returns how many bytes passed through system calls."""
    copy_and_wait(torch.frombuffer(bytearray(_PATTERN), dtype=torch.uint8), tensor)
    before = _syscall_nbytes()
    write_raw(handle, path, tensor, 0)
    written = _syscall_nbytes() - before
    if os.pread(fd, TRIAL_NBYTES, 0) != _PATTERN:
        raise RuntimeError("what was written from device memory does not stand in the file")
    turned = _PATTERN[::-1]
    os.pwrite(fd, turned, 0)
    os.fsync(fd)
    before = _syscall_nbytes()
    read_raw(handle, path, tensor, 0)
    read = _syscall_nbytes() - before
    found = bytearray(TRIAL_NBYTES)
    copy_and_wait(tensor, torch.frombuffer(found, dtype=torch.uint8))
    if found != turned:
        raise RuntimeError("what was read into device memory is not what stands in the file")
    return max(written, read)


def _syscall_nbytes() -> int:
    """Bytes that this process has read and written by system calls."""
    with open("/proc/self/io", encoding="ascii") as file:
        counted = dict(line.split(": ") for line in file)
    return int(counted["rchar"]) + int(counted["wchar"])


@contextmanager
def _scratch_file(directory: str) -> Iterator[int]:
    """A file for reading and writing that is nowhere to be found afterwards."""
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (OSError, AttributeError):  # no unnamed files on NFS and Lustre
        path = os.path.join(directory, f".gpudcp-{secrets.token_hex(8)}")
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)
            os.unlink(path)
        return
    try:
        yield fd
    finally:
        os.close(fd)
