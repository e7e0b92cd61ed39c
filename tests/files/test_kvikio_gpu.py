"""KvikIO files with the memory of a real GPU, by GPUDirect Storage or by compat mode, whichever this machine has."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpudcp.executors.devicememory import allocate
from gpudcp.files.gds import unavailable_reason
from gpudcp.files.kvikio import CompatMode, KvikioReader, KvikioWriter, deregister, register
from gpudcp.files.measure import measure
from gpudcp.files.trial import TRIAL_NBYTES, try_device_io

BLOCK = 4096
NBYTES = (20 << 20) + 3 * BLOCK
CUDA = torch.device("cuda", 0)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _kvikio() -> None:
    if (why := unavailable_reason("kvikio")) is not None:
        pytest.skip(why)


def aligned(nbytes: int) -> torch.Tensor:
    """Memory of the caching allocator, on a block."""
    memory = torch.zeros(nbytes + BLOCK, dtype=torch.uint8, device=CUDA)
    start = -memory.data_ptr() % BLOCK
    return memory[start : start + nbytes]


def round_trip(path: Path, source: torch.Tensor, into: torch.Tensor, compat_mode: CompatMode | None) -> None:
    """Write and read in requests of 4 MiB, from several threads that have never seen a GPU; compare in between."""
    with KvikioWriter(str(path), nbytes=source.nbytes, is_direct=False, fsync=True, compat_mode=compat_mode) as writer:
        in_threads(lambda at, end: writer.write_device(source[at:end], at), source.nbytes)
        writer.finish(source.nbytes - 5)
    assert path.read_bytes() == bytes(source.cpu().numpy())[:-5]
    reader = KvikioReader(str(path), compat_mode=compat_mode)
    in_threads(lambda at, end: reader.read_device(into[at : min(end, source.nbytes - 5)], at), source.nbytes)
    reader.close()
    assert torch.equal(into[:-5], source[:-5])
    assert into[-5:].tolist() == [0] * 5


def in_threads(move: Callable[[int, int], None], nbytes: int) -> None:
    """Each request in a thread of its own; the first error is raised."""
    errors: list[BaseException] = []

    def run(at: int) -> None:
        try:
            move(at, min(at + (4 << 20), nbytes))
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=run, args=(at,)) for at in range(0, nbytes, 4 << 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("memory", ["registered", "own", "allocator"])
@pytest.mark.parametrize("compat_mode", [None, "ON"], ids=["as found", "compat"])
def test_device_memory_makes_the_round_trip(tmp_path: Path, memory: str, compat_mode: CompatMode | None) -> None:
    """Of an allocation of its own, registered or not, and of torch's caching allocator."""
    source, into = (aligned(NBYTES) if memory == "allocator" else allocate(NBYTES, CUDA) for _ in range(2))
    source.random_()
    into.zero_()
    torch.cuda.synchronize()
    if memory != "registered":
        round_trip(tmp_path / "file", source, into, compat_mode)
        return
    for tensor in (source, into):
        register(tensor)
    try:
        round_trip(tmp_path / "file", source, into, compat_mode)
    finally:
        for tensor in (source, into):
            deregister(tensor)


def test_a_trial_passes_and_says_how(tmp_path: Path) -> None:
    """For memory as slabs have it."""
    print(try_device_io(str(tmp_path), allocate(TRIAL_NBYTES, CUDA)))
    assert os.listdir(tmp_path) == []


@pytest.mark.gds
def test_gds_is_used_where_nothing_stands_in_its_way(tmp_path: Path) -> None:
    """The machine says that it can; a trial on the checkpoint's file system says that it does."""
    if (why := unavailable_reason("gds")) is not None:
        pytest.skip(why)
    assert try_device_io(str(tmp_path), allocate(TRIAL_NBYTES, CUDA)).is_gds


def test_every_way_is_measured(tmp_path: Path) -> None:
    """The ways that are not have a reason; the bytes are few."""
    found = measure(str(tmp_path), CUDA, nbytes=32 << 20, threads=(1, 2), requests_nbytes=(4 << 20,), allocate=allocate)
    for figure in found.figures:
        print(figure)
    assert {each.way for each in found.figures} | set(found.not_measured) == {"gds", "compat", "direct", "buffered"}
