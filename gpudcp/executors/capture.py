"""A thread that works beside a CUDA graph which another thread is capturing."""

from __future__ import annotations

import ctypes

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def relax_stream_capture() -> None:
    """Let this thread's calls, such as waiting for an event, not end the capture of a graph in another thread.

    CUDA's default is the other way round (CUDA driver API, cuThreadExchangeStreamCaptureMode).
    """
    mode = ctypes.c_int(_RELAXED)
    ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
