"""State dicts on a GPU, in every dtype and layout, and how their checkpoints are compared. Moves no bytes itself."""

from __future__ import annotations

from pathlib import Path

import torch
from gpu_cases import DEVICE

import gpudcp

EXECUTOR = "cuda"
State = dict[str, torch.Tensor]

DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)


def mixed_state(*, steps: int = 2000) -> State:
    """Every dtype; strided, permuted, empty and 0-d tensors; and, on the host, steps of AdamW by the thousand."""
    generator = torch.Generator().manual_seed(1)
    state: State = {}
    for dtype in DTYPES:
        high = 2 if dtype == torch.bool else 256
        data = torch.randint(0, high, (30 * 70 * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        matrix = data.view(dtype).view(30, 70).to(DEVICE)
        name = str(dtype).removeprefix("torch.")
        state |= {f"{name}.whole": matrix, f"{name}.transposed": matrix.t(), f"{name}.part": matrix[3:20, 5:64]}
    cube = torch.randn(6, 5, 4, 3, 7, generator=generator).to(DEVICE)
    large = torch.randn(1500, 1001, generator=generator).to(DEVICE)
    waves = torch.randn(40, 3, dtype=torch.complex64, generator=generator).to(DEVICE)
    state |= {
        "permuted": cube.permute(4, 0, 2, 1, 3),
        "stepped": cube[::2, 1:, :, ::2],
        "large": large,
        "large.transposed": large.t(),
        "columns": large[:, 300:333],
        "odd": large.view(-1)[1:100_004],
        "0-d": torch.tensor(3.5, device=DEVICE),
        "empty": torch.empty(0, 4, device=DEVICE),
        "bf16": large.to(torch.bfloat16),
        "conjugate": waves.conj(),
        "conjugate.transposed": waves.t()[1:].conj(),
    }
    return state | {f"optimizer.{number}.step": torch.tensor(float(number)) for number in range(steps)}


def blank(state: State) -> State:
    """Places of the same shapes, strides, dtypes and devices that hold nothing of it."""
    return {name: _blank(tensor) for name, tensor in state.items()}


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    # Of bytes: not every dtype here can be filled on every device.
    memory = torch.zeros(span * tensor.itemsize, dtype=torch.uint8, device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bytes, row-major, on the host."""
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().view(-1).view(torch.uint8)


def differences(expected: State, found: State) -> list[str]:
    """Names of the tensors that are not the same, bit for bit."""
    return [
        name
        for name, tensor in expected.items()
        if (tensor.dtype, tensor.shape) != (found[name].dtype, found[name].shape)
        or not torch.equal(bits(tensor), bits(found[name]))
    ]


def save(state: State, directory: Path, planner: object = None, **options: object) -> gpudcp.TransferReport:
    """By gpudcp, with options; what it reports."""
    writer = gpudcp.GpuStorageWriter(directory, options=gpudcp.Options(**options))  # type: ignore[arg-type]
    gpudcp.save(dict(state), storage_writer=writer, planner=planner)  # type: ignore[arg-type]
    assert writer.report is not None
    return writer.report


def load(places: State, directory: Path, **options: object) -> gpudcp.TransferReport:
    """By gpudcp, with options; what it reports."""
    reader = gpudcp.GpuStorageReader(directory, options=gpudcp.Options(**options))  # type: ignore[arg-type]
    gpudcp.load(dict(places), storage_reader=reader)
    assert reader.report is not None
    return reader.report


def data_files(directory: Path) -> dict[str, bytes]:
    """Contents of the data files by rank and number: the rest of a name is drawn for each save."""
    return {"_".join(path.name.split("_")[2:4]): path.read_bytes() for path in directory.glob("*.distcp")}
