"""Directories on file systems of a known size, and processes that come and go."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gpudcp import errors


@pytest.fixture(autouse=True)
def cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where this test's figures are remembered: what one test writes must not steer the next."""
    directory = str(tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", directory)
    return directory


@pytest.fixture
def small_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory on a tmpfs of one MiB, where mounting is permitted."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = shutil.which("mount")
    if mount is None:
        pytest.skip("no mount command")
    mounted = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


# The package without its __init__, which imports torch: what is tested here needs none, and starts 50 times faster.
_PRELUDE = """
import os, sys, types
package = types.ModuleType("gpudcp")
package.__path__ = [sys.argv[1]]
sys.modules["gpudcp"] = package
from gpudcp.errors import *
from gpudcp.files.commit import *
directory = sys.argv[2]
def say(text):
    print(text, flush=True)
def wait_to_go_on():
    sys.stdin.readline()
"""


class Child:
    """A process that runs a script, says lines, and waits to be told to go on."""

    def __init__(self, script: str, directory: Path) -> None:
        package = str(Path(errors.__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PRELUDE + script, package, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def line(self) -> str:
        """What it says next; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        """Let it pass its next ``wait_to_go_on()``."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """Kill it and what it forked, as far as they still run, and forget it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    """Start a process that runs a script in the directory of the test; it ends with the test."""
    children: list[Child] = []

    def start(script: str) -> Child:
        children.append(Child(textwrap.dedent(script), tmp_path))
        return children[-1]

    yield start
    for child in children:
        child.end()
