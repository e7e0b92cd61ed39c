"""A kvikio package that records what it is asked for; its device memory is host memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

Memory = dict[str, Any]


class FakeCuFile:
    """A handle: it opens the path that it is given, for itself, as KvikIO does."""

    def __init__(self, package: FakeKvikio, path: str, flags: str) -> None:
        package.before_open()
        if package.open_error is not None:
            raise package.open_error
        if package.opens_without_direct_io and package.compat_mode == "OFF":
            raise RuntimeError("O_DIRECT refused")
        self._package = package
        self._fd = os.open(path, {"r": os.O_RDONLY, "r+": os.O_RDWR}[flags])
        self.closed = False
        package.calls.append(f"open {flags}")
        package.open_paths.append(os.readlink(path))

    def raw_write(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        return self._package.transfer("write", self._fd, buf.__cuda_array_interface__, size, file_offset, dev_offset)

    def raw_read(self, buf: Any, size: int, file_offset: int, dev_offset: int) -> int:
        return self._package.transfer("read", self._fd, buf.__cuda_array_interface__, size, file_offset, dev_offset)

    def close(self) -> None:
        if not self.closed:
            self._package.calls.append("close")
            os.close(self._fd)
        self.closed = True


class FakeKvikio:
    """What a test sets before, and looks at afterwards."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.open_paths: list[str] = []
        self.transfers: list[tuple[str, int, int, int, int]] = []
        """Direction, base address, its bytes, size and offset from the base."""
        self.registered: list[tuple[int, int]] = []
        self.registers = True
        self.settings: list[tuple[str, str]] = []
        self.open_error: Exception | None = None
        self.before_open: Callable[[], object] = lambda: None
        self.receipt: Callable[[int], int] = lambda size: size
        self.error: Exception | None = None
        self.is_compat = False
        self.is_nvidia_fs_loaded = True
        self.may_fall_back = True
        self.opens_without_direct_io = False
        """As where O_DIRECT or cuFile's registration is refused: such a file falls back for itself, if it may."""
        self.compat_mode = "AUTO"
        self.falls_back: tuple[str, ...] = ()
        """Directions that go by system calls."""
        self.spoils: tuple[str, ...] = ()
        """Directions that move wrong bytes."""

    def transfer(self, what: str, fd: int, memory: Memory, size: int, file_offset: int, dev_offset: int) -> int:
        address, is_read_only = memory["data"]
        assert memory["typestr"] == "|u1"
        assert not is_read_only
        assert dev_offset + size <= memory["shape"][0]
        self.transfers.append((what, address, memory["shape"][0], size, dev_offset))
        if self.error is not None:
            raise self.error
        host = (ctypes.c_char * size).from_address(address + dev_offset)
        if what in self.falls_back or self.opens_without_direct_io:
            self._by_system_calls(what, fd, host, file_offset)
        else:
            self._past_system_calls(what, fd, host, file_offset)
        if what in self.spoils:
            self._spoil(what, fd, host, file_offset)
        return self.receipt(size)

    def _by_system_calls(self, what: str, fd: int, host: Any, file_offset: int) -> None:
        if what == "write":
            assert os.pwrite(fd, memoryview(host), file_offset) == len(host)
        else:
            assert os.preadv(fd, [memoryview(host)], file_offset) == len(host)

    def _past_system_calls(self, what: str, fd: int, host: Any, file_offset: int) -> None:
        if what == "write":
            # Grows a file and never shrinks it, whatever other threads have just written.
            os.posix_fallocate(fd, file_offset, len(host))
        access = mmap.ACCESS_WRITE if what == "write" else mmap.ACCESS_READ
        with mmap.mmap(fd, file_offset + len(host), access=access) as mapped:
            if what == "write":
                mapped[file_offset:] = host.raw
            else:
                host.raw = mapped[file_offset:]

    def _spoil(self, what: str, fd: int, host: Any, file_offset: int) -> None:
        if what == "write":
            os.pwrite(fd, b"\xff", file_offset)
        else:
            host[0] = b"\xff"

    def register(self, buf: Any) -> None:
        if not self.registers:
            raise RuntimeError("GPU memory pinning failed")
        if self.compat_mode != "ON":
            self.registered.append(_extent(buf))

    def deregister(self, buf: Any) -> None:
        if self.compat_mode != "ON":
            self.registered.remove(_extent(buf))

    @contextmanager
    def set_default(self, name: str, value: str) -> Iterator[None]:
        self.settings.append((name, value))
        found, self.compat_mode = self.compat_mode, value
        try:
            yield
        finally:
            self.compat_mode = found
            self.settings.append((name, "as found"))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be the kvikio that `import` finds."""
        package = ModuleType("kvikio")
        defaults = SimpleNamespace(
            is_compat_mode_preferred=lambda: self.is_compat or self.compat_mode == "ON",
            get=lambda name: {"compat_mode": self.compat_mode}[name],
            set=self.set_default,
        )
        driver = SimpleNamespace(
            get=lambda name: {
                "is_gds_available": self.is_nvidia_fs_loaded,
                "allow_compat_mode": self.may_fall_back,
                "max_device_cache_size": 131072,
            }[name]
        )
        names: dict[str, Any] = {
            "CuFile": lambda path, flags: FakeCuFile(self, path, flags),
            "CompatMode": SimpleNamespace(ON="ON", OFF="OFF"),
            "memory_register": self.register,
            "memory_deregister": self.deregister,
            "defaults": defaults,
            "cufile_driver": driver,
        }
        for name, value in names.items():
            setattr(package, name, value)
        monkeypatch.setitem(sys.modules, "kvikio", package)
        monkeypatch.setitem(sys.modules, "kvikio.defaults", defaults)
        monkeypatch.setitem(sys.modules, "kvikio.cufile_driver", driver)


def _extent(buf: Any) -> tuple[int, int]:
    memory = buf.__cuda_array_interface__
    return memory["data"][0], memory["shape"][0]


def block_aligned(nbytes: int) -> torch.Tensor:
    """Memory of its own that starts on a block of 4096."""
    memory = torch.zeros(nbytes + 4096, dtype=torch.uint8)
    start = -memory.data_ptr() % 4096
    return memory[start : start + nbytes]


def filled(data: bytes) -> torch.Tensor:
    """Such memory with these bytes in it."""
    tensor = block_aligned(len(data))
    if data:
        tensor.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return tensor
