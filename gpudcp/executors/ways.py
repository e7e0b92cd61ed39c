"""Choose the way between memory and files: KvikIO for device memory where it is there and faster, else POSIX files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch

from gpudcp.errors import BackendUnavailableError
from gpudcp.executors.devicememory import allocate
from gpudcp.files import gds
from gpudcp.files.figures import KVIKIO_WAYS, Direction, Way, place_of, read_figures
from gpudcp.files.filesystems import supports_direct_io
from gpudcp.files.trial import TRIAL_NBYTES, DeviceIO, try_device_io
from gpudcp.files.tune import Choice, choose_way, choose_write
from gpudcp.options import Options


def choose_files(options: Options, directory: str, direction: Direction, *gpus: torch.device) -> Choice:
    """The way to the files in ``directory`` for these GPUs' memory, by figures of the first; none: for the host's.

    Raises:
        BackendUnavailableError: the options ask by name for what is not available.
    """
    gpu = gpus[0] if gpus else None
    if options.files in ("gds", "kvikio"):
        return _named(options.files, directory, gpus)
    posix = _posix(options, directory, direction, gpu)
    if gpu is None or options.files == "posix" or gds.unavailable_reason("kvikio") is not None:
        return posix
    # Whoever has had KvikIO measured here has asked for it.
    tuned = read_figures(place_of(directory, figures_name(gpu)), "tuned")
    try:
        trial = _tried(directory, gpus, is_asked_for=any(figure.way in KVIKIO_WAYS for figure in tuned))
    except BackendUnavailableError as err:
        return posix._replace(reason=f"{posix.reason}; KvikIO failed: {err}")
    ways: list[Way] = ["gds" if trial.is_gds else "compat", posix.way]
    choice = choose_way(directory, direction=direction, device=figures_name(gpu), ways=ways)
    return choice._replace(reason=f"{choice.reason}; {trial.reason}") if choice.way in KVIKIO_WAYS else choice


def figures_name(gpu: torch.device | None) -> str:
    """What figures of transfers call the memory: two GPUs of one kind are one device there."""
    return "cpu" if gpu is None else torch.cuda.get_device_name(gpu)


def _named(asked: Literal["gds", "kvikio"], directory: str, gpus: Sequence[torch.device]) -> Choice:
    def refused(why: str) -> BackendUnavailableError:
        return BackendUnavailableError(f"Options(files={asked!r}): {why}")

    if not gpus:
        raise refused("it moves device memory, and no tensor is on a GPU; use Options(files='auto') or 'posix'")
    if (why := gds.unavailable_reason(asked)) is not None:
        raise refused(why)
    trial = _tried(directory, gpus, is_asked_for=True)
    if asked == "gds" and not trial.is_gds:
        raise refused(f"{trial.reason}; use Options(files='auto') or 'kvikio'")
    return Choice("gds" if trial.is_gds else "compat", None, None, trial.reason)


def _tried(directory: str, gpus: Sequence[torch.device], *, is_asked_for: bool) -> DeviceIO:
    """What a trial of each GPU's memory showed: of several the first that has no GPUDirect Storage.

    Raises:
        BackendUnavailableError: one of them failed.
    """
    try:
        memories = [_trial_memory(gpu) for gpu in gpus]
    except torch.OutOfMemoryError as err:
        raise BackendUnavailableError(f"no room for a trial: {err}; use Options(files='auto') or 'posix'") from err
    trials = [try_device_io(directory, memory, is_asked_for=is_asked_for) for memory in memories]
    return next((trial for trial in trials if not trial.is_gds), trials[0])


@cache
def _trial_memory(gpu: torch.device) -> torch.Tensor:
    """Kept, because freeing it would wait for everything else that the device does."""
    return allocate(TRIAL_NBYTES, gpu)


def _posix(options: Options, directory: str, direction: Direction, gpu: torch.device | None) -> Choice:
    if direction == "read" or (gpu is not None and options.direct_io == "auto"):
        # Of pinned slabs, which have figures of their own. What the host reads goes to tensors at any address, where
        # O_DIRECT does not reach; and buffered reads come first, as the ranks of a node share the pages.
        may_be_direct = gpu is not None and options.direct_io != "off" and supports_direct_io(directory)
        ways: tuple[Way, ...] = ("direct", "buffered") if may_be_direct else ("buffered",)
        return choose_way(directory, direction=direction, device=figures_name(gpu), ways=ways)
    choice = choose_write(directory, options.direct_io)
    return Choice("direct" if choice.is_direct else "buffered", choice.threads, choice.request_nbytes, choice.reason)
