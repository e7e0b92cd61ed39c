"""Values of every kind on ranks that never communicate, for the tests of planning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from hypothesis import settings
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard as TensorShard
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as ShardProperties
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

PROPERTY = settings(deadline=None, max_examples=200)


@contextmanager
def rank_of(rank: int, nranks: int) -> Iterator[None]:
    """This process as a rank of a group that never communicates."""
    dist.init_process_group("fake", rank=rank, world_size=nranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def dtensor(
    mesh: DeviceMesh, placements: list[Placement], *sizes: int, device: str = "cpu", requires_grad: bool = False
) -> DTensor:
    """A DTensor of these sizes, as this rank of the mesh holds it."""
    full = torch.arange(torch.Size(sizes).numel(), dtype=torch.float32).view(sizes)
    local = full
    coordinate = mesh.get_coordinate()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard) and coordinate is not None:
            parts = local.chunk(mesh.size(dim), placement.dim)
            at = coordinate[dim]
            local = parts[at] if at < len(parts) else local.narrow(placement.dim, 0, 0)
    made = DTensor.from_local(
        local.contiguous().to(device), mesh, placements, run_check=False, shape=full.shape, stride=full.stride()
    )
    return made.requires_grad_(requires_grad)


def sharded_tensor(rank: int, nranks: int) -> ShardedTensor:
    """Two rows for each rank."""
    shards = [ShardMetadata([2 * each, 0], [2, 3], f"rank:{each}/cpu") for each in range(nranks)]
    properties = ShardProperties(dtype=torch.float32, requires_grad=True)
    metadata = ShardedTensorMetadata(shards, torch.Size((2 * nranks, 3)), properties)
    local = TensorShard(torch.full((2, 3), float(rank), requires_grad=True), shards[rank])
    return ShardedTensor._init_from_local_shards_and_global_metadata([local], metadata)


def every_kind(rank: int, nranks: int) -> dict[str, Any]:
    """A flat state dict of all kinds of values."""
    line, grid = init_device_mesh("cpu", (nranks,)), init_device_mesh("cpu", (2, nranks // 2))
    return {
        "plain": torch.zeros(3, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(1, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "strided": torch.zeros(3, 4).t(),
        "sharded": sharded_tensor(rank, nranks),
        "rows": dtensor(line, [Shard(0)], 7, 3),
        "columns": dtensor(line, [Shard(1)], 2, 9, requires_grad=True),
        "replicated": dtensor(line, [Replicate()], 5),
        "few": dtensor(line, [Shard(0)], 2, 2),
        "both": dtensor(grid, [Shard(0), Shard(1)], 5, 5),
        "twice": dtensor(grid, [Shard(0), Shard(0)], 9, 2),
        "hybrid": dtensor(grid, [Replicate(), Shard(0)], 6, 2),
        "lr": 0.1,
        "none": None,
        "list": [1, 2],
    }


def hints(items: list[Any]) -> list[Any]:
    """Index hints, which torch leaves out when it compares."""
    return [
        (item.dest_index.index, item.storage_index.index) if isinstance(item, ReadItem) else item.index.index
        for item in items
    ]


class Checkpointable:
    """Describes itself, in torch's protocol; two shards of one row each."""

    def __init__(self) -> None:
        self.rows = [torch.full((1, 2), 1.0), torch.full((1, 2), 2.0)]

    def size(self) -> torch.Size:
        return torch.Size((2, 2))

    def __create_write_items__(self, fqn: str, value: Any) -> list[WriteItem]:
        assert value is self
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(torch.float32), self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk((row, 0), (1, 2)) for row in range(2)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None
        return self.rows[index.offset[0]]


def chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def shard_item(fqn: str, row: int, *, dtype: torch.dtype = torch.float32, rows: int = 2) -> WriteItem:
    """One row of a tensor."""
    data = TensorWriteData(chunk((row, 0), (1, 3)), TensorProperties(dtype), torch.Size((rows, 3)))
    return WriteItem(MetadataIndex(fqn, (row, 0)), WriteItemType.SHARD, tensor_data=data)


def leaves(value: Any, name: str = "") -> Iterator[tuple[Any, str]]:
    """All that is in nested dicts and lists."""
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}.{key}")
    else:
        yield value, name
