"""Several gloo ranks save, load, reshard and fail together, in gpudcp, in stock, and each with the other's files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import distributed_child
import interop_cases
import pytest
import torch
import torch.distributed.checkpoint as dcp

import gpudcp
from gpudcp.errors import CorruptCheckpointError

Ran = tuple[Path, dict[str, dict[str, str]]]

SCENARIOS = [(scenario, members) for _, members, scenarios in distributed_child.WORLDS for scenario in scenarios]


@pytest.mark.parametrize(("scenario", "members"), SCENARIOS, ids=[scenario.__name__ for scenario, _ in SCENARIOS])
def test_every_rank_goes_through_the_scenario(
    distributed: Ran, scenario: distributed_child.Scenario, members: tuple[int, ...]
) -> None:
    """What each demands is said in its own docstring. A rank hears within 5 seconds that another one has raised."""
    _, found = distributed
    problems = found.get(scenario.__name__, {})
    assert problems == dict.fromkeys(map(str, members), ""), text_of(problems)


@pytest.mark.parametrize("where", distributed_child.DEATHS)
def test_a_rank_that_dies_is_an_error_on_the_other_within_ten_seconds(distributed: Ran, where: str) -> None:
    """Wherever in a save; the group's timeout is ten minutes. The dead rank reports nothing."""
    _, found = distributed
    problems = found.get(where, {})
    assert problems == {str(1 - distributed_child.DEATHS[where].rank): ""}, text_of(problems)


def text_of(problems: dict[str, str]) -> str:
    """What each rank says."""
    return "\n".join(f"rank {rank}: {text}" for rank, text in problems.items())


def whole_state() -> dict[str, Any]:
    """What `distributed_child.state_dict` holds, as one process sees it."""
    tensors = distributed_child.TENSORS
    state: dict[str, Any] = {
        f"{layout}.{name}": tensor for layout in distributed_child.LAYOUTS for name, tensor in tensors.items()
    }
    state |= {"sharded_tensor": tensors["large"], "plain": tensors["cube"], "scalar": torch.tensor(2.5)}
    state |= {f"of_rank_{rank}": {"tensor": torch.full((3,), float(rank)), "object": f"rank {rank}"} for rank in (0, 1)}
    return state | {"nested": {"list": [1, "two"]}}


@pytest.mark.parametrize("saved", ["two_by_gpudcp", "four_by_gpudcp", "four_by_stock"])
@pytest.mark.parametrize("load", [gpudcp.load, dcp.load], ids=["gpudcp", "stock"])
def test_one_process_loads_what_several_ranks_saved(distributed: Ran, saved: str, load: Any) -> None:
    """All shards of every layout, the values of single ranks too, into plain tensors."""
    directory, _ = distributed
    expected = whole_state()
    found = interop_cases.blank(expected)
    load(found, checkpoint_id=directory / saved)
    assert interop_cases.differences(expected, found) == []


def test_files_that_swapped_their_names_are_caught(distributed: Ran, tmp_path: Path) -> None:
    """Two ranks' files of the same layout, each sound in itself: .metadata knows other checksums. Stock loads them."""
    directory, _ = distributed
    broken = tmp_path / "swapped"
    shutil.copytree(directory / "faults", broken)
    one, two = (next(broken.glob(f"__{rank}_*.distcp")) for rank in (2, 3))
    assert one.stat().st_size == two.stat().st_size
    for source, target in ((one, tmp_path / "aside"), (two, one), (tmp_path / "aside", two)):
        os.rename(source, target)

    by_stock = {"weight": torch.zeros(8, 3)}
    dcp.load(by_stock, checkpoint_id=broken)
    assert not torch.equal(by_stock["weight"], torch.arange(24.0).view(8, 3) + 1)
    with pytest.raises(CorruptCheckpointError, match=r"distcp: weight: .*CRC-32"):
        gpudcp.load({"weight": torch.zeros(8, 3)}, broken)
