"""Snapshots of tensors on a GPU, which the host plays here."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import FakeGpu

import gpudcp
from gpudcp import api, staging
from gpudcp.errors import PlanError
from gpudcp.planners import CastRule
from gpudcp.ranks import Ranks
from gpudcp.staging import Snapshot, Stager

KIB = 1 << 10


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """The one GPU of the process."""
    gpu = FakeGpu()

    class Event:
        def __init__(self, *, blocking: bool) -> None:
            assert blocking
            self.record, self.synchronize = lambda _: None, gpu.synchronize

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gpu.free_nbytes, gpu.total_nbytes))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: gpu.reserved_nbytes)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: gpu.allocated_nbytes)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(staging, "pin", lambda *_: None)
    monkeypatch.setattr(staging, "new_stream", lambda _: gpu)
    with gpu:
        yield gpu


def full(gpu: FakeGpu) -> None:
    """No room for the copy that a snapshot begins with: tensors go to the host at once."""
    gpu.total_nbytes = gpu.reserved_nbytes + 128 * KIB


def staged(stager: Stager, **tensors: torch.Tensor) -> Snapshot:
    return stager.stage(tensors, None, nested=True, is_shared=False)


def complex_tensor(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("room", ["room", "full"])
@pytest.mark.parametrize(
    "view",
    [
        torch.Tensor.conj,
        lambda tensor: tensor.conj().imag,
        lambda tensor: tensor.t().conj(),
        lambda tensor: tensor.t(),
        lambda tensor: tensor[:, 1:],
        lambda tensor: tensor[0].expand(300, -1),
        lambda tensor: tensor,
    ],
    ids=["conjugate", "negative", "transposed conjugate", "transposed", "part", "expanded", "whole"],
)
def test_views_of_a_gpu_are_copied_as_they_are(gpu: FakeGpu, view: Any, room: str) -> None:
    """Also where bytes come to the host after the call that copies them has returned."""
    tensor = view(gpu.place(complex_tensor(200, 300)))
    expected = tensor.clone().tolist()
    if room == "full":
        full(gpu)
    snapshot = staged(Stager(), tensor=tensor)
    snapshot.finish()
    assert snapshot.state_dict["tensor"].tolist() == expected


@pytest.mark.parametrize("shape", [(512, 600), (1, 3, 1, 1000, 40)], ids=str)
def test_a_full_gpu_needs_little_for_tensors_that_are_not_contiguous(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    """Not the whole tensor once more, which it has no room for."""
    monkeypatch.setattr("gpudcp.executors.casting._PIECE_NUMEL", 2048)
    tensor = gpu.place(torch.randn(*shape)).transpose(-1, -2)
    expected = tensor.tolist()
    full(gpu)
    gpu.most_nbytes = before = gpu.allocated_nbytes
    snapshot = staged(Stager(), tensor=tensor)
    snapshot.finish()
    assert gpu.most_nbytes - before <= 2 * 2048 * 4
    assert snapshot.state_dict["tensor"].tolist() == expected


def test_a_full_gpu_needs_little_for_views_that_are_cast(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative ones with gaps: they are negated there, by parts."""
    monkeypatch.setattr("gpudcp.executors.casting._PIECE_NUMEL", 2048)
    tensor = gpu.place(complex_tensor(512, 600)).conj().imag
    expected = tensor.bfloat16().tolist()
    full(gpu)
    gpu.most_nbytes = before = gpu.allocated_nbytes
    snapshot = Stager().stage({"tensor": tensor}, CastRule.of(torch.bfloat16), nested=True, is_shared=False)
    snapshot.finish()
    assert gpu.most_nbytes - before <= 3 * 2048 * 4
    assert snapshot.state_dict["tensor"].tolist() == expected


class Uncopied(dict[str, Any]):
    """A part of a state dict that no copy can be made of."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise ValueError("not to be copied")


def test_a_background_save_brings_a_snapshot_and_frees_the_gpu(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of which the snapshot took as much as the tensors do, and no more."""
    monkeypatch.setattr(api, "_stager", Stager())
    tensor = gpu.place(torch.randn(1000, 64))
    gpudcp.async_save({"tensor": tensor}, tmp_path).result()
    assert gpu.most_nbytes == 2 * tensor.nbytes
    assert gpu.allocated_nbytes == tensor.nbytes
    found = {"tensor": torch.zeros(1000, 64)}
    gpudcp.load(found, tmp_path)
    assert torch.equal(found["tensor"], tensor)


