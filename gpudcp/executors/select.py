"""Choose an executor and say why. "auto" may fall back; a backend asked for by name may not."""

from __future__ import annotations

from gpudcp.errors import BackendUnavailableError
from gpudcp.executors.base import Executor
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.options import Options

_NOT_BUILT = {
    "cuda": "the CUDA executor is not part of this version of gpudcp; use Options(executor='auto') or 'cpu'",
    "interpret": "the interpreter is not part of this version of gpudcp; use Options(executor='auto') or 'cpu'",
    "gds": "GPUDirect Storage is not part of this version of gpudcp; use Options(files='auto') or 'posix'",
    "kvikio": "KvikIO files are not part of this version of gpudcp; use Options(files='auto') or 'posix'",
}


def unavailable(backend: str) -> str | None:
    """Why a backend, an executor or a way of reaching files, cannot be used here; None: it can."""
    return _NOT_BUILT.get(backend)


def choose_executor(options: Options) -> tuple[Executor, str]:
    """The executor for these options, and the reason for it.

    Raises:
        BackendUnavailableError: the options ask by name for what is not available.
    """
    for name, asked in (("executor", options.executor), ("files", options.files)):
        if (why := unavailable(asked)) is not None:
            raise BackendUnavailableError(f"Options({name}={asked!r}): {why}")
    executor = CpuExecutor(lanes=options.lanes, threads=options.threads, has_checksum=options.checksum)
    if options.executor == "cpu":
        return executor, "Options(executor='cpu')"
    return executor, "the cpu executor, the only one in this version"
