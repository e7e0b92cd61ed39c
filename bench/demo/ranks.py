"""Start the ranks of a training as processes, listen to them, and end them. Every wait has a limit."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

Event = dict[str, Any]

RANK_PROGRAM = Path(__file__).with_name("train.py")
SILENCE_LIMIT_S = 120.0
"""The longest time between two events. Starting torch on a busy machine takes the most of it."""
EXIT_LIMIT_S = 30.0


class RanksError(RuntimeError):
    """A rank failed, or said nothing for too long; the message ends with what it wrote to stderr."""


class Ranks:
    """The ranks of one run, a context manager: leaving it leaves no process behind."""

    def __init__(self, world_size: int, *, device: str, arguments: Sequence[str], log_directory: Path) -> None:
        # The parent holds the store and the system chooses its port, so no port can be taken in between.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._events: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._logs = [log_directory / f"rank{rank}.stderr" for rank in range(world_size)]
        command = [sys.executable, str(RANK_PROGRAM), "--port", str(self._store.port), "--device", device, *arguments]
        self._processes = [self._start(command, rank, world_size) for rank in range(world_size)]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def events(self) -> Iterator[tuple[int, Event]]:
        """(rank, event), as they come, until every rank has ended. Raises when one fails or all are silent."""
        running = len(self._processes)
        while running:
            try:
                rank, line = self._events.get(timeout=SILENCE_LIMIT_S)
            except queue.Empty:
                self._signal(signal.SIGABRT)  # with PYTHONFAULTHANDLER: each rank writes where it stands
                raise self._error(f"no rank said anything for {SILENCE_LIMIT_S:.0f} s") from None
            if line is not None:
                yield rank, json.loads(line)
                continue
            running -= 1
            if self._processes[rank].wait(EXIT_LIMIT_S) != 0:
                raise self._error(f"rank {rank} ended with status {self._processes[rank].returncode}")

    def kill(self) -> list[int]:
        """SIGKILL to every rank that still runs; the return codes of all."""
        self._signal(signal.SIGKILL)
        return [process.wait(EXIT_LIMIT_S) for process in self._processes]

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _start(self, command: list[str], rank: int, world_size: int) -> subprocess.Popen[str]:
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        environment["PYTHONFAULTHANDLER"] = "1"
        # All ranks are on this machine; a host name that resolves elsewhere must not matter.
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for
        with self._logs[rank].open("w") as log:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()
        return process

    def _listen(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"event"'):  # NCCL, for one, writes its version to stdout
                self._events.put((rank, line))
        self._events.put((rank, None))

    def _error(self, message: str) -> RanksError:
        # When one rank fails the others follow within moments, each with its own last words.
        time.sleep(0.5)
        said = [f"--- rank {rank}\n{log.read_text()[-3000:]}" for rank, log in enumerate(self._logs)]
        return RanksError("\n".join([message, *said]))
