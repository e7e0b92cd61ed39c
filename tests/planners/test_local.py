"""A rank's own part of a save plan: what it makes of values that are more than plain tensors."""

from __future__ import annotations

import pytest
import torch
from planning_cases import rank_of, sharded_tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from gpudcp import DefaultSavePlanner
from gpudcp.errors import PlanError

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


def test_a_sharded_tensor_is_cast_as_a_dtensor_is() -> None:
    """What is planned and what is resolved; the shard in memory stays as it is."""
    with rank_of(1, 2):
        planner = DefaultSavePlanner(dtype=torch.float16)
        planner.set_up_planner({"sharded": sharded_tensor(1, 2)})
        (item,) = planner.create_local_plan().items
        assert item.tensor_data is not None
        assert item.tensor_data.properties.dtype is torch.float16
        assert torch.equal(planner.resolve_data(item), torch.ones(2, 3, dtype=torch.float16))
        assert planner.resolve_source(item).dtype is torch.float32


def test_a_local_shard_of_another_shape_is_refused_each_time() -> None:
    """Also after a DTensor of the same size whose shard is right: its template is known by then."""
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        good, bad = (
            DTensor.from_local(
                torch.zeros(rows, 3), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 3)), stride=(3, 1)
            )
            for rows in (2, 3)
        )
        planner = DefaultSavePlanner()
        planner.set_up_planner({"good": good, "bad": bad})
        with pytest.raises(PlanError, match=r"bad: .*\(2, 3\), it has \(3, 3\)"):
            planner.create_local_plan()


def test_an_asynchronous_redistribution_is_waited_for() -> None:
    """Its DTensor is saved as every other one; torch's planner makes of it what nobody can load."""
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        values = torch.arange(6.0).view(2, 3)
        pending = DTensor.from_local(AsyncCollectiveTensor(values), mesh, [Replicate()], run_check=False)
        assert type(pending._local_tensor) is AsyncCollectiveTensor
        planner = DefaultSavePlanner()
        planner.set_up_planner({"pending": pending})
        (item,) = planner.create_local_plan().items
        found = planner.resolve_data(item)
        assert type(found) is torch.Tensor
        assert found.data_ptr() == values.data_ptr()
