"""Measure where CUDA's ``tensor.to(dtype)`` differs from the cast rule. As a script: prints the table as JSON.

Usage: PYTHONPATH=.:kernels python tests/gpu/to_table.py > tests/gpu/cuda_to.json, on a machine with a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_cases import BITS, DEVICE, FLOAT_PAIRS, telling_values
from gpudcp_kernels.casts import CANONICAL_NANS, FLOATS, cast_reference

KEPT = Path(__file__).with_name("cuda_to.json")
"""What was measured on the first GPU that this ran on."""
_EXAMPLES = 6


def measured() -> dict[str, Any]:
    """For every pair of floating-point dtypes: values that are cast otherwise, and which NaNs come out."""
    pairs = {f"{FLOATS[a]}->{FLOATS[b]}": _pair(a, b) for a, b in FLOAT_PAIRS}
    return {"torch": torch.__version__, "device": torch.cuda.get_device_name(DEVICE), "pairs": pairs}


def as_lines(table: dict[str, Any]) -> Iterator[str]:
    """The pairs that differ, a line each; examples are source bits, the rule's, CUDA's."""
    yield f"CUDA's .to() beside the rule, torch {table['torch']} on {table['device']}:"
    for name, pair in table["pairs"].items():
        if pair["differ"] or pair["nans"] != [pair["rule_nan"]]:
            yield (
                f"  {name}: {pair['differ']} of {pair['values']} values differ {pair['examples']}; "
                f"NaNs {' '.join(pair['nans'])}, the rule's {pair['rule_nan']}"
            )


def _pair(source: torch.dtype, dest: torch.dtype) -> dict[str, Any]:
    values = telling_values(source, dest)
    carrier, source_carrier = BITS[dest.itemsize], BITS[source.itemsize]
    found = values.to(DEVICE).to(dest).cpu().view(carrier)
    expected = cast_reference(values, dest).view(carrier)
    is_nan = values.isnan()
    differ = ((found != expected) & ~is_nan).nonzero()[:, 0]
    bits = values.view(source_carrier)
    return {
        "values": int((~is_nan).sum()),
        "differ": len(differ),
        "examples": [
            [_hex(bits[n], source), _hex(expected[n], dest), _hex(found[n], dest)] for n in differ[:_EXAMPLES]
        ],
        "nans": [_hex(each, dest) for each in found[is_nan].unique()[:_EXAMPLES]],
        "rule_nan": f"{CANONICAL_NANS[dest]:#0{2 + 2 * dest.itemsize}x}",
    }


def _hex(bits: torch.Tensor, dtype: torch.dtype) -> str:
    nbits = 8 * dtype.itemsize
    return f"{int(bits) & ((1 << nbits) - 1):#0{2 + nbits // 4}x}"


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("to_table.py: needs a CUDA device")
    print(json.dumps(measured(), indent=1))
