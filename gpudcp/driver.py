"""One save, one load: DCP's calls in DCP's order, over any planner and any storage, and our own coordination.

Each step runs on every rank that takes part in it; then the ranks exchange what came of it, so that every rank knows of
every failure before the next step starts, and none is left waiting (see `gpudcp.ranks`).

Save: set up, local plan | gather, global plan on the coordinator, scatter | finish plan, write | gather, finish on the
coordinator, broadcast.
Load: read metadata, set up, local plan | gather, global plan on the coordinator, scatter | finish plan, read | vote.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult

from gpudcp.ranks import Ranks


def run_save(
    state_dict: Callable[[], dict[str, Any]],
    storage: Callable[[], StorageWriter],
    planner: SavePlanner,
    ranks: Ranks,
    *,
    use_collectives: bool,
) -> Metadata:
    """Save what ``state_dict`` returns, in which no value is Stateful any more; return the checkpoint's Metadata.

    ``state_dict`` and ``storage`` are called in the first step, so that what they raise on one rank is raised on all.
    """
    writers: list[StorageWriter] = []
    made: list[Metadata] = []

    def local_plan() -> SavePlan:
        writers.append(writer := storage())
        _call_set_up_planner(planner, state_dict(), writer, is_coordinator=ranks.is_coordinator)
        known = {"rank": ranks.rank, "use_collectives": use_collectives}
        writer.set_up_storage_writer(ranks.is_coordinator, **_accepted(writer.set_up_storage_writer, known))
        return writer.prepare_local_plan(planner.create_local_plan())

    def global_plan(plans: list[SavePlan]) -> list[SavePlan]:
        planned, metadata = planner.create_global_plan(plans)
        made.append(metadata)
        return writers[0].prepare_global_plan(planned)

    def write(plan: SavePlan) -> list[WriteResult]:
        future = writers[0].write_data(planner.finish_plan(plan), planner)
        results: list[WriteResult] = future.wait()
        return results

    def finish(results: list[list[WriteResult]]) -> Metadata:
        writers[0].finish(metadata=made[0], results=results)
        return made[0]

    try:
        if use_collectives:
            plan = ranks.reduce_scatter("plan", local_plan, global_plan)
            return ranks.reduce_broadcast("write", lambda: write(plan()), finish)
        return ranks.vote("save", lambda: finish([write(global_plan([local_plan()])[0])]))
    except BaseException:
        for writer in writers:
            # Ours lets go of the directory at once; torch's writers have nothing of the kind.
            if (release := getattr(writer, "release", None)) is not None:
                release()
        raise


def run_load(
    state_dict: Callable[[], dict[str, Any]],
    storage_and_planner: Callable[[], tuple[StorageReader, LoadPlanner]],
    ranks: Ranks,
) -> None:
    """Load into what ``state_dict`` returns, in which no value is Stateful any more.

    Both are called in the first step, so that what they raise on one rank is raised on all.
    """
    made: list[tuple[StorageReader, LoadPlanner]] = []
    own: list[LoadPlan] = []

    def local_plan() -> tuple[LoadPlan, bool]:
        made.append(storage_and_planner())
        reader, planner = made[0]
        wanted = state_dict()
        metadata, use_collectives = _read_metadata(reader, ranks.rank)
        planner.set_up_planner(wanted, metadata, ranks.is_coordinator)
        known = {"rank": ranks.rank, "use_collectives": use_collectives}
        reader.set_up_storage_reader(metadata, ranks.is_coordinator, **_accepted(reader.set_up_storage_reader, known))
        own.append(reader.prepare_local_plan(planner.create_local_plan()))
        return own[0], use_collectives

    def global_plan(plans: list[LoadPlan]) -> list[LoadPlan]:
        reader, planner = made[0]
        return reader.prepare_global_plan(planner.create_global_plan(plans))

    def global_plan_if_shared(plans: list[tuple[LoadPlan, bool]]) -> list[LoadPlan | None]:
        if all(use_collectives for _, use_collectives in plans):
            return [*global_plan([plan for plan, _ in plans])]
        return [None] * len(plans)

    def read(plan: LoadPlan | None) -> None:
        reader, planner = made[0]
        if plan is None:  # ranks that saved without collectives load without them
            plan = global_plan(own)[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()

    plan = ranks.reduce_scatter("plan", local_plan, global_plan_if_shared)
    ranks.vote("read", lambda: read(plan()))


def _call_set_up_planner(
    planner: SavePlanner, state_dict: dict[str, Any], writer: StorageWriter, *, is_coordinator: bool
) -> None:
    storage_meta = writer.storage_meta()
    if "storage_meta" in inspect.signature(planner.set_up_planner).parameters:
        planner.set_up_planner(state_dict, storage_meta=storage_meta, is_coordinator=is_coordinator)
    else:  # planners written before torch 2.3
        planner.set_up_planner(state_dict, is_coordinator)  # type: ignore[arg-type]


def _accepted(method: Callable[..., Any], known: dict[str, Any]) -> dict[str, Any]:
    """DCP's rule: the keywords go to methods that have a parameter named ``kwargs``."""
    return known if "kwargs" in inspect.signature(method).parameters else {}


def _read_metadata(reader: StorageReader, rank: int) -> tuple[Metadata, bool]:
    """The checkpoint's metadata or, where it has none, this rank's own; and whether it is the checkpoint's."""
    try:
        return reader.read_metadata(), True
    except FileNotFoundError:
        if "kwargs" not in inspect.signature(reader.read_metadata).parameters:
            raise
        try:
            return reader.read_metadata(rank=rank), False
        except FileNotFoundError:
            pass
        raise
