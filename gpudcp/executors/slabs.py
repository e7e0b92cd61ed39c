"""Host slabs: page-aligned buffers, allocated once for a transfer and used in turn."""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from weakref import WeakSet

import torch

_HUGE_PAGE_NBYTES = 2 << 20


class HostSlab:
    """One page-aligned host buffer: as a memoryview, as a flat uint8 tensor, and as an address.

    On huge pages where the kernel has them: a direct write of 4 MiB then is a handful of segments instead of a
    thousand.
    """

    __slots__ = ("__weakref__", "address", "nbytes", "tensor", "view")

    def __init__(self, nbytes: int) -> None:
        is_huge = nbytes >= _HUGE_PAGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE")
        # Address space for the alignment: untouched, so it takes no memory.
        mapped_nbytes = nbytes + _HUGE_PAGE_NBYTES if is_huge else nbytes
        memory = mmap.mmap(-1, mapped_nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if is_huge:
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        with torch.inference_mode(False):  # the caller's own mode may have ended when the slab is used again
            mapped = torch.frombuffer(memory, dtype=torch.uint8)
            start = -mapped.data_ptr() % _HUGE_PAGE_NBYTES if is_huge else 0
            self.tensor = mapped[start : start + nbytes]
        self.nbytes = nbytes
        self.view = memoryview(memory)[start : start + nbytes]
        self.address = self.tensor.data_ptr()

    def keep_from_children(self) -> None:
        """Processes that are forked from now on do not get this memory.

        Of pages that a device copies to, a fork would have to make a copy at once (and older kernels may move them away
        from under the device instead), for each worker that loads data.
        """
        if hasattr(mmap, "MADV_DONTFORK"):
            memory: mmap.mmap = self.view.obj  # type: ignore[assignment]
            _kept_from_children.add(memory)
            memory.madvise(mmap.MADV_DONTFORK)


_kept_from_children: WeakSet[mmap.mmap] = WeakSet()


def _never_unmap() -> None:
    """In a forked child nothing is where these were, until the system puts something else there: not to be unmapped."""
    for memory in _kept_from_children:
        # A reference of Python's would end with its module, at exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))


os.register_at_fork(after_in_child=_never_unmap)
