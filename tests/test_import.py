"""What `import gpudcp` imports, and what it offers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed.checkpoint as dcp

import gpudcp

_ROOT = Path(__file__).parents[1]
_OPTIONAL = ("triton", "kvikio", "cupy", "cuda")

_CHILD = """
import json, sys
import torch, torch.distributed, torch.distributed.checkpoint, torch.distributed.tensor, numpy
import torch.distributed._shard.sharded_tensor.api
before = set(sys.modules)
import gpudcp
state = {"weight": torch.ones(3), "note": "x"}
gpudcp.save(state, sys.argv[1])
gpudcp.load(state, sys.argv[1])
gpudcp.probe(sys.argv[1])
added = sorted(set(sys.modules) - before)
print(json.dumps(added))
"""


def test_importing_and_using_gpudcp_imports_no_gpu_package(tmp_path: Path) -> None:
    """Packages of these names lie on the path and note that they were imported: none is, beyond torch's own imports."""
    fakes, witness = tmp_path / "fakes", tmp_path / "imported"
    for name in _OPTIONAL:
        (fakes / name).mkdir(parents=True)
        (fakes / name / "__init__.py").write_text(
            f"import sys\nif 'gpudcp' in sys.modules:\n    open({str(witness)!r}, 'a').write({name!r})\n"
        )
    path = os.pathsep.join((str(fakes), str(_ROOT), str(_ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path / "checkpoint")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout.splitlines()[-1])
    assert "gpudcp" in added
    assert [name for name in added if name.partition(".")[0] in _OPTIONAL] == []
    assert not witness.exists()
    # The cast rule, which every executor follows, is torch alone; kernels are not imported.
    assert [name for name in added if name.startswith("gpudcp_kernels")] == ["gpudcp_kernels", "gpudcp_kernels.casts"]


def test_the_public_names_are_there() -> None:
    """And are all that `from gpudcp import *` gives."""
    expected = {"save", "load", "probe", "tune", "Options", "TransferReport", "errors"}
    expected |= {"GpuStorageWriter", "GpuStorageReader", "DefaultSavePlanner", "DefaultLoadPlanner"}
    assert set(gpudcp.__all__) >= expected
    for name in gpudcp.__all__:
        assert getattr(gpudcp, name) is not None
    assert all(part.isdigit() for part in gpudcp.__version__.split("."))


def parameters(function: object) -> dict[str, object]:
    return {name: each.default for name, each in inspect.signature(function).parameters.items()}  # type: ignore[arg-type]


def test_save_and_load_take_what_torchs_take() -> None:
    """The same names with the same defaults; `options` is ours."""
    for ours, torchs in ((gpudcp.save, dcp.save), (gpudcp.load, dcp.load)):
        expected = {**parameters(torchs), "options": None}
        assert parameters(ours) == expected


def test_the_planners_take_what_torchs_take() -> None:
    """The same positions, names and defaults; what is ours is by keyword only."""
    for ours, torchs in (
        (gpudcp.DefaultSavePlanner, dcp.DefaultSavePlanner),
        (gpudcp.DefaultLoadPlanner, dcp.DefaultLoadPlanner),
    ):
        mine, theirs = inspect.signature(ours).parameters, inspect.signature(torchs).parameters
        assert list(mine)[: len(theirs)] == list(theirs)
        for name, parameter in theirs.items():
            assert mine[name].default == parameter.default
        for name in list(mine)[len(theirs) :]:
            assert mine[name].kind is inspect.Parameter.KEYWORD_ONLY
