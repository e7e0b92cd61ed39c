"""The snapshot that a background save writes: every value as it is at the call, in memory that is used again.

Tensors go into one arena for each device, cast on the way where the planner would cast them, so that fewer bytes are
kept. A GPU's tensors are first copied within it where there is room: that is what training waits for, and the thread
that writes brings them to pinned host memory in pieces. Else they are copied to the host at once. It plans nothing
and writes nothing.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from gpudcp._dcp import dtensor_parts, dtensor_with_local
from gpudcp.cudadriver import new_stream
from gpudcp.executors.casting import copy_cast, in_pieces
from gpudcp.executors.devicememory import pin
from gpudcp.executors.devices import CudaDevice
from gpudcp.executors.memory import is_plain_memory
from gpudcp.executors.sharedmemory import SharedSlab
from gpudcp.executors.slabs import HostSlab
from gpudcp.formats.dtypes import QUANTIZED_DTYPES
from gpudcp.planners.casts import CastRule
from gpudcp.planners.local import flattened

_ALIGNMENT_NBYTES = 64
# A transfer of training waits for one piece at most: 1 ms at 32 GB/s.
_PIECE_NBYTES = 32 << 20
# Below it, calling torch's copy takes longer than copying.
_SMALL_NBYTES = 64 << 10


class Snapshot(NamedTuple):
    """A copy of a state dict, which nothing that training does changes."""

    state_dict: dict[str, Any]
    on_devices: list[_DeviceCopy]
    """What is still there."""

    def finish(self) -> None:
        """Bring that to the host. To be called before the tensors are read, by who reads them."""
        while self.on_devices:
            copied = self.on_devices.pop()
            try:
                _bring(copied.memory, copied.host)
            finally:
                copied.free()

    def discard(self) -> None:
        """Nobody will read the tensors, or somebody has: give the devices' memory back."""
        while self.on_devices:
            self.on_devices.pop().free()


class _DeviceCopy(NamedTuple):
    """One device's tensors, copied within it, and where they go."""

    memory: torch.Tensor
    host: torch.Tensor

    def free(self) -> None:
        """Whoever still has the tensor, as the frames of an error have that somebody keeps."""
        self.memory.untyped_storage().resize_(0)


