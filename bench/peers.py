"""gpudcp and its peers: how each saves a dict of CPU tensors durably, and loads it into ready tensors.

Equal work: the same bytes and dtypes, every save ends with its files on the device (fsync; stock DCP's FileSystemWriter
does so by itself), every load ends in the tensors that it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import gpudcp
from bench.measure import PartClock
from bench.tensors import Tensors

_FILE_NAME = "tensors"


class Peer(Protocol):
    """One way to save and load."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def save(self, tensors: Tensors, directory: Path) -> None:
        """Into a directory that exists and is empty."""

    def load(self, places: Tensors, directory: Path) -> None:
        """From that directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DcpPeer:
    """A DCP driver over a DCP storage. ``clock`` takes the seconds of the storage alone."""

    name: str
    drive_save: Callable[..., object]
    drive_load: Callable[..., object]
    writer: Callable[[Path], Any]
    reader: Callable[[Path], Any]

    def save(self, tensors: Tensors, directory: Path, clock: PartClock | None = None) -> None:
        writer = self.writer(directory)
        if clock is not None:
            clock.watch(writer, "write_data", "finish")
        self.drive_save(dict(tensors), storage_writer=writer)

    def load(
        self,
        places: Tensors,
        directory: Path,
        clock: PartClock | None = None,
        planner: dcp.LoadPlanner | None = None,
    ) -> None:
        reader = self.reader(directory)
        if clock is not None:
            clock.watch(reader, "read_data")
        self.drive_load(dict(places), storage_reader=reader, planner=planner)


@dataclass(frozen=True, slots=True)
class TorchSave:
    """torch.save and torch.load."""

    name: str = "torch.save"

    def save(self, tensors: Tensors, directory: Path) -> None:
        torch.save(tensors, directory / _FILE_NAME)
        _fsync(directory / _FILE_NAME)

    def load(self, places: Tensors, directory: Path) -> None:
        for name, tensor in torch.load(directory / _FILE_NAME, weights_only=True).items():
            places[name].copy_(tensor)


@dataclass(frozen=True, slots=True)
class Safetensors:
    """safetensors' own calls for torch."""

    name: str = "safetensors"

    def save(self, tensors: Tensors, directory: Path) -> None:
        safetensors.torch.save_file(tensors, directory / _FILE_NAME)
        _fsync(directory / _FILE_NAME)

    def load(self, places: Tensors, directory: Path) -> None:
        with safetensors.safe_open(directory / _FILE_NAME, framework="pt") as file:
            for name, place in places.items():
                place.copy_(file.get_tensor(name))

    def load_rows(self, place: torch.Tensor, name: str, first_row: int, directory: Path) -> None:
        """Some rows of a matrix."""
        with safetensors.safe_open(directory / _FILE_NAME, framework="pt") as file:
            place.copy_(file.get_slice(name)[first_row : first_row + len(place)])


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stock(name: str, thread_count: int) -> DcpPeer:
    return DcpPeer(
        name=name,
        drive_save=dcp.save,
        drive_load=dcp.load,
        writer=lambda path: dcp.FileSystemWriter(path, thread_count=thread_count),
        reader=dcp.FileSystemReader,
    )


GPUDCP = DcpPeer(
    name="gpudcp",
    drive_save=gpudcp.save,
    drive_load=gpudcp.load,
    writer=gpudcp.GpuStorageWriter,
    reader=gpudcp.GpuStorageReader,
)
GPUDCP_UNVERIFIED = DcpPeer(
    name="gpudcp, not verifying",
    drive_save=gpudcp.save,
    drive_load=gpudcp.load,
    writer=gpudcp.GpuStorageWriter,
    reader=lambda path: gpudcp.GpuStorageReader(path, options=gpudcp.Options(verify="off")),
)
GPUDCP_UNDER_TORCH = DcpPeer(
    name="gpudcp's storage, all else torch's",
    drive_save=dcp.save,
    drive_load=dcp.load,
    writer=gpudcp.GpuStorageWriter,
    reader=gpudcp.GpuStorageReader,
)
STOCK = _stock("stock DCP", 1)
STOCK_2_THREADS = _stock("stock DCP, 2 threads", 2)
STOCKS = (STOCK, STOCK_2_THREADS)
TORCH_SAVE = TorchSave()
SAFETENSORS = Safetensors()
PEERS: tuple[Peer, ...] = (*STOCKS, TORCH_SAVE, SAFETENSORS)
