"""Host slabs: page-aligned buffers, allocated once for a transfer and used in turn."""

from __future__ import annotations

import mmap
from contextlib import suppress

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
            self.view.obj.madvise(mmap.MADV_DONTFORK)  # type: ignore[attr-defined]
