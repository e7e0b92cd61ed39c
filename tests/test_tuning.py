"""`gpudcp.tune` measures once a node, remembers the best of each way, and `auto` takes it from there."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gpudcp
from gpudcp import tuning
from gpudcp.errors import PlanError, TransferError
from gpudcp.files.figures import Direction, Figure, Way, place_of, read_figures
from gpudcp.files.measure import Measurements
from gpudcp.files.tune import choose_way
from gpudcp.tuning import TuneReport, tune


def figure(direction: Direction, way: Way, gb_per_s: float, *, threads: int = 1) -> Figure:
    """A measured figure."""
    return Figure(
        direction=direction, way=way, threads=threads, request_nbytes=4 << 20, gb_per_s=gb_per_s, ntransfers=1
    )


MEASURED = Measurements(
    (
        figure("write", "buffered", 3.0, threads=8),
        figure("write", "direct", 1.0),
        figure("write", "direct", 2.0, threads=4),
        figure("read", "buffered", 5.0),
    ),
    {"gds": "no GPU", "compat": "no GPU"},
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is measured, and how: nothing moves."""
    calls: list[dict[str, Any]] = []

    def record(directory: str, device: torch.device, **keywords: Any) -> Measurements:
        calls.append({"directory": directory, "device": device, **keywords})
        return MEASURED

    monkeypatch.setattr(tuning, "measure", record)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def test_a_directory_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    """The real thing, of the fewest bytes whose figures are remembered."""
    report = gpudcp.tune(tmp_path, nbytes=64 << 20)
    assert report.is_remembered
    assert {each.direction for each in report.figures} == {"write", "read"}
    assert os.listdir(tmp_path) == []
    place = place_of(str(tmp_path), "cpu")
    assert set(read_figures(place, "tuned")) == {*report.best("write"), *report.best("read")}


@pytest.mark.usefixtures("calls")
def test_the_best_setting_of_each_way_is_remembered_and_chosen(tmp_path: Path) -> None:
    """By whoever asks for this file system and device."""
    report = tune(tmp_path)
    assert report.best("write") == (MEASURED.figures[0], MEASURED.figures[2])
    assert report.place == place_of(str(tmp_path), "cpu")
    choice = choose_way(str(tmp_path), direction="write", device="cpu", ways=("direct", "buffered"))
    assert choice[:3] == ("buffered", 8, 4 << 20)


@pytest.mark.usefixtures("calls")
def test_figures_of_few_bytes_are_reported_and_not_remembered(tmp_path: Path) -> None:
    """They would overrule better ones."""
    assert tune(tmp_path).is_remembered
    assert not tune(tmp_path, nbytes=(64 << 20) - 1).is_remembered
    assert len(read_figures(place_of(str(tmp_path), "cpu"), "tuned")) == 3


@pytest.mark.usefixtures("calls")
def test_a_user_without_a_cache_directory_gets_the_report_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And hears that nothing was kept."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    report = tune(tmp_path)
    assert not report.is_remembered
    assert report.figures == MEASURED.figures


@pytest.mark.usefixtures("calls")
def test_the_text_names_every_way_and_the_report_travels(tmp_path: Path) -> None:
    """For people, and between ranks."""
    report = tune(tmp_path)
    lines = str(report).splitlines()
    assert str(tmp_path) in lines[0]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["write", "buffered"],
        ["write", "direct"],
        ["read", "buffered"],
        ["no", "gds"],
        ["no", "compat"],
    ]
    assert "3.00 GB/s  8 threads, 4096 KiB a request" in lines[1]
    assert pickle.loads(pickle.dumps(report)) == report


def test_requests_are_no_larger_than_what_is_measured(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    """And a measurement is at least a block."""
    tune(tmp_path, nbytes=5000)
    tune(tmp_path, nbytes=2 << 20)
    assert [call["requests_nbytes"] for call in calls] == [[4096], [1 << 20]]
    with pytest.raises(PlanError, match="must be at least 4096"):
        tune(tmp_path, nbytes=4095)


def test_a_failure_is_an_error_of_the_tree(tmp_path: Path) -> None:
    """A directory that is not there."""
    with pytest.raises(TransferError, match="No such file"):
        tune(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(TransferError, match="file: is no directory; give one that exists"):
        tune(tmp_path / "file")


class ThreadRanks:
    """The ranks of a job as threads: what Ranks promises, without processes."""

    barrier: threading.Barrier
    values: list[Any]
    local = threading.local()

    def __init__(self, group: object, *, no_dist: bool) -> None:
        assert group is None
        assert not no_dist
        self.rank = self.local.rank

    def reduce_broadcast(self, step: str, make: Callable[[], Any], reduce: Callable[[list[Any]], Any]) -> Any:
        """Each gets its own copy, as by pickle."""
        assert step
        self.values[self.rank] = make()
        self.barrier.wait(20)
        result = pickle.loads(pickle.dumps(reduce(list(self.values))))
        self.barrier.wait(20)
        return result


def test_one_rank_of_each_node_measures_and_all_get_their_nodes_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[dict[str, Any]]
) -> None:
    """Ranks of one node that measured at once would measure each other."""
    nodes = ["a", "b", "a", "b"]
    ThreadRanks.barrier, ThreadRanks.values = threading.Barrier(len(nodes)), [None] * len(nodes)
    monkeypatch.setattr(tuning, "Ranks", ThreadRanks)
    monkeypatch.setattr(tuning.platform, "node", lambda: nodes[ThreadRanks.local.rank])
    monkeypatch.setattr(tuning.dist, "is_initialized", lambda: True)
    reports: dict[int, TuneReport] = {}
    measuring: list[int] = []
    monkeypatch.setattr(tuning, "measure", lambda *_, **__: (measuring.append(ThreadRanks.local.rank), MEASURED)[1])

    def act(rank: int) -> None:
        ThreadRanks.local.rank = rank
        (tmp_path / nodes[rank]).mkdir(exist_ok=True)
        reports[rank] = tune(tmp_path / nodes[rank])

    threads = [threading.Thread(target=act, args=(rank,)) for rank in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(measuring) == [0, 1]
    assert [os.path.basename(reports[rank].path) for rank in range(len(nodes))] == nodes
    assert calls == []
