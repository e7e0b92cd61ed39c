"""What the machine says about GPUDirect Storage, printed as one line of JSON. Runs as a script in a process of its own.

Standard library alone, and nothing here makes a CUDA context: GPUs in exclusive mode refuse a second process one. It
judges nothing; gpudcp.files.gds turns the facts into reasons.
"""

from __future__ import annotations

import ctypes
import glob
import gzip
import json
import os
import platform
import re
from typing import Any

_MESSAGE_LENGTH = 300


def facts() -> dict[str, Any]:
    """All of them; what cannot be found out is None."""
    found: dict[str, Any] = {"cuda": _cuda(), "nvidia_fs": _nvidia_fs(), "p2pdma": _p2pdma()}
    found["is_udev_readable"] = os.access("/run/udev", os.R_OK)
    found["is_compat_forced"] = _is_set("CUFILE_FORCE_COMPAT_MODE", "force_compat_mode")
    found["kvikio"] = _kvikio()
    found["cufile_error"] = _cufile_error()
    return found


def _cuda() -> dict[str, Any]:
    """Whether the driver's library loads, what cuInit answers, and how many devices there are."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as err:
        return {"error": str(err)[:_MESSAGE_LENGTH], "init": None, "ndevices": 0}
    count = ctypes.c_int(0)
    init = library.cuInit(0)
    if init == 0:
        library.cuDeviceGetCount(ctypes.byref(count))
    return {"error": None, "init": init, "ndevices": count.value}


def _nvidia_fs() -> dict[str, Any]:
    nodes = sorted(glob.glob("/dev/nvidia-fs*"))
    return {
        "version": _text_of("/proc/driver/nvidia-fs/version"),
        "nnodes": len(nodes),
        "are_nodes_open_to_us": bool(nodes) and all(os.access(node, os.R_OK | os.W_OK) for node in nodes),
    }


def _p2pdma() -> dict[str, Any]:
    """The kernel's option, the driver's settings and cuFile's: all three are needed."""
    parameters = _text_of("/proc/driver/nvidia/params")
    return {
        "kernel": _kernel_has_p2pdma(),
        "driver": parameters is not None and "RMForceStaticBar1=1" in parameters,
        "cufile": _is_set("CUFILE_USE_PCIP2PDMA", "use_pci_p2pdma"),
    }


def _kernel_has_p2pdma() -> bool | None:
    try:
        with gzip.open("/proc/config.gz", "rt", encoding="utf-8", errors="replace") as file:
            config: str | None = file.read()
    except (OSError, EOFError):
        config = _text_of(f"/boot/config-{platform.release()}")
    return None if config is None else "CONFIG_PCI_P2PDMA=y" in config


def _is_set(variable: str, key: str) -> bool:
    """Whether cuFile's setting is on: in the environment or, failing that, in its configuration file."""
    if (value := os.environ.get(variable)) is not None:
        return value.lower() in ("1", "true")
    text = _text_of(os.environ.get("CUFILE_ENV_PATH_JSON") or "/etc/cufile.json") or ""
    # Not by a JSON parser: the file has comments.
    lines = "\n".join(line.partition("//")[0] for line in text.splitlines())
    return re.search(rf'"{key}"\s*:\s*true', lines) is not None


def _kvikio() -> dict[str, Any]:
    try:
        import kvikio
        import kvikio.defaults

        return {
            "error": None,
            "version": str(kvikio.__version__),
            "compat_mode": kvikio.defaults.get("compat_mode").name,
            "is_compat_preferred": bool(kvikio.defaults.is_compat_mode_preferred()),
        }
    except Exception as err:  # a broken installation may raise anything
        return {
            "error": f"{type(err).__name__}: {err}"[:_MESSAGE_LENGTH],
            "version": None,
            "compat_mode": None,
            "is_compat_preferred": True,
        }


def _cufile_error() -> str | None:
    """Why libcufile does not load. Called after kvikio, which loads the one of its own wheel."""
    if "libcufile.so" in (_text_of("/proc/self/maps") or ""):
        return None
    try:
        ctypes.CDLL("libcufile.so.0")
    except OSError as err:
        return str(err)[:_MESSAGE_LENGTH]
    return None


def _text_of(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


if __name__ == "__main__":
    print(json.dumps(facts()), flush=True)
