"""Start a script of this directory in a process of its own, whose device memory and process groups are its own too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def started(script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The running child; it imports what this process can import."""
    path = os.pathsep.join(filter(None, [str(_HERE), *sys.path]))
    return subprocess.Popen(
        [sys.executable, str(_HERE / script), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(child: subprocess.Popen[str], *, timeout_s: float) -> Any:
    """The JSON that it prints as its last line."""
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        out, err = child.communicate()
        raise AssertionError(f"{child.args}: not done after {timeout_s} s\n{out}\n{err}") from None
    assert child.returncode == 0, f"exit code {child.returncode}\n{out}\n{err}"
    return json.loads(out.splitlines()[-1])
