"""A small byte-level transformer. It knows nothing of ranks, shards or checkpoints."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

VOCABULARY = 256
CONTEXT = 128
WIDTH = 128
HEADS = 4
BLOCKS = 4


class Block(nn.Module):
    """Causal self-attention and a two-layer perceptron, each behind a layer norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(2, 3)
        # The math backend: the fused ones have no deterministic backward pass on every device.
        with sdpa_kernel(SDPBackend.MATH):
            query, key, value = heads.unbind(0)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).flatten(2))
        y: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class ByteTransformer(nn.Module):
    """Bytes in, logits of the next byte out: int64 [batch, CONTEXT] -> float32 [batch, CONTEXT, 256]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits
