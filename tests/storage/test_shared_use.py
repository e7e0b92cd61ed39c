"""Memory, writers and directories that two uses share."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.planner import SavePlan

import gpudcp
from gpudcp.errors import CheckpointBusyError
from gpudcp.storage.writer import SaveTicket


def test_destinations_that_share_memory_hold_the_one_read_last(tmp_path: Path) -> None:
    """Saved untied, loaded tied: stock reads one after the other; two threads at once would give a blend of both."""
    saved = {"a": torch.full((1 << 21,), 1.0), "b": torch.full((1 << 21,), 2.0)}
    gpudcp.save(saved, tmp_path)
    for _ in range(5):
        tied = torch.zeros(1 << 21)
        gpudcp.load({"a": tied, "b": tied}, tmp_path, options=gpudcp.Options(threads=4, slab_nbytes=1 << 20))
        assert torch.equal(tied, saved["b"])


def test_a_writer_that_saves_in_another_thread_is_refused_and_not_robbed_of_its_lock(tmp_path: Path) -> None:
    """The save that runs must not lose its directory to the next one by the same writer."""
    writer = gpudcp.GpuStorageWriter(tmp_path)
    is_saving, may_end = threading.Event(), threading.Event()

    class SlowPlanner(gpudcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: SavePlan) -> SavePlan:
            is_saving.set()
            assert may_end.wait(30)
            return super().finish_plan(new_plan)

    state = {"t": torch.ones(5)}
    thread = threading.Thread(
        target=gpudcp.save, args=(state,), kwargs={"storage_writer": writer, "planner": SlowPlanner()}
    )
    thread.start()
    try:
        assert is_saving.wait(30)
        with pytest.raises(CheckpointBusyError, match="another thread"):
            gpudcp.save(state, storage_writer=writer)
        with pytest.raises(CheckpointBusyError, match="another thread"):
            writer.reset(tmp_path / "other")
    finally:
        may_end.set()
        thread.join()
    loaded = {"t": torch.zeros(5)}
    gpudcp.load(loaded, tmp_path)
    assert torch.equal(loaded["t"], state["t"])


def test_a_data_file_that_is_gone_before_the_commit_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """Somebody cleaned the directory during the save: naming the lost file would tear the checkpoint."""
    old = {"t": torch.ones(5)}
    gpudcp.save(old, tmp_path)

    class Thief(gpudcp.GpuStorageWriter):
        def finish(self, metadata: object, results: object) -> None:
            for name in self._written:
                os.unlink(tmp_path / name)
            super().finish(metadata, results)  # type: ignore[arg-type]

    with pytest.raises(CheckpointBusyError, match="was removed"):
        gpudcp.save({"t": torch.zeros(5)}, storage_writer=Thief(tmp_path))
    loaded = {"t": torch.zeros(5)}
    gpudcp.load(loaded, tmp_path)
    assert torch.equal(loaded["t"], old["t"])


def test_a_ticket_that_comes_again_gives_another_name(tmp_path: Path) -> None:
    """A planner that caches plans hands out old tickets; a reader two saves behind must find no new bytes there."""
    writer = gpudcp.GpuStorageWriter(tmp_path)
    ticket = SaveTicket(rank=0, save_id="0123456789abcdef")
    names = {tuple(writer._unused_names(ticket, 2)) for _ in range(3)}
    assert len(names) == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_quantized_view_takes_only_its_own_bytes_to_the_file(tmp_path: Path) -> None:
    """torch.save would write the whole storage that the view is of."""
    whole = torch.quantize_per_tensor(torch.randn(1000, 1000), 0.1, 0, torch.qint8)
    gpudcp.save({"view": whole[:2]}, tmp_path)
    (file,) = tmp_path.glob("*.distcp")
    assert file.stat().st_size < 20_000
    loaded = {"view": torch.quantize_per_tensor(torch.zeros(2, 1000), 0.1, 0, torch.qint8)}
    gpudcp.load(loaded, tmp_path)
    assert torch.equal(loaded["view"].int_repr(), whole[:2].int_repr())
