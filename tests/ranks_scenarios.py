"""One rank of the scenarios of test_ranks.py: all of them in one process group, and a line of JSON for each.

Run as ``ranks_scenarios.py RANK NRANKS DIRECTORY``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from gpudcp.errors import CheckpointBusyError, TransferError
from gpudcp.ranks import Ranks

TIMEOUT = timedelta(minutes=10)  # a rank that waits for it to pass is killed before


class KeywordOnlyError(Exception):
    """Pickles, and does not unpickle: the way that leaves stock DCP's ranks hanging."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")


class UnprintableError(Exception):
    """An error that cannot even be told."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class OddTransferError(TransferError):
    """Of our tree, by a user's subclass that does not unpickle."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}", path="odd")


class Poison:
    """A value that pickles, and does not unpickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ("poison",)


def _refuse(what: str) -> None:
    raise LookupError(f"cannot unpickle {what}")


def _ours() -> None:
    raise TransferError("f: disk full\nmore", path="f", byte_offset=7, expected_nbytes=9, moved_nbytes=3, errno=28)


def _busy() -> None:
    raise CheckpointBusyError("a newer checkpoint")


def _foreign() -> None:
    raise ValueError("no such tensor\nand a second line")


def _keyword_only() -> None:
    raise KeywordOnlyError(code=5)


def _checkpoint_exception() -> None:
    raise CheckpointException("inner save failed", {})


def _keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def _system_exit() -> None:
    raise SystemExit(3)


def _unprintable() -> None:
    raise UnprintableError


def _ours_unpicklable() -> None:
    class LocalTransferError(TransferError):
        pass

    raise LocalTransferError("local", path="local")


def _ours_that_does_not_unpickle() -> None:
    raise OddTransferError(code=6)


def _ours_that_is_unknown_elsewhere() -> None:
    module = types.ModuleType(f"a_module_of_process_{os.getpid()}")
    kind = type("ForeignTransferError", (TransferError,), {"__module__": module.__name__})
    module.ForeignTransferError = kind  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    raise kind("unknown elsewhere", path="here")


def _value_that_does_not_pickle() -> Any:
    return lambda: 0


def _value_that_does_not_unpickle() -> Any:
    return Poison()


FAULTS: dict[str, Callable[[], Any]] = {
    name.strip("_"): fault
    for name, fault in globals().copy().items()
    if isinstance(fault, types.FunctionType) and name.startswith("_") and name != "_refuse"
}
VALUE_FAULTS = ("value_that_does_not_pickle", "value_that_does_not_unpickle")

Act = Callable[[], Any]
Step = Callable[[Ranks, Act, Callable[[Any], Any]], Any]

STEPS: dict[str, Step] = {
    # A part is unpickled inside the step that uses it, here as in the driver.
    "reduce_scatter": lambda ranks, make, reduce: ranks.vote("use", ranks.reduce_scatter("step", make, reduce)),
    "reduce_broadcast": lambda ranks, make, reduce: ranks.reduce_broadcast("step", make, reduce),
    "vote": lambda ranks, make, _: ranks.vote("step", make),
}


def scenarios(rank: int, group: dist.ProcessGroup | None) -> dict[str, Callable[[], Any]]:
    """All scenarios that this rank takes part in, by name."""
    ranks = Ranks(None, no_dist=False)
    found: dict[str, Callable[[], Any]] = {}

    def add(name: str, scenario: Callable[[], Any]) -> None:
        found[name] = scenario

    def failing(fault: str, failing_ranks: set[int]) -> Act:
        return FAULTS[fault] if rank in failing_ranks else lambda: f"value of {rank}"

    for step, call in STEPS.items():
        for fault in FAULTS:
            if step == "vote" and fault in VALUE_FAULTS:
                continue  # what a rank gets from its own vote is not sent
            for failing_ranks in ({0}, {2}, {1, 2}, {0, 1, 2}):
                act = failing(fault, failing_ranks)
                name = f"{step} make {fault} {sorted(failing_ranks)}"
                add(name, lambda call=call, act=act: call(ranks, act, lambda values: values))
    for fault in FAULTS:
        act = FAULTS[fault]
        add(
            f"reduce_broadcast reduce {fault} [0]",
            lambda act=act: ranks.reduce_broadcast("step", lambda: 0, lambda _: act()),
        )
        add(
            f"reduce_scatter reduce {fault} [0]",
            lambda act=act: ranks.vote("use", ranks.reduce_scatter("step", lambda: 0, lambda _: [1, act(), 3])),
        )
    for pair in (("ours", "foreign"), ("foreign", "ours"), ("busy", "ours"), ("foreign", "busy")):
        fault = dict(zip((1, 2), pair, strict=True)).get(rank)
        add(" and ".join(pair), lambda fault=fault: ranks.vote("step", FAULTS[fault] if fault else lambda: 0))
    for count in (0, 2, 4):
        add(f"{count} parts", lambda count=count: ranks.reduce_scatter("step", lambda: 0, lambda _: [0] * count)())
    add("no list of parts", lambda: ranks.reduce_scatter("step", lambda: 0, lambda _: (n for n in range(3)))())

    calls: list[str] = []

    def counted(what: str, value: Any) -> Any:
        calls.append(what)
        return value

    def successes() -> Any:
        scattered = ranks.reduce_scatter(
            "step", lambda: counted("make", rank), lambda values: counted("reduce", [(v, values) for v in values])
        )
        broadcast = ranks.reduce_broadcast(
            "step", lambda: counted("make", rank), lambda values: counted("reduce", values)
        )
        voted = ranks.vote("step", lambda: counted("act", lambda: f"own of {rank}"))
        return [scattered(), broadcast, voted(), calls, ranks.rank, ranks.is_coordinator]

    add("successes", successes)
    if group is not None:
        part = Ranks(group, no_dist=False)
        add("subgroup scatter", lambda: part.reduce_scatter("step", lambda: rank, lambda values: [values, "last"])())
        add("subgroup broadcast", lambda: part.reduce_broadcast("step", lambda: rank, lambda values: values))
        add("subgroup who", lambda: [part.rank, part.is_coordinator])
        add("subgroup make", lambda: part.reduce_broadcast("step", failing("ours", {2}), lambda values: values))
        add("subgroup reduce", lambda: part.reduce_scatter("step", lambda: 0, lambda _: FAULTS["foreign"]())())
        add("subgroup vote", lambda: part.vote("step", failing("foreign", {1})))
        add("subgroup again", lambda: part.reduce_broadcast("step", lambda: rank, sum))
    return found


def outcome(scenario: Callable[[], Any]) -> dict[str, Any]:
    """What came of a scenario, as JSON can tell it, and how long it took."""
    started_s = time.monotonic()
    found = value_or_error(scenario)
    return {**found, "spent_s": time.monotonic() - started_s}


def value_or_error(scenario: Callable[[], Any]) -> dict[str, Any]:
    """What came of it."""
    try:
        return {"value": scenario()}
    except BaseException as error:
        details = {
            name: getattr(error, name, None) for name in ("ranks", "byte_offset", "moved_nbytes", "errno", "code")
        }
        return {
            "error": type(error).__name__,
            "is_ours": "GpuDcpError" in [kind.__name__ for kind in type(error).__mro__],
            "message": None if isinstance(error, UnprintableError) else str(error),
            "cause": type(error.__cause__).__name__,
            **details,
        }


def main() -> None:
    """Run them all, each followed by a step that must work: no failure may put the ranks out of step."""
    rank, nranks, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=nranks, timeout=TIMEOUT
    )
    group = dist.new_group([1, 2], timeout=TIMEOUT)
    ranks = Ranks(None, no_dist=False)

    def following() -> int:
        return ranks.reduce_broadcast("next", lambda: rank, sum)

    with open(directory / f"rank{rank}.jsonl", "w", encoding="utf-8") as lines:

        def tell(name: str, scenario: Callable[[], Any], next_value: Any) -> None:
            lines.write(json.dumps([name, outcome(scenario), next_value()]) + "\n")
            lines.flush()

        for name, scenario in scenarios(rank, group if rank else None).items():
            tell(name, scenario, following if not name.startswith("subgroup") else lambda: None)
        tell("killed", lambda: ranks.vote("step", lambda: os._exit(0) if rank == 2 else 1), lambda: None)
    # Not through the interpreter's shutdown, where gloo's threads now and then abort the process (pytorch#190489).
    os._exit(0)


if __name__ == "__main__":
    main()
