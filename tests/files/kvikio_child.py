"""Run by test_kvikio_real.py, under a stub of the CUDA driver: the real KvikIO takes host memory for a GPU's."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

import kvikio
import kvikio.defaults
from fake_kvikio import block_aligned, filled

from gpudcp.errors import TransferError
from gpudcp.files import gds
from gpudcp.files.kvikio import KvikioReader, KvikioWriter, deregister, register
from gpudcp.files.trial import TRIAL_NBYTES, try_device_io

BLOCK = 4096
SETTINGS = ("compat_mode", "num_threads", "task_size", "gds_threshold", "bounce_buffer_size", "auto_direct_io_write")


def error_of(reader: KvikioReader, nbytes: int, byte_offset: int) -> list[object]:
    """What a read raises."""
    try:
        reader.read_device(block_aligned(nbytes), byte_offset)
    except TransferError as err:
        return [err.path, err.byte_offset, err.expected_nbytes, "EOF" in str(err)]
    return []


class SeenCuFile(kvikio.CuFile):
    """A file that tells by which mode KvikIO opened it."""

    def __init__(self, *args: Any) -> None:
        self.compat_mode = kvikio.defaults.get("compat_mode").name
        super().__init__(*args)


def mode_of(path: str) -> str:
    """By which mode KvikIO opens a file when its compat mode is asked for."""
    kvikio.CuFile, found = SeenCuFile, kvikio.CuFile
    try:
        reader = KvikioReader(path, compat_mode="ON")
        reader.close()
        return str(reader._handle.compat_mode)
    finally:
        kvikio.CuFile = found


def main(directory: str) -> dict[str, object]:
    """Write, read, fail; what came of it."""
    found: dict[str, object] = {}
    before = {name: str(kvikio.defaults.get(name)) for name in SETTINGS}
    # Larger than one of KvikIO's bounce buffers of 16 MiB, and no multiple of anything.
    content = os.urandom((20 << 20) + 1234)
    padded = content + bytes(-len(content) % BLOCK)
    path = os.path.join(directory, "file")
    slab = filled(padded)
    register(slab)
    half = len(padded) // BLOCK // 2 * BLOCK
    with KvikioWriter(path, nbytes=len(content), is_direct=False, fsync=True) as writer:
        writer.write_device(slab[half:], half)
        writer.write_device(slab[BLOCK:half], BLOCK)
        writer.write(memoryview(content)[:BLOCK], 0)
        writer.finish(len(content))
    deregister(slab)
    with open(path, "rb") as file:
        found["is_written_right"] = file.read() == content
    reader = KvikioReader(path)
    os.unlink(path)
    into = block_aligned(len(content))
    reader.read_device(into, 0)
    found["is_read_right"] = bytes(into.numpy()) == content
    part = block_aligned(3 * BLOCK + 7)
    reader.read_device(part, half)
    found["is_part_right"] = bytes(part.numpy()) == content[half : half + 3 * BLOCK + 7]
    found["past_the_end"] = error_of(reader, BLOCK, len(padded))
    reader.close()
    found["is_closed"] = error_of(reader, BLOCK, 0) != []
    found["trial"] = list(try_device_io(directory, block_aligned(TRIAL_NBYTES)))
    with tempfile.NamedTemporaryFile(dir=directory) as named:
        found["asked_for"] = mode_of(named.name)
    found["changed"] = [name for name in SETTINGS if str(kvikio.defaults.get(name)) != before[name]]
    found["reasons"] = [gds.unavailable_reason("gds"), gds.unavailable_reason("kvikio")]
    found["left"] = os.listdir(directory)
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    found["open"] = [link for link in links if link.startswith(directory)]
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
