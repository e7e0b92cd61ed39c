"""What the device executor needs of a device: memory, streams, events. CUDA, or the host under Triton's interpreter."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from gpudcp.cudadriver import context_of, new_stream, relax_stream_capture
from gpudcp.executors.devicememory import allocate, pin
from gpudcp.executors.slabs import HostSlab
from gpudcp.workers import until_given_back


def is_out_of_memory(err: RuntimeError) -> bool:
    """Whether a device has run out of memory: torch tells it by type, the driver and Triton in words."""
    return isinstance(err, torch.OutOfMemoryError) or "out of memory" in str(err)


class Event(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Wait for it, without spinning and without the interpreter's lock."""


class Stream(Protocol):
    """A queue of work on one device."""

    def current(self) -> AbstractContextManager[Any]:
        """Work begun in this context goes to the stream."""

    def wait_for_caller(self) -> None:
        """What comes next waits for all that the calling thread's own current stream was given so far."""

    def wait_for(self, event: Event) -> None:
        """What comes next waits for the event."""

    def record(self) -> Event:
        """The point that the stream has come to when it has done all it was given so far."""


class Device(Protocol):
    """Where tensors are that kernels reach."""

    torch_device: torch.device

    def free_nbytes(self) -> int:
        """How much memory may still be allocated there, by whoever comes first."""

    def spare_nbytes(self) -> int:
        """Likewise by torch, which keeps some for its next tensors."""

    def reclaim(self) -> None:
        """Make torch give back what it keeps for its next tensors, as it does itself before it is out of memory."""

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether kernels on this device reach the tensor's memory."""

    def new_slab(self, nbytes: int) -> torch.Tensor:
        """Flat uint8, an allocation of its own, on a multiple of 4096.

        Raises:
            torch.OutOfMemoryError: the device has no room.
        """

    def new_host_slab(self, nbytes: int) -> HostSlab:
        """Host memory that the device copies to and from while the host goes on.

        Raises:
            torch.OutOfMemoryError: no more can be had.
        """

    def on_device(self, data: torch.Tensor) -> torch.Tensor:
        """A copy of bytes of a host slab, made by the current stream: they stay as they are meanwhile."""

    def on_host(self, data: torch.Tensor) -> torch.Tensor:
        """A copy of device bytes, made by the current stream: there when that has come so far."""

    def new_stream(self) -> Stream: ...

    def bind_thread(self) -> None:
        """Make the device the current one of a thread of `Workers`, which will wait for its events or move its memory.

        If the thread is only borrowed, then for the job at hand.
        """


class CudaDevice:
    """One GPU."""

    def __init__(self, torch_device: torch.device) -> None:
        self.torch_device = torch_device

    def free_nbytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch_device)[0]

    def spare_nbytes(self) -> int:
        kept = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(self.torch_device)
        return self.free_nbytes() + kept

    def reclaim(self) -> None:
        with torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.torch_device

    def new_slab(self, nbytes: int) -> torch.Tensor:
        return allocate(nbytes, self.torch_device)

    def new_host_slab(self, nbytes: int) -> HostSlab:
        slab = HostSlab(nbytes)
        pin(slab, self.torch_device)
        return slab

    def on_device(self, data: torch.Tensor) -> torch.Tensor:
        return data.to(self.torch_device, non_blocking=True)

    def on_host(self, data: torch.Tensor) -> torch.Tensor:
        host = torch.empty(data.shape, dtype=data.dtype, device="cpu", pin_memory=True)
        return host.copy_(data, non_blocking=True)

    def new_stream(self) -> Stream:
        return _CudaStream(self.torch_device)

    def bind_thread(self) -> None:
        if (borrowed := until_given_back()) is not None:
            borrowed.enter_context(context_of(self.torch_device))
            return
        # The first call of a thread, such as waiting for an event, else makes a context on device 0, whoever owns that.
        # It costs next to nothing where the device is the thread's already.
        torch.cuda.set_device(self.torch_device)
        relax_stream_capture()


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = new_stream(device)

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def wait_for_caller(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def wait_for(self, event: Event) -> None:
        self._stream.wait_event(event)

    def record(self) -> Event:
        event: Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._stream.record_event(event)
        return event


class InterpretedDevice:
    """The host, where Triton's interpreter runs the kernels at once: nothing is asynchronous."""

    torch_device = torch.device("cpu")

    def free_nbytes(self) -> int:
        return sys.maxsize  # the host pages

    def spare_nbytes(self) -> int:
        return self.free_nbytes()

    def reclaim(self) -> None:
        pass

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cpu

    def new_slab(self, nbytes: int) -> torch.Tensor:
        return HostSlab(nbytes).tensor

    def new_host_slab(self, nbytes: int) -> HostSlab:
        return HostSlab(nbytes)

    def on_device(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def on_host(self, data: torch.Tensor) -> torch.Tensor:
        return data

    def new_stream(self) -> Stream:
        return _HostStream()

    def bind_thread(self) -> None:
        pass


_interpreter = threading.RLock()
"""Triton's interpreter is one for the process: transfers of several threads take turns."""


class _HostStream:
    def current(self) -> AbstractContextManager[Any]:
        return _interpreter

    def wait_for_caller(self) -> None:
        pass

    def wait_for(self, event: Event) -> None:
        event.synchronize()

    def record(self) -> Event:
        return _Passed()


class _Passed:
    def synchronize(self) -> None:
        pass
