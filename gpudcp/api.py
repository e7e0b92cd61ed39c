"""The public calls: torch's ``dcp.save`` and ``dcp.load``, argument for argument."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from gpudcp.collector import collector_paused
from gpudcp.driver import run_load, run_save
from gpudcp.errors import CheckpointBusyError, PlanError
from gpudcp.options import Options
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.ranks import Ranks
from gpudcp.storage.reader import GpuStorageReader
from gpudcp.storage.writer import GpuStorageWriter

_logger = logging.getLogger("gpudcp")


def save(
    state_dict: dict[str, Any],
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    options: Options | None = None,
) -> Metadata:
    """Save a state dict as a DCP checkpoint, every rank its own shards.

    On return the checkpoint is committed and on stable storage; until then the directory holds the one that was there
    before. All ranks of the group call this together; all raise when one fails.

    Args:
        state_dict: tensors, DTensors, ShardedTensors, objects, nested dicts and lists of them; of values that have
            ``state_dict`` and ``load_state_dict``, what their ``state_dict()`` returns.
        checkpoint_id: the directory; with a ``storage_writer``, the place it is reset to.
        storage_writer: any torch StorageWriter; GpuStorageWriter by default.
        planner: any torch SavePlanner; gpudcp's DefaultSavePlanner by default.
        process_group: the ranks that save; all by default. Rank 0 of it coordinates.
        no_dist: save from this process alone; so does a process without torch.distributed.
        use_collectives: False: every rank writes a ``__{rank}.metadata`` of its own, nothing is exchanged but errors.
        options: for the default writer; see `gpudcp.Options`.

    Returns:
        The checkpoint's Metadata, on every rank.

    Raises:
        GpuDcpError: one of its tree; see `gpudcp.errors`.
    """
    if storage_writer is None:
        storage_writer = GpuStorageWriter(_required(checkpoint_id, "storage_writer"), options=options)
    elif options is not None:
        raise PlanError(
            "options go to the storage_writer that is given, GpuStorageWriter(path, options=...), not to save"
        )
    elif checkpoint_id is not None:
        storage_writer.reset(checkpoint_id)

    def values() -> dict[str, Any]:
        return {key: value.state_dict() if _is_stateful(value) else value for key, value in state_dict.items()}

    ranks = Ranks(process_group, no_dist=_is_alone(no_dist))
    with collector_paused():
        return run_save(values, storage_writer, planner or DefaultSavePlanner(), ranks, use_collectives=use_collectives)


def load(
    state_dict: dict[str, Any],
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_reader: StorageReader | None = None,
    planner: LoadPlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    options: Options | None = None,
) -> None:
    """Load a DCP checkpoint, gpudcp's or stock torch's, into a state dict, in place.

    Tensors are filled where they are, every rank reading the parts it needs, however the checkpoint was sharded;
    objects are replaced; ``load_state_dict()`` is called on values that have it. A load that raises has changed some
    of the tensors: treat the state dict as lost.

    Args:
        state_dict: says what to load, and takes it.
        checkpoint_id: the directory; with a ``storage_reader``, the place it is reset to.
        storage_reader: any torch StorageReader; GpuStorageReader by default.
        planner: any torch LoadPlanner; gpudcp's DefaultLoadPlanner by default. Objects are the planner's: torch's own
            loads them with ``weights_only=False``.
        process_group: the ranks that load; all by default.
        no_dist: load into this process alone; so does a process without torch.distributed.
        options: for the default reader; see `gpudcp.Options`. The default planner follows its reader's.

    Raises:
        GpuDcpError: one of its tree; see `gpudcp.errors`.
    """
    if storage_reader is None:
        storage_reader = GpuStorageReader(_required(checkpoint_id, "storage_reader"), options=options)
    elif options is not None:
        raise PlanError(
            "options go to the storage_reader that is given, GpuStorageReader(path, options=...), not to load"
        )
    elif checkpoint_id is not None:
        storage_reader.reset(checkpoint_id)
    if planner is None:
        is_trusted = isinstance(storage_reader, GpuStorageReader) and storage_reader.options.trust_pickle
        planner = DefaultLoadPlanner(trust_pickle=is_trusted)
    ranks = Ranks(process_group, no_dist=_is_alone(no_dist))
    loaded: dict[str, Any] = {}

    def values() -> dict[str, Any]:
        loaded.clear()
        # All ranks go through the keys in one order, as a Stateful may call collectives.
        for key in sorted(state_dict):
            value = state_dict[key]
            loaded[key] = value.state_dict() if _is_stateful(value) else value
        return loaded

    with collector_paused():
        try:
            run_load(values, storage_reader, planner, ranks)
        except CheckpointBusyError as busy:
            _logger.info("%s; loading the newer checkpoint", busy)
            storage_reader.reset()
            run_load(values, storage_reader, planner, ranks)
    # Also what a planner has put there, as one does that rebuilds an empty state dict.
    for key in sorted(loaded):
        if key in state_dict and _is_stateful(state_dict[key]):
            state_dict[key].load_state_dict(loaded[key])
        else:
            state_dict[key] = loaded[key]


def _required(checkpoint_id: str | os.PathLike[str] | None, alternative: str) -> str | os.PathLike[str]:
    if not checkpoint_id:
        raise PlanError(f"a checkpoint_id is needed where no {alternative} is given")
    return checkpoint_id


def _is_alone(no_dist: bool) -> bool:
    if no_dist or not (dist.is_available() and dist.is_initialized()):
        _logger.debug("no process group: this process saves and loads alone")
        return True
    return False


_stateful_types: dict[type, bool] = {}


def _is_stateful(value: Any) -> bool:
    # Once for a type: torch's runtime-checkable Protocol costs up to 60 us a value.
    kind = type(value)
    known = _stateful_types.get(kind)
    if known is None:
        known = _stateful_types[kind] = not issubclass(kind, torch.Tensor) and isinstance(value, Stateful)
    return known
