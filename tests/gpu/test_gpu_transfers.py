"""Saves and loads of tensors on a GPU by the cuda executor: to and from stock, the cpu executor, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from gpu_cases import DEVICE
from gpu_states import EXECUTOR, State, bits, blank, data_files, differences, load, mixed_state, save

from gpudcp.errors import CorruptCheckpointError
from gpudcp.planners import DefaultSavePlanner

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")]

RINGS = [{}, {"lanes": 2, "slab_nbytes": 64 << 10, "threads": 3}]
"""The defaults, and slabs so small that tensors and envelopes lie across their borders."""


@pytest.mark.parametrize("options", RINGS, ids=["defaults", "small slabs"])
def test_tensors_come_back_as_they_were(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every dtype and layout, with thousands of tensors of the host among those of the device."""
    state = mixed_state()
    places = blank(state)
    assert save(state, tmp_path, executor=EXECUTOR, **options).executor == EXECUTOR
    assert load(places, tmp_path, executor=EXECUTOR, **options).executor == EXECUTOR
    assert differences(state, places) == []


@pytest.mark.parametrize("options", RINGS, ids=["defaults", "small slabs"])
def test_stock_torch_loads_what_was_saved(tmp_path: Path, options: dict[str, Any]) -> None:
    """Into tensors of the device."""
    state = mixed_state(steps=50)
    places = blank(state)
    save(state, tmp_path, executor=EXECUTOR, **options)
    dcp.load(places, checkpoint_id=tmp_path)
    assert differences(state, places) == []


@pytest.mark.parametrize("options", RINGS, ids=["defaults", "small slabs"])
def test_what_stock_torch_saved_is_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    """Payloads at any byte, some of them strided, into boxes of other strides."""
    state = mixed_state(steps=50)
    dcp.save(state, checkpoint_id=tmp_path)
    places = blank(state)
    places["large"], places["columns"] = places["large"].t().contiguous().t(), blank(state)["large"][:, :33]
    places["odd"] = torch.zeros(3 * state["odd"].numel(), device=DEVICE)[1::3][: state["odd"].numel()]
    load(places, tmp_path, executor=EXECUTOR, **options)
    assert differences(state, places) == []


