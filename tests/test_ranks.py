"""Steps of several ranks: every rank hears of every failure, as an error of our tree, and none is left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks_scenarios import FAULTS, STEPS, VALUE_FAULTS
from torch.distributed.checkpoint import CheckpointException

import gpudcp
from gpudcp.errors import PlanError, RankFailedError, TransferError
from gpudcp.ranks import Ranks

NRANKS = 3
DEADLINE_S = 100  # of all together; the group's timeout is ten minutes, so who waits for that is found out here

Outcomes = list[dict[str, tuple[dict[str, Any], Any]]]
"""By rank, by scenario: what came of it, and of the step after it."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every scenario, run once by three ranks in one process group: processes with torch start slowly."""
    directory = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks_scenarios.py")
    path = os.pathsep.join([str(Path(gpudcp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(NRANKS), str(directory)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NRANKS)
    ]
    deadline = time.monotonic() + DEADLINE_S
    try:
        for process in processes:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the tests of the scenarios that are missing fail
    finally:
        for process in processes:
            process.kill()
        errors = [process.communicate()[1] for process in processes]
    files = [directory / f"rank{rank}.jsonl" for rank in range(NRANKS)]
    assert all(file.exists() for file in files), "\n".join(errors)
    print("\n".join(errors))
    return [
        {name: (outcome, after) for name, outcome, after in map(json.loads, file.read_text().splitlines())}
        for file in files
    ]


def outcomes_of(outcomes: Outcomes, name: str) -> list[dict[str, Any]]:
    """What came of a scenario on each rank; the step after it, which must have worked on every rank."""
    found = [of_rank.get(name) for of_rank in outcomes]
    assert None not in found, f"{name}: the ranks were left waiting"
    assert [after for _, after in found] == [0 + 1 + 2] * NRANKS
    return [outcome for outcome, _ in found]


# What each fault is on the rank that has it: the type, its first line, and whether others can get the error itself.
TYPES = {
    "ours": ("TransferError", "f: disk full"),
    "busy": ("CheckpointBusyError", "a newer checkpoint"),
    "foreign": ("ValueError", "no such tensor"),
    "keyword_only": ("KeywordOnlyError", "code 5"),
    "checkpoint_exception": ("CheckpointException", str(CheckpointException("", {})).strip().partition("\n")[0]),
    "keyboard_interrupt": ("KeyboardInterrupt", ""),
    "system_exit": ("SystemExit", "3"),
    "unprintable": ("UnprintableError", ""),
    "ours_unpicklable": ("LocalTransferError", "local"),
    "ours_that_does_not_unpickle": ("OddTransferError", "code 6"),
    "ours_that_is_unknown_elsewhere": ("ForeignTransferError", "unknown elsewhere"),
}
KEPT_ON_THEIR_RANK = {
    "ours",
    "busy",
    "keyboard_interrupt",
    "system_exit",
    "ours_unpicklable",
    "ours_that_does_not_unpickle",
    "ours_that_is_unknown_elsewhere",
}


def test_every_fault_has_an_expectation() -> None:
    """A fault that is added to the scenarios is added here."""
    assert {*TYPES, *VALUE_FAULTS} == set(FAULTS)


def check(found: list[dict[str, Any]], fault: str, failed: list[int]) -> None:
    """Every rank raised what it should: its own error, the first failed rank's, or one that names them all."""
    kind, line = TYPES[fault]
    where = f"on rank{'s' * (len(failed) > 1)} {', '.join(map(str, failed))}"
    message = f"step failed {where}: {kind}: {line}"
    for rank, outcome in enumerate(found):
        if rank in failed and fault in KEPT_ON_THEIR_RANK:
            assert (outcome["error"], outcome["cause"]) == (kind, "NoneType")
        elif fault in ("ours", "busy"):
            assert (outcome["error"], outcome["message"]) == (kind, message)
            numbers = (outcome["byte_offset"], outcome["moved_nbytes"], outcome["errno"])
            assert numbers == ((7, 3, 28) if fault == "ours" else (None, None, None))
        else:
            assert (outcome["error"], outcome["message"]) == ("RankFailedError", message)
            assert outcome["ranks"] == {str(other): f"{kind}: {line}" for other in failed}
            assert outcome["cause"] == (kind if rank in failed else "NoneType")


@pytest.mark.parametrize("failed", [[0], [2], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("fault", TYPES)
@pytest.mark.parametrize("step", STEPS)
def test_an_error_on_some_ranks_reaches_all(outcomes: Outcomes, step: str, fault: str, failed: list[int]) -> None:
    """The coordinator among them or not; and the next step works."""
    check(outcomes_of(outcomes, f"{step} make {fault} {failed}"), fault, failed)


@pytest.mark.parametrize("fault", TYPES)
@pytest.mark.parametrize("step", ["reduce_scatter", "reduce_broadcast"])
def test_an_error_of_the_coordinator_alone_reaches_all(outcomes: Outcomes, step: str, fault: str) -> None:
    """Where the others wait for what it makes of their values."""
    check(outcomes_of(outcomes, f"{step} reduce {fault} [0]"), fault, [0])


@pytest.mark.parametrize("failed", [[0], [2], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("step", ["reduce_scatter", "reduce_broadcast"])
def test_a_value_that_does_not_pickle_is_an_error_of_its_rank(outcomes: Outcomes, step: str, failed: list[int]) -> None:
    """It is pickled before it is sent."""
    for rank, outcome in enumerate(outcomes_of(outcomes, f"{step} make value_that_does_not_pickle {failed}")):
        assert outcome["error"] == "RankFailedError"
        assert sorted(outcome["ranks"]) == [str(other) for other in failed]
        assert (outcome["cause"] != "NoneType") is (rank in failed)


@pytest.mark.parametrize("failed", [[0], [2], [1, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("step", ["reduce_scatter", "reduce_broadcast"])
def test_a_value_that_does_not_unpickle_is_an_error_of_the_coordinator(
    outcomes: Outcomes, step: str, failed: list[int]
) -> None:
    """It is unpickled where errors are still told: stock's ranks would wait for the whole timeout."""
    for rank, outcome in enumerate(outcomes_of(outcomes, f"{step} make value_that_does_not_unpickle {failed}")):
        assert outcome["error"] == "RankFailedError"
        assert outcome["ranks"] == {"0": "LookupError: cannot unpickle poison"}
        assert outcome["cause"] == ("NoneType" if rank else "LookupError")


@pytest.mark.parametrize("step", ["reduce_scatter", "reduce_broadcast"])
def test_a_result_that_does_not_pickle_is_an_error_of_the_coordinator(outcomes: Outcomes, step: str) -> None:
    """The others hear of it instead of the result."""
    for outcome in outcomes_of(outcomes, f"{step} reduce value_that_does_not_pickle [0]"):
        assert (outcome["error"], list(outcome["ranks"])) == ("RankFailedError", ["0"])


def test_a_part_that_does_not_unpickle_fails_the_step_that_uses_it(outcomes: Outcomes) -> None:
    """Only its own rank has it, and all hear of it."""
    for outcome in outcomes_of(outcomes, "reduce_scatter reduce value_that_does_not_unpickle [0]"):
        assert outcome["message"] == "use failed on rank 1: LookupError: cannot unpickle poison"
        assert outcome["error"] == "RankFailedError"


def test_a_result_that_does_not_unpickle_is_an_error_of_our_tree(outcomes: Outcomes) -> None:
    """Every rank has it, and names them all."""
    for outcome in outcomes_of(outcomes, "reduce_broadcast reduce value_that_does_not_unpickle [0]"):
        assert outcome["error"] == "RankFailedError"
        assert outcome["ranks"] == {str(rank): "LookupError: cannot unpickle poison" for rank in range(NRANKS)}


def test_errors_of_two_kinds_are_told_by_the_first_and_name_both(outcomes: Outcomes) -> None:
    """Ours or not: the ranks that succeeded get the first failed rank's."""
    found = outcomes_of(outcomes, "ours and foreign")
    message = "step failed on ranks 1, 2: TransferError: f: disk full"
    assert [outcome["error"] for outcome in found] == ["TransferError", "TransferError", "RankFailedError"]
    assert [outcome["message"] for outcome in found] == [message, "f: disk full\nmore", message]
    assert found[2]["ranks"] == {"1": "TransferError: f: disk full", "2": "ValueError: no such tensor"}
    found = outcomes_of(outcomes, "foreign and ours")
    message = "step failed on ranks 1, 2: ValueError: no such tensor"
    assert [outcome["error"] for outcome in found] == ["RankFailedError", "RankFailedError", "TransferError"]
    assert [outcome["message"] for outcome in found] == [message, message, "f: disk full\nmore"]
    assert [outcome["cause"] for outcome in found] == ["NoneType", "ValueError", "NoneType"]


def test_no_rank_is_told_to_try_again_where_another_cannot(outcomes: Outcomes) -> None:
    """Busy means: trying again can help. The ranks do so together or not at all, so any other failure goes first."""
    found = outcomes_of(outcomes, "busy and ours")
    message = "step failed on ranks 1, 2: TransferError: f: disk full"
    assert [outcome["error"] for outcome in found] == ["TransferError"] * 3
    assert [outcome["message"] for outcome in found] == [message, message, "f: disk full\nmore"]
    assert [outcome["cause"] for outcome in found] == ["NoneType", "CheckpointBusyError", "NoneType"]
    found = outcomes_of(outcomes, "foreign and busy")
    message = "step failed on ranks 1, 2: ValueError: no such tensor"
    assert [outcome["error"] for outcome in found] == ["RankFailedError"] * 3
    assert [outcome["message"] for outcome in found] == [message] * 3
    assert [outcome["cause"] for outcome in found] == ["NoneType", "ValueError", "CheckpointBusyError"]


@pytest.mark.parametrize("name", ["0 parts", "2 parts", "4 parts"])
def test_too_few_or_too_many_parts_are_an_error_on_every_rank(outcomes: Outcomes, name: str) -> None:
    """A planner that loses a plan would leave the other ranks waiting for theirs."""
    for outcome in outcomes_of(outcomes, name):
        assert outcome["error"] == "PlanError"
        assert f"{name} for 3 ranks" in outcome["message"]


def test_parts_that_are_no_sequence_are_an_error_on_every_rank(outcomes: Outcomes) -> None:
    """A planner may return anything."""
    assert [outcome["error"] for outcome in outcomes_of(outcomes, "no list of parts")] == ["RankFailedError"] * 3


def test_values_go_to_the_coordinator_and_parts_and_results_to_every_rank(outcomes: Outcomes) -> None:
    """In the order of the ranks; each rank makes once, the coordinator alone reduces; a vote's value stays at home."""
    for rank, outcome in enumerate(outcomes_of(outcomes, "successes")):
        scattered, broadcast, voted, calls, own_rank, is_coordinator = outcome["value"]
        assert scattered == [rank, [0, 1, 2]]
        assert broadcast == [0, 1, 2]
        assert voted == f"own of {rank}"
        assert calls == ["make", *["reduce"] * (rank == 0), "make", *["reduce"] * (rank == 0), "act"]
        assert (own_rank, is_coordinator) == (rank, rank == 0)


def test_a_group_of_some_ranks_has_its_own_coordinator(outcomes: Outcomes) -> None:
    """Its rank 0, here the second of all; errors name ranks of the group."""
    found = {name: [outcomes[rank][name][0] for rank in (1, 2)] for name in outcomes[1] if name.startswith("subgroup")}
    assert [outcome["value"] for outcome in found["subgroup who"]] == [[0, True], [1, False]]
    assert [outcome["value"] for outcome in found["subgroup scatter"]] == [[1, 2], "last"]
    assert [outcome["value"] for outcome in found["subgroup broadcast"]] == [[1, 2], [1, 2]]
    assert [outcome["error"] for outcome in found["subgroup make"]] == ["TransferError"] * 2
    assert found["subgroup make"][0]["message"] == "step failed on rank 1: TransferError: f: disk full"
    assert found["subgroup make"][1]["message"] == "f: disk full\nmore"
    assert [outcome["cause"] for outcome in found["subgroup reduce"]] == ["ValueError", "NoneType"]
    assert [outcome["ranks"] for outcome in found["subgroup vote"]] == [{"0": "ValueError: no such tensor"}] * 2
    assert [outcome["value"] for outcome in found["subgroup again"]] == [3, 3]


def test_a_rank_that_is_killed_is_an_error_of_our_tree_on_the_others(outcomes: Outcomes) -> None:
    """Whatever the process group says of it is the cause."""
    assert "killed" not in outcomes[2]
    for rank in (0, 1):
        outcome, _ = outcomes[rank]["killed"]
        assert (outcome["error"], outcome["cause"]) == ("RankFailedError", "RuntimeError")
        assert outcome["message"].startswith("step failed: the ranks lost touch with each other: ")


def test_every_rank_hears_of_a_failure_within_five_seconds_and_of_a_death_within_ten(outcomes: Outcomes) -> None:
    """Of any fault in any step, from its own call of it on."""
    spent_s = {
        (rank, name): (outcome["spent_s"], 10.0 if name == "killed" else 5.0)
        for rank, of_rank in enumerate(outcomes)
        for name, (outcome, _) in of_rank.items()
    }
    assert {place: spent for place, (spent, most) in spent_s.items() if spent >= most} == {}
    assert all((rank, "killed") in spent_s for rank in (0, 1))


# --- one process alone -----------------------------------------------------------------------------------------------


def fail(error: BaseException) -> Any:
    """Raise it, as an expression."""
    raise error


def test_a_process_alone_is_its_own_coordinator() -> None:
    """And needs no process group."""
    ranks = Ranks(None, no_dist=True)
    assert (ranks.rank, ranks.is_coordinator) == (0, True)
    assert ranks.reduce_scatter("step", lambda: 5, lambda values: [values])() == [5]
    assert ranks.reduce_broadcast("step", lambda: 5, lambda values: values) == [5]
    assert ranks.vote("step", lambda: 5) == 5


def test_a_process_alone_pickles_nothing() -> None:
    """Its values are its own: no copy, and no need to be picklable."""
    ranks = Ranks(None, no_dist=True)
    value = [lambda: 0]
    assert ranks.reduce_scatter("step", lambda: value, lambda values: values)() is value
    assert ranks.reduce_broadcast("step", lambda: value, lambda values: values[0]) is value
    assert ranks.vote("step", lambda: value) is value


@pytest.mark.parametrize(
    "error",
    [TransferError("disk full", path="f"), KeyboardInterrupt(), SystemExit(2)],
    ids=lambda error: type(error).__name__,
)
def test_a_process_alone_raises_our_errors_as_they_are(error: BaseException) -> None:
    """There is nobody to tell them to."""
    ranks = Ranks(None, no_dist=True)
    for step in (
        lambda: ranks.vote("step", lambda: fail(error)),
        lambda: ranks.reduce_scatter("step", lambda: fail(error), lambda values: values),
        lambda: ranks.reduce_scatter("step", lambda: 0, lambda _: fail(error)),
        lambda: ranks.reduce_broadcast("step", lambda: fail(error), lambda values: values),
        lambda: ranks.reduce_broadcast("step", lambda: 0, lambda _: fail(error)),
    ):
        with pytest.raises(type(error)) as caught:
            step()
        assert caught.value is error
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("no such tensor\nmore"), "ValueError: no such tensor"),
        (CheckpointException("inner", {}), "CheckpointException: "),
        (ValueError(), "ValueError: "),
    ],
    ids=["several lines", "no Exception", "no text"],
)
def test_a_process_alone_raises_foreign_errors_as_the_cause_of_ours(error: BaseException, text: str) -> None:
    """torch's CheckpointException is no Exception: a caller who waits for one would miss it."""
    with pytest.raises(RankFailedError) as caught:
        Ranks(None, no_dist=True).vote("step", lambda: fail(error))
    assert caught.value.__cause__ is error
    assert str(caught.value).startswith(f"step failed: {text}")
    assert "\n" not in str(caught.value)
    assert list(caught.value.ranks) == [0]  # type: ignore[attr-defined]


def test_a_process_alone_needs_exactly_one_part() -> None:
    """As several need one each."""
    for parts in ([], [1, 2]):
        with pytest.raises(PlanError, match=f"{len(parts)} parts for 1 rank"):
            Ranks(None, no_dist=True).reduce_scatter("step", lambda: 0, lambda _, parts=parts: parts)
