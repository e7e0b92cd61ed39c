"""Choose an executor and a way to its files, and say why. "auto" may fall back; a backend asked for by name may not."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from gpudcp.errors import BackendUnavailableError
from gpudcp.executors.base import Executor
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.ways import choose_files, figures_name
from gpudcp.files.figures import KVIKIO_WAYS, Direction, Way
from gpudcp.files.ways import described
from gpudcp.options import SLAB_ALIGNMENT_NBYTES, Options, c_compiler, cores_of_this_rank, ranks_of_this_node

HOST_SLAB_NBYTES = 4 << 20
DEVICE_SLAB_NBYTES = 32 << 20
"""So large because each slab takes a few launches and events, whose cost is fixed: a guess until a GPU shows better."""
THREADS = 2
"""Of a rank, but of all ranks of a node together no more than four times as many."""
_LEAST_HOST_SLAB_NBYTES = 1 << 20

_REMEDY = "use Options(executor='auto') or 'cpu'"
_LEAST_CAPABILITY = 8, 0  # of the GPUs that the compile checks of the kernels begin with


class Selection(NamedTuple):
    """Who moves the bytes of a transfer, and by which way to the files."""

    executor: Executor
    way: Way
    threads: int
    device: str
    """Whose memory moves, as figures of transfers know it: "cpu", or a GPU's name."""
    reasons: tuple[str, str]
    """Why this executor and this way, one sentence each."""
    notes: Sequence[str] = ()
    """What went otherwise in the transfer; known when it is over."""
    devices: Sequence[torch.device] = ()
    """Those with lanes of their own; none: of the cpu executor."""

    @property
    def files(self) -> str:
        """The way in words, as the bytes went it: an executor that took over moves host memory, by POSIX calls."""
        is_taken_over = self.device != "cpu" and self.executor.name == "cpu"
        return described("buffered" if is_taken_over and self.way in KVIKIO_WAYS else self.way)


def select(
    options: Options,
    directory: str,
    *,
    direction: Direction,
    devices: Callable[[], Collection[torch.device] | None],
    is_beside_training: bool = False,
) -> Selection:
    """The executor and the way to the files of a transfer.

    Args:
        options: what was asked for.
        directory: where the files are.
        direction: "write" for a save.
        devices: gives those of the tensors that move; None: they are not known.
        is_beside_training: whether this rank computes meanwhile.

    Raises:
        BackendUnavailableError: the options ask by name for what is not available.
    """
    chosen, reason = _choose_devices(options, devices)
    on_gpu = [device for device in chosen if device.type != "cpu"]
    choice = choose_files(options, directory, direction, *on_gpu)
    threads = options.threads or _default_threads(choice.threads, is_beside_training=is_beside_training)
    slab_nbytes = options.slab_nbytes or _slab_nbytes(chosen, choice.request_nbytes)
    executor: Executor = CpuExecutor(
        lanes=options.lanes, threads=threads, slab_nbytes=slab_nbytes, has_checksum=options.checksum
    )
    notes: list[str] = []
    if chosen:
        executor = _device_executor(
            chosen, executor, options, choice.way, threads=threads, slab_nbytes=slab_nbytes, notes=notes
        )
    name = figures_name(on_gpu[0] if on_gpu else None)
    return Selection(executor, choice.way, threads, name, (reason, choice.reason), notes, chosen)


def unavailable(executor: str) -> str | None:
    """Why an executor cannot be used here, ending with the remedy; None: it can."""
    if executor not in ("cuda", "interpret"):
        return None
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: pip install triton, or {_REMEDY}"
    if executor == "interpret":
        if "gpudcp_kernels.triton_api" in sys.modules and not _kernels_on_host():
            return f"this process has compiled its kernels already: set TRITON_INTERPRET=1 from its start, or {_REMEDY}"
        return None
    if torch.version.hip is not None:
        return f"this torch is built for ROCm, and the cuda executor is for NVIDIA's GPUs: {_REMEDY}"
    if not torch.cuda.is_available():
        return f"torch sees no CUDA device: install torch with CUDA, see nvidia-smi, or {_REMEDY}"
    if "gpudcp_kernels.triton_api" in sys.modules and _kernels_on_host():
        return f"this process interprets its kernels: unset TRITON_INTERPRET, or {_REMEDY}"
    if c_compiler() is None:
        return f"Triton needs a C compiler at its first launch and finds none: install gcc, set CC, or {_REMEDY}"
    from gpudcp_kernels.launching import why_no_launch  # imports triton

    if (why := why_no_launch()) is not None:
        return (
            f"Triton cannot launch a kernel here ({why}): it needs Python.h, libcuda where ldconfig -p lists it or "
            f"TRITON_LIBCUDA_PATH says, and a cache that it can write to, TRITON_CACHE_DIR; or {_REMEDY}"
        )
    return None


