"""Options, directories and the collecting of results, for all suites."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from bench.gpu.hardware import describe_gpu
from bench.results import Suite, describe_environment
from bench.sizes import SIZES, Sizes

_SUITES = pytest.StashKey[dict[str, Suite]]()
_WRITTEN = pytest.StashKey[list[Path]]()
_RESULTS = Path(__file__).parent / "results"
_TMPFS = "/dev/shm"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpudcp benches")
    group.addoption(
        "--size", choices=sorted(SIZES), default="small", help="small: seconds in all; full: the real sizes"
    )
    group.addoption("--directory", help="where the disk is; by default a temporary directory in the current one")
    group.addoption("--results", help="where results are written; by default bench/results if full, nowhere if small")
    group.addoption("--commit", default="", help="of this tree, where git is not there to be asked")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SUITES] = {}
    config.stash[_WRITTEN] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What could not be measured is said where it is missed."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        _suite_of(item).notes.append(f"{item.name}: {report.longrepr[2]}")
    return report


@pytest.fixture(scope="session")
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return SIZES[_size(request.config)]


@pytest.fixture(scope="module")
def suite(request: pytest.FixtureRequest) -> Suite:
    """Takes what a module finds; it is printed and written when all have run."""
    return _suite_of(request.node)


@pytest.fixture(scope="session")
def disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A fresh directory on the disk that is measured."""
    parent = Path(_disk_directory(request.config))
    parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpudcp-bench-", dir=parent) as path:
        yield Path(path)


@pytest.fixture(scope="session")
def tmpfs() -> Iterator[Path]:
    """A fresh directory in memory."""
    if not os.access(_TMPFS, os.W_OK):
        pytest.skip(f"{_TMPFS} cannot be written")
    with tempfile.TemporaryDirectory(prefix="gpudcp-bench-", dir=_TMPFS) as path:
        yield Path(path)


@pytest.fixture(scope="module", params=["disk", "tmpfs"])
def place(request: pytest.FixtureRequest) -> Path:
    """The disk, then memory."""
    path: Path = request.getfixturevalue(request.param)
    return path


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    size, results = _size(config), config.getoption("--results")
    if results is None and size == "full":
        results = _RESULTS
    if results is None or exitstatus != pytest.ExitCode.OK:
        return  # figures of a run in which bytes were wrong are not for keeping
    environment = describe_environment(
        command="python -m pytest " + " ".join(config.invocation_params.args),
        size=size,
        directories={"disk": str(_disk_directory(config)), "tmpfs": _TMPFS},
        commit=config.getoption("--commit"),
    )
    for suite in config.stash[_SUITES].values():
        if suite.tables:  # a suite that only skipped has nothing to keep
            config.stash[_WRITTEN] += suite.write(Path(results), environment | describe_gpu())


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for suite in config.stash[_SUITES].values():
        terminalreporter.section(suite.name)
        terminalreporter.write_line(suite.as_text())
    for path in config.stash[_WRITTEN]:
        terminalreporter.write_line(f"written: {path}")


def _suite_of(node: pytest.Item | pytest.Collector) -> Suite:
    name = node.path.stem.removeprefix("bench_").replace("_", "-")
    return node.config.stash[_SUITES].setdefault(name, Suite(name, is_full=_size(node.config) == "full"))


def _size(config: pytest.Config) -> str:
    size: str = config.getoption("--size")
    return size


def _disk_directory(config: pytest.Config) -> Path:
    # pytest-benchmark's own directory for what it keeps, which git ignores.
    return Path(config.getoption("--directory") or Path.cwd() / ".benchmarks")
