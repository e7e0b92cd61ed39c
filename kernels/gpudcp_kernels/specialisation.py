"""One compile-time variant of a kernel, and what its machine code must look like. A record: it compiles nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """One variant that a launcher can ask for; the compile check builds every one of them without a GPU.

    A launcher asks for no variant beyond those that its module lists in `SPECIALISATIONS`: an unlisted one would be
    compiled for the first time in the middle of a save.
    """

    name: str
    """Unique over all kernels, such as "crc32_ranges[lanes=1024]"."""
    kernel: Any
    """The `triton.jit` function."""
    signature: Mapping[str, str]
    """Triton types of the run-time arguments, in order: "*u8", "*i64", "i64". Without the constexprs."""
    constexprs: Mapping[str, object]
    """Values of the constexpr arguments."""
    divisible_by_16: tuple[str, ...] = ()
    """Arguments that the launcher passes as multiples of 16 and that Triton may rely upon."""
    num_warps: int
    loads: str
    """The widest global load, which the main path must use: "v4.b32", "b32", ..."""
    stores: str | None
    """Likewise for stores; None for a kernel that only adds to memory atomically."""
    max_registers: int
    """Upper bound of ptxas' registers a thread, over every target of the check. Spills are never allowed."""
    operations_per_word: float | None = None
    """Upper bound of arithmetic operations (SASS) for a 32-bit word on the main path, where they bound the kernel."""

    def __post_init__(self) -> None:
        shared = self.signature.keys() & self.constexprs.keys()
        if shared:
            raise ValueError(f"{self.name}: {sorted(shared)} are both run-time arguments and constexprs")
        unknown = set(self.divisible_by_16) - self.signature.keys()
        if unknown:
            raise ValueError(f"{self.name}: {sorted(unknown)} are divisible by 16 and not in the signature")
        if self.max_registers <= 0 or self.num_warps <= 0:
            raise ValueError(f"{self.name}: {self.max_registers} registers, {self.num_warps} warps")