@pytest.mark.parametrize("options", RINGS, ids=["defaults", "small slabs"])
@pytest.mark.parametrize(
    "dtype", [None, torch.bfloat16, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn], ids=str
)
def test_files_are_the_cpu_executors_byte_for_byte(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """Of the same tensors on the device and of the same on the host, as they are and cast."""
    state = mixed_state(steps=300)
    on_host = {name: tensor.cpu() for name, tensor in state.items()}
    slab = {"slab_nbytes": 4 << 20, **options}
    save(state, tmp_path / "device", DefaultSavePlanner(dtype=dtype), executor=EXECUTOR, **slab)
    save(state, tmp_path / "cpu", DefaultSavePlanner(dtype=dtype), executor="cpu", **slab)
    save(on_host, tmp_path / "host", DefaultSavePlanner(dtype=dtype), executor="cpu", **slab)
    files = data_files(tmp_path / "device")
    assert files
    assert files == data_files(tmp_path / "cpu")
    assert files == data_files(tmp_path / "host")


def test_a_load_casts_by_the_rule_and_leaves_the_rest_to_torch(tmp_path: Path) -> None:
    """Floats among one another by a kernel; floats to integers on the host."""
    values = torch.randn(300, 70, device=DEVICE) * 100
    save({"bf16": values, "int": values, "double": values}, tmp_path, executor=EXECUTOR)
    places = {
        "bf16": torch.zeros(300, 70, dtype=torch.bfloat16, device=DEVICE),
        "int": torch.zeros(300, 70, dtype=torch.int32, device=DEVICE),
        "double": torch.zeros(70, 300, dtype=torch.float64, device=DEVICE).t(),
    }
    load(places, tmp_path, executor=EXECUTOR)
    for place in places.values():
        assert torch.equal(bits(place), bits(values.to(place.dtype)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64], ids=str)
def test_what_no_integer_holds_becomes_what_stock_makes_of_it(tmp_path: Path, dtype: torch.dtype) -> None:
    """Though a GPU's own casts make something else of it; by the cuda executor and by the cpu executor."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e9, -3e9, 1e30, -7.5, 300.0] * 9, device=DEVICE)
    save({"values": values}, tmp_path, executor=EXECUTOR)
    by_stock, *places = ({"values": torch.zeros(72, dtype=dtype, device=DEVICE)} for _ in range(3))
    dcp.load(by_stock, checkpoint_id=tmp_path)
    for executor, place in zip((EXECUTOR, "cpu"), places, strict=True):
        load(place, tmp_path, executor=executor)
        assert differences(by_stock, place) == []


@pytest.mark.parametrize("slab_nbytes", [None, 64 << 10])
def test_a_flipped_bit_is_found_by_the_device(tmp_path: Path, slab_nbytes: int | None) -> None:
    """The error names the tensor; its CRC-32 was computed on the device when it was saved and when it is loaded."""
    state = {"weight": torch.randn(1000, 300, device=DEVICE)}
    save(state, tmp_path, executor=EXECUTOR, slab_nbytes=slab_nbytes)
    (path,) = tmp_path.glob("*.distcp")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="weight"):
        load(blank(state), tmp_path, executor=EXECUTOR, slab_nbytes=slab_nbytes)


def test_auto_takes_the_cuda_executor_and_says_so(tmp_path: Path) -> None:
    """Where a tensor is on a GPU; and the cpu executor where none is."""
    state = {"weight": torch.randn(100, device=DEVICE)}
    assert save(state, tmp_path).executor == EXECUTOR
    assert load(blank(state), tmp_path).executor == EXECUTOR
    assert save({"weight": torch.zeros(3)}, tmp_path / "host").executor == "cpu"


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def state_of_two_devices() -> State:
    """Layers on one and the other in turn, large and small, with what belongs to neither between them."""
    state: State = {}
    for layer in range(12):
        device = f"cuda:{layer % 2}"
        state[f"layers.{layer}.weight"] = torch.randn(500 + layer, 300, device=device)
        state[f"layers.{layer}.bias"] = torch.randn(300 + layer, device=device).to(torch.bfloat16)
        state[f"layers.{layer}.step"] = torch.tensor(float(layer))
    return state | {"empty": torch.empty(0, 3, device="cuda:1")}


@two_gpus
@pytest.mark.parametrize("options", RINGS, ids=["defaults", "small slabs"])
@pytest.mark.parametrize("current", [0, 1])
def test_tensors_of_two_devices_go_into_one_checkpoint(tmp_path: Path, options: dict[str, Any], current: int) -> None:
    """Each by lanes of its own, into files of its own; stock reads them, and so does whoever has them exchanged."""
    state = state_of_two_devices()
    with torch.cuda.device(current):
        saved = save(state, tmp_path, executor=EXECUTOR, **options)
        assert saved.executor == EXECUTOR
        assert saved.reasons[0].endswith("on each of 2 GPUs")
        assert len(data_files(tmp_path)) >= 2
        exchanged = {
            name: torch.zeros_like(each, device=f"cuda:{1 - each.device.index}" if each.is_cuda else "cpu")
            for name, each in state.items()
        }
        for places in (blank(state), exchanged):
            loaded = load(places, tmp_path, executor=EXECUTOR, **options)
            assert (loaded.executor, len(loaded.reasons)) == (EXECUTOR, 2), "nothing went otherwise than was chosen"
            assert differences(state, places) == []
    by_stock = blank(state)
    dcp.load(by_stock, checkpoint_id=tmp_path)
    assert differences(state, by_stock) == []


@two_gpus
def test_what_stock_saved_is_loaded_onto_two_devices(tmp_path: Path) -> None:
    """One file, whose reads have tensors of both: each goes where most of it belongs."""
    state = state_of_two_devices()
    dcp.save(state, checkpoint_id=tmp_path)
    places = blank(state)
    load(places, tmp_path, executor=EXECUTOR, slab_nbytes=1 << 20)
    assert differences(state, places) == []


@two_gpus
def test_the_streams_of_two_devices_are_waited_for(tmp_path: Path) -> None:
    """What the caller has queued on either of them, by whichever stream is the current one there."""
    states = [torch.zeros(1 << 22, device=f"cuda:{number}") for number in range(2)]
    matrices = [torch.randn(4096, 4096, device=f"cuda:{number}") for number in range(2)]
    streams = [torch.cuda.Stream(number) for number in range(2)]
    for number in range(2):
        torch.cuda.synchronize(number)
    with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):
        for state, matrix, stream in zip(states, matrices, streams, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(20):
                    torch.mm(matrix, matrix)
                state += 1
        save({str(number): state for number, state in enumerate(states)}, tmp_path, executor=EXECUTOR)
    loaded = {str(number): torch.zeros(1 << 22) for number in range(2)}
    load(loaded, tmp_path)
    assert all(bool((each == 1).all()) for each in loaded.values())


@pytest.mark.parametrize("files", ["posix", "kvikio", pytest.param("gds", marks=pytest.mark.gds)])
def test_every_way_to_the_files_holds_the_same_bytes(tmp_path: Path, files: str) -> None:
    """KvikIO's compat mode, GPUDirect Storage, or pinned slabs and POSIX; each must be there to be tried."""
    from gpudcp.files.gds import unavailable_reason

    if files != "posix" and (why := unavailable_reason(files)) is not None:  # type: ignore[arg-type]
        pytest.skip(why)
    state = mixed_state(steps=300)
    places = blank(state)
    print(save(state, tmp_path, executor=EXECUTOR, files=files, slab_nbytes=1 << 20))
    print(load(places, tmp_path, executor=EXECUTOR, files=files, slab_nbytes=1 << 20))
    assert differences(state, places) == []
    again = blank(state)
    dcp.load(again, checkpoint_id=tmp_path)
    assert differences(state, again) == []
