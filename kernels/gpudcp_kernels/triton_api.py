"""What moves between Triton versions, in one place; tried on 3.6.0, 3.7.1 and 3.9.0. Holds no kernel.

Kernels run under Triton's interpreter when ``TRITON_INTERPRET=1`` is set before the first kernel module is imported,
even where triton itself was imported earlier: `triton.jit` looks when it decorates. Only what Triton wrote in itself
(`tl.zeros`, `tl.sum`, `tl.cdiv` and the rest of `triton.language.standard`) would by then be compiled for good, so the
kernels here use none of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

IS_INTERPRETING = bool(triton.knobs.runtime.interpret)
"""Whether the kernels of this process are interpreted instead of compiled: decided once, at the first import."""

ON_HOST = IS_INTERPRETING
"""Whether they work on the host's memory. Tests set it to run what is compiled there."""


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel whose integer arguments are not specialised: a new length or count never compiles anything again.

    Pointers are told by their names, which end in ``_ptr``.
    """
    parameters = inspect.signature(function).parameters.values()
    integers = [p.name for p in parameters if "constexpr" not in str(p.annotation) and not p.name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=integers)


def device_function(function: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(function)


def access_width(unit: int, element_nbytes: int) -> str:
    """How PTX spells the access that Triton makes of so many aligned elements, in `Specialisation`'s words."""
    nbytes = min(unit * element_nbytes, 16)
    if element_nbytes == 8:
        return "b64" if nbytes == 8 else "v2.b64"
    return f"b{8 * nbytes}" if nbytes <= 4 else f"v{nbytes // 4}.b32"
