"""Whether KvikIO and GPUDirect Storage can work on this machine, and what stands in the way. Moves no bytes.

The machine is asked in a child process with a time limit: a library that hangs or crashes while it loads must not take
the training with it. Whether bytes really go that way, only `gpudcp.files.trial` can tell.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal

TIME_LIMIT_S = 60.0
"""For the child. The first cuInit after boot takes several seconds on machines with many GPUs."""

Kind = Literal["gds", "kvikio"]

_RUN_FILE = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
)
_REMEDY = "use Options(files='auto') or 'posix'"


class ProbeFailed(Exception):
    """The child gave no answer; the text says what became of it."""


def unavailable_reason(kind: Kind) -> str | None:
    """Why device memory cannot move by KvikIO here, or not by GPUDirect Storage; None: nothing stands in the way.

    The first call may take a second; the answer is the process's from then on.
    """
    found = _obstacles(kind)
    return f"{'; '.join(found)}; or {_REMEDY}" if found else None


def transport() -> str:
    """What GPUDirect Storage goes through here, for reports; empty where it cannot work."""
    if _obstacles("gds"):
        return ""
    return "nvidia-fs" if has_nvidia_fs(machine_facts()) else "PCI P2PDMA"


@cache
def _obstacles(kind: Kind) -> tuple[str, ...]:
    if importlib.util.find_spec("kvikio") is None:
        return ("KvikIO is not installed: pip install kvikio-cu13, or kvikio-cu12 for CUDA 12",)
    try:
        facts = machine_facts()
    except ProbeFailed as err:
        return (str(err),)
    return tuple(kvikio_obstacles(facts) or (gds_obstacles(facts) if kind == "gds" else ()))


def kvikio_obstacles(facts: Mapping[str, Any]) -> list[str]:
    """What keeps KvikIO from moving device memory at all, each with its remedy."""
    cuda, kvikio = facts["cuda"], facts["kvikio"]
    if kvikio["error"] is not None:
        said = " ".join(kvikio["error"].split())
        remedy = "pip install nvidia-cufile" if "libcufile" in said else "install the wheel for this CUDA version again"
        return [f"KvikIO does not import ({said}): {remedy}"]
    if cuda["error"] is not None:
        return [f"the CUDA driver's library does not load ({cuda['error']}): install the NVIDIA driver"]
    if cuda["init"] != 0:
        return [f"cuInit answers error {cuda['init']}: see whether nvidia-smi works here"]
    if cuda["ndevices"] == 0:
        return ["the CUDA driver shows no device: see CUDA_VISIBLE_DEVICES"]
    return []


def gds_obstacles(facts: Mapping[str, Any]) -> list[str]:
    """What keeps KvikIO that works from using GPUDirect Storage, each with its remedy."""
    found = []
    kvikio = facts["kvikio"]
    if facts["cufile_error"] is not None:
        found.append(f"libcufile does not load ({facts['cufile_error']}): pip install nvidia-cufile")
    if not has_nvidia_fs(facts) and not has_p2pdma(facts):
        found.append(_no_transport(facts))
    if facts["is_compat_forced"]:
        found.append(
            "cuFile is in compat mode by force: unset CUFILE_FORCE_COMPAT_MODE, or force_compat_mode in cufile.json"
        )
    if not facts["is_udev_readable"]:
        found.append("/run/udev is not readable: in a container, mount it (-v /run/udev:/run/udev:ro)")
    if kvikio["compat_mode"] == "ON":
        found.append("KvikIO is in compat mode by its settings: unset KVIKIO_COMPAT_MODE")
    elif kvikio["is_compat_preferred"] and not found:
        found.append("KvikIO prefers its compat mode and does not say why: try KVIKIO_COMPAT_MODE=OFF, which does")
    return found


def has_nvidia_fs(facts: Mapping[str, Any]) -> bool:
    """Whether the kernel module is loaded and its nodes are open to this process."""
    module = facts["nvidia_fs"]
    return module["version"] is not None and bool(module["are_nodes_open_to_us"])


def has_p2pdma(facts: Mapping[str, Any]) -> bool:
    """Whether kernel, driver and cuFile are set up for it, as far as they say; a kernel that says nothing may be."""
    return facts["p2pdma"]["kernel"] is not False and facts["p2pdma"]["driver"] and facts["p2pdma"]["cufile"]


def _no_transport(facts: Mapping[str, Any]) -> str:
    module, p2pdma = facts["nvidia_fs"], facts["p2pdma"]
    if module["version"] is not None and not module["nnodes"]:
        first = "nvidia-fs is loaded, but there is no /dev/nvidia-fs*: pass the nodes into the container"
    elif module["version"] is not None:
        first = "nvidia-fs is loaded, but /dev/nvidia-fs* is not open to this user: change its mode"
    else:
        first = "the nvidia-fs module is not loaded: install nvidia-fs-dkms and modprobe nvidia-fs"
    missing = [
        text
        for is_missing, text in (
            (p2pdma["kernel"] is False, "a kernel with CONFIG_PCI_P2PDMA"),
            (not p2pdma["driver"], "RMForceStaticBar1=1 among the driver's NVreg_RegistryDwords"),
            (not p2pdma["cufile"], "use_pci_p2pdma in cufile.json"),
        )
        if is_missing
    ]
    return f"{first}; or set up PCI P2PDMA, which lacks {', '.join(missing)}"


@cache
def machine_facts() -> Mapping[str, Any]:
    """What the child found, asked once in a process.

    Raises:
        ProbeFailed: it crashed, hung, or said something else.
    """
    return ask_child(
        os.path.join(os.path.dirname(os.path.abspath(__file__)), "gds_child.py"), time_limit_s=TIME_LIMIT_S
    )


def ask_child(script: str, *, time_limit_s: float) -> Mapping[str, Any]:
    """Run a script that prints JSON on its last line, with this process's import path and no other tie to it.

    Raises:
        ProbeFailed: it crashed, hung, or said something else.
    """
    if not sys.executable:
        raise ProbeFailed("there is no Python executable to probe with: run under an ordinary python")
    # As code, not as a script: the script's own directory would come first on its path, and hold a kvikio.py.
    command = [sys.executable, "-c", _RUN_FILE, json.dumps(sys.path), script]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
    except OSError as err:
        raise ProbeFailed(f"the probe could not be started ({err}): run {sys.executable} by hand") from err
    try:
        out, errors = process.communicate(timeout=time_limit_s)
    except subprocess.TimeoutExpired:
        _abandon(process)
        raise ProbeFailed(
            f"the probe did not answer within {time_limit_s:g} s: see whether nvidia-smi and `import kvikio` do"
        ) from None
    if process.returncode:
        said = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise ProbeFailed(f"the probe ended with status {process.returncode} ({said}): run `import kvikio` by hand")
    try:
        facts = json.loads(out.decode(errors="replace").strip().rpartition("\n")[2])
    except ValueError:
        raise ProbeFailed("the probe said nothing that can be read: run `import kvikio` by hand") from None
    if not isinstance(facts, dict):
        raise ProbeFailed("the probe said nothing that can be read: run `import kvikio` by hand")
    return facts


def _abandon(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    # A child that hangs inside the kernel does not die of it; it is not waited for.
    with suppress(subprocess.TimeoutExpired):
        process.communicate(timeout=1)
