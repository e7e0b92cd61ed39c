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
_ENVIRONMENT = pytest.StashKey[dict[str, str]]()
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
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Figures of a bench in which bytes were wrong are not for keeping."""
    suite = _suite_of(item)
    tables, targets = len(suite.tables), len(suite.targets)
    try:
        yield
    except Exception:
        del suite.tables[tables:], suite.targets[targets:]
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What could not be measured is said where it is missed; what was is kept at once, should the next bench hang."""
    report = yield
    suite = _suite_of(item)
    if report.skipped and isinstance(report.longrepr, tuple):
        suite.notes.append(f"{item.name}: {report.longrepr[2]}")
    elif report.failed and report.when != "teardown":
        suite.notes.append(f"{item.name}: FAILED, and gives no figures")
    if report.when == "call":
        _write(item.config, suite)
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


@pytest.fixture(scope="module", params=["tmpfs", "disk"])
def place(request: pytest.FixtureRequest) -> Path:
    """Memory, then the disk, which takes the longest: it is what a run lacks that is ended early."""
    path: Path = request.getfixturevalue(request.param)
    return path


def pytest_sessionfinish(session: pytest.Session) -> None:
    for suite in session.config.stash[_SUITES].values():
        _write(session.config, suite)  # with the notes that the ends of the modules made


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for suite in config.stash[_SUITES].values():
        terminalreporter.section(suite.name)
        terminalreporter.write_line(suite.as_text())
    for path in dict.fromkeys(config.stash[_WRITTEN]):
        terminalreporter.write_line(f"written: {path}")


def _write(config: pytest.Config, suite: Suite) -> None:
    size, results = _size(config), config.getoption("--results")
    if results is None and size == "full":
        results = _RESULTS
    if results is None or not suite.tables:  # a suite that only skipped has nothing to keep
        return
    if _ENVIRONMENT not in config.stash:
        environment = describe_environment(
            command="python -m pytest " + " ".join(config.invocation_params.args),
            size=size,
            directories={"disk": str(_disk_directory(config)), "tmpfs": _TMPFS},
            commit=config.getoption("--commit"),
        )
        config.stash[_ENVIRONMENT] = environment | describe_gpu()
    config.stash[_WRITTEN] += suite.write(Path(results), config.stash[_ENVIRONMENT])


def _suite_of(node: pytest.Item | pytest.Collector) -> Suite:
    name = node.path.stem.removeprefix("bench_").replace("_", "-")
    return node.config.stash[_SUITES].setdefault(name, Suite(name, is_full=_size(node.config) == "full"))


def _size(config: pytest.Config) -> str:
    size: str = config.getoption("--size")
    return size


def _disk_directory(config: pytest.Config) -> Path:
    # pytest-benchmark's own directory for what it keeps, which git ignores.
    return Path(config.getoption("--directory") or Path.cwd() / ".benchmarks")
