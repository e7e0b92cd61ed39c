"""A GPU played by the host, as far as a snapshot sees one: what memory is whose, how much there is, what comes when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

_NBYTES = 1 << 40
_COPIES = (torch.Tensor.clone, torch.Tensor.contiguous, torch.Tensor.resolve_conj, torch.Tensor.resolve_neg)


class FakeGpu(TorchFunctionMode):
    """One GPU, for the thread that has entered it: what is placed there, and made of that, says that it is there.

    A copy to the host does what torch's does (copy_kernel_cuda in ATen/native/cuda/Copy.cu): a tensor that is not
    contiguous is made so on the device first; bytes that nobody waits for land at `synchronize`; and conjugate and
    negative views are conjugated or negated on the host, at once. The allocator keeps all memory that it ever had, as
    torch's does, and gives any of it again.
    """

    torch_device = torch.device("cuda", 0)

    def __init__(self) -> None:
        super().__init__()
        self.total_nbytes = _NBYTES
        self.reserved_nbytes = 0
        self.most_nbytes = 0
        """The most that was allocated since this was last set."""
        self.moved_nbytes = 0
        """Copied to the host."""
        self.before_copy: Callable[[], None] = lambda: None
        """Called before every copy, on the device and from it; may raise."""
        self._storages: dict[int, StorageWeakRef] = {}
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def allocated_nbytes(self) -> int:
        """In use, by whoever still has it."""
        found = (torch.UntypedStorage._new_with_weak_ptr(known.cdata) for known in self._storages.values())
        return sum(storage.nbytes() for storage in found if storage is not None)

    @property
    def free_nbytes(self) -> int:
        """What the driver would still give."""
        return self.total_nbytes - self.reserved_nbytes

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, which is on the GPU from now on."""
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = StorageWeakRef(storage)
        allocated = self.allocated_nbytes
        self.reserved_nbytes = max(self.reserved_nbytes, allocated)
        self.most_nbytes = max(self.most_nbytes, allocated)
        if self.reserved_nbytes > self.total_nbytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tensor

    def synchronize(self) -> None:
        """What was begun is done: bytes have landed."""
        for into, come in self._pending:
            into.copy_(come)
        self._pending.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__ and self._owns(args[0]):  # type: ignore[attr-defined]
            return self.torch_device
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return not self._owns(args[0])
        if func is torch.empty and kwargs.get("device") == self.torch_device:
            return self.place(torch.empty(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.copy_:
            self.before_copy()
            if self._owns(args[1]) and not self._owns(args[0]):
                return self._copy_to_host(*args, **kwargs)
        made = func(*args, **kwargs)
        if func in _COPIES and self._owns(args[0]):
            self.place(made)
        return made

    def _owns(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = self._storages.get(storage.data_ptr())
        return known is not None and known == StorageWeakRef(storage)

    def _copy_to_host(self, into: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        physical = source.conj() if source.is_conj() else source
        physical = torch._neg_view(physical) if physical.is_neg() else physical
        if not physical.is_contiguous():
            physical = self.place(physical.contiguous())
        self._pending.append((into, physical.clone()))
        self.moved_nbytes += into.nbytes
        if not non_blocking:
            self.synchronize()
        if source.is_conj():
            into.conj_physical_()
        if source.is_neg():
            into.neg_()
        return into
