"""Run in a process of its own, where gpudcp cannot be imported: load what gpudcp saved with stock torch.

Usage: stock_child.py DIRECTORY. The directory holds one checkpoint for each case. Prints JSON: what differs, by case.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


class Blocker(importlib.abc.MetaPathFinder):
    """Refuses gpudcp, wherever it may lie on the path."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:  # noqa: ARG002
        if name.partition(".")[0] in ("gpudcp", "gpudcp_kernels"):
            raise ModuleNotFoundError(f"{name} is blocked in this process")


sys.meta_path.insert(0, Blocker())

import interop_cases  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.tensor import DTensor, Replicate, Shard  # noqa: E402
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402


def whole(directory: Path, case: str) -> list[str]:
    """Load a case as its owner would."""
    expected = interop_cases.CASES[case]()
    found = interop_cases.blank(expected)
    dcp.load(found, checkpoint_id=directory / case)
    return interop_cases.differences(expected, found)


def from_nothing(directory: Path, case: str) -> list[str]:
    """Load a case into an empty state dict, and through a torch.save file: what stock's own checkpoint gives."""
    dcp.save(interop_cases.CASES[case](), checkpoint_id=directory / f"{case}_by_stock")
    expected = _load_state_dict_from_keys(checkpoint_id=directory / f"{case}_by_stock")
    found = _load_state_dict_from_keys(checkpoint_id=directory / case)
    converted = directory / f"{case}.pt"
    dcp_to_torch_save(directory / case, converted)
    again = torch.load(converted, weights_only=False)
    return [*interop_cases.differences(expected, found), *interop_cases.differences(expected, again)]


def resharded(directory: Path, _: str) -> list[str]:
    """Load the shards of every rank of several meshes, one rank after the other."""
    state = interop_cases.of_shards()
    problems: list[str] = []
    for mesh_shape, dims in interop_cases.SHARDINGS:
        nranks = int(torch.Size(mesh_shape).numel())
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        for rank in range(nranks):
            dist.init_process_group("fake", rank=rank, world_size=nranks, store=FakeStore())
            mesh = init_device_mesh("cpu", mesh_shape)
            wanted, expected = {}, {}
            for name, tensor in state.items():
                sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
                local = torch.zeros(sizes, dtype=tensor.dtype)
                wanted[name] = DTensor.from_local(
                    local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
                )
                expected[name] = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
            dcp.load(wanted, checkpoint_id=directory / "shards", no_dist=True)
            found = {name: tensor.to_local() for name, tensor in wanted.items()}
            problems += interop_cases.differences(expected, found, f"{mesh_shape} {dims} rank {rank}")
            dist.destroy_process_group()
    return problems


def is_blocked(_: Path, __: str) -> list[str]:
    """That stock is alone here."""
    try:
        import gpudcp  # noqa: F401
    except ModuleNotFoundError:
        return [name for name in sys.modules if name.startswith("gpudcp")]
    return ["gpudcp was imported"]


def main(directory: Path) -> dict[str, list[str]]:
    """Run everything; an exception is a difference too."""
    checks: dict[str, tuple[Callable[[Path, str], list[str]], str]] = {}
    for case in interop_cases.CASES:
        checks[case] = (whole, case)
    for case in ("nesting", "dtypes"):
        checks[f"{case}_from_nothing"] = (from_nothing, case)
    checks |= {"resharded": (resharded, ""), "blocked": (is_blocked, "")}
    results: dict[str, list[str]] = {}
    for name, (check, case) in checks.items():
        results[name] = attempted(check, directory, case)
    return results


def attempted(check: Callable[[Path, str], list[str]], directory: Path, case: str) -> list[str]:
    try:
        return check(directory, case)
    except BaseException:
        return [traceback.format_exc()]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    outcome: dict[str, Any] = main(Path(sys.argv[1]))
    print(json.dumps(outcome))
