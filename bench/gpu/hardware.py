"""Which GPU, driver and libraries a result is of. Asks; changes nothing."""

from __future__ import annotations

import subprocess
from importlib import metadata

import pytest
import torch

_KVIKIO = ("kvikio-cu13", "kvikio-cu12")
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


def describe_gpu() -> dict[str, str]:
    """For a result's environment; nothing where there is no GPU."""
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "GPU": f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
        f"{properties.total_memory / 2**30:.1f} GiB, compute capability {properties.major}.{properties.minor}",
        "L2": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": nvidia_smi("driver_version"),
        "CUDA of torch": str(torch.version.cuda),
        "triton": _version("triton") or "not installed",
        "KvikIO": _first_version(_KVIKIO),
        "CuPy": _first_version(_CUPY),
    }


def need_device_memory(nbytes: int) -> None:
    """Skip the bench on a GPU where so much is not free."""
    torch.cuda.empty_cache()
    free_nbytes, _ = torch.cuda.mem_get_info()
    if free_nbytes < nbytes:
        pytest.skip(f"needs {nbytes / 2**30:.1f} GiB of device memory, {free_nbytes / 2**30:.1f} are free")


def clocks() -> str:
    """Of the multiprocessors and the memory, now and at most, and why they are not higher."""
    return nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,temperature.gpu,power.draw,pstate")


def nvidia_smi(query: str) -> str:
    """What it says of the first GPU, or that it is not there."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as err:
        return f"unknown ({type(err).__name__})"


def _first_version(distributions: tuple[str, ...]) -> str:
    found = [f"{name} {version}" for name in distributions if (version := _version(name))]
    return ", ".join(found) or "not installed"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
