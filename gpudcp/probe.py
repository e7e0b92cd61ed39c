"""What works on this machine, and why the rest does not."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch

from gpudcp.executors.select import unavailable
from gpudcp.files import gds
from gpudcp.files.filesystems import file_system_type, supports_direct_io
from gpudcp.files.tune import choose_write
from gpudcp.formats import checksum


@dataclass(frozen=True, slots=True, kw_only=True)
class Capability:
    """One path that a transfer can take."""

    name: str
    is_available: bool
    reason: str
    """What it is used for or, where it is not available, why, ending with the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The answer of `probe`."""

    python: str
    torch: str
    capabilities: tuple[Capability, ...]

    def __getitem__(self, name: str) -> Capability:
        for capability in self.capabilities:
            if capability.name == name:
                return capability
        raise KeyError(name)

    def __str__(self) -> str:
        lines = [f"Python {self.python}, torch {self.torch}"]
        lines += [
            f"{'yes' if each.is_available else 'no ':3} {each.name:12} {each.reason}" for each in self.capabilities
        ]
        return "\n".join(lines)


def probe(path: str | os.PathLike[str] = ".") -> Probe:
    """Find out what works here; ``path`` is where checkpoints would go, and need not exist yet.

    Writes nothing. Where KvikIO is installed, the first call asks the machine in a child process, with a time limit.
    """
    directory = _existing(os.path.abspath(path))
    return Probe(
        python=platform.python_version(),
        torch=torch.__version__,
        capabilities=(
            Capability(name="cpu", is_available=True, reason="host slabs, a thread pool"),
            *(_named(name) for name in ("cuda", "interpret")),
            _gds(),
            _kvikio(),
            *_posix(directory),
            _checksum(),
        ),
    )


_KERNELS = {
    "cuda": "kernels on the GPU that the tensors are on",
    "interpret": "the same kernels on the host, by Triton's interpreter: slow, for tests",
}


def _existing(path: str) -> str:
    """The path, or what is there of it: a checkpoint's directory is made when it is saved."""
    while not os.path.lexists(path) and (parent := os.path.dirname(path)) != path:
        path = parent
    return path


def _named(name: str) -> Capability:
    why = unavailable(name)
    return Capability(name=name, is_available=why is None, reason=why or _KERNELS[name])


def _gds() -> Capability:
    if (why := gds.unavailable_reason("gds")) is not None:
        return Capability(name="gds", is_available=False, reason=why)
    return Capability(
        name="gds",
        is_available=True,
        reason=f"GPUDirect Storage over {gds.transport()}; a trial transfer before the first use has the last word; "
        "beside the slabs, cuFile takes up to max_device_cache_size_kb of cufile.json (128 MiB) of device memory",
    )


def _kvikio() -> Capability:
    if (why := gds.unavailable_reason("kvikio")) is not None:
        return Capability(name="kvikio", is_available=False, reason=why)
    is_compat = gds.unavailable_reason("gds") is not None
    return Capability(
        name="kvikio",
        is_available=True,
        reason="device memory in compat mode: POSIX calls through pinned memory" if is_compat else "device memory",
    )


def _posix(directory: str) -> tuple[Capability, Capability]:
    if not os.path.isdir(directory):
        reason = f"{directory} is no directory: give one that checkpoints can be saved into"
        return (
            Capability(name="posix", is_available=False, reason=reason),
            Capability(name="direct", is_available=False, reason=reason),
        )
    return Capability(name="posix", is_available=True, reason="buffered reads and writes"), _direct(directory)


def _direct(directory: str) -> Capability:
    kind = file_system_type(directory)
    if not supports_direct_io(directory):
        return Capability(
            name="direct",
            is_available=False,
            reason=f"{directory} ({kind}) opens no file with O_DIRECT, so that writes are buffered: "
            "use a directory of a file system that does, such as ext4 or xfs on a local disk",
        )
    choice = choose_write(directory, "auto")
    return Capability(name="direct", is_available=True, reason=f"O_DIRECT works in {directory}; auto: {choice.reason}")


def _checksum() -> Capability:
    if checksum.LIBRARY == "isal":
        return Capability(name="isal", is_available=True, reason="CRC-32 with carry-less multiplication")
    return Capability(
        name="isal", is_available=False, reason="CRC-32 by zlib, at a tenth of the speed; pip install isal"
    )
