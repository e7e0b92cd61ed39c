"""The four runs of the training that the demo needs: whole, killed, and resumed on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ranks import Event, Ranks

STEPS = 60
SAVE_AFTER = 30
KILL_AFTER = 32

Losses = dict[int, str]
"""Step to loss, as a hexadecimal float: two are equal only if every bit is."""


class RunError(RuntimeError):
    """The ranks ended well, but did not do what the run was for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Where the runs leave their files, and on what they run."""

    directory: Path
    device: str

    @property
    def checkpoint(self) -> Path:
        """The directory that gpudcp saves into."""
        return self.directory / "checkpoint"

    @property
    def reference(self) -> Path:
        """The same state in a file of torch.save, which the saving ranks write beside the checkpoint."""
        return self.directory / "reference.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class KilledRun:
    """A run that saved and was killed while it trained on; one ``saved`` event and one return code for each rank."""

    losses: Losses
    saved: list[Event]
    return_codes: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumedRun:
    """A run that started from the checkpoint; ``restored`` tells how the live state compared with what was saved."""

    losses: Losses
    restored: Event


def run_whole(setup: Setup, world_size: int) -> Losses:
    """All steps, without a save."""
    with _start(setup, world_size) as ranks:
        return _losses([event for _, event in ranks.events()])


def run_until_killed(setup: Setup, world_size: int) -> KilledRun:
    """Save after SAVE_AFTER steps; when every rank has returned from it and trains on, SIGKILL to all of them."""
    events: list[Event] = []
    with _start(setup, world_size, f"--save-after={SAVE_AFTER}") as ranks:
        for _, event in ranks.events():
            events.append(event)
            saved = [event for event in events if event["event"] == "saved"]
            if len(saved) == world_size and max(_losses(events)) >= KILL_AFTER:
                return KilledRun(losses=_losses(events), saved=saved, return_codes=ranks.kill())
    raise RunError(f"the ranks ended before they could be killed, after {len(_losses(events))} steps")


def run_resumed(setup: Setup, world_size: int) -> ResumedRun:
    """Load on ``world_size`` ranks and make the steps that are left."""
    with _start(setup, world_size, "--resume") as ranks:
        events = [event for _, event in ranks.events()]
    losses = _losses(events)
    # A comparison of nothing with nothing would hold.
    if sorted(losses) != list(range(SAVE_AFTER + 1, STEPS + 1)):
        raise RunError(f"a resumed run should make steps {SAVE_AFTER + 1} to {STEPS}, it made {sorted(losses)}")
    (restored,) = (event for event in events if event["event"] == "restored")
    return ResumedRun(losses=losses, restored=restored)


def _start(setup: Setup, world_size: int, *arguments: str) -> Ranks:
    common = [f"--steps={STEPS}", f"--checkpoint={setup.checkpoint}", f"--reference={setup.reference}"]
    return Ranks(world_size, device=setup.device, arguments=[*common, *arguments], log_directory=setup.directory)


def _losses(events: Iterable[Event]) -> Losses:
    return {event["step"]: event["loss"] for event in events if event["event"] == "loss"}
