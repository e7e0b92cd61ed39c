"""Real text that is on every machine with Python: the source of its standard library, as bytes."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch

CORPUS_NBYTES = 1_000_000
# A prime far from any divisor of the corpus: consecutive samples lie far apart, and no random numbers are needed.
SAMPLE_STRIDE_NBYTES = 611_953


def read_corpus() -> torch.Tensor:
    """The first million bytes of the standard library's top-level modules, in order of name."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(stdlib.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= CORPUS_NBYTES:
            return torch.frombuffer(text[:CORPUS_NBYTES], dtype=torch.uint8)
    raise FileNotFoundError(f"{stdlib}: {len(text)} bytes of Python source, the demo needs {CORPUS_NBYTES}")


def read_samples(corpus: torch.Tensor, *, position: int, count: int, context: int) -> torch.Tensor:
    """Samples ``position .. position + count`` as int64 [count, context + 1]: a pure function of the position."""
    starts = torch.arange(position, position + count) * SAMPLE_STRIDE_NBYTES % (corpus.numel() - context - 1)
    return corpus[starts[:, None] + torch.arange(context + 1)].long()
