"""A bf16 model on a GPU, saved and loaded beside stock DCP, pinned copies and raw files of the same way and threads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import gpudcp
from bench import cache
from bench.gpu.device_time import compare_calls
from bench.gpu.hardware import need_device_memory
from bench.measure import Contender, Timings
from bench.peers import GPUDCP, STOCK, STOCK_2_THREADS, STOCKS, DcpPeer
from bench.places import empty_directory, need_cold_reads, need_room
from bench.results import Suite, in_words
from bench.sizes import Sizes
from bench.tensors import Tensors, check_equal, count_nbytes, places_for, spoil
from gpudcp.executors.select import DEVICE_SLAB_NBYTES, THREADS
from gpudcp.files.figures import Way
from gpudcp.files.ways import described, open_reader, open_writer
from gpudcp.options import SLAB_ALIGNMENT_NBYTES

STOCK_NAMES = [peer.name for peer in STOCKS]
RAW_WRITE, RAW_READ = "raw write, same way and files", "raw read of gpudcp's files"
TO_HOST, TO_DEVICE = "pinned copy to the host", "pinned copy to the device"
SLOTS = 4


def bf16_model(nbytes: int, *, hidden: int) -> Tensors:
    """About so many random bytes on the device, in layers of matrices and norms."""
    shapes = {
        "attention_norm": (hidden,),
        **dict.fromkeys(("q", "k", "v", "o"), (hidden, hidden)),
        "mlp_norm": (hidden,),
        **dict.fromkeys(("up", "gate", "down"), (4 * hidden, hidden)),
    }
    layer_nbytes = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    tensors = {
        f"layers.{number}.{name}.weight": torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        for number in range(max(1, round(nbytes / layer_nbytes)))
        for name, shape in shapes.items()
    }
    for tensor in tensors.values():
        tensor.view(torch.int16).random_(-(2**15), 2**15)
    return tensors


class PinnedCopies:
    """The ceiling of the bus: so many bytes between the device and a ring of pinned slabs, slab by slab."""

    def __init__(self, nbytes: int) -> None:
        self._count = max(1, nbytes // DEVICE_SLAB_NBYTES)
        slab_nbytes = min(nbytes, DEVICE_SLAB_NBYTES)
        self._host = [torch.zeros(slab_nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(SLOTS)]
        self._device = [torch.zeros(slab_nbytes, dtype=torch.uint8, device="cuda") for _ in range(SLOTS)]

    def to_host(self) -> None:
        for number in range(self._count):
            self._host[number % SLOTS].copy_(self._device[number % SLOTS], non_blocking=True)

    def to_device(self) -> None:
        for number in range(self._count):
            self._device[number % SLOTS].copy_(self._host[number % SLOTS], non_blocking=True)


class RawFiles:
    """The ceiling of the files: as many files of the same sizes, by the same way, threads and request size."""

    def __init__(self, way: Way, sizes_nbytes: dict[str, int]) -> None:
        self._way = way
        self._sizes_nbytes = sizes_nbytes
        self._is_of_device = way in ("gds", "compat")
        self._slots = [self._slot() for _ in range(SLOTS)]

    def _slot(self) -> Any:
        from gpudcp.executors.devicememory import allocate

        if self._is_of_device:
            return allocate(DEVICE_SLAB_NBYTES, torch.device("cuda", 0))
        padded = torch.zeros(DEVICE_SLAB_NBYTES + SLAB_ALIGNMENT_NBYTES, dtype=torch.uint8, pin_memory=True)
        start = -padded.data_ptr() % SLAB_ALIGNMENT_NBYTES
        return padded[start : start + DEVICE_SLAB_NBYTES].numpy().data

    def write(self, directory: Path) -> None:
        """Into new files, with fsync."""
        directory.mkdir()
        with ExitStack() as stack:
            files: dict[str, Any] = {
                name: stack.enter_context(open_writer(str(directory / name), self._way, nbytes=nbytes, fsync=True))
                for name, nbytes in self._sizes_nbytes.items()
            }

            def write(name: str, slot: Any, begin: int, nbytes: int) -> None:
                padded = -(-nbytes // SLAB_ALIGNMENT_NBYTES) * SLAB_ALIGNMENT_NBYTES
                act = files[name].write_device if self._is_of_device else files[name].write
                act(slot[:padded], begin)

            self._in_threads(write)
            for name, file in files.items():
                file.finish(self._sizes_nbytes[name])

    def read(self, directory: Path) -> None:
        """All of them whole."""
        files: dict[str, Any] = {name: open_reader(str(directory / name), self._way) for name in self._sizes_nbytes}

        def read(name: str, slot: Any, begin: int, nbytes: int) -> None:
            act = files[name].read_device if self._is_of_device else files[name].read
            act(slot[:nbytes], begin)

        self._in_threads(read)
        for file in files.values():
            file.close()

    def _in_threads(self, act: Callable[[str, Any, int, int], None]) -> None:
        requests = [
            (begin, name, min(DEVICE_SLAB_NBYTES, nbytes - begin))
            for name, nbytes in self._sizes_nbytes.items()
            for begin in range(0, nbytes, DEVICE_SLAB_NBYTES)
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            futures = [
                pool.submit(act, name, self._slots[number % SLOTS], begin, nbytes)
                for number, (begin, name, nbytes) in enumerate(sorted(requests))
            ]
            for future in futures:
                future.result()


class Model:
    """The model of a place, where it is loaded into, and gpudcp's own checkpoint of it."""

    def __init__(self, place: Path, sizes: Sizes) -> None:
        is_tmpfs = place.is_relative_to("/dev/shm")
        self.kind = "tmpfs" if is_tmpfs else "disk"
        nbytes = sizes.gpu_model_nbytes if is_tmpfs else sizes.gpu_disk_nbytes
        need_room(place, 2 * nbytes)
        need_device_memory(5 * nbytes // 2)
        self.tensors = bf16_model(nbytes, hidden=sizes.gpu_model_hidden)
        self.places = places_for(self.tensors)
        self.nbytes = count_nbytes(self.tensors)
        self.directory = empty_directory(place / "gpudcp")
        self.stocks_directory = place / "stock"
        writer = gpudcp.GpuStorageWriter(self.directory)
        gpudcp.save(dict(self.tensors), storage_writer=writer)
        reader = gpudcp.GpuStorageReader(self.directory)
        gpudcp.load(dict(self.places), storage_reader=reader)
        check_equal(self.tensors, self.places)
        self.reports = [writer.report, reader.report]
        self.file_nbytes = {path.name: path.stat().st_size for path in self.directory.glob("*.distcp")}

    def raw_files(self, report: Any) -> RawFiles:
        """Of the way that a transfer reports."""
        way: Way = next(way for way in get_args(Way) if described(way) == report.files)
        return RawFiles(way, self.file_nbytes)


@pytest.fixture(scope="module")
def model(place: Path, sizes: Sizes) -> Any:
    """One for each place; its memory is given back before the next."""
    model = Model(place, sizes)
    yield model
    model.tensors.clear()
    model.places.clear()
    torch.cuda.empty_cache()
    shutil.rmtree(model.directory)


def test_saving_a_model_from_the_gpu(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, place: Path, model: Model
) -> None:
    """Into an empty directory, with fsync; each library's first checkpoint is judged by the other."""
    target, copies, raw = place / "target", PinnedCopies(model.nbytes), model.raw_files(model.reports[0])
    judged: set[str] = set()

    def saved_by(peer: DcpPeer, *, has_one_turn: bool = False) -> Contender:
        def check() -> None:
            if peer.name in judged:
                return
            judged.add(peer.name)
            spoil(model.places)
            (STOCK if peer is GPUDCP else GPUDCP).load(model.places, target)
            check_equal(model.tensors, model.places)

        return Contender(
            name=peer.name,
            prepare=lambda: empty_directory(target),
            run=lambda: peer.save(model.tensors, target),
            check=check,
            has_one_turn=has_one_turn,
        )

    contenders = [
        saved_by(GPUDCP),
        Contender(name=RAW_WRITE, prepare=lambda: empty_directory(target), run=lambda: raw.write(target / "raw")),
        Contender(name=TO_HOST, run=copies.to_host),
        # Some ten seconds each, of the few minutes that there are.
        saved_by(STOCK, has_one_turn=True),
        saved_by(STOCK_2_THREADS, has_one_turn=True),
    ]
    timings = compare_calls(benchmark, contenders, sizes.gpu_rounds)
    shutil.rmtree(target)
    _add(suite, f"save, {model.kind}", timings, model, model.reports[0], [RAW_WRITE, TO_HOST])


def test_loading_a_model_into_the_gpu(
    benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, place: Path, model: Model
) -> None:
    """From a cold disk, or from memory; gpudcp verifies every checksum."""
    if model.kind == "disk":
        need_cold_reads(place)
    copies, raw = PinnedCopies(model.nbytes), model.raw_files(model.reports[1])
    STOCK.save(model.tensors, empty_directory(model.stocks_directory))

    def cool(directory: Path) -> None:
        if model.kind == "disk":
            cache.drop(cache.files_of(directory))

    def loaded_by(peer: DcpPeer, directory: Path, *, has_one_turn: bool = False) -> Contender:
        def prepare() -> None:
            spoil(model.places)
            cool(directory)

        return Contender(
            name=peer.name,
            prepare=prepare,
            run=lambda: peer.load(model.places, directory),
            check=lambda: check_equal(model.tensors, model.places),
            has_one_turn=has_one_turn,
        )

    contenders = [
        loaded_by(GPUDCP, model.directory),
        Contender(name=RAW_READ, prepare=lambda: cool(model.directory), run=lambda: raw.read(model.directory)),
        Contender(name=TO_DEVICE, run=copies.to_device),
        loaded_by(STOCK, model.stocks_directory, has_one_turn=True),
    ]
    timings = compare_calls(benchmark, contenders, sizes.gpu_rounds)
    shutil.rmtree(model.stocks_directory)
    _add(suite, f"load, {model.kind}", timings, model, model.reports[1], [RAW_READ, TO_DEVICE])


def _add(suite: Suite, what: str, timings: Timings, model: Model, report: Any, ceilings: list[str]) -> None:
    title = f"{what}: {in_words(model.nbytes)} of bf16 in {len(model.tensors)} tensors"
    suite.add_timings(title, timings, nbytes=model.nbytes)
    slower = max(ceilings, key=lambda name: timings[name].median_s)
    found = timings[slower].median_s / timings[GPUDCP.name].median_s
    suite.expect(f"{what}: gpudcp beside the slower ceiling, {slower}", found, "at least", 0.9, "x")
    suite.expect_speed(what, timings, GPUDCP.name, STOCK_NAMES, 5)
    suite.notes.append(f"{what}: executor {report.executor}, files {report.files} ({'; '.join(report.reasons)})")
