"""State dicts to save, whose bytes anyone can compute again, and ready places to load them into."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]

_SPOILED = 0x5A5A5A5A5A5A5A5A
_ODD = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed number: consecutive multiples of it share few bits


def small_tensors(count: int) -> Tensors:
    """``count`` fp32 tensors of 4 KiB."""
    return _filled({f"layers.{number}.norm.weight": torch.empty(1024) for number in range(count)})


def llama_like(nbytes: int, *, hidden: int) -> Tensors:
    """About ``nbytes`` of a Llama-like model in mixed precision: every weight in bf16, and its master copy in fp32."""
    vocabulary, key_value, intermediate = 32 * hidden, hidden // 4, 11 * hidden // 4
    layer = {
        "attention_norm": (hidden,),
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "mlp_norm": (hidden,),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    around = {"embed": (vocabulary, hidden), "head": (vocabulary, hidden), "norm": (hidden,)}
    layer_nbytes, around_nbytes = (6 * sum(torch.Size(s).numel() for s in part.values()) for part in (layer, around))
    count = max(1, round((nbytes - around_nbytes) / layer_nbytes))
    shapes = {f"layers.{number}.{name}": shape for number in range(count) for name, shape in layer.items()} | around
    return _filled(
        {f"model.{name}.weight": torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        | {f"master.{name}.weight": torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    )


def matrix(rows: int, columns: int) -> torch.Tensor:
    """One fp32 matrix."""
    return _filled({"weight": torch.empty(rows, columns)})["weight"]


def count_nbytes(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def places_for(tensors: Tensors) -> Tensors:
    """Tensors of the same shapes and dtypes, their memory touched."""
    places = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    spoil(places)
    return places


def spoil(places: Tensors) -> None:
    """Overwrite what an earlier load left, so that the next one has to do its work."""
    for place in places.values():
        _words(place).fill_(_SPOILED)


def check_equal(expected: Tensors, found: Tensors) -> None:
    """Compare bit for bit.

    Raises:
        ValueError: names the first tensor that is missing or different.
    """
    if expected.keys() != found.keys():
        raise ValueError(f"only on one side: {sorted(expected.keys() ^ found.keys())[:5]}")
    for name, tensor in expected.items():
        other = found[name]
        if (tensor.dtype, tensor.shape) != (other.dtype, other.shape) or not torch.equal(_words(tensor), _words(other)):
            raise ValueError(f"{name}: what was loaded differs from what was saved")


def check_filled(tensors: Tensors) -> None:
    """Compare with what they held when they were made, holding one tensor more at a time.

    Raises:
        ValueError: names the first tensor that is different.
    """
    start = 1
    for name, tensor in tensors.items():
        expected = torch.empty_like(tensor)
        start = _fill(expected, start)
        check_equal({name: expected}, {name: tensor})


def _filled(tensors: Tensors) -> Tensors:
    start = 1
    for tensor in tensors.values():
        start = _fill(tensor, start)
    return tensors


def _fill(tensor: torch.Tensor, start: int) -> int:
    # Every 8 bytes of all tensors different; in place, as memory freed here would hide what a save takes up.
    words = _words(tensor)
    end = start + words.numel()
    torch.arange(start, end, out=words).mul_(_ODD)
    return end


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.int64)
