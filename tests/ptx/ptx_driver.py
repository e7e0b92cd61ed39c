"""A GPU for Triton that is none: kernels are compiled for a real one, and their PTX runs on the host (`ptx_machine`).

Everything before the launch is Triton's own: how arguments are specialised, the compilation, its cache.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ptx_machine
import torch
import triton
from ptx_program import Program, parse
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

TARGET = GPUTarget("cuda", int(os.environ.get("PTX_ARCHITECTURE", "90")), 32)
_MAX_SHARED_NBYTES = 99 * 1024  # of a block, on the smallest of these GPUs


class _Function:
    """What Triton takes for a handle of the driver's."""

    program: Program


class _Utilities:
    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": _MAX_SHARED_NBYTES}

    def load_binary(self, _name: str, _binary: bytes, _shared: int, _device: int) -> tuple[_Function, ...]:
        function = _Function()
        return function, function, 0, 0, 1024  # module, function, registers, spills, threads at most


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        constants = {source.fn.arg_names[path[0]] for path in source.constants}
        self._is_argument = [name not in constants for name in source.fn.arg_names]
        self._shared_nbytes = metadata.shared

    def __call__(self, nblocks: int, y: int, z: int, _stream: int, function: _Function, *rest: Any) -> None:
        assert (y, z) == (1, 1)
        values = rest[-len(self._is_argument) :]
        arguments = [value for value, is_argument in zip(values, self._is_argument, strict=True) if is_argument]
        addresses = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        ptx_machine.launch(function.program, addresses, nblocks=nblocks, shared_nbytes=self._shared_nbytes)


class Driver(DriverBase):
    """Of the one device 0, whose memory is the host's."""

    utils = _Utilities()
    launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, _type: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def _loaded(_module: Any, function: _Function, _name: str, files: dict[str, str], _hash: str) -> None:
    function.program = parse(Path(next(path for name, path in files.items() if name.endswith(".ptx"))).read_text())


def install() -> None:
    """From now on this process's kernels run so."""
    triton.knobs.runtime.kernel_load_end_hook = _loaded
    triton.runtime.driver.set_active(Driver())
