"""Each kernel once on little and awkward data, for `make sanitize-gpu`, under which everything takes a hundred times
as long. What it gives is compared elsewhere; here every access must be to memory that is there."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from gpu_cases import DEVICE, on_device, random_bytes, random_layout
from gpudcp_kernels.checksum import crc32_ranges, finished, write_patches
from gpudcp_kernels.dequant import Scales, dequant_unpack
from gpudcp_kernels.pack import pack_cast
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES, Boxes
from gpudcp_kernels.unpack import unpack_cast

pytestmark = pytest.mark.gpu

PAIRS = [
    (torch.uint8, torch.uint8),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float8_e4m3fn, torch.float16),
    (torch.float64, torch.float64),
]


@pytest.mark.parametrize(("memory_dtype", "file_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("start", "alignment"), [(0, 16), (3, 1)])
def test_packing_and_unpacking_stay_in_bounds(
    memory_dtype: torch.dtype, file_dtype: torch.dtype, start: int, alignment: int
) -> None:
    """The slab has no byte more than the padding that is promised, the memory none at all."""
    shape = {"memory_dtype": memory_dtype, "file_dtype": file_dtype, "start": start, "slab_alignment": alignment}
    layout = random_layout(start, count=12, **shape)  # type: ignore[arg-type]
    last = int(np.argmax(layout.boxes.addresses))
    assert layout.boxes.addresses[last] < layout.memory_nbytes
    memory = random_bytes(layout.memory_nbytes, seed=1).to(DEVICE)
    slab = torch.empty(layout.slab_nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device=DEVICE)[: layout.slab_nbytes]
    pack_cast(layout.at(memory), slab, memory_dtype=memory_dtype, file_dtype=file_dtype)
    unpack_cast(layout.at(memory), slab, file_dtype=file_dtype, memory_dtype=memory_dtype)
    torch.cuda.synchronize()


def test_a_payload_at_the_very_end_of_slab_and_memory_stays_in_bounds() -> None:
    """At all sixteen offsets."""
    for start in range(16):
        for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.int64):
            numel = 1001
            memory = torch.zeros(numel, dtype=dtype, device=DEVICE)
            nbytes = start + memory.nbytes
            slab = random_bytes(nbytes + SLAB_PADDING_NBYTES, seed=start).to(DEVICE)[:nbytes]
            boxes = Boxes(
                addresses=np.array([memory.data_ptr()]),
                byte_offsets=np.array([start]),
                lengths=np.array([[numel]]),
                strides=np.array([[1]]),
            )
            unpack_cast(boxes, slab, file_dtype=dtype, memory_dtype=dtype)
            pack_cast(boxes, slab, memory_dtype=dtype, file_dtype=dtype)
    torch.cuda.synchronize()


def test_checksums_and_patches_stay_in_bounds() -> None:
    """Ranges at both ends of the slab, short ones and one of several chunks."""
    nbytes = 300_001
    host = random_bytes(nbytes + SLAB_PADDING_NBYTES, seed=2)
    slab = on_device(host)[:nbytes]
    starts = np.array([0, 1, nbytes - 5, nbytes - 40_000, 0])
    lengths = np.array([3, 2000, 5, 40_000, nbytes])
    slots = crc32_ranges(slab, starts, lengths)
    write_patches(slab, slots, patch_slots=np.arange(5), byte_offsets=np.array([0, 5, 11, 100, nbytes - 4]))
    data = host.numpy().data
    assert finished(slots).tolist() == [zlib.crc32(data[a : a + n]) for a, n in zip(starts, lengths, strict=True)]


def test_block_scales_stay_in_bounds() -> None:
    """A weight that is not whole blocks, with exactly as many scales as it needs."""
    rows, columns = 130, 272
    memory = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    scales = torch.ones(2, 3, device=DEVICE)
    slab = random_bytes(rows * columns + 3 + SLAB_PADDING_NBYTES, seed=3).to(DEVICE)[: rows * columns + 3]
    for start in (0, 3):
        boxes = Boxes(
            addresses=np.array([memory.data_ptr()]),
            byte_offsets=np.array([start]),
            lengths=np.array([[rows, columns]]),
            strides=np.array([[columns, 1]]),
        )
        of_box = Scales(
            addresses=np.array([scales.data_ptr()]), strides=np.array([3]), origins=np.zeros((1, 2), np.int64)
        )
        dequant_unpack(boxes, of_box, slab, memory_dtype=torch.bfloat16)
    torch.cuda.synchronize()
