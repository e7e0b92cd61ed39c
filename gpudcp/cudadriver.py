"""What is asked of the CUDA driver itself, because torch has no way of asking: contexts, capture modes, own streams."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream, nor that one for it


@cache
def driver() -> Any:
    """The driver's library."""
    return ctypes.CDLL("libcuda.so.1")


@contextmanager
def context_of(device: torch.device) -> Iterator[None]:
    """The device's context is this thread's meanwhile; no call ends the capture of a graph in another thread."""
    with torch.cuda.device(device):
        torch.cuda.mem_get_info(device)  # torch makes none current for a device that is the thread's already
        before = _exchange_capture_mode(_RELAXED)
        try:
            yield
        finally:
            _exchange_capture_mode(before)


def relax_stream_capture() -> None:
    """Let this thread's calls, such as waiting for an event, not end the capture of a graph in another thread.

    CUDA's default is the other way round (CUDA driver API, cuThreadExchangeStreamCaptureMode).
    """
    _exchange_capture_mode(_RELAXED)


def new_stream(device: torch.device) -> Any:
    """A stream that nobody else has, for as long as it is used; torch's kind.

    torch's own streams are 32 for a device, given out in turn: one of them may also be training's, or the one that a
    graph is being captured on, which a copy would become a part of.
    """
    stream = ctypes.c_void_p()
    with context_of(device):
        result = driver().cuStreamCreate(ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
    if result != 0 or stream.value is None:
        raise torch.OutOfMemoryError(f"{device}: cuStreamCreate: CUDA driver error {result}")
    own: Any = torch.cuda.ExternalStream(stream.value, device)  # type: ignore[no-untyped-call]
    when_gone(own, _destroy, stream.value, device)
    return own


def when_gone(owner: object, act: Callable[..., object], *args: object) -> None:
    """Have ``act`` called when the owner is no more.

    Not at the interpreter's exit, when the driver may be gone. Nor in processes that are forked from this one: they
    cannot call the driver, and what it would free there is this one's.
    """
    weakref.finalize(owner, _act_in, os.getpid(), act, args).atexit = False


def _act_in(pid: int, act: Callable[..., object], args: tuple[object, ...]) -> None:
    if os.getpid() == pid:
        act(*args)


def _destroy(stream: int, device: torch.device) -> None:
    with context_of(device):
        driver().cuStreamDestroy_v2(ctypes.c_void_p(stream))


def _exchange_capture_mode(mode: int) -> int:
    """Set this thread's; returns the one before."""
    exchanged = ctypes.c_int(mode)
    driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(exchanged))
    return exchanged.value
