"""How large the suites are: small to see that they work, full to see how fast gpudcp is."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure import Rounds

_MIB = 1 << 20
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes of one run of all suites."""

    rounds: Rounds
    small_tensors: int
    """How many tensors of 4 KiB."""
    llm_nbytes: int
    llm_hidden: int
    sliced_rows: int
    sliced_columns: int
    memory_nbytes: tuple[int, ...]
    memory_hidden: int
    memory_peers: int
    """Up to how many bytes of tensors all peers are measured; above it, stock DCP alone."""
    device_rounds: Rounds
    """For what takes a GPU microseconds."""
    gpu_nbytes: int
    gpu_rounds: Rounds
    gpu_model_nbytes: int
    gpu_disk_nbytes: int
    """Of the model that is saved to the disk, where every turn takes its time."""
    gpu_model_hidden: int


SIZES = {
    "small": Sizes(
        rounds=Rounds(measured=1, warm_up=0),
        small_tensors=50,
        llm_nbytes=8 * _MIB,
        llm_hidden=128,
        sliced_rows=1024,
        sliced_columns=1024,
        memory_nbytes=(8 * _MIB,),
        memory_hidden=128,
        memory_peers=0,
        device_rounds=Rounds(measured=2, warm_up=1),
        gpu_nbytes=8 * _MIB,
        gpu_rounds=Rounds(measured=1, warm_up=0),
        gpu_model_nbytes=8 * _MIB,
        gpu_disk_nbytes=8 * _MIB,
        gpu_model_hidden=128,
    ),
    "full": Sizes(
        rounds=Rounds(measured=7, warm_up=1),
        small_tensors=20_000,
        llm_nbytes=3 * _GIB // 2,
        llm_hidden=1024,
        sliced_rows=8192,
        sliced_columns=16384,
        memory_nbytes=(2 * _GIB, 8 * _GIB),
        memory_hidden=2048,
        memory_peers=2 * _GIB,
        device_rounds=Rounds(measured=15, warm_up=3),
        gpu_nbytes=2 * _GIB,
        gpu_rounds=Rounds(measured=3, warm_up=1),
        gpu_model_nbytes=10 * _GIB,
        gpu_disk_nbytes=4 * _GIB,
        gpu_model_hidden=4096,
    ),
}
