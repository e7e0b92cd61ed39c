"""What compiled kernels ask the GPU's memory for, in sectors of 32 bytes: where accesses of a warp coalesce, once.

By `make test-ptx`: elsewhere kernels are interpreted, and have no warps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpudcp_kernels import triton_api
from gpudcp_kernels.checksum import crc32_ranges
from gpudcp_kernels.dequant import Scales, dequant_unpack
from gpudcp_kernels.pack import pack_cast
from gpudcp_kernels.tables import SLAB_PADDING_NBYTES, Boxes
from gpudcp_kernels.unpack import unpack_cast
from ptx_traffic import traffic

pytestmark = pytest.mark.skipif(
    triton_api.IS_INTERPRETING or not triton_api.ON_HOST, reason="kernels do not run as PTX on the host"
)

ROWS, COLUMNS = 96, 4096
NUMEL = ROWS * COLUMNS


def on_a_sector(nbytes: int) -> torch.Tensor:
    memory = torch.zeros(nbytes + 64 + SLAB_PADDING_NBYTES, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 64 :][:nbytes]


def box_of(memory: torch.Tensor, byte_offset: int) -> Boxes:
    """A matrix whose rows lie without gaps."""
    return Boxes(
        addresses=np.array([memory.data_ptr()]),
        byte_offsets=np.array([byte_offset]),
        lengths=np.array([[ROWS, COLUMNS]]),
        strides=np.array([[COLUMNS, 1]]),
    )


@pytest.mark.parametrize(
    ("memory_dtype", "file_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.uint8, torch.uint8),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float8_e4m3fn),
    ],
    ids=str,
)
def test_aligned_elements_are_packed_and_unpacked_by_whole_sectors(
    memory_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    """A thread takes 16 bytes of the narrower side: more, in the wider one, by loads that share sectors two and two."""
    memory, slab = on_a_sector(NUMEL * memory_dtype.itemsize), on_a_sector(NUMEL * file_dtype.itemsize)
    with traffic() as seen:
        pack_cast(box_of(memory, 0), slab, memory_dtype=memory_dtype, file_dtype=file_dtype)
    shared = 2 if memory_dtype.itemsize > file_dtype.itemsize else 1
    assert (seen.nbytes("ld", memory), seen.nbytes("st", slab)) == (shared * memory.nbytes, slab.nbytes)
    with traffic() as seen:
        unpack_cast(box_of(memory, 0), slab, memory_dtype=memory_dtype, file_dtype=file_dtype)
    shared = 2 if file_dtype.itemsize > memory_dtype.itemsize else 1
    assert (seen.nbytes("ld", slab), seen.nbytes("st", memory)) == (shared * slab.nbytes, memory.nbytes)


def test_payloads_at_an_odd_byte_are_read_by_words_and_stored_by_whole_sectors() -> None:
    """As stock's lie: each word twice, with its neighbour."""
    memory, slab = on_a_sector(4 * NUMEL), on_a_sector(4 * NUMEL + 3)
    with traffic() as seen:
        unpack_cast(box_of(memory, 3), slab, memory_dtype=torch.float32, file_dtype=torch.float32)
    assert seen.nbytes("st", memory) == memory.nbytes
    assert seen.nbytes("ld", slab) <= 2.3 * slab.nbytes


@pytest.mark.parametrize(("start", "count", "nbytes"), [(0, 1, 1 << 20), (3, 1, (1 << 20) - 5), (64, 250, 4096)])
def test_checksums_load_every_sector_once(start: int, count: int, nbytes: int) -> None:
    """Large and small ranges, also those that begin within a word."""
    slab = on_a_sector(count * nbytes + 64 + start)
    ranges = start + np.arange(count, dtype=np.int64) * nbytes
    with traffic() as seen:
        crc32_ranges(slab, ranges, np.full(count, nbytes))
    assert count * nbytes <= seen.nbytes("ld", slab) <= 1.02 * count * nbytes


def test_scaled_weights_are_read_and_written_by_whole_sectors() -> None:
    """fp8 in blocks of 128 x 128, to bfloat16."""
    memory, slab = on_a_sector(2 * NUMEL), on_a_sector(NUMEL)
    scales = torch.ones(ROWS * COLUMNS // 128)
    of_box = Scales(
        addresses=np.array([scales.data_ptr()]), strides=np.array([COLUMNS // 128]), origins=np.array([[0, 0]])
    )
    with traffic() as seen:
        dequant_unpack(box_of(memory, 0), of_box, slab, memory_dtype=torch.bfloat16)
    assert (seen.nbytes("ld", slab), seen.nbytes("st", memory)) == (slab.nbytes, memory.nbytes)
