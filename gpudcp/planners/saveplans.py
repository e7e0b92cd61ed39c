"""A rank's save plan: its columns, whoever made it, and the plan with others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch.distributed.checkpoint.planner import SavePlan

from gpudcp.columns import SaveColumns
from gpudcp.errors import PlanError
from gpudcp.items import WriteItems, columns_of
from gpudcp.names import Names
from gpudcp.views import Paths


def columns_of_plan(plan: SavePlan, *, is_flattened: bool) -> SaveColumns:
    """The columns of a rank's plan, which it, or its storage, may have changed.

    Args:
        plan: of any planner.
        is_flattened: ``planner_data``, if it is a mapping, says the path of each key; else it is the planner's own.

    Raises:
        PlanError: ``planner_data`` is a mapping, but not one of keys to paths.
    """
    paths = plan.planner_data if is_flattened and isinstance(plan.planner_data, Mapping) else None
    columns = columns_of(plan.items, paths)
    is_own = isinstance(paths, Paths) and paths.is_unchanged and paths.names is columns.names
    if paths is None or is_own:
        return columns
    for fqn, path in paths.items():
        if not (isinstance(fqn, str) and isinstance(path, tuple) and all(type(part) in (str, int) for part in path)):
            raise PlanError(f"planner_data: {fqn!r}: {path!r} is no path in a state dict, a tuple of str and int")
    if paths == columns.names.paths:
        return columns
    return dataclasses.replace(columns, names=Names(columns.names.fqns, dict(paths)))


def with_columns(plan: SavePlan, columns: SaveColumns) -> SavePlan:
    """The plan with these items."""
    return dataclasses.replace(plan, items=WriteItems(columns))  # type: ignore[arg-type]
