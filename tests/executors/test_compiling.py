"""The first launch of a kernel is told apart from the transfer that pays for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpudcp_kernels.tables import Boxes

from gpudcp.executors import compiling
from gpudcp.executors.compiling import checksumming, first_launch_apart, packing, unpacking
from gpudcp.report import Stopwatch

ONE = torch.device("cuda", 0)


def test_only_the_first_launch_of_a_kernel_is_a_phase_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process, not in the transfer: the second save pays nothing."""
    monkeypatch.setattr(compiling, "_launched", {})
    first, second = Stopwatch(), Stopwatch()
    for stopwatch in (first, second):
        for kernel in (("pack", "a"), ("pack", "b"), ("pack", "a")):
            with stopwatch.phase("pack"), first_launch_apart(stopwatch, ONE, kernel):
                pass
    assert set(first.seconds) == {"pack", "compile"}
    assert set(second.seconds) == {"pack"}


def test_launches_of_several_kernels_are_apart_if_one_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none at all is nothing new."""
    monkeypatch.setattr(compiling, "_launched", {ONE: {"old"}})
    for kernels, expected in (((), set()), (("old",), set()), (("old", "new"), {"compile"}), (("new",), set())):
        stopwatch = Stopwatch()
        with first_launch_apart(stopwatch, ONE, *kernels):
            pass
        assert set(stopwatch.seconds) == expected


def test_every_device_loads_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one has compiled the other still has to load."""
    monkeypatch.setattr(compiling, "_launched", {ONE: {"old"}})
    for expected in ({"compile"}, set()):
        stopwatch = Stopwatch()
        with first_launch_apart(stopwatch, torch.device("cuda", 1), "old"):
            pass
        assert set(stopwatch.seconds) == expected


def test_kernels_are_told_apart_as_their_launchers_do() -> None:
    """By dtypes, alignment and length."""
    one, other = torch.float32, torch.bfloat16

    def boxes(*rows: tuple[int, int]) -> Boxes:
        addresses, byte_offsets = np.array(rows, dtype=np.int64).T
        ones = np.ones((len(rows), 1), dtype=np.int64)
        return Boxes(addresses=addresses.copy(), byte_offsets=byte_offsets.copy(), lengths=ones, strides=ones)

    assert set(packing(one, other, boxes((64, 32)))) == {("pack", one, other, True)}
    assert set(packing(one, other, boxes((64, 32), (68, 0)))) == {("pack", one, other, flag) for flag in (True, False)}
    assert set(unpacking(one, other, boxes((64, 3)), is_dense=True)) == {("unpack", one, other, True, 2)}
    assert set(checksumming(np.array([1, 32 << 10]))) == {("checksum", True)}
    assert set(checksumming(np.array([1, (32 << 10) + 1]))) == {("checksum", True), ("checksum", False)}