class Stager:
    """Takes snapshots, one at a time: the next one is taken into the same memory."""

    def __init__(self) -> None:
        self._slabs: dict[tuple[torch.device, type], HostSlab | SharedSlab] = {}
        self._lent_nbytes: dict[torch.device, int] = {}
        """The most that a snapshot has had of a device's memory, which torch keeps for the next one."""

    def stage(
        self, state_dict: Mapping[str, Any], casts: CastRule | None, *, nested: bool, is_shared: bool
    ) -> Snapshot:
        """Copy what is in ``state_dict``; on return its tensors may be written to.

        Args:
            state_dict: tensors, DTensors, objects, nested dicts and lists of them. No value is Stateful.
            casts: what the planner casts, by key; None: nothing.
            nested: whether the planner looks into dicts and lists; else those are objects.
            is_shared: into memory that another process can map.
        """
        flat, _ = flattened(state_dict, nested=nested, sharded_tensors=False)
        jobs: dict[int, _Job] = {}
        memo: dict[int, Any] = {}
        memo_of_objects: dict[int, Any] = {}
        for fqn, value in flat.items():
            local = _local_memory(value)
            if local is not None:
                dtype = _dtype_of_copy(fqn, local, casts)
                is_other = value.requires_grad and not (dtype.is_floating_point or dtype.is_complex)
                is_other = is_other or (id(value) in jobs and jobs[id(value)].dtype != dtype)
                # What is one tensor stays one: where its keys ask for several dtypes, the writer casts.
                jobs[id(value)] = _Job(value, local, local.dtype if is_other else dtype)
            elif id(value) not in memo:
                # With what is inside: an object that holds a tensor of the state dict is saved with that one's whole
                # memory, which must not be the arena, and with its own dtype and type.
                memo[id(value)] = _copied_object(value, memo_of_objects)
        # GPUs first: they copy, all at once, while the host does.
        devices = sorted({job.local.device for job in jobs.values()}, key=lambda device: device.type != "cuda")
        snapshot = Snapshot({}, [])
        try:
            for device in devices:
                own = {key: job for key, job in jobs.items() if job.local.device == device}
                self._copy(device, own, memo, snapshot.on_devices, is_shared=is_shared)
            for device in devices:
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
            # The structure around everything is copied by Python's own rules.
            snapshot.state_dict.update(copy.deepcopy(dict(state_dict), memo))
        except BaseException:
            snapshot.discard()
            raise
        return snapshot

    def _copy(
        self,
        device: torch.device,
        jobs: dict[int, _Job],
        memo: dict[int, Any],
        on_devices: list[_DeviceCopy],
        *,
        is_shared: bool,
    ) -> None:
        """Begin to copy the tensors of one device; what is a host tensor in the end goes into ``memo``.

        What is still to be brought there goes into ``on_devices``.
        """
        starts, nbytes = {}, 0
        for key, job in jobs.items():
            starts[key] = nbytes
            nbytes += -(-prod(job.local.shape) * job.dtype.itemsize // _ALIGNMENT_NBYTES) * _ALIGNMENT_NBYTES
        host = self._host_memory(SharedSlab if is_shared else HostSlab, nbytes, device)
        on_device = self._device_memory(nbytes, device) if device.type == "cuda" else None
        if on_device is not None:
            on_devices.append(_DeviceCopy(on_device, host))
        for key, job in jobs.items():
            _copy_into(_view(host if on_device is None else on_device, starts[key], job), job.local)
            memo[key] = job.rewrapped(_view(host, starts[key], job))

    def _host_memory(self, kind: type[HostSlab] | type[SharedSlab], nbytes: int, device: torch.device) -> torch.Tensor:
        """Flat uint8 of so many bytes: that of the last snapshot if it is large enough; pinned, for a GPU."""
        slab = self._slabs.pop((device, kind), None)
        if slab is None or slab.nbytes < nbytes:
            del slab  # before there is another one
            slab = kind(max(nbytes, 1))
            if device.type == "cuda":
                with suppress(torch.OutOfMemoryError):  # copies take longer then
                    pin(slab, device)
        self._slabs[device, kind] = slab
        return slab.tensor[:nbytes]

    def _device_memory(self, nbytes: int, device: torch.device) -> torch.Tensor | None:
        """Flat uint8, for as long as it takes to bring it to the host; None: there is no room."""
        gpu = CudaDevice(device)
        free_nbytes = gpu.free_nbytes()
        lent_nbytes = self._lent_nbytes.get(device, 0)
        if lent_nbytes > gpu.spare_nbytes() - free_nbytes:  # torch has given it back, or to somebody who keeps it
            lent_nbytes = self._lent_nbytes[device] = 0
        # Training needs some too. What torch keeps for its next tensors does not count: it is for activations. But what
        # a snapshot before has had is as free as it was for that one.
        if nbytes > (free_nbytes + (lent_nbytes if nbytes <= lent_nbytes else 0)) // 2:
            return None
        try:
            memory = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError:
            return None
        self._lent_nbytes[device] = max(nbytes, lent_nbytes)
        return memory


class _Job(NamedTuple):
    value: Any
    local: torch.Tensor
    """Its memory on this rank."""
    dtype: torch.dtype
    """Of the copy."""

    def rewrapped(self, copied: torch.Tensor) -> Any:
        """The copy as what the value is."""
        if isinstance(self.value, DTensor):
            return dtensor_with_local(self.value, copied)
        return copied.requires_grad_() if self.value.requires_grad else copied


def _copied_object(value: Any, memo: dict[int, Any]) -> Any:
    """A copy by Python's own rules, which results of computations, nested tensors and many subclasses have none of."""
    if not isinstance(value, torch.Tensor) or isinstance(value, torch.nn.Parameter):
        return copy.deepcopy(value, memo)
    copied = value.detach().clone()
    for name, attribute in vars(value).items():
        if name not in vars(copied):
            setattr(copied, name, copy.deepcopy(attribute, memo))
    return copied


def _local_memory(value: Any) -> torch.Tensor | None:
    """The strided memory of a tensor or of this rank's part of one; None: something else."""
    if type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        tensor: torch.Tensor = value.detach()
    elif isinstance(value, DTensor):
        tensor = dtensor_parts(value)[0].detach()
        if type(tensor) is not torch.Tensor:
            return None
    else:
        return None
    is_plain = tensor.layout is torch.strided and not tensor.is_nested and tensor.dtype not in QUANTIZED_DTYPES
    return tensor if is_plain and tensor.device.type in ("cpu", "cuda") else None


def _dtype_of_copy(fqn: str, local: torch.Tensor, casts: CastRule | None) -> torch.dtype:
    """What the planner will cast to; the tensor's own if it would cast the cast tensor once more."""
    if casts is None:
        return local.dtype
    dtype = casts.dtype_of(fqn, local)
    return dtype if casts.dtype_for(fqn, dtype) == dtype else local.dtype


def _view(arena: torch.Tensor, start: int, job: _Job) -> torch.Tensor:
    shape = job.local.shape
    return arena[start : start + prod(shape) * job.dtype.itemsize].view(job.dtype).view(shape)


def _copy_into(copied: torch.Tensor, source: torch.Tensor) -> None:
    if source.nbytes < _SMALL_NBYTES and copied.is_cpu and is_plain_memory(source, copied.dtype):
        ctypes.memmove(copied.data_ptr(), source.data_ptr(), source.nbytes)
    elif copied.dtype != source.dtype:
        copy_cast(copied, source)
    elif copied.device == source.device or (source.is_contiguous() and not (source.is_conj() or source.is_neg())):
        copied.copy_(source, non_blocking=True)
    else:
        # To the host torch moves bytes. It would first make all of them contiguous in device memory, and conjugate or
        # negate them on the host before they have come (pytorch issue 146286). Here the device does both, by parts.
        for piece, piece_of_source in in_pieces(copied, source):
            piece.copy_(piece_of_source.clone(memory_format=torch.contiguous_format), non_blocking=True)


def _bring(arena: torch.Tensor, host: torch.Tensor) -> None:
    """Copy device memory to the host, piece by piece, so that training's own transfers come in between."""
    stream = new_stream(arena.device)
    # To wait for a stream may keep a core busy, which training could use; a blocking event sleeps.
    copied: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for start in range(0, arena.nbytes, _PIECE_NBYTES):
            host[start : start + _PIECE_NBYTES].copy_(arena[start : start + _PIECE_NBYTES], non_blocking=True)
            copied.record(stream)
            copied.synchronize()
