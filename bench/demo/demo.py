"""The main job, end to end: train, save, lose every rank, resume, read with stock torch; then real weights, measured.

Run it with ``make demo``. Ends with status 0 only if every comparison below held, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import compare
import runs
import stock
import torch
import torch.distributed.checkpoint as dcp
from equality import count_nbytes, count_tensors, find_differences
from libraries import Tensors
from memory import MemoryProbeError
from ranks import RanksError
from runs import Losses, ResumedRun, RunError, Setup
from weights import WeightsMissingError, read_weights

import gpudcp

LOSS_BOUND = 1e-4
"""On another number of ranks float32 sums are taken in another order, and every step builds on the one before."""
STOCK_LIMIT_S = 60.0


class DemoError(RuntimeError):
    """What was asked for cannot be shown on this machine."""


EXPLAINED = (DemoError, RanksError, RunError, MemoryProbeError, WeightsMissingError, subprocess.SubprocessError)
"""Errors whose message says all there is to know; any other keeps its traceback."""


class Checks:
    """Prints every claim with its outcome, and remembers the ones that did not hold."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def check(self, claim: str, differences: Sequence[str]) -> None:
        """The claim holds if there are no differences; the first ones are printed."""
        say(f"{'FAILED' if differences else 'ok'}  {claim}")
        for difference in differences[:5]:
            say(f"        {difference}")
        if differences:
            self.failed.append(claim)


def say(line: str) -> None:
    print(f"   {line}", flush=True)


def head(line: str) -> None:
    print(line, flush=True)


def tell_training(setup: Setup, checks: Checks, ranks: int) -> Losses:
    """Train without interruption, then again with a save and a violent end; the losses of the first."""
    whole = runs.run_whole(setup, ranks)
    first, last = float.fromhex(whole[1]), float.fromhex(whole[runs.STEPS])
    say(f"uninterrupted: {runs.STEPS} steps, loss {first:.3f} -> {last:.3f}")
    killed = runs.run_until_killed(setup, ranks)
    seconds = max(event["seconds"] for event in killed.saved)
    size = f"{killed.saved[0]['tensors']} tensors, {killed.saved[0]['nbytes'] / 1e6:.1f} MB"
    say(f"again: saved with gpudcp after step {runs.SAVE_AFTER}, {size}, {seconds:.3f} s")
    survivors = [f"rank {rank}: {code}" for rank, code in enumerate(killed.return_codes) if code != -signal.SIGKILL]
    checks.check(f"killed after step {max(killed.losses)}: SIGKILL ended every rank", survivors)
    claim = f"its {len(killed.losses)} losses are bit-identical to the uninterrupted run's"
    checks.check(claim, compare_bits(whole, killed.losses))
    return whole


def tell_resuming(setup: Setup, checks: Checks, whole: Losses, ranks: int, other_ranks: int) -> None:
    """Once on as many ranks, where no bit may differ, and once on another number, where only rounding may."""
    same = runs.run_resumed(setup, ranks)
    tell_restored(checks, same, ranks)
    claim = f"the losses of steps {runs.SAVE_AFTER + 1} to {runs.STEPS} are"
    checks.check(f"{claim} bit-identical to the uninterrupted run's", compare_bits(whole, same.losses))
    other = runs.run_resumed(setup, other_ranks)
    tell_restored(checks, other, other_ranks)
    distances = {step: abs(float.fromhex(loss) - float.fromhex(whole[step])) for step, loss in other.losses.items()}
    largest = max(distances.values())
    # "not <=": a NaN has to fail.
    outside = [f"step {step}: {distance:.1e}" for step, distance in distances.items() if not distance <= LOSS_BOUND]
    checks.check(f"{claim} within {LOSS_BOUND} of that run's; the largest difference is {largest:.1e}", outside)


def tell_restored(checks: Checks, run: ResumedRun, ranks: int) -> None:
    say(f"on {count_ranks(ranks)}: loaded in {run.restored['seconds']:.3f} s")
    claim = f"{run.restored['tensors']} tensors of model and optimizer, step, data position and RNG state"
    checks.check(f"{claim} are byte for byte as saved", run.restored["differences"])


