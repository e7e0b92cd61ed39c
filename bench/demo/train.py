"""One rank of the training: FSDP2 over a byte-level transformer, gpudcp for the checkpoint. Started by ``ranks.py``.

What it has to say it prints as JSON, one event a line: ``loss``, ``saved``, ``restored``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from equality import count_nbytes, count_tensors, find_differences, flatten_full
from model import CONTEXT, ByteTransformer
from text import read_corpus, read_samples
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import gpudcp

SEED = 2026
GLOBAL_BATCH = 12
"""Samples a step over all ranks: divisible by 1, 2 and 3, so each rank has an equal share."""
HIDDEN_FRACTION = 0.05
COLLECTIVE_TIMEOUT = timedelta(seconds=60)


class Training:
    """A sharded model, its optimizer, and how far they have come."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.corpus = read_corpus()
        self.step = 0
        self.position = 0
        self.model = ByteTransformer().to(device)
        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3)

    def advance(self) -> float:
        """Train one step on the next GLOBAL_BATCH samples; the mean loss over all ranks."""
        inputs, targets = self._next_share()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean) / dist.get_world_size()

    def _next_share(self) -> tuple[torch.Tensor, torch.Tensor]:
        samples = read_samples(self.corpus, position=self.position, count=GLOBAL_BATCH, context=CONTEXT)
        self.position += GLOBAL_BATCH
        # Some input bytes are hidden, at random. Every rank draws for the whole batch from the same generator, so the
        # batch is the same on any number of ranks, and a resumed run is exact only if the generator was restored.
        hidden = torch.rand(GLOBAL_BATCH, CONTEXT) < HIDDEN_FRACTION
        inputs = samples[:, :-1].masked_fill(hidden, 0)
        share = slice(dist.get_rank(), None, dist.get_world_size())
        return inputs[share].to(self.device), samples[share, 1:].to(self.device)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs: sharded tensors, and plain objects for the rest."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        rng = torch.get_rng_state().numpy().tobytes()
        progress = {"step": self.step, "position": self.position, "rng": rng}
        return {"model": model, "optimizer": optimizer, "progress": progress}

    def restore(self, checkpoint: Path) -> None:
        """Load a checkpoint, whatever the number of ranks that wrote it."""
        state = self.state()
        gpudcp.load(state, checkpoint)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step, self.position = state["progress"]["step"], state["progress"]["position"]
        torch.set_rng_state(torch.frombuffer(bytearray(state["progress"]["rng"]), dtype=torch.uint8))


def tell(event: str, **details: Any) -> None:
    print(json.dumps({"event": event, **details}), flush=True)


def save(training: Training, checkpoint: Path, reference: Path) -> None:
    """Save, and keep what was saved in a second file that gpudcp has no part in."""
    full = flatten_full(training.state())
    if dist.get_rank() == 0:
        torch.save(full, reference)
    dist.barrier()
    start_s = time.perf_counter()
    gpudcp.save(training.state(), checkpoint)
    tell("saved", seconds=time.perf_counter() - start_s, tensors=count_tensors(full), nbytes=count_nbytes(full))


def restore(training: Training, checkpoint: Path, reference: Path) -> None:
    """Load, then compare the live model and optimizer with what the first run kept."""
    start_s = time.perf_counter()
    training.restore(checkpoint)
    seconds = time.perf_counter() - start_s
    full = flatten_full(training.state())
    if dist.get_rank() == 0:
        expected = torch.load(reference, weights_only=True)
        tell("restored", seconds=seconds, tensors=count_tensors(full), differences=find_differences(expected, full))


def open_group(device_type: str, port: int) -> torch.device:
    """Join the group whose store the parent holds; the device of this rank."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=COLLECTIVE_TIMEOUT)
    device = torch.device("cuda", rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="one rank of the demo's training")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--save-after", type=int)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def train(arguments: argparse.Namespace) -> None:
    training = Training(open_group(arguments.device, arguments.port))
    if arguments.resume:
        restore(training, arguments.checkpoint, arguments.reference)
    while training.step < arguments.steps:
        loss = training.advance()
        if dist.get_rank() == 0:
            # Hexadecimal: every bit of the number.
            tell("loss", step=training.step, loss=loss.hex())
        if training.step == arguments.save_after:
            save(training, arguments.checkpoint, arguments.reference)


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(SEED)
    train(parse_arguments())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Not through the interpreter's shutdown: torch's caches keep the group alive, and a thread of gloo's that still
    # holds a tensor of the last collective now and then aborts the process there (pytorch#190489 tells the cause).
    os._exit(0)
