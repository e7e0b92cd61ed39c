"""Whether Triton can launch a kernel on a GPU here, asked before any kernel module is imported. Holds no kernel."""

from __future__ import annotations

from functools import cache

import triton


@cache
def why_no_launch() -> str | None:
    """What Triton says when it prepares its first launch, for which it compiles and loads some C; None: it can.

    Asked once in a process. Nothing is decided about the interpreter, as importing `triton_api` would.
    """
    try:
        triton.runtime.driver.active.utils  # noqa: B018
    except Exception as err:  # of whatever kind: who asks has another way
        return f"{type(err).__name__}: {err}"
    return None
