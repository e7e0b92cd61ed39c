"""Read data files in file order, several slabs at once, and compare them with what they should be."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from gpudcp.errors import TransferError
from gpudcp.executors.slabs import HostSlab
from gpudcp.files.base import FileReader
from gpudcp.formats.checksum import crc32, crc32_combine
from gpudcp.verification.expected import ExpectedFile, Part
from gpudcp.verification.report import Problem


class _Task(NamedTuple):
    file: ExpectedFile
    reader: FileReader
    start: int
    stop: int


class _Partial(NamedTuple):
    """The CRC-32 of some bytes of a part that lies in several slabs."""

    start: int
    stop: int
    crc32: int


class _Whole(NamedTuple):
    """Such a part."""

    path: str
    fqn: str | None
    part: Part


class Comparison:
    """What was found in the files so far. Memory taken is ``lanes * slab_nbytes``, whatever the files' size."""

    def __init__(self, *, lanes: int, slab_nbytes: int) -> None:
        self.problems: list[Problem] = []
        self.nbytes = 0
        self._lanes = lanes
        self._slab_nbytes = slab_nbytes
        self._partial: dict[_Whole, list[_Partial]] = {}
        self._next_task = threading.Lock()
        self._results = threading.Lock()

    def run(self, files: Iterable[tuple[ExpectedFile, FileReader]]) -> None:
        """Compare these files; all problems are kept, none ends it."""
        tasks = self._tasks(files)
        with ThreadPoolExecutor(self._lanes, thread_name_prefix="gpudcp-verify") as pool:
            lanes = [pool.submit(self._run_lane, tasks) for _ in range(self._lanes)]
            try:
                for lane in lanes:
                    lane.result()
            finally:
                # Who presses Ctrl-C waits for the slabs that are being read, not for all.
                with self._next_task:
                    tasks.close()
        self._settle()

    def _tasks(self, files: Iterable[tuple[ExpectedFile, FileReader]]) -> Generator[_Task, None, None]:
        for file, reader in files:
            for start in range(0, file.nbytes, self._slab_nbytes):
                yield _Task(file, reader, start, min(start + self._slab_nbytes, file.nbytes))

    def _run_lane(self, tasks: Iterator[_Task]) -> None:
        slab = None
        while True:
            with self._next_task:
                task = next(tasks, None)
            if task is None:
                return
            slab = slab or HostSlab(self._slab_nbytes)
            self._compare(task, slab.view[: task.stop - task.start])

    def _compare(self, task: _Task, data: memoryview) -> None:
        try:
            task.reader.read(data, task.start)
        except TransferError as err:
            problem = Problem(
                kind="read",
                file=task.file.path,
                byte_offset=task.start,
                expected=f"{len(data)} readable bytes",
                found=str(err),
            )
            self._add([problem], [], 0)
            return
        problems: list[Problem] = []
        partial: list[tuple[_Whole, _Partial]] = []
        for number in task.file.between(task.start, task.stop):
            item = task.file.items[number]
            for part in item.parts():
                start, stop = max(part.start, task.start), min(part.stop, task.stop)
                if start >= stop:
                    continue
                here = data[start - task.start : stop - task.start]
                if part.crc32 is None:
                    problems += _compared(task.file.path, item.fqn, part, here, start)
                elif stop - start == part.stop - part.start:
                    problems += _checked(task.file.path, item.fqn, part, crc32(here))
                else:
                    whole = _Whole(task.file.path, item.fqn, part)
                    partial.append((whole, _Partial(start, stop, crc32(here))))
        self._add(problems, partial, len(data))

    def _add(self, problems: list[Problem], partial: list[tuple[_Whole, _Partial]], nbytes: int) -> None:
        with self._results:
            self.problems += problems
            self.nbytes += nbytes
            for whole, crc in partial:
                self._partial.setdefault(whole, []).append(crc)

    def _settle(self) -> None:
        """Put together what lies in several slabs; where one could not be read, nothing can be said of the whole."""
        for whole, every in self._partial.items():
            found, nbytes = 0, 0
            for start, stop, crc in sorted(every):
                found = crc32_combine(found, crc, stop - start)
                nbytes += stop - start
            if nbytes == whole.part.stop - whole.part.start:
                self.problems += _checked(whole.path, whole.fqn, whole.part, found)
        self._partial.clear()


def _checked(path: str, fqn: str | None, part: Part, found: int) -> list[Problem]:
    """A part with a checksum."""
    if found == part.crc32:
        return []
    expected = f"CRC-32 {part.crc32:#010x} of {part.stop - part.start} bytes ({part.what})"
    return [
        Problem(kind="checksum", fqn=fqn, file=path, byte_offset=part.start, expected=expected, found=f"{found:#010x}")
    ]


def _compared(path: str, fqn: str | None, part: Part, here: memoryview, start: int) -> list[Problem]:
    """Some bytes of a part whose bytes are known, or without anything to compare them with."""
    if part.data is not None:
        expected = part.data[start - part.start : start - part.start + len(here)]
    elif part.is_zero:
        expected = bytes(len(here))
    else:
        return []
    if here == expected:
        return []
    first = int(np.argmax(np.frombuffer(here, np.uint8) != np.frombuffer(expected, np.uint8)))
    shown = slice(first, first + _SHOWN_NBYTES)
    return [
        Problem(
            kind="gap" if part.is_zero else "envelope",
            fqn=fqn,
            file=path,
            byte_offset=start + first,
            expected=f"bytes {expected[shown].hex()}",
            found=bytes(here[shown]).hex(),
        )
    ]


_SHOWN_NBYTES = 8
