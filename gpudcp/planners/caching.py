"""Save plans that are not sent again: what each rank and the coordinator remember of the last save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from torch.distributed.checkpoint.planner import SavePlan

from gpudcp.columns import CheckpointColumns, SaveColumns
from gpudcp.errors import PlanError
from gpudcp.items import WriteItems
from gpudcp.planners.saveplans import columns_of_plan, with_columns


class _Known(NamedTuple):
    """What the coordinator remembers of one rank."""

    digest: bytes | None
    """Of what the rank's planner made. None: of a plan that was changed after that, so it is not known here."""
    local: SaveColumns
    plan: SavePlan

    def is_said_by(self, plan: SavePlan) -> bool:
        """Whether a rank that sends this plan says that it has not changed."""
        return not plan.usable and self.digest in (None, plan.planner_data)


class PlanCache:
    """Plans of the last save whose global plan succeeded: each rank's own, and on the coordinator everybody's.

    A rank whose plan has not changed sends its digest, and gets word that its final plan has not changed either. A
    rank that never got the last save's final plan forgets, and sends all.
    """

    def __init__(self, *, is_flattened: bool) -> None:
        self._is_flattened = is_flattened
        self._sent: bytes | None = None
        self._final: SavePlan | None = None
        self._is_open = False
        self._everybody: list[_Known] = []
        self._checkpoint: CheckpointColumns | None = None

    def begin(self, columns: SaveColumns) -> bytes | None:
        """The digest to send instead of an unchanged plan."""
        if self._is_open:  # the last save ended before `finish`
            self._sent = self._final = None
        self._is_open = True
        digest = digest_of(columns)
        if self._final is not None and digest == self._sent:
            return digest
        self._sent, self._final = digest, None
        return None

    def coordinated(
        self,
        plans: list[SavePlan],
        coordinate: Callable[[Sequence[SaveColumns]], tuple[list[SaveColumns], CheckpointColumns]],
    ) -> tuple[list[SavePlan], CheckpointColumns]:
        """The plans to send back: unusable ones stand for "as last time"."""
        known = self._everybody
        is_known = len(known) == len(plans) and all(map(_Known.is_said_by, known, plans))
        if self._checkpoint is not None and is_known:
            return [_as_last_time(plan) for plan in plans], self._checkpoint
        local = [self._local_of(rank, plan) for rank, plan in enumerate(plans)]
        columns, checkpoint = coordinate([own for _, own in local])
        made: list[_Known] = []
        sent: list[SavePlan] = []
        for rank, (plan, (digest, own), final) in enumerate(zip(plans, local, columns, strict=True)):
            full = with_columns(plan if plan.usable else known[rank].plan, final)
            is_same = not plan.usable and digest_of(final) == digest_of(self._columns(known[rank].plan))
            sent.append(_as_last_time(plan) if is_same else full)
            made.append(_Known(digest, own, full))
        self._everybody, self._checkpoint = made, checkpoint
        return sent, checkpoint

    def _local_of(self, rank: int, plan: SavePlan) -> tuple[bytes | None, SaveColumns]:
        if plan.usable:
            made = plan.items.columns if isinstance(plan.items, WriteItems) else None
            return None if made is None else digest_of(made), self._columns(plan)
        own = self._everybody[rank] if rank < len(self._everybody) else None
        if own is None or not own.is_said_by(plan):
            raise PlanError(
                f"rank {rank} says that its plan has not changed, but the coordinator does not know it; "
                "use the same planners for every save, or none of their caching"
            )
        return own.digest, own.local

    def _columns(self, plan: SavePlan) -> SaveColumns:
        return columns_of_plan(plan, is_flattened=self._is_flattened)

    def finish(self, plan: SavePlan) -> SavePlan:
        """The final plan, whether it was sent or is the last one's."""
        if not plan.usable:
            if self._final is None:
                raise PlanError("the coordinator says that this rank's plan has not changed, but it has none")
            # What the storage says of this save is new all the same.
            plan = dataclasses.replace(self._final, storage_data=plan.storage_data)
        self._final = plan
        self._is_open = False
        return plan


def _as_last_time(plan: SavePlan) -> SavePlan:
    """What goes back to a rank whose final plan has not changed; what its storage said of this save stays."""
    return SavePlan([], storage_data=plan.storage_data, usable=False)


def digest_of(columns: SaveColumns) -> bytes:
    """16 bytes that no plan with another item has: names, shapes, dtypes, hints and all other properties count."""
    digest = blake2b(columns.names.digest, digest_size=16)
    for column in (columns.name_ids, columns.template_ids, columns.templates.heads, columns.templates.boxes):
        digest.update(repr(column.shape).encode())
        digest.update(column.tobytes())
    digest.update(repr(columns.templates.properties).encode())
    digest.update(b"" if columns.hints is None else columns.hints.tobytes())
    return digest.digest()
