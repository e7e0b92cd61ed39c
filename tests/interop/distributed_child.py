"""Run in a process of its own: four gloo ranks, forked after one import of torch, go through many scenarios.

Usage: distributed_child.py DIRECTORY. The ranks meet in several worlds, one after the other: of the first two, of all
four, of the first two again; then pairs of which one dies, each forked anew. Prints JSON: what went wrong, by scenario
and rank.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import interop_cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import gpudcp
from gpudcp.errors import (
    CheckpointBusyError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    GpuDcpError,
    PlanError,
    RankFailedError,
)
from gpudcp.files import commit, posix
from gpudcp.planners import local_save_plan
from gpudcp.storage import committing

# Far longer than any test may take: a rank that waits for it to pass never ends.
TIMEOUT = timedelta(minutes=10)
WATCHDOG_S = 240
RAISED_WITHIN_S, DEAD_WITHIN_S = 5.0, 10.0
"""How long a rank may take, from its own call on, to hear that another one has raised, or has died."""

Scenario = Callable[[Path], None]

TENSORS = {
    "even": interop_cases.patterned(torch.float32, 8, 12, seed=1),
    "uneven": interop_cases.patterned(torch.bfloat16, 7, 5, seed=2),
    "few": interop_cases.patterned(torch.int64, 1, 3, seed=3),
    "cube": interop_cases.patterned(torch.float16, 4, 6, 10, seed=4),
    "large": interop_cases.patterned(torch.uint8, 1000, 300, seed=5),
    "flat": interop_cases.patterned(torch.float64, 13, seed=6),
}

LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int | None, ...]]] = {
    "rows": ((-1,), (0,)),
    "last": ((-1,), (-1,)),
    "replicated": ((-1,), (None,)),
    "grid": ((2, -1), (0, -1)),
    "twice": ((2, -1), (0, 0)),
    "hybrid": ((2, -1), (None, 0)),
}
"""Mesh shapes, -1 for the rest of the world, and the tensor dimension that each mesh dimension shards; None: copies."""


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    known = -torch.Size(shape).numel()
    return init_device_mesh("cpu", tuple(dist.get_world_size() // known if n == -1 else n for n in shape))


def sharded(full: torch.Tensor, mesh: DeviceMesh, dims: tuple[int | None, ...], *, is_blank: bool = False) -> DTensor:
    placements = [Replicate() if dim is None else Shard(dim % full.ndim) for dim in dims]
    sizes, offsets = compute_local_shape_and_global_offset(full.shape, mesh, placements)
    local = full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].clone()
    if is_blank:
        local = interop_cases.blank(local)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def sharded_tensor(full: torch.Tensor, *, is_blank: bool = False) -> ShardedTensor:
    """Rows, in chunks as ShardedTensors are cut: two local shards on rank 0, one on each other rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    bounds = [full.shape[0] * i // (world + 1) for i in range(world + 2)]
    own = [0, 1] if rank == 0 else [rank + 1]
    shards = []
    for number in own:
        rows = full[bounds[number] : bounds[number + 1]].clone()
        rows = interop_cases.blank(rows) if is_blank else rows
        shards.append(LocalShard.from_tensor_and_offsets(rows, [bounds[number], 0], rank))
    return init_from_local_shards(shards, full.shape)


def state_dict(*, is_blank: bool = False) -> dict[str, Any]:
    """DTensors of every layout, ShardedTensors, plain values, and values of one rank alone."""
    state: dict[str, Any] = {}
    for layout, (shape, dims) in LAYOUTS.items():
        mesh = mesh_of(shape)
        for name, full in TENSORS.items():
            state[f"{layout}.{name}"] = sharded(full, mesh, dims, is_blank=is_blank)
    state["sharded_tensor"] = sharded_tensor(TENSORS["large"], is_blank=is_blank)
    plain = {"plain": TENSORS["cube"].clone(), "scalar": torch.tensor(2.5), "nested": {"list": [1, "two"]}}
    rank = dist.get_rank()
    if rank < 2:
        plain[f"of_rank_{rank}"] = {"tensor": torch.full((3,), float(rank)), "object": f"rank {rank}"}
    return state | (interop_cases.blank(plain) if is_blank else plain)


def locals_of(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.to_local()
    if isinstance(value, ShardedTensor):
        return [shard.tensor for shard in value.local_shards()]
    return value


def check_equal(expected: dict[str, Any], found: dict[str, Any]) -> None:
    problems = interop_cases.differences(
        {key: locals_of(value) for key, value in expected.items()},
        {key: locals_of(value) for key, value in found.items()},
    )
    assert problems == [], problems


def check_loads(directory: Path, *loads: Callable[..., Any]) -> None:
    for load in loads:
        found = state_dict(is_blank=True)
        load(found, checkpoint_id=directory)
        check_equal(state_dict(), found)


@contextmanager
def raises(kind: type[BaseException], *texts: str, within_s: float = RAISED_WITHIN_S) -> Iterator[list[BaseException]]:
    told: list[BaseException] = []
    started_s = time.monotonic()
    try:
        yield told
    except kind as error:
        told.append(error)
    assert (spent_s := time.monotonic() - started_s) < within_s, f"after {spent_s:.1f} s"
    assert told, f"no {kind.__name__}"
    missing = [text for text in texts if text not in str(told[0])]
    assert not missing, f"{missing} not in {told[0]}"


def settled(directory: Path, expected: float) -> None:
    """That the directory holds the checkpoint of ``only(expected)``, and can be saved into again."""
    found = only(0.0)
    gpudcp.load(found, directory)
    check_equal(only(expected), found)
    gpudcp.save(only(expected), directory)
    if dist.get_rank() == 0:
        assert not (directory / commit.LOCK_NAME).exists()
    dist.barrier()


def only(number: float) -> dict[str, Any]:
    """A small state with a shard for every rank."""
    full = torch.arange(dist.get_world_size() * 6.0).view(-1, 3) + number
    return {"weight": sharded(full, mesh_of((-1,)), (0,)), "step": number}


def two_ranks_save(directory: Path) -> None:
    gpudcp.save(state_dict(), directory / "two_by_gpudcp")
    dcp.save(state_dict(), checkpoint_id=directory / "two_by_stock")
    check_loads(directory / "two_by_gpudcp", gpudcp.load, dcp.load)
    check_loads(directory / "two_by_stock", gpudcp.load)


def mixed_drivers(directory: Path) -> None:
    """Our storage and planners under torch's driver, torch's under ours, each half at a time."""
    base = directory / "mixed"
    saves: dict[str, Callable[[Path], Any]] = {
        "our_writer": lambda path: dcp.save(state_dict(), storage_writer=gpudcp.GpuStorageWriter(path)),
        "our_all": lambda path: dcp.save(
            state_dict(), storage_writer=gpudcp.GpuStorageWriter(path), planner=gpudcp.DefaultSavePlanner()
        ),
        "our_planner": lambda path: dcp.save(
            state_dict(), storage_writer=dcp.FileSystemWriter(path), planner=gpudcp.DefaultSavePlanner()
        ),
        "torch_planner": lambda path: gpudcp.save(state_dict(), path, planner=dcp.DefaultSavePlanner()),
        "torch_all": lambda path: gpudcp.save(
            state_dict(), storage_writer=dcp.FileSystemWriter(path), planner=dcp.DefaultSavePlanner()
        ),
    }
    loads: dict[str, Callable[..., Any]] = {
        "our_reader": lambda state, checkpoint_id: dcp.load(
            state, storage_reader=gpudcp.GpuStorageReader(checkpoint_id), planner=gpudcp.DefaultLoadPlanner()
        ),
        "torch_reader": lambda state, checkpoint_id: gpudcp.load(
            state, storage_reader=dcp.FileSystemReader(checkpoint_id), planner=dcp.DefaultLoadPlanner()
        ),
    }
    for name, save in saves.items():
        save(base / name)
        check_loads(base / name, *loads.values())


def async_save(directory: Path) -> None:
    """torch's async_save over our writer, twice with the same writer, each from a thread of its own."""
    writer = gpudcp.GpuStorageWriter(directory / "async")
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    for number in (1.0, 2.0):
        state = only(number)
        future = dcp.async_save(state, storage_writer=writer, process_group=group)
        future.result()
        check_loads_only(directory / "async", number)


def saves_in_the_background_beside_training(directory: Path) -> None:
    """Training talks on the default group while the ranks of a save talk on theirs; values are those at the call."""
    path = directory / "background"
    for number in (1.0, 2.0):
        state = only(number)
        response = gpudcp.async_save(state, path)
        for value in state.values():
            if isinstance(value, torch.Tensor):
                value.zero_()
        for _ in range(50):
            dist.all_reduce(torch.ones(10))
        response.upload_completion.result()
        check_loads_only(path, number)


def a_snapshot_that_one_rank_cannot_take_fails_on_all(directory: Path) -> None:
    """That rank's call raises, the others' futures; nobody waits, and the next save works."""

    class Unwilling:
        def __deepcopy__(self, memo: Any) -> Any:
            raise ValueError("not to be copied")

    path = directory / "background"
    if dist.get_rank() == 1:
        with raises(ValueError, "not to be copied"):
            gpudcp.async_save({"object": Unwilling()}, path)
    else:
        upload = gpudcp.async_save({"a": torch.ones(1)}, path).upload_completion
        with raises(GpuDcpError, "snapshot failed on rank 1: ValueError: not to be copied"):
            upload.result()
    check_loads_only(path, 2.0)


def groups_that_not_all_ranks_are_in_do_not_matter(directory: Path) -> None:
    """Nor do groups of the caller's, in any order; a rank may have made more of them than another."""
    dist.new_group([0], timeout=TIMEOUT)
    # Torch 2.11 sorts the ranks of every group.
    unsorted = {"sort_ranks": False} if "sort_ranks" in inspect.signature(dist.new_group).parameters else {}
    backwards = dist.new_group([1, 0], timeout=TIMEOUT, **unsorted)
    alone = [dist.new_group([rank], timeout=TIMEOUT) for rank in (0, 1)]
    own = [dist.new_group([rank], timeout=TIMEOUT) for rank in (0, 0, 1)][2 * dist.get_rank()]
    for number, group in enumerate((None, backwards, alone[dist.get_rank()], own)):
        is_shared = group is None or dist.get_world_size(group) == 2
        path = directory / (f"groups_{number}" if is_shared else f"groups_{number}_{dist.get_rank()}")
        state = {"a": torch.full((3,), float(number))}
        gpudcp.async_save(state, path, process_group=group).result()
        found = {"a": torch.zeros(3)}
        gpudcp.load(found, path, process_group=group)
        assert torch.equal(found["a"], state["a"])


def arguments_that_are_wrong_on_one_rank_are_errors_on_all(directory: Path) -> None:
    """None waits for one that never came to the first step."""
    path = directory / "arguments"
    gpudcp.save(only(1.0), path)
    is_wrong = dist.get_rank() == 1
    no_dict: Any = torch.nn.Linear(1, 1)
    manager = gpudcp.CheckpointManager(directory / "arguments_run")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("checkpoint_id is needed", lambda: gpudcp.save(only(2.0), None if is_wrong else path)),
        ("checkpoint_id is needed", lambda: gpudcp.async_save(only(2.0), None if is_wrong else path).result()),
        ("gs://bucket", lambda: gpudcp.load(only(0.0), "gs://bucket/x" if is_wrong else path)),
        (
            "not a dict; pass its state_dict",
            lambda: gpudcp.save(no_dict if is_wrong else only(2.0), path),
        ),  # type: ignore[arg-type]
        ("an integer of at least 0", lambda: manager.save(-1 if is_wrong else 1, only(2.0))),
        ("different steps", lambda: manager.async_save(2 if is_wrong else 1, only(2.0))),
    ]
    for text, call in calls:
        with raises(GpuDcpError, text):
            call()
    check_loads_only(path, 1.0)


def a_failure_that_only_one_rank_has_heard_of_is_raised_on_all(directory: Path) -> None:
    """By the next save: on the ranks that were not told yet it is their own, on the others a failed rank's."""
    path = directory / "background"

    class Fails(gpudcp.DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise PlanError("no plan today")

    upload = gpudcp.async_save(only(3.0), path, planner=Fails()).upload_completion
    if dist.get_rank() == 0:
        assert isinstance(upload.exception(), GpuDcpError)
    with raises(GpuDcpError, "no plan today"):
        gpudcp.async_save(only(3.0), path).upload_completion.result()
    check_loads_only(path, 2.0)
    gpudcp.save(only(4.0), path)
    check_loads_only(path, 4.0)


def a_manager_goes_back_on_all_ranks_when_one_cannot_read(directory: Path) -> None:
    """Only one rank's shard of the newest step is damaged; all restore the one before it."""
    manager = gpudcp.CheckpointManager(directory / "run", keep_last=2)
    for step in (1, 2, 3):
        manager.save(step, only(float(step)))
    assert manager.steps() == [2, 3]
    dist.barrier()
    if dist.get_rank() == 0:
        (path,) = Path(manager.path(3)).glob("__1_*.distcp")
        data = bytearray(path.read_bytes())
        data[data.index(torch.tensor([9.0, 10.0]).numpy().tobytes())] ^= 1
        path.write_bytes(bytes(data))
    dist.barrier()
    found = only(0.0)
    assert manager.restore(found) == 2
    check_equal(only(2.0), found)
    response = manager.async_save(4, only(4.0))
    response.upload_completion.result()
    assert manager.restore(found) == 4
    with raises(GpuDcpError, "no_such_key"):
        manager.restore({**only(0.0), **({"no_such_key": 1} if dist.get_rank() == 1 else {})})


def check_loads_only(directory: Path, number: float) -> None:
    for load in (gpudcp.load, dcp.load):
        found = only(0.0)
        load(found, checkpoint_id=directory)
        check_equal(only(number), found)


def returns_the_metadata(directory: Path) -> None:
    """Every rank gets the same Metadata, which says what .metadata says."""
    metadata = gpudcp.save(state_dict(), directory / "returned")
    on_disk = dcp.FileSystemReader(directory / "returned").read_metadata()
    assert metadata.state_dict_metadata == on_disk.state_dict_metadata
    assert dict(metadata.storage_data or {}) == on_disk.storage_data
    assert metadata.planner_data == on_disk.planner_data
    assert len(on_disk.storage_data) > 30


def four_ranks_load_what_two_saved(directory: Path) -> None:
    check_loads(directory / "two_by_gpudcp", gpudcp.load, dcp.load)
    check_loads(directory / "two_by_stock", gpudcp.load)


def four_ranks_save(directory: Path) -> None:
    gpudcp.save(state_dict(), directory / "four_by_gpudcp")
    dcp.save(state_dict(), checkpoint_id=directory / "four_by_stock")
    check_loads(directory / "four_by_gpudcp", gpudcp.load, dcp.load)
    check_loads(directory / "four_by_stock", gpudcp.load)


def replicas_are_written_once(directory: Path) -> None:
    """Each byte of replicated tensors lies in one file only, and every rank writes some."""
    full = interop_cases.patterned(torch.uint8, 400, 1000, seed=9)
    state = {f"hybrid_{i}": sharded(full, mesh_of((2, -1)), (None, 0)) for i in range(4)}
    state |= {f"plain_{i}": full.clone() for i in range(4)}
    gpudcp.save(state, directory / "replicas")
    sizes = [path.stat().st_size for path in (directory / "replicas").glob("*.distcp")]
    assert sum(sizes) < 8 * full.numel() * 1.05, sizes
    assert len(sizes) == 4


class OwnPlan(gpudcp.DefaultSavePlanner):
    """Plans by itself, and so says nothing of what it planned to the methods that resolve it."""

    def create_local_plan(self) -> SavePlan:
        return local_save_plan(self.state_dict)


class TorchsResolve(gpudcp.DefaultSavePlanner):
    """Resolves as torch's planner does, which knows of no pieces."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.transform_object(write_item, self.lookup_object(write_item.index))


class OwnDTensor(DTensor):
    """A subclass."""


def pieces_of_replicas_are_right_whatever_holds_them(directory: Path) -> None:
    """Large replicas, which are written by rows: under planners that resolve them otherwise, and in other tensors."""
    full = interop_cases.patterned(torch.uint8, 4000, 1000, seed=10)
    mesh, grid = mesh_of((-1,)), init_device_mesh("cpu", (dist.get_world_size(), 1))
    replica = sharded(full, mesh, (None,))
    subclass = sharded(full, mesh, (None,))
    subclass.__class__ = OwnDTensor
    wrapped = LocalShardsWrapper([full.clone()], [(0, 0)])  # type: ignore[no-untyped-call]
    in_shards = DTensor.from_local(
        wrapped, grid, [Replicate(), Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
    )
    alone = [dist.new_group([rank], timeout=TIMEOUT) for rank in range(dist.get_world_size())][dist.get_rank()]
    shards = [LocalShard.from_tensor_and_offsets(full.clone(), [0, 0], dist.get_rank())]
    of_one_rank = init_from_local_shards(shards, full.shape, process_group=alone)
    by_key = gpudcp.DefaultSavePlanner()
    by_key.lookup_object = lambda index: locals_of(by_key.state_dict[index.fqn])  # type: ignore[method-assign]
    cases: dict[str, tuple[Any, Any]] = {
        "own_plan_of_a_tensor": (full.clone(), OwnPlan()),
        "own_plan_of_a_dtensor": (replica, OwnPlan()),
        "torchs_resolve": (full.clone(), TorchsResolve()),
        "lookup_on_the_instance": (replica, by_key),
        "dtensor_subclass": (subclass, None),
        "shards_wrapper": (in_shards, None),
        "sharded_tensor_of_one_rank": (of_one_rank, None),
    }
    for name, (value, planner) in cases.items():
        writers = {
            f"pieces_{name}": gpudcp.GpuStorageWriter(directory / f"pieces_{name}"),
            f"pieces_{name}_by_stock": dcp.FileSystemWriter(directory / f"pieces_{name}_by_stock"),
        }
        for directory_name, writer in writers.items():
            gpudcp.save({"w": value}, storage_writer=writer, planner=planner)
            found = {"w": torch.zeros_like(full)}
            dcp.load(found, checkpoint_id=directory / directory_name)
            assert torch.equal(found["w"], full), directory_name


def a_sub_mesh(directory: Path) -> None:
    """A DTensor of two of the four ranks; the other two have no part in it."""
    mesh = DeviceMesh("cpu", [1, 3])

    def state(*, is_blank: bool = False) -> dict[str, Any]:
        full = TENSORS["uneven"]
        if mesh.get_coordinate() is None:
            local = torch.empty(0, 5, dtype=full.dtype)
            part = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
        else:
            part = sharded(full, mesh, (0,), is_blank=is_blank)
        return {"part": part, "all": sharded(full, mesh_of((-1,)), (0,), is_blank=is_blank)}

    for name, save in (("ours", gpudcp.save), ("stock", dcp.save)):
        save(state(), checkpoint_id=directory / f"sub_mesh_{name}")
        for load in (gpudcp.load, dcp.load):
            found = state(is_blank=True)
            load(found, checkpoint_id=directory / f"sub_mesh_{name}")
            check_equal(state(), found)


def a_process_group(directory: Path) -> None:
    """Ranks 1 and 3 save and load by themselves; rank 1 is their coordinator, and files bear their own numbers."""
    group = dist.new_group([1, 3], timeout=TIMEOUT)
    mesh = DeviceMesh("cpu", [1, 3])
    path = directory / "group"
    if dist.get_rank() in (1, 3):
        full = TENSORS["uneven"]
        state = {"weight": sharded(full, mesh, (0,)), "object": "x"}
        gpudcp.save(state, path, process_group=group)
        numbers = sorted(name.name.split("_")[2] for name in path.glob("*.distcp"))
        assert numbers == ["0", "1"], numbers
        for load in (gpudcp.load, dcp.load):
            found = {"weight": sharded(full, mesh, (0,), is_blank=True), "object": ""}
            load(found, checkpoint_id=path, process_group=group)
            check_equal(state, found)
        with raises(RankFailedError, "rank 1: ValueError: on purpose"):
            gpudcp.save(state, path, process_group=group, planner=Faulty("create_local_plan", 3))
    dist.barrier()


def without_dist(directory: Path) -> None:
    """Every rank saves and loads alone, into a directory of its own, in a world of four."""
    path = directory / f"alone_{dist.get_rank()}"
    state = {"weight": TENSORS["uneven"] + dist.get_rank(), "object": dist.get_rank()}
    gpudcp.save(state, path, no_dist=True)
    for load in (gpudcp.load, dcp.load):
        found = interop_cases.blank(state)
        load(found, checkpoint_id=path, no_dist=True)
        check_equal(state, found)


def without_collectives(directory: Path) -> None:
    """Every rank writes a metadata file of its own; gpudcp and stock read them, and stock's are read by gpudcp."""
    rank = dist.get_rank()
    for name, save in (
        ("ours", lambda path: gpudcp.save(only(5.0), path, use_collectives=False)),
        ("stock", lambda path: dcp.save(only(5.0), checkpoint_id=path, use_collectives=False)),
        (
            "mixed",
            lambda path: dcp.save(only(5.0), storage_writer=gpudcp.GpuStorageWriter(path), use_collectives=False),
        ),
    ):
        path = directory / f"rank_local_{name}"
        save(path)
        dist.barrier()
        assert (path / f"__{rank}.metadata").exists()
        assert not (path / ".metadata").exists()
        check_loads_only(path, 5.0)
    path = directory / "rank_local_ours"
    gpudcp.save(only(6.0), path, use_collectives=False)
    check_loads_only(path, 6.0)
    dist.barrier()
    assert len(list(path.glob(f"__{rank}_*.distcp"))) == 1


def an_overwrite_without_collectives_is_refused_on_all_ranks(directory: Path) -> None:
    path = directory / "rank_local_refused"
    gpudcp.save(only(1.0), path, use_collectives=False)
    writer = gpudcp.GpuStorageWriter(path, overwrite=False)
    with raises(GpuDcpError, "overwrite=False"):
        gpudcp.save(only(2.0), storage_writer=writer, use_collectives=False)
    dist.barrier()
    check_loads_only(path, 1.0)
    # Slow ranks must not take what fast ranks have just written for an older checkpoint.
    path = directory / "rank_local_slow"
    writer = gpudcp.GpuStorageWriter(path, overwrite=False)
    planner = Slow() if dist.get_rank() == 3 else gpudcp.DefaultSavePlanner()
    gpudcp.save(only(3.0), storage_writer=writer, planner=planner, use_collectives=False)
    check_loads_only(path, 3.0)


class Slow(gpudcp.DefaultSavePlanner):
    def create_local_plan(self) -> Any:
        time.sleep(0.5)
        return super().create_local_plan()


class Unpicklable(Exception):
    """An error that takes two arguments and gives one to its base: it pickles, and does not unpickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


class Faulty(gpudcp.DefaultSavePlanner):
    """Raises at one of DCP's calls, on one rank."""

    def __init__(self, call: str, rank: int, error: Callable[[], BaseException] | None = None) -> None:
        super().__init__()
        if dist.get_rank() == rank:
            setattr(self, call, self._fail)
        self._error = error or (lambda: ValueError("on purpose"))

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise self._error()


class FaultyLoad(gpudcp.DefaultLoadPlanner):
    def __init__(self, call: str, rank: int, error: Callable[[], BaseException] | None = None) -> None:
        super().__init__()
        if dist.get_rank() == rank:
            setattr(self, call, self._fail)
        self._error = error or (lambda: ValueError("on purpose"))

    def _fail(self, *_: Any, **__: Any) -> Any:
        raise self._error()


class StatefulThatFails:
    def __init__(self, rank: int) -> None:
        self._rank = rank

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == self._rank:
            raise ValueError("no state")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def an_error_on_one_rank_reaches_all(directory: Path) -> None:
    """Wherever a save fails, on whichever rank: all raise, the old checkpoint stays, the directory is free."""
    path = directory / "faults"
    gpudcp.save(only(1.0), path)
    for call, rank in (
        ("set_up_planner", 1),
        ("create_local_plan", 2),
        ("create_global_plan", 0),
        ("finish_plan", 3),
        ("resolve_data", 1),
        ("resolve_data", 0),
    ):
        with raises(RankFailedError, f"rank {rank}: ValueError: on purpose") as told:
            gpudcp.save(only(2.0), path, planner=Faulty(call, rank))
        assert told[0].ranks == {rank: "ValueError: on purpose"}  # type: ignore[attr-defined]
        is_own = isinstance(told[0].__cause__, ValueError)
        assert is_own == (dist.get_rank() == rank)
        dist.barrier()
        settled(path, 1.0)


def errors_of_our_tree_arrive_whole(directory: Path) -> None:
    """With type and attributes, on ranks that had none; what does not unpickle arrives as text."""
    path = directory / "faults_typed"
    gpudcp.save(only(1.0), path)

    def corrupt() -> BaseException:
        return CorruptCheckpointError("bad", path="p", fqn="w", expected_crc32=1, found_crc32=2)

    with raises(CorruptCheckpointError, "bad") as told:
        gpudcp.load(only(0.0), path, planner=FaultyLoad("resolve_tensor", 2, corrupt))
    assert (told[0].fqn, told[0].found_crc32) == ("w", 2)  # type: ignore[attr-defined]
    if dist.get_rank() != 2:
        assert "on rank 2" in str(told[0])

    with raises(RankFailedError, "rank 3: Unpicklable: ab"):
        gpudcp.save(only(2.0), path, planner=Faulty("resolve_data", 3, lambda: Unpicklable("a", "b")))
    settled(path, 1.0)


def errors_reach_all_under_torchs_driver(directory: Path) -> None:
    """Ours unpickle on the other ranks of dcp.save and dcp.load, so none of them hangs."""
    path = directory / "faults_dcp"
    gpudcp.save(only(1.0), path)

    def plan_error() -> BaseException:
        return PlanError("on purpose")

    for call, rank in (("create_local_plan", 2), ("resolve_data", 1)):
        with raises(CheckpointException, "on purpose"):
            dcp.save(
                only(2.0),
                storage_writer=gpudcp.GpuStorageWriter(path),
                planner=Faulty(call, rank, plan_error),
            )
        dist.barrier()
        settled(path, 1.0)
    broken = directory / "faults_dcp_files"
    gpudcp.save(only(1.0), broken)
    if dist.get_rank() == 0:
        victim = next(broken.glob("__2_*.distcp"))
        data = bytearray(victim.read_bytes())
        data[data.index(torch.arange(12.0, 18.0).add(1).numpy().tobytes())] ^= 1
        victim.write_bytes(data)
    dist.barrier()
    with raises(CheckpointException, "CRC-32", "weight"):
        dcp.load(only(0.0), storage_reader=gpudcp.GpuStorageReader(broken))
    with raises(CorruptCheckpointError, "CRC-32", "weight"):
        gpudcp.load(only(0.0), broken)


def a_failing_state_dict_reaches_all(directory: Path) -> None:
    """A Stateful that raises on one rank leaves no other rank waiting, in a save or in a load."""
    path = directory / "faults_stateful"
    gpudcp.save(only(1.0), path)
    with raises(RankFailedError, "rank 2: ValueError: no state"):
        gpudcp.save({"bad": StatefulThatFails(2), **only(2.0)}, path)
    settled(path, 1.0)
    with raises(RankFailedError, "rank 1: ValueError: no state"):
        gpudcp.load({"bad": StatefulThatFails(1), **only(2.0)}, path)
    settled(path, 1.0)


def a_full_disk_reaches_all(directory: Path) -> None:
    """A write that fails on one rank, and a commit that fails on the coordinator."""
    path = directory / "faults_disk"
    gpudcp.save(only(1.0), path)
    rank = dist.get_rank()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    write, replace = posix.os.pwrite, commit.os.replace
    if rank == 3:
        posix.os.pwrite = full
    try:
        with raises(GpuDcpError, "No space left on device") as told:
            gpudcp.save(only(2.0), path)
    finally:
        posix.os.pwrite = write
    assert told[0].errno == 28  # type: ignore[attr-defined]
    dist.barrier()
    settled(path, 1.0)

    if rank == 0:
        commit.os.replace = full
    try:
        with raises(GpuDcpError, "No space left on device"):
            gpudcp.save(only(2.0), path)
    finally:
        commit.os.replace = replace
    dist.barrier()
    settled(path, 1.0)
    if rank == 0:
        assert len(list(path.iterdir())) == 5, sorted(path.iterdir())
    dist.barrier()


def a_busy_directory_is_refused_on_all_ranks(directory: Path) -> None:
    """While another save holds the directory, all ranks raise, and the holder keeps it."""
    path = directory / "busy"
    gpudcp.save(only(1.0), path)
    holder = _held_by_a_thread(path) if dist.get_rank() == 0 else None
    with raises(CheckpointBusyError, "another save into this directory is running"):
        gpudcp.save(only(2.0), path)
    if holder is not None:
        assert (path / commit.LOCK_NAME).exists()
        holder.release()
    dist.barrier()
    settled(path, 1.0)


def _held_by_a_thread(path: Path) -> commit.DirectoryLock:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(commit.DirectoryLock.acquire, str(path)).result()


def ranks_agree_on_trying_again(directory: Path) -> None:
    """One rank sees a newer checkpoint, another fails otherwise: all raise, and none goes back alone to wait."""
    path = directory / "retry"
    gpudcp.save(only(1.0), path)
    rank = dist.get_rank()

    def error() -> BaseException:
        return CheckpointBusyError("a newer checkpoint") if rank == 1 else ValueError("size mismatch")

    with raises(GpuDcpError, "size mismatch"):
        gpudcp.load(only(0.0), path, planner=FaultyLoad("create_local_plan", rank if rank in (1, 2) else -1, error))
    calls = []

    class Once(gpudcp.DefaultLoadPlanner):
        def create_local_plan(self) -> Any:
            calls.append(1)
            if len(calls) == 1 and rank in (1, 2):
                raise CheckpointBusyError("a newer checkpoint")
            return super().create_local_plan()

    found = only(0.0)
    gpudcp.load(found, path, planner=Once())
    check_equal(only(1.0), found)
    assert len(calls) == 2


def keys_that_are_missing_are_named(directory: Path) -> None:
    path = directory / "missing"
    gpudcp.save(only(1.0), path)
    with raises(gpudcp.errors.MissingKeyError, "absent"):
        gpudcp.load({**only(0.0), **({"absent": torch.zeros(2)} if dist.get_rank() == 2 else {})}, path)
    with raises(CheckpointNotFoundError, "no checkpoint"):
        gpudcp.load(only(0.0), directory / "nowhere")


def fewer_ranks_overwrite(directory: Path) -> None:
    """Two of four ranks overwrite what four saved: the files of all four go."""
    path = directory / "shrunk"
    gpudcp.save(only(1.0), path)
    group, mesh = dist.new_group([0, 1], timeout=TIMEOUT), DeviceMesh("cpu", [0, 1])
    if dist.get_rank() < 2:
        gpudcp.save({"weight": sharded(TENSORS["even"], mesh, (0,))}, path, process_group=group)
    dist.barrier()
    names = sorted(name.name.split("_")[2] if name.suffix == ".distcp" else name.name for name in path.iterdir())
    assert names == [".metadata", "0", "1"], names
    dist.barrier()


def fsdp_model(seed: int, *, has_tensor_parallel: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Tanh(), torch.nn.Linear(10, 3))
    if has_tensor_parallel:
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(model[0])
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def full_values(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().full_tensor()  # type: ignore[operator]
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.full_tensor() if isinstance(value, DTensor) else value
    return found


def fsdp_saves(directory: Path) -> None:
    """FSDP2 over four ranks, and FSDP2 with tensor parallelism two by two, each after a step of training."""
    for name, has_tensor_parallel in (("fsdp", False), ("fsdp_tp", True)):
        model, optimizer = fsdp_model(1, has_tensor_parallel=has_tensor_parallel)
        model(torch.arange(12.0).view(2, 6)).sum().backward()
        optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        gpudcp.save({"model": weights, "optimizer": state}, directory / name)
        values = full_values(model, optimizer)
        if dist.get_rank() == 0:
            torch.save(values, directory / f"{name}.pt")
        dist.barrier()


def two_ranks_load_what_four_saved(directory: Path) -> None:
    check_loads(directory / "four_by_gpudcp", gpudcp.load, dcp.load)
    check_loads(directory / "four_by_stock", gpudcp.load)


def fsdp_loads_on_fewer_ranks(directory: Path) -> None:
    """Parameters and optimizer state of both are those saved, bit for bit, with and without tensor parallelism."""
    for name in ("fsdp", "fsdp_tp"):
        for has_tensor_parallel in (False, True):
            model, optimizer = fsdp_model(2, has_tensor_parallel=has_tensor_parallel)
            weights, state = get_state_dict(model, optimizer)
            wanted = {"model": weights, "optimizer": state}
            gpudcp.load(wanted, directory / name)
            set_state_dict(model, optimizer, model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"])
            expected = torch.load(directory / f"{name}.pt")
            check_equal(expected, full_values(model, optimizer))


def ranks_that_are_given_different_directories_are_warned_of(directory: Path) -> None:
    """The save succeeds, as the files may be gathered later; the coordinator names the missing ones and their ranks."""
    paths = [directory / f"apart_{rank}" for rank in range(dist.get_world_size())]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gpudcp.save(only(1.0), directory / "together")
        gpudcp.save(only(1.0), paths[dist.get_rank()])
    told = [str(each.message) for each in caught if "have written are not in it" in str(each.message)]
    dist.barrier()
    if dist.get_rank():
        assert told == []
    else:
        (text,) = told
        (missing,) = (path.name for path in paths[1].glob("*.distcp"))
        assert f"{missing} of rank 1" in text
        assert "1 of 2 files" in text
        assert "the same directory" in text
        (paths[1] / missing).rename(paths[0] / missing)
    dist.barrier()
    check_loads_only(paths[0], 1.0)


class Place(NamedTuple):
    """Where a rank dies in a save: at a call of a class or a module, on a rank."""

    owner: Any
    call: str
    rank: int


DEATHS = {
    "in its own planning": Place(gpudcp.DefaultSavePlanner, "create_local_plan", 1),
    "in the global planning": Place(gpudcp.DefaultSavePlanner, "create_global_plan", 0),
    "in packing": Place(gpudcp.DefaultSavePlanner, "resolve_sources", 1),
    "in writing": Place(posix.PosixWriter, "write", 1),
    "in fsync": Place(posix.PosixWriter, "finish", 0),
    "in commit": Place(committing, "file_to_replace", 0),
}


def a_rank_that_dies(directory: Path, where: str) -> None:
    """The other hears of it, the directory is free, the old checkpoint is whole, and the next save cleans up."""
    place, path = DEATHS[where], directory / f"killed {where}"
    gpudcp.save(only(1.0), path)
    if dist.get_rank() == place.rank:
        setattr(place.owner, place.call, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with raises(RankFailedError, "lost touch", within_s=DEAD_WITHIN_S):
        gpudcp.save(only(2.0), path)
    full = torch.arange(12.0).view(4, 3)
    found = {"weight": torch.zeros(4, 3), "step": 0.0}
    gpudcp.load(found, path, no_dist=True)
    assert torch.equal(found["weight"], full + 1)
    gpudcp.save({"weight": full, "step": 3.0}, path, no_dist=True)
    assert sorted(name.name[:4] for name in path.iterdir()) == [".met", "__0_"]


WORLDS: tuple[tuple[str, tuple[int, ...], tuple[Scenario, ...]], ...] = (
    ("first_two", (0, 1), (two_ranks_save, mixed_drivers, async_save, returns_the_metadata)),
    (
        "background",
        (0, 1),
        (
            saves_in_the_background_beside_training,
            a_snapshot_that_one_rank_cannot_take_fails_on_all,
            a_failure_that_only_one_rank_has_heard_of_is_raised_on_all,
            groups_that_not_all_ranks_are_in_do_not_matter,
            arguments_that_are_wrong_on_one_rank_are_errors_on_all,
            a_manager_goes_back_on_all_ranks_when_one_cannot_read,
        ),
    ),
    (
        "all_four",
        (0, 1, 2, 3),
        (
            four_ranks_load_what_two_saved,
            four_ranks_save,
            replicas_are_written_once,
            pieces_of_replicas_are_right_whatever_holds_them,
            a_sub_mesh,
            a_process_group,
            without_dist,
            without_collectives,
            an_overwrite_without_collectives_is_refused_on_all_ranks,
            an_error_on_one_rank_reaches_all,
            errors_of_our_tree_arrive_whole,
            errors_reach_all_under_torchs_driver,
            a_failing_state_dict_reaches_all,
            a_full_disk_reaches_all,
            a_busy_directory_is_refused_on_all_ranks,
            ranks_agree_on_trying_again,
            keys_that_are_missing_are_named,
            fewer_ranks_overwrite,
            fsdp_saves,
        ),
    ),
    (
        "two_again",
        (0, 1),
        (
            two_ranks_load_what_four_saved,
            fsdp_loads_on_fewer_ranks,
            ranks_that_are_given_different_directories_are_warned_of,
        ),
    ),
)


def join(directory: Path, world: str, rank: int, nranks: int) -> None:
    """Meet the other ranks of a world."""
    store = f"file://{directory}/store_{world.replace(' ', '_')}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=nranks, timeout=TIMEOUT)
    dist.barrier()  # nobody goes, or dies, before all are connected


def run_rank(number: int, directory: Path) -> None:
    """All worlds that this rank takes part in. What it finds goes to a file after each scenario."""
    found: dict[str, str] = {}
    report = directory / f"rank_{number}.json"
    for world, members, scenarios in WORLDS:
        if number not in members:
            continue
        join(directory, world, members.index(number), len(members))
        for scenario in scenarios:
            try:
                scenario(directory)
                found[scenario.__name__] = ""
            except BaseException:
                found[scenario.__name__] = traceback.format_exc()
            report.write_text(json.dumps(found))
            if found[scenario.__name__]:
                return  # the ranks no longer agree on what comes next
        dist.barrier()
        dist.destroy_process_group()


def run_pair(number: int, directory: Path, where: str) -> None:
    """One rank of two, of which one dies."""
    join(directory, where, number, 2)
    text = ""
    try:
        a_rank_that_dies(directory, where)
    except BaseException:
        text = traceback.format_exc()
    (directory / f"rank_{number}_{where}.json").write_text(json.dumps({where: text}))


def run_forked(rank_mains: list[Callable[[], None]], deadline_s: float) -> None:
    """Each in a process of its own, until all have ended or the time is over."""
    children = set()
    for rank_main in rank_mains:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                rank_main()
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(code)
        children.add(pid)
    while children:
        if time.monotonic() > deadline_s:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        children -= {pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.01)


def main(directory: Path) -> dict[str, dict[str, str]]:
    """Fork the ranks, wait for them, and gather what they found."""
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    deadline_s = time.monotonic() + WATCHDOG_S
    run_forked([partial(run_rank, number, directory) for number in range(4)], deadline_s)
    for where in DEATHS:
        run_forked([partial(run_pair, number, directory, where) for number in range(2)], deadline_s)
    results: dict[str, dict[str, str]] = {}
    for report in sorted(directory.glob("rank_*.json")):
        number = report.stem.split("_")[1]
        for scenario, text in json.loads(report.read_text()).items():
            results.setdefault(scenario, {})[number] = text
    return results


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(Path(sys.argv[1]))))