def _choose_devices(
    options: Options, devices: Callable[[], Collection[torch.device] | None]
) -> tuple[list[torch.device], str]:
    """The devices of the device executor (the host's: the interpreter), none for the cpu executor; and why."""
    asked = options.executor
    if asked in ("cuda", "interpret") and (why := unavailable(asked)) is not None:
        raise BackendUnavailableError(f"Options(executor={asked!r}): {why}")
    if asked == "cpu":
        return [], "Options(executor='cpu')"
    if asked == "interpret":
        return [torch.device("cpu")], "Options(executor='interpret')"
    if asked == "auto" and not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return [], "the cpu executor: no tensor on a GPU"
    known = devices()
    on_gpu = sorted({device for device in known or () if device.type == "cuda"}, key=lambda device: device.index or 0)
    if asked == "auto" and known is not None and not on_gpu:
        return [], "the cpu executor: no tensor on a GPU"
    if asked == "auto" and (why := unavailable("cuda")) is not None:
        return [], f"the cpu executor: {why}"
    on_gpu = on_gpu or [_current()]
    if asked == "auto" and (too_old := [device for device in on_gpu if _capability(device) < _LEAST_CAPABILITY]):
        named = ", ".join(map(str, too_old))
        return [], f"the cpu executor: {named} has compute capability below 8.0, for which no kernel was ever compiled"
    named = ", ".join(map(str, on_gpu))
    reason = "Options(executor='cuda')" if asked == "cuda" else f"the cuda executor: tensors on {named}"
    if len(on_gpu) > 1:
        reason = f"{reason}; {options.lanes} lanes, each with its slab of memory, on each of {len(on_gpu)} GPUs"
    return on_gpu, reason


def _device_executor(
    devices: Sequence[torch.device],
    fallback: Executor,
    options: Options,
    way: Way,
    *,
    threads: int,
    slab_nbytes: int,
    notes: list[str],
) -> Executor:
    is_interpreting = devices[0].type == "cpu"
    if is_interpreting:
        os.environ["TRITON_INTERPRET"] = "1"
    # Only now: these import triton.
    from gpudcp.executors.cuda import DeviceExecutor
    from gpudcp.executors.devices import CudaDevice, InterpretedDevice

    return DeviceExecutor(
        [InterpretedDevice()] if is_interpreting else [CudaDevice(device) for device in devices],
        name="interpret" if is_interpreting else "cuda",
        lanes=options.lanes,
        threads=threads,
        slab_nbytes=slab_nbytes,
        has_checksum=options.checksum,
        registers_slabs=way in KVIKIO_WAYS,
        fallback=fallback,
        notes=notes,
    )


def _kernels_on_host() -> bool:
    from gpudcp_kernels.triton_api import ON_HOST

    return ON_HOST


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _current() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _slab_nbytes(devices: Sequence[torch.device], request_nbytes: int | None) -> int:
    """What a slab has where nobody says. Each is one request to a file."""
    if devices:
        return DEVICE_SLAB_NBYTES
    if request_nbytes is None or request_nbytes % SLAB_ALIGNMENT_NBYTES:
        return HOST_SLAB_NBYTES
    return min(max(request_nbytes, _LEAST_HOST_SLAB_NBYTES), DEVICE_SLAB_NBYTES)


def _default_threads(best: int | None, *, is_beside_training: bool) -> int:
    """One rank's share of the threads that are best for its node; beside training one core stays free of them."""
    if best is None:
        threads = min(THREADS, cores_of_this_rank(), max(1, 4 * THREADS // ranks_of_this_node()))
    else:
        threads = max(1, best // ranks_of_this_node())
    return min(threads, max(1, cores_of_this_rank() - 1)) if is_beside_training else threads
