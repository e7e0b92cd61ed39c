"""The libraries of the table: how each saves a dict of CPU tensors durably, and loads it back into ready tensors.

Equal work: every save ends with its files on the device (fsync), every load ends in the tensors that it was given.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp

import gpudcp

Tensors = dict[str, torch.Tensor]
FILE_NAME = "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One row of the table. ``save`` gets a directory that exists and is empty, ``load`` the same one later."""

    name: str
    save: Callable[[Tensors, Path], None]
    load: Callable[[Tensors, Path], None]


def _save_gpudcp(tensors: Tensors, directory: Path) -> None:
    gpudcp.save(dict(tensors), directory)


def _load_gpudcp(tensors: Tensors, directory: Path) -> None:
    gpudcp.load(dict(tensors), directory)


def _save_stock(tensors: Tensors, directory: Path) -> None:
    dcp.save(dict(tensors), checkpoint_id=directory)  # its FileSystemWriter syncs by default


def _save_stock_on_two_threads(tensors: Tensors, directory: Path) -> None:
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(directory, thread_count=2))


def _load_stock(tensors: Tensors, directory: Path) -> None:
    dcp.load(dict(tensors), checkpoint_id=directory)


def _save_torch(tensors: Tensors, directory: Path) -> None:
    torch.save(tensors, directory / FILE_NAME)
    _fsync(directory / FILE_NAME)


def _load_torch(tensors: Tensors, directory: Path) -> None:
    for name, tensor in torch.load(directory / FILE_NAME, weights_only=True).items():
        tensors[name].copy_(tensor)


def _save_safetensors(tensors: Tensors, directory: Path) -> None:
    safetensors.torch.save_file(tensors, directory / FILE_NAME)
    _fsync(directory / FILE_NAME)


def _load_safetensors(tensors: Tensors, directory: Path) -> None:
    with safetensors.safe_open(directory / FILE_NAME, framework="pt") as file:
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(name))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


LIBRARIES = (
    Library(name="gpudcp", save=_save_gpudcp, load=_load_gpudcp),
    Library(name="stock DCP", save=_save_stock, load=_load_stock),
    Library(name="stock, 2 threads", save=_save_stock_on_two_threads, load=_load_stock),
    Library(name="torch.save", save=_save_torch, load=_load_torch),
    Library(name="safetensors", save=_save_safetensors, load=_load_safetensors),
)


def by_name(name: str) -> Library:
    """The library of that name."""
    return next(library for library in LIBRARIES if library.name == name)
