"""Thousands of tensors of 4 KiB, packed and unpacked in one launch, beside loops of ``copy_`` and other peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.gpu.device_time import add_device_timings, as_graph, compare_calls, device_timings
from bench.measure import Contender
from bench.results import Suite
from bench.sizes import Sizes

NUMEL = 1024
LOOP = "loop of copy_"
GRAPH = "loop of copy_, as a CUDA graph"
FOREACH = "torch._foreach_copy_"
COPY = "one copy of as many bytes"


class Places:
    """Tensors on the device, each an allocation of its own, and their places in a slab."""

    def __init__(self, count: int) -> None:
        from gpudcp_kernels.tables import SLAB_PADDING_NBYTES

        self.tensors = [torch.randn(NUMEL, device="cuda") for _ in range(count)]
        self.nbytes = count * NUMEL * 4
        memory = torch.empty(self.nbytes + SLAB_PADDING_NBYTES, dtype=torch.uint8, device="cuda")
        self.slab = memory[: self.nbytes]
        self.views = list(self.slab.view(torch.float32).view(count, NUMEL))
        self.whole = torch.randn(count * NUMEL, device="cuda")
        self.values = torch.stack(self.tensors)

    def boxes(self) -> Any:
        """The address table, as the executor makes it for every slab."""
        from gpudcp.executors.boxtables import BoxTable

        table, count = BoxTable(), len(self.tensors)
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        table.add_runs(addresses, range(0, count * NUMEL * 4, NUMEL * 4), [NUMEL] * count)
        return table.boxes()


@pytest.mark.parametrize("what", ["pack", "unpack"])
def test_small_tensors(benchmark: BenchmarkFixture, suite: Suite, sizes: Sizes, what: str) -> None:
    """Device time, cold and warm; then whole calls, the address table included."""
    places = Places(sizes.small_tensors)
    kernel = f"{what}, one launch"
    moved = dict.fromkeys((kernel, LOOP, GRAPH, FOREACH, COPY), 2 * places.nbytes)
    contenders = _contenders(places, what, kernel)
    title = f"{what}, {sizes.small_tensors:,} tensors of 4 KiB"

    cold = device_timings(contenders, sizes.device_rounds, is_cold=True)
    warm = device_timings(contenders, sizes.device_rounds, is_cold=False)
    add_device_timings(suite, f"{title}: device time, cold L2", cold, moved, COPY)
    add_device_timings(suite, f"{title}: device time, warm L2", warm, moved, COPY)
    suite.expect_speed(f"{title}, device time", cold, kernel, [LOOP, GRAPH], 50)
    whole = [each for each in contenders if each.name in (LOOP, FOREACH)]
    timings = compare_calls(benchmark, [_whole_call(places, what, kernel), *whole], sizes.device_rounds)
    suite.add_timings(f"{title}: whole calls", timings, nbytes=places.nbytes)
    suite.expect_speed(f"{title}, whole call", timings, kernel, [LOOP], 3)
    suite.expect_speed(f"{title}, whole call", timings, kernel, [FOREACH], 1)


def _contenders(places: Places, what: str, kernel: str) -> list[Contender]:
    boxes = places.boxes()
    into, source = (places.views, places.tensors) if what == "pack" else (places.tensors, places.views)

    def loop() -> None:
        for place, tensor in zip(into, source, strict=True):
            place.copy_(tensor)

    loop()
    graph = as_graph(loop)
    runs: dict[str, Callable[[], object]] = {
        kernel: lambda: _launch(places, what, boxes),
        COPY: lambda: places.whole.copy_(places.slab.view(torch.float32)),
        LOOP: loop,
        GRAPH: graph.replay,
        FOREACH: lambda: torch._foreach_copy_(into, source),
    }
    return [_checked(places, what, name, run) for name, run in runs.items()]


def _whole_call(places: Places, what: str, kernel: str) -> Contender:
    return _checked(places, what, kernel, lambda: _launch(places, what, places.boxes()))


def _launch(places: Places, what: str, boxes: Any) -> None:
    from gpudcp_kernels.pack import pack_cast
    from gpudcp_kernels.unpack import unpack_cast

    act = pack_cast if what == "pack" else unpack_cast
    act(boxes, places.slab, memory_dtype=torch.float32, file_dtype=torch.float32)


def _checked(places: Places, what: str, name: str, run: Callable[[], object]) -> Contender:
    """Poisoned before, compared after."""

    def prepare() -> None:
        if what == "pack":
            places.slab.fill_(0xA5)
        else:
            torch._foreach_zero_(places.tensors)
            places.slab.view(torch.float32).copy_(places.values.view(-1))

    def check() -> None:
        found = (
            places.slab.view(torch.float32).view_as(places.values) if what == "pack" else torch.stack(places.tensors)
        )
        if name != COPY and not torch.equal(found, places.values):
            raise ValueError(f"{name}: wrong bytes")

    return Contender(name=name, prepare=prepare, run=run, check=check)
