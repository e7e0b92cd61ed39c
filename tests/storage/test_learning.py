"""What transfers teach, and which of them teach nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
import torch

from gpudcp.executors.cpu import CpuExecutor
from gpudcp.executors.select import Selection
from gpudcp.files.figures import LEAST_NBYTES, place_of, read_figures
from gpudcp.report import TransferReport
from gpudcp.storage.learning import learn

GPU = "some GPU"


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TransferReport, Selection]:
    """A save of a GPU's memory by the cuda executor, with a cache directory of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    report = TransferReport(
        direction="save",
        path=str(tmp_path),
        nitems=1,
        payload_nbytes=LEAST_NBYTES,
        file_nbytes=LEAST_NBYTES,
        total_s=0.5,
        phases_s=MappingProxyType({}),
        executor="cuda",
        files="posix direct",
        checksum="",
        reasons=(),
    )
    executor = CpuExecutor(lanes=1, threads=1, slab_nbytes=4096, has_checksum=True)
    return report, Selection(executor, "direct", 2, GPU, ("", ""))


def test_a_transfer_is_remembered_for_its_device_and_way(told: tuple[TransferReport, Selection]) -> None:
    """By the first rank of a node."""
    report, selection = told
    learn(report, selection)
    (figure,) = read_figures(place_of(report.path, GPU), "learned")
    assert (figure.direction, figure.way, figure.threads, figure.request_nbytes) == ("write", "direct", 2, 4096)
    assert figure.gb_per_s == LEAST_NBYTES / 0.5 / 1e9


def test_time_that_kernels_took_to_compile_is_not_the_file_systems(told: tuple[TransferReport, Selection]) -> None:
    """It is spent once, however many transfers follow."""
    report, selection = told
    learn(replace(report, total_s=3.5, phases_s=MappingProxyType({"compile": 3.0, "write": 0.5})), selection)
    (figure,) = read_figures(place_of(report.path, GPU), "learned")
    assert figure.gb_per_s == LEAST_NBYTES / 0.5 / 1e9


def test_a_transfer_that_another_executor_took_over_teaches_nothing(told: tuple[TransferReport, Selection]) -> None:
    """Its bytes went another way than was chosen."""
    report, selection = told
    learn(replace(report, executor="cpu"), selection)
    assert read_figures(place_of(report.path, GPU), "learned") == ()


def test_other_ranks_of_a_node_teach_nothing(
    told: tuple[TransferReport, Selection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They saw the same file system, shared with the first."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    learn(*told)
    assert read_figures(place_of(told[0].path, GPU), "learned") == ()


def test_a_transfer_of_several_gpus_teaches_nothing(told: tuple[TransferReport, Selection]) -> None:
    """Its speed is that of all of them, and figures are of one."""
    report, selection = told
    learn(report, selection._replace(devices=[torch.device("cuda", 0), torch.device("cuda", 1)]))
    assert read_figures(place_of(report.path, GPU), "learned") == ()
