"""Choosing an executor: by name it is that one or an error, "auto" says what it took."""

from __future__ import annotations

import pytest

from gpudcp.errors import BackendUnavailableError
from gpudcp.executors import select
from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.select import choose_executor, unavailable
from gpudcp.options import Options


def test_the_cpu_executor_is_what_its_name_gets() -> None:
    """Asked for by name, the reason is the name."""
    executor, reason = choose_executor(Options(executor="cpu", files="posix"))
    assert isinstance(executor, CpuExecutor)
    assert reason == "Options(executor='cpu')"


def test_auto_says_why_it_took_the_cpu_executor() -> None:
    """The reason goes into the report, so it is a sentence and not a name."""
    executor, reason = choose_executor(Options())
    assert executor.name == "cpu"
    assert reason == "the cpu executor, the only one in this version"


@pytest.mark.parametrize(
    ("options", "asked", "remedy"),
    [
        (Options(executor="cuda"), "Options(executor='cuda')", "use Options(executor='auto') or 'cpu'"),
        (Options(executor="interpret"), "Options(executor='interpret')", "use Options(executor='auto') or 'cpu'"),
        (Options(files="gds"), "Options(files='gds')", "use Options(files='auto') or 'posix'"),
        (Options(files="kvikio"), "Options(files='kvikio')", "use Options(files='auto') or 'posix'"),
        (Options(executor="cpu", files="gds"), "Options(files='gds')", "use Options(files='auto') or 'posix'"),
    ],
)
def test_a_backend_asked_for_by_name_is_refused_and_not_replaced(options: Options, asked: str, remedy: str) -> None:
    """The message begins with what was asked and ends with the remedy."""
    with pytest.raises(BackendUnavailableError) as caught:
        choose_executor(options)
    assert str(caught.value).startswith(f"{asked}: ")
    assert str(caught.value).endswith(remedy)


def test_only_what_works_here_has_no_reason_against_it() -> None:
    """None means available."""
    assert unavailable("cpu") is None
    assert unavailable("posix") is None
    assert unavailable("cuda") is not None


def test_the_options_of_the_ring_reach_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lanes, threads and checksum are the user's."""
    made: list[dict[str, object]] = []
    monkeypatch.setattr(select, "CpuExecutor", lambda **options: made.append(options))
    choose_executor(Options(lanes=3, threads=5, checksum=False))
    assert made == [{"lanes": 3, "threads": 5, "has_checksum": False}]
