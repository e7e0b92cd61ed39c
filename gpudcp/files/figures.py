"""Remembered figures: how fast bytes moved between a device and a file system, and by which way. Decides nothing.

Small JSON files in the user's cache directory, one for each file system, device and origin: `tune` measured it, or
transfers taught it. A file is replaced at once and holds no other place's figures, so ranks and nodes that write at the
same time cannot tear it; at worst a transfer is not learned from. What cannot be read or written is ignored: without
figures everything works.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from gpudcp.files.filesystems import mount_of
from gpudcp.options import user_cache_directory

Direction = Literal["write", "read"]
Way = Literal["gds", "compat", "direct", "buffered"]
"""GPUDirect Storage, KvikIO's compat mode, O_DIRECT from host memory, the page cache."""
KVIKIO_WAYS: frozenset[Way] = frozenset({"gds", "compat"})
Origin = Literal["tuned", "learned"]

LEAST_NBYTES = 64 << 20
"""A transfer of fewer bytes says more about its fixed costs than about the file system."""

_VERSION = 1
_LARGEST_FILE_NBYTES = 1 << 16
_REMEMBERED_TRANSFERS = 8
_NOTICED_CHANGE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """How fast one way was. GB is 10^9 bytes."""

    direction: Direction
    way: Way
    threads: int
    request_nbytes: int
    gb_per_s: float
    ntransfers: int
    """How many transfers it is the mean of; older ones fade."""


class Place(NamedTuple):
    """A file system and the device whose memory moves there: what figures hold for."""

    file_system: str
    device: str


def place_of(directory: str, device: str) -> Place:
    """``device`` is "cpu" or a GPU's name: two GPUs of one kind are one device here."""
    return Place(" ".join(mount_of(directory)), device)


def read_figures(place: Place, origin: Origin) -> tuple[Figure, ...]:
    """What is remembered; nothing where there is nothing that can be read."""
    path = _path_of(place, origin)
    try:
        if path is None or os.path.getsize(path) > _LARGEST_FILE_NBYTES:
            return ()
        with open(path, encoding="utf-8") as file:
            stored = json.load(file)
        if stored["version"] != _VERSION or [stored["file_system"], stored["device"]] != list(place):
            return ()
        return tuple(_figure_of(values) for values in stored["figures"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()


def write_figures(place: Place, origin: Origin, figures: Iterable[Figure]) -> bool:
    """Replace what is remembered; False where that is not possible."""
    path = _path_of(place, origin)
    if path is None:
        return False
    data = {
        "version": _VERSION,
        "file_system": place.file_system,
        "device": place.device,
        "figures": [asdict(figure) for figure in figures],
    }
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=f"{os.path.basename(path)}.")
    except OSError:
        return False
    try:
        # Escaped: the name of a mount may be no UTF-8.
        with open(fd, "w", encoding="ascii") as file:
            json.dump(data, file, indent=1)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)
        return False
    return True


def record_transfer(
    directory: str,
    device: str,
    *,
    direction: Direction,
    way: Way,
    threads: int,
    request_nbytes: int,
    nbytes: int,
    seconds: float,
) -> None:
    """Learn from a transfer that took ``seconds`` from its first byte to its last, fsync included. Never raises.

    Costs one small file read and at most one written, and that only while there is something to learn. One rank a
    node should call it: what the others see is the same file system, shared with this one.
    """
    if nbytes < LEAST_NBYTES or seconds <= 0:
        return
    place = place_of(directory, device)
    known = read_figures(place, "learned")
    new = Figure(
        direction=direction,
        way=way,
        threads=threads,
        request_nbytes=request_nbytes,
        gb_per_s=nbytes / seconds / 1e9,
        ntransfers=1,
    )
    old = next((figure for figure in known if (figure.direction, figure.way) == (direction, way)), None)
    if old is not None:
        merged = _merged(old, new)
        if old.ntransfers == _REMEMBERED_TRANSFERS and abs(merged.gb_per_s / old.gb_per_s - 1) < _NOTICED_CHANGE:
            return
        new = merged
    write_figures(place, "learned", [new, *(figure for figure in known if figure is not old)])


def _merged(old: Figure, new: Figure) -> Figure:
    ntransfers = min(old.ntransfers + 1, _REMEMBERED_TRANSFERS)
    gb_per_s = old.gb_per_s + (new.gb_per_s - old.gb_per_s) / ntransfers
    return replace(new, gb_per_s=gb_per_s, ntransfers=ntransfers)


def _figure_of(values: dict[str, Any]) -> Figure:
    figure = Figure(**{name: values[name] for name in Figure.__slots__})
    numbers = (figure.threads, figure.request_nbytes, figure.ntransfers)
    if figure.direction not in get_args(Direction) or figure.way not in get_args(Way):
        raise ValueError("a direction or a way that this version does not know")
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("a count that is none")
    if type(figure.gb_per_s) is not float or not math.isfinite(figure.gb_per_s) or figure.gb_per_s <= 0:
        raise ValueError("a speed that is none")
    return figure


def _path_of(place: Place, origin: Origin) -> str | None:
    """Where figures of a place are kept; None: this user has no cache directory."""
    cache = user_cache_directory()
    if cache is None:
        return None
    name = hashlib.sha256("\0".join(place).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
    return os.path.join(cache, "gpudcp", f"{name}-{origin}.json")