@pytest.mark.parametrize("failing", ["another rank", "the transfer", "the directory"])
def test_a_background_save_that_fails_frees_the_gpu(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    """Whoever keeps its error: gpudcp does, until the next save."""

    def fail(*_: Any) -> None:
        raise PlanError("not today")

    monkeypatch.setattr(api, "_stager", Stager())
    if failing == "another rank":
        monkeypatch.setattr(Ranks, "vote", fail)
    elif failing == "the transfer":
        monkeypatch.setattr(staging, "new_stream", fail)
    tensor = gpu.place(torch.randn(1000, 64))
    (tmp_path / "file").write_bytes(b"")
    directory = tmp_path / "file" / "below" if failing == "the directory" else tmp_path
    error = gpudcp.async_save({"tensor": tensor}, directory).exception()
    assert error is not None
    assert error.__traceback__ is not None
    assert gpu.most_nbytes == 2 * tensor.nbytes
    assert gpu.allocated_nbytes == tensor.nbytes


@pytest.mark.parametrize("failing", ["the ranks", "the thread"])
def test_a_background_save_that_does_not_begin_frees_the_gpu(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    """As where the process group is gone, or no thread can be started."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(api, "_stager", Stager())
    monkeypatch.setattr(*((api, "Ranks", fail) if failing == "the ranks" else (threading.Thread, "start", fail)))
    tensor = gpu.place(torch.randn(1000, 64))
    with pytest.raises(RuntimeError, match="not today") as caught:
        gpudcp.async_save({"tensor": tensor}, tmp_path).result()
    assert caught.tb is not None
    assert gpu.most_nbytes == 2 * tensor.nbytes
    assert gpu.allocated_nbytes == tensor.nbytes


@pytest.mark.parametrize("failing", ["copy", "structure"])
def test_a_snapshot_that_cannot_be_taken_frees_the_gpu(gpu: FakeGpu, failing: str) -> None:
    """Whoever keeps its error."""

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tensor = gpu.place(torch.randn(1000, 64))
    if failing == "copy":
        gpu.before_copy = fail
    structure = {"tensor": tensor} if failing == "copy" else Uncopied(tensor=tensor)
    with pytest.raises((torch.OutOfMemoryError, ValueError)) as caught:
        Stager().stage({"structure": structure}, None, nested=True, is_shared=False)
    assert caught.tb is not None
    assert gpu.most_nbytes == 2 * tensor.nbytes
    assert gpu.allocated_nbytes == tensor.nbytes


def nbytes_moved_at_once(gpu: FakeGpu, stager: Stager, tensor: torch.Tensor) -> int:
    """While training waits; the snapshot is brought to the host after that."""
    gpu.moved_nbytes = 0
    snapshot = staged(stager, tensor=tensor)
    moved_nbytes = gpu.moved_nbytes
    snapshot.finish()
    assert torch.equal(snapshot.state_dict["tensor"], tensor)
    return moved_nbytes


def test_a_gpu_has_room_for_every_snapshot_that_it_had_room_for_once(gpu: FakeGpu) -> None:
    """torch keeps the memory of the first, which is then no longer free."""
    stager, tensor = Stager(), gpu.place(torch.randn(1000, 64))
    gpu.total_nbytes = gpu.reserved_nbytes + tensor.nbytes * 5 // 2
    assert [nbytes_moved_at_once(gpu, stager, tensor) for _ in range(4)] == [0, 0, 0, 0]
    assert [nbytes_moved_at_once(gpu, stager, tensor[:500]) for _ in range(2)] == [0, 0]
    assert nbytes_moved_at_once(gpu, stager, tensor) == 0


@pytest.mark.parametrize("meanwhile", ["grown", "used", "given back and used"])
def test_memory_of_a_snapshot_that_is_gone_does_not_count(gpu: FakeGpu, meanwhile: str) -> None:
    """Nor where the next one needs more: torch would take that from what is free, of which training needs some."""
    stager, tensor = Stager(), gpu.place(torch.randn(1000, 64))
    gpu.total_nbytes = gpu.reserved_nbytes + tensor.nbytes * 5 // 2
    assert nbytes_moved_at_once(gpu, stager, tensor) == 0
    if meanwhile == "grown":
        larger = gpu.place(torch.randn(1001, 64))
        gpu.total_nbytes += larger.nbytes
        gpu.reserved_nbytes += larger.nbytes
        assert nbytes_moved_at_once(gpu, stager, larger) == larger.nbytes
        return
    kept = gpu.place(torch.empty(tensor.nbytes // 2 if meanwhile == "used" else tensor.nbytes, dtype=torch.uint8))
    if meanwhile != "used":
        gpu.reserved_nbytes = gpu.allocated_nbytes
        gpu.total_nbytes -= tensor.nbytes
    assert nbytes_moved_at_once(gpu, stager, tensor) == tensor.nbytes
    del kept