def tell_stock(setup: Setup, checks: Checks) -> None:
    """The same directory through torch alone and through gpudcp, and both against what the saving ranks kept."""
    target = setup.directory / "stock.pt"
    subprocess.run([sys.executable, stock.__file__, setup.checkpoint, target], check=True, timeout=STOCK_LIMIT_S)
    by_stock = torch.load(target, weights_only=True)
    by_gpudcp = stock.empty_state(dcp.FileSystemReader(setup.checkpoint).read_metadata())
    gpudcp.load(by_gpudcp, setup.checkpoint)
    tensors = count_tensors(by_stock)
    count = f"{tensors} tensors and {len(by_stock) - tensors} objects"
    checks.check(f"stock torch reads what gpudcp reads: {count}, byte for byte", find_differences(by_gpudcp, by_stock))
    saved = torch.load(setup.reference, weights_only=True)
    checks.check("they are what the ranks had in memory when they saved", find_differences(saved, by_stock))


def tell_table(setup: Setup, checks: Checks, weights: Tensors) -> None:
    """Real weights, gpudcp and its peers, one table."""
    nbytes = count_nbytes(weights)
    say(f"{len(weights)} tensors, {nbytes / 1e6:.1f} MB; medians of {compare.ROUNDS} interleaved runs")
    say("every save ends with fsync; every load goes from the page cache into ready tensors;")
    say("memory: the most that one call adds to the process, pages mapped from files not counted")
    results = compare.measure(weights, setup.directory)
    for line in compare.format_table(results, nbytes):
        say(line)
    differences = [f"{name}: {line}" for name, result in results.items() for line in result.differences]
    loads = len(results) * (compare.ROUNDS + 1)
    checks.check(f"each of the {loads} loads gave the weights, byte for byte", differences)


def compare_bits(whole: Losses, losses: Losses) -> list[str]:
    """One line for each step whose loss is not the uninterrupted run's, to the last bit."""
    return [f"step {step}: {loss} is not {whole[step]}" for step, loss in losses.items() if loss != whole[step]]


def count_ranks(ranks: int) -> str:
    return "1 rank" if ranks == 1 else f"{ranks} ranks"


def choose_ranks(arguments: argparse.Namespace) -> tuple[str, int, int]:
    """Device type, ranks to start with, another number to resume on. NCCL wants a GPU for each rank."""
    gpus = torch.cuda.device_count()
    device = arguments.device or ("cuda" if gpus >= 2 else "cpu")
    ranks = arguments.ranks or 2
    possible = (number for number in (3, 1) if number != ranks and (device == "cpu" or number <= gpus))
    other_ranks = arguments.other_ranks or next(possible, 3)
    if device == "cuda" and gpus < max(ranks, other_ranks):
        raise DemoError(f"NCCL needs a GPU for each of {max(ranks, other_ranks)} ranks; there are {gpus}")
    return device, ranks, other_ranks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda with two or more GPUs")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 3), help="ranks that save and resume; default: 2")
    parser.add_argument("--other-ranks", type=int, choices=(1, 2, 3), help="of the second resume; default: 3, or 1")
    return parser.parse_args()


def tell_story(directory: Path, arguments: argparse.Namespace) -> list[str]:
    """All parts in order; the claims that did not hold."""
    device, ranks, other_ranks = choose_ranks(arguments)
    weights = read_weights()  # early: if they are missing, nobody should wait for the training to hear of it
    setup, checks = Setup(directory=directory, device=device), Checks()
    where = "CUDA and NCCL" if device == "cuda" else "CPU and gloo"
    python = f"Python {platform.python_version()}"
    head(f"gpudcp {gpudcp.__version__}, torch {torch.__version__}, {python}, {os.cpu_count()} cores")
    head(f"1. Train a byte-level transformer on Python's standard library: FSDP2, {count_ranks(ranks)}, {where}")
    whole = tell_training(setup, checks, ranks)
    head("2. Resume from the checkpoint")
    tell_resuming(setup, checks, whole, ranks, other_ranks)
    head("3. Open the checkpoint with stock torch, in a process where gpudcp cannot be imported")
    tell_stock(setup, checks)
    head("4. Save and load the weights of all-MiniLM-L6-v2")
    tell_table(setup, checks, weights)
    return checks.failed


def main() -> int:
    arguments = parse_arguments()
    # So that a polite end from outside also removes the files and the ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))
    stock.silence_single_process_note()
    start_s = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="gpudcp-demo-") as directory:
            failed = tell_story(Path(directory), arguments)
    except EXPLAINED as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start_s
    head(f"{len(failed)} FAILED; {seconds:.0f} s" if failed else f"Every check held; {seconds:.0f} s.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
