"""Planners that resolve into memory of their own, which the next item overwrites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import gpudcp
from gpudcp.storage.sources import PlannerSource


class _ScratchPlanner(gpudcp.DefaultSavePlanner):
    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(*args, **kwargs)
        self.scratch = torch.empty(1 << 20)

    def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: ARG002
        return self.scratch.copy_(object)


def test_a_planner_with_one_scratch_buffer_saves_each_tensor(tmp_path: Path) -> None:
    """Stock writes a tensor before it asks for the next one; so may a planner think of us, in buffered mode too."""
    state = {f"t{number}": torch.full((1 << 20,), float(number)) for number in range(6)}
    gpudcp.save(state, tmp_path, planner=_ScratchPlanner(), options=gpudcp.Options(direct_io="off"))
    loaded = {fqn: torch.zeros_like(tensor) for fqn, tensor in state.items()}
    gpudcp.load(loaded, tmp_path)
    assert all(torch.equal(loaded[fqn], tensor) for fqn, tensor in state.items())


def test_only_planners_that_resolve_to_the_callers_tensors_are_trusted_with_their_memory() -> None:
    """Ours and torch's, as long as nothing in them is overridden."""
    assert PlannerSource([], gpudcp.DefaultSavePlanner()).keeps_memory
    assert PlannerSource([], torch.distributed.checkpoint.DefaultSavePlanner()).keeps_memory
    assert not PlannerSource([], _ScratchPlanner()).keeps_memory
