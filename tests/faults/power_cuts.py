"""What a power cut may leave of recorded operations: all that was fsynced, and of the rest any part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filesystem import Operation

Keep = Callable[[], bool]
"""Whether an operation that nothing made durable reached the disk."""


def left_after(operations: list[Operation], before: dict[str, bytes], keep: Keep) -> dict[str, bytes]:
    """The files of a directory that held ``before`` when the power goes after these operations.

    Contents are durable after the file's fsync, names after the directory's. What is not is asked for one by one: a
    write without the one before it, a rename without the creation before it, half of a write.
    """
    names = {name: number for number, name in enumerate(sorted(before))}
    contents = {number: bytearray(before[name]) for name, number in names.items()}
    for place, operation in enumerate(operations):
        rest = operations[place + 1 :]
        if operation.kind in ("write", "truncate"):
            is_durable = any(each.kind == "fsync" and each.file == operation.file for each in rest)
            if is_durable or keep():
                _change(contents.setdefault(operation.file, bytearray()), operation, is_whole=is_durable or keep())
        elif operation.kind in ("enter", "rename", "remove"):
            contents.setdefault(operation.file, bytearray())
            if any(each.kind == "fsync directory" for each in rest) or keep():
                _rename(names, operation)
    return {name: bytes(contents[number]) for name, number in names.items()}


def _change(content: bytearray, operation: Operation, *, is_whole: bool) -> None:
    if operation.kind == "truncate":
        content[:] = content[: operation.byte_offset].ljust(operation.byte_offset, b"\0")
        return
    data = operation.data if is_whole else operation.data[: len(operation.data) // 2]
    end = operation.byte_offset + len(data)
    content.extend(bytes(max(0, end - len(content))))
    content[operation.byte_offset : end] = data


def _rename(names: dict[str, int], operation: Operation) -> None:
    if operation.kind == "enter":
        names[operation.name] = operation.file
    elif operation.kind == "remove":
        names.pop(operation.name, None)
    else:
        source, target = operation.name.split("/")
        names.pop(source, None)
        names[target] = operation.file


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    """Make a directory that holds these files."""
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
