"""Background saves of several processes: writing processes, gpudcp's and torch's; one rank and two; lost ranks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpudcp
from gpudcp import Options, api
from gpudcp.errors import TransferError

_ROOT = Path(__file__).parents[1]


def run(script: str, directory: Path, *, nranks: int = 1) -> None:
    """A script in interpreters of its own, one for each rank: an exception in it says what was wrong."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "kernels"))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(nranks),
    }
    # A file: torch's process runs a script's module once more, which cannot be done with a text.
    (path := directory / "script.py").write_text(script)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(path), str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(nranks)
    ]
    try:
        told = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * nranks, "\n".join(told)


def test_the_writing_process_starts_where_the_working_directory_was_removed(tmp_path: Path) -> None:
    """As on a node whose scratch space was cleaned."""
    script = """
import os, sys, torch, gpudcp
os.mkdir(sys.argv[1] + "/gone")
os.chdir(sys.argv[1] + "/gone")
os.rmdir(sys.argv[1] + "/gone")
options = gpudcp.Options(async_mode="process")
gpudcp.async_save({"a": torch.ones(9)}, sys.argv[1] + "/checkpoint", options=options).upload_completion.result()
found = {"a": torch.zeros(9)}
gpudcp.load(found, sys.argv[1] + "/checkpoint")
assert torch.equal(found["a"], torch.ones(9))
"""
    run(script, tmp_path)


def test_every_rank_has_a_writing_process(tmp_path: Path) -> None:
    """Two ranks, two saves into one directory: each rank's own process writes its file, and old files go."""
    script = """
import os, sys, torch, torch.distributed as dist, gpudcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from gpudcp import api
directory, rank = sys.argv[1] + "/checkpoint", int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
full = torch.arange(40_000.0).view(100, 400)

def state(number):
    return {"weight": distribute_tensor(full * number, mesh, [Shard(0)]), "note": number}

children = set()
for number in (1.0, 2.0):
    saved = state(number)
    response = gpudcp.async_save(saved, directory, options=gpudcp.Options(async_mode="process"))
    saved["weight"].zero_()
    response.upload_completion.result()
    children.add(api._writer_process._child.pid)
    found = state(0.0)
    gpudcp.load(found, directory)
    assert torch.equal(found["weight"].full_tensor(), full * number)
    assert found["note"] == number
assert len(children) == 1
names = sorted(os.listdir(directory))
assert [name[:4] for name in names] == [".met", "__0_", "__1_"], names
pids = [None, None]
dist.all_gather_object(pids, children.pop())
assert len({*pids, os.getpid()}) == 3
os._exit(0)  # not through the interpreter's shutdown, where gloo's threads now and then abort the process
"""
    run(script, tmp_path, nranks=2)


def test_a_rank_that_died_before_the_first_background_save_is_heard_of(tmp_path: Path) -> None:
    """Within 10 seconds, though the group waits for 10 minutes, and though the save first makes a group of its own."""
    script = """
import datetime, os, sys, time, torch, torch.distributed as dist, gpudcp
rank = int(os.environ["RANK"])
timeout = datetime.timedelta(minutes=10)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=rank, world_size=2, timeout=timeout)
part = dist.new_group([1, 0], timeout=timeout)
dist.barrier()
if rank == 1:
    os._exit(0)
for group in (None, part):
    start = time.monotonic()
    try:
        gpudcp.async_save({"a": torch.ones(3)}, sys.argv[1] + "/checkpoint", process_group=group).result()
    except gpudcp.errors.GpuDcpError as error:
        assert "lost touch" in str(error), error
    else:
        raise AssertionError("nobody missed the other rank")
    assert time.monotonic() - start < 10
os._exit(0)
"""
    run(script, tmp_path, nranks=2)


def test_torchs_own_process_saves_by_our_writer(tmp_path: Path) -> None:
    """``dcp.async_save`` pickles writer and planner and sends them; two saves, by the same process."""
    script = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, gpudcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

def main():
    directory = sys.argv[1] + "/checkpoint"
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    for number in (1.0, 2.0):
        saved = {"a": torch.arange(70_000.0) * number, "note": number}
        dcp.async_save(
            saved,
            storage_writer=gpudcp.GpuStorageWriter(directory),
            planner=gpudcp.DefaultSavePlanner(),
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
        ).result()
        found = {"a": torch.zeros(70_000), "note": 0}
        gpudcp.load(found, directory)
        assert torch.equal(found["a"], torch.arange(70_000.0) * number)
        assert found["note"] == number
    assert len(os.listdir(directory)) == 2
    sys.stdout.flush()

if __name__ == "__main__":
    main()
"""
    run(script, tmp_path)


def test_a_disk_that_is_full_is_an_error_of_the_writing_process_and_leaves_the_old_checkpoint(small_disk: Path) -> None:
    """With its number; the process goes on, and the next save, of what there is room for, is clean."""
    options, directory = Options(async_mode="process", slab_nbytes=8192), small_disk / "checkpoint"

    def save(number: float, nbytes: int) -> None:
        state = {"a": torch.full((nbytes // 4,), number)}
        gpudcp.async_save(state, directory, options=options).upload_completion.result()

    def check(number: float, nbytes: int) -> None:
        found = {"a": torch.zeros(nbytes // 4)}
        gpudcp.load(found, directory)
        assert torch.equal(found["a"], torch.full((nbytes // 4,), number))
        assert len(list(directory.iterdir())) == 2

    save(1.0, 100_000)
    child = api._writer_process._child
    with pytest.raises(TransferError, match="No space left on device") as told:
        save(2.0, 100_000)
    assert told.value.errno == errno.ENOSPC
    check(1.0, 100_000)
    save(3.0, 4_000)
    check(3.0, 4_000)
    assert api._writer_process._child is child
