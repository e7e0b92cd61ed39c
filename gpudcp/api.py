"""The public calls: torch's ``dcp.save``, ``dcp.load`` and ``dcp.async_save``, argument for argument."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from gpudcp.background import BackgroundSaves, group_for_background
from gpudcp.collector import collector_paused
from gpudcp.driver import run_load, run_save
from gpudcp.errors import BackendUnavailableError, CheckpointBusyError, PlanError
from gpudcp.executors.remote import WriterProcess
from gpudcp.options import Options, world_size_of_launcher
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.planners.overrides import are_untouched
from gpudcp.ranks import Ranks
from gpudcp.staging import Snapshot, Stager
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

    def writer() -> StorageWriter:
        _background.settle()  # before a writer in use is pointed elsewhere
        return _writer(checkpoint_id, storage_writer, options, "save")

    def values() -> dict[str, Any]:
        return _without_statefuls(state_dict)

    ranks = Ranks(process_group, no_dist=_is_alone(no_dist))
    with collector_paused():
        return run_save(values, writer, planner or DefaultSavePlanner(), ranks, use_collectives=use_collectives)


@dataclass
class BackgroundSave(AsyncSaveResponse):
    """What `async_save` returns: torch's response, and as good as the Future that torch returns by default."""

    def result(self, timeout: float | None = None) -> Metadata:
        """The Metadata, when the checkpoint is committed; raises what the save raised."""
        metadata: Any = self.upload_completion.result(timeout)
        return metadata  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the save raised."""
        return self.upload_completion.exception(timeout)

    def done(self) -> bool:
        """Whether the checkpoint is committed, or the save has failed."""
        return self.upload_completion.done()

    def add_done_callback(self, call: Callable[[Any], object]) -> None:
        """Call with the future, when the save is done."""
        self.upload_completion.add_done_callback(call)


def async_save(
    state_dict: dict[str, Any],
    checkpoint_id: str | os.PathLike[str] | None = None,
    *,
    storage_writer: StorageWriter | None = None,
    planner: SavePlanner | None = None,
    process_group: dist.ProcessGroup | None = None,
    async_checkpointer_type: AsyncCheckpointerType | None = None,
    async_stager: AsyncStager | None = None,
    no_dist: bool = False,
    use_collectives: bool = True,
    options: Options | None = None,
) -> BackgroundSave:
    """Save a state dict in the background: on return it may be trained on, and the checkpoint holds what it was.

    The snapshot is taken at once, into memory that is used again by the next one; a thread writes it. At most one save
    is in flight: the next `async_save` or `save` waits for it first, and raises what it raised if nobody has heard of
    that. The ranks talk over a gloo group of their own, made at the first call, which all of them make together.

    Args:
        state_dict, checkpoint_id, storage_writer, planner, process_group, no_dist, use_collectives, options: as for
            `save`.
        async_checkpointer_type: ``THREAD`` or ``PROCESS``; None: what the options' ``async_mode`` says. A process
            packs, checksums and writes for `GpuStorageWriter` only; planning stays in this one.
        async_stager: takes the snapshot in place of gpudcp's own; any torch AsyncStager.

    Returns:
        ``.staging_completion`` is done when the snapshot is taken, ``.upload_completion`` with the checkpoint's
        Metadata when it is committed; both raise what went wrong. ``.result()`` and the like are the second's.

    Raises:
        GpuDcpError: the snapshot cannot be taken, or an earlier save failed; on the other ranks their futures say so.
    """
    planner = planner or DefaultSavePlanner()
    is_alone = _is_alone(no_dist)
    group = None if is_alone else group_for_background(process_group)
    taken: list[tuple[StorageWriter, Snapshot, WriterProcess | None]] = []
    claimed: list[tuple[StorageWriter, Snapshot, WriterProcess | None]] = []
    failed: list[BaseException] = []

    def snapshot() -> tuple[StorageWriter, Snapshot, WriterProcess | None]:
        if failed:
            raise failed[0]
        claimed.append(taken.pop())
        return claimed[0]

    def give_up() -> None:
        # An error is kept until the next save, and keeps what it has come through.
        while taken:
            taken.pop()[1].discard()

    def act() -> Metadata:
        try:
            ranks = Ranks(group, no_dist=is_alone)
            # A rank that has nothing to save must not leave the others waiting for it.
            writer, values, process = ranks.vote("snapshot", snapshot)

            def state() -> dict[str, Any]:
                values.finish()
                return values.state_dict

            with writer.beside_training(process) if isinstance(writer, GpuStorageWriter) else nullcontext():
                return run_save(state, lambda: writer, planner, ranks, use_collectives=use_collectives)
        finally:
            taken.extend(claimed)
            give_up()

    with _background.calls:
        try:
            _background.settle()
            writer = _writer(checkpoint_id, storage_writer, options, "async_save")
            if isinstance(writer, GpuStorageWriter):
                writer.path = os.path.abspath(writer.path)  # wherever the process is by then
            is_by_process = _is_by_process(writer, async_checkpointer_type)
            values = _staged(state_dict, planner, async_stager, is_shared=is_by_process)
            taken.append((writer, values, _writer_process if is_by_process else None))
        except BaseException as error:
            failed.append(error)
        place = getattr(taken[0][0], "checkpoint_id", None) if taken else checkpoint_id
        upload: Any = _background.begin(act, str(place), give_up=give_up)
    if failed:
        upload.exception()
        raise failed[0]
    staging: Future[None] = Future()
    staging.set_result(None)
    return BackgroundSave(staging_completion=staging, upload_completion=upload)


_background = BackgroundSaves()
_stager = Stager()
_writer_process = WriterProcess()


def _forget_in_child() -> None:
    global _stager
    _background.forget_in_child()
    _writer_process.forget_in_child()
    _stager = Stager()  # shared memory is the parent's too


os.register_at_fork(after_in_child=_forget_in_child)


def _is_by_process(writer: StorageWriter, asked: AsyncCheckpointerType | None) -> bool:
    """Whether a process is to write."""
    if not isinstance(writer, GpuStorageWriter):
        if asked is AsyncCheckpointerType.PROCESS:
            raise BackendUnavailableError(
                f"{asked}: only a GpuStorageWriter saves by a process, and this is a {type(writer).__name__}; "
                "use AsyncCheckpointerType.THREAD, or dcp.async_save"
            )
        return False
    return asked is AsyncCheckpointerType.PROCESS or (asked is None and writer.options.async_mode == "process")


_METHODS = (
    *("set_up_planner", "create_local_plan", "lookup_object"),
    *("resolve_data", "resolve_source", "resolve_sources", "transform_object"),
)


def _staged(
    state_dict: dict[str, Any], planner: SavePlanner, stager: AsyncStager | None, *, is_shared: bool
) -> Snapshot:
    values = _without_statefuls(state_dict)
    if stager is None:
        casts = None
        # The rule goes by the planner's keys: only where those are the state dict's own can it be applied before; and
        # an override of what resolves the values has a right to those that the state dict has.
        if isinstance(planner, DefaultSavePlanner) and are_untouched(planner, _METHODS, DefaultSavePlanner):
            casts = planner.casts
        nested = getattr(planner, "flatten_state_dict", True)
        return _stager.stage(values, casts, nested=nested, is_shared=is_shared)
    taken = stager.stage(values)
    if isinstance(taken, Future):
        return Snapshot(taken.result(), [])
    if stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return Snapshot(taken, [])


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
    made: list[tuple[StorageReader, LoadPlanner]] = []

    def storage_and_planner() -> tuple[StorageReader, LoadPlanner]:
        if not made:
            _background.wait()  # what it writes may be what is wanted
            made.append(_reader_and_planner(checkpoint_id, storage_reader, planner, options))
        return made[0]

    ranks = Ranks(process_group, no_dist=_is_alone(no_dist))
    loaded: dict[str, Any] = {}

    def values() -> dict[str, Any]:
        loaded.clear()
        _check_state_dict(state_dict)
        # All ranks go through the keys in one order, as a Stateful may call collectives.
        for key in sorted(state_dict):
            value = state_dict[key]
            loaded[key] = value.state_dict() if _is_stateful(value) else value
        return loaded

    with collector_paused():
        try:
            run_load(values, storage_and_planner, ranks)
        except CheckpointBusyError as busy:
            _logger.info("%s; loading the newer checkpoint", busy)
            made[0][0].reset()
            run_load(values, storage_and_planner, ranks)
    # Also what a planner has put there, as one does that rebuilds an empty state dict.
    for key in sorted(loaded):
        if key in state_dict and _is_stateful(state_dict[key]):
            state_dict[key].load_state_dict(loaded[key])
        else:
            state_dict[key] = loaded[key]


def _writer(
    checkpoint_id: str | os.PathLike[str] | None, writer: StorageWriter | None, options: Options | None, call: str
) -> StorageWriter:
    if writer is None:
        return GpuStorageWriter(_required(checkpoint_id, "storage_writer"), options=options)
    if options is not None:
        raise PlanError(
            f"options go to the storage_writer that is given, GpuStorageWriter(path, options=...), not to {call}"
        )
    if checkpoint_id is not None:
        writer.reset(checkpoint_id)
    return writer


def _reader_and_planner(
    checkpoint_id: str | os.PathLike[str] | None,
    reader: StorageReader | None,
    planner: LoadPlanner | None,
    options: Options | None,
) -> tuple[StorageReader, LoadPlanner]:
    if reader is None:
        reader = GpuStorageReader(_required(checkpoint_id, "storage_reader"), options=options)
    elif options is not None:
        raise PlanError(
            "options go to the storage_reader that is given, GpuStorageReader(path, options=...), not to load"
        )
    elif checkpoint_id is not None:
        reader.reset(checkpoint_id)
    if planner is None:
        is_trusted = isinstance(reader, GpuStorageReader) and reader.options.trust_pickle
        planner = DefaultLoadPlanner(trust_pickle=is_trusted)
    return reader, planner


def _without_statefuls(state_dict: dict[str, Any]) -> dict[str, Any]:
    _check_state_dict(state_dict)
    return {key: value.state_dict() if _is_stateful(value) else value for key, value in state_dict.items()}


def _check_state_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        hint = "; pass its state_dict()" if hasattr(state_dict, "state_dict") else ""
        raise PlanError(f"the state dict is a {type(state_dict).__name__}, not a dict{hint}")


def _required(checkpoint_id: str | os.PathLike[str] | None, alternative: str) -> str | os.PathLike[str]:
    if not checkpoint_id:
        raise PlanError(f"a checkpoint_id is needed where no {alternative} is given")
    return checkpoint_id


def _is_alone(no_dist: bool) -> bool:
    if no_dist:
        return True
    if dist.is_available() and dist.is_initialized():
        return False
    if (launched := world_size_of_launcher()) > 1:
        warnings.warn(
            f"{launched} ranks were launched, but there is no process group: each saves and loads alone; call "
            "torch.distributed.init_process_group first, or pass no_dist=True",
            UserWarning,
            stacklevel=3,
        )
    return True


_stateful_types: dict[type, bool] = {}


def _is_stateful(value: Any) -> bool:
    # Once for a type: torch's runtime-checkable Protocol costs up to 60 us a value.
    kind = type(value)
    known = _stateful_types.get(kind)
    if known is None:
        known = _stateful_types[kind] = not issubclass(kind, torch.Tensor) and isinstance(value, Stateful)
    return known
