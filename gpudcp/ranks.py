"""The ranks of a save or a load: steps that either succeed on all of them or raise on all of them.

After each step the ranks exchange what came of it, over public torch.distributed collectives. Values are pickled before
they are sent and unpickled inside the step that uses them, so a value that cannot be is an error like any other, and no
rank is left waiting for one that has already given up.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch.distributed as dist

from gpudcp.errors import CheckpointBusyError, GpuDcpError, PlanError, RankFailedError

T = TypeVar("T")
R = TypeVar("R")


class _Failure(NamedTuple):
    """An error on its way to other ranks: its first line and, if it is of our tree and can travel, itself, pickled."""

    text: str
    pickled: bytes | None
    is_busy: bool

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        return cls(_in_a_line(error), _pickled(error), isinstance(error, CheckpointBusyError))

    def error(self) -> GpuDcpError | None:
        """A copy of the error, if there can be one on this rank."""
        try:
            return None if self.pickled is None else pickle.loads(self.pickled)
        except Exception:  # a user's subclass: unpickling it may raise anything, as where its module is unknown
            return None


def _in_a_line(error: BaseException) -> str:
    try:
        text = str(error).strip()
    except Exception:  # some errors cannot even be printed
        text = ""
    return f"{type(error).__name__}: {text.partition(chr(10))[0]}"


def _pickled(error: BaseException) -> bytes | None:
    if not isinstance(error, GpuDcpError):
        return None
    try:
        return pickle.dumps(error)
    except Exception:  # a user's subclass
        return None


class _Outcome(NamedTuple):
    """What came of a step on one rank, or of all ranks: a pickled value, or who failed."""

    pickled: bytes
    failures: dict[int, _Failure]


class Ranks:
    """The ranks of one process group, or this process alone; the coordinator is the group's rank 0.

    Every method is called by all ranks together. When a step fails on some, all raise: a rank that failed its own error
    or, where that is not of gpudcp's tree, a RankFailedError `from` it; the others the first failed rank's, with the
    failed ranks named. KeyboardInterrupt and SystemExit stay what they are on the rank that got them.
    """

    def __init__(self, group: dist.ProcessGroup | None, *, no_dist: bool) -> None:
        self._group = group
        self._is_alone = no_dist
        self.rank = 0 if no_dist else dist.get_rank(group)
        if self.rank < 0:
            raise PlanError(f"rank {dist.get_rank()} is not in the process group that it was given")
        self._size = 1 if no_dist else dist.get_world_size(group)
        self._coordinator = 0 if no_dist or group is None else dist.get_global_rank(group, 0)
        self.is_coordinator = self.rank == 0

    def reduce_scatter(
        self, step: str, make: Callable[[], T], reduce: Callable[[list[T]], Sequence[R]]
    ) -> Callable[[], R]:
        """Make a value on each rank, reduce them on the coordinator, and give each rank its part, to be called for."""

        def parts_of(values: list[T]) -> Sequence[R]:
            parts = reduce(values)
            if len(parts) != self._size:
                raise PlanError(f"{step}: {len(parts)} parts for {self._size} rank{'s' * (self._size > 1)}")
            return parts

        if self._is_alone:
            part = self._alone(step, lambda: parts_of([make()])[0])
            return lambda: part
        own, error = self._attempt(lambda: pickle.dumps(make()))
        parts: list[_Outcome] | None = None
        if (gathered := self._gather(step, own)) is not None:
            parts, own_error = self._reduce(gathered, lambda values: [pickle.dumps(part) for part in parts_of(values)])
            error = error or own_error
        received: list[Any] = [None]
        with _in_touch(step):
            dist.scatter_object_list(received, parts, src=self._coordinator, group=self._group)
        pickled = self._pickled_value(step, received[0], error)
        return lambda: pickle.loads(pickled)

    def reduce_broadcast(self, step: str, make: Callable[[], T], reduce: Callable[[list[T]], R]) -> R:
        """Make a value on each rank, reduce them on the coordinator, and give the result to every rank."""
        if self._is_alone:
            return self._alone(step, lambda: reduce([make()]))
        own, error = self._attempt(lambda: pickle.dumps(make()))
        sent: list[Any] = [None]
        if (gathered := self._gather(step, own)) is not None:
            parts, own_error = self._reduce(gathered, lambda values: [pickle.dumps(reduce(values))] * self._size)
            error = error or own_error
            sent = parts[:1]
        with _in_touch(step):
            dist.broadcast_object_list(sent, src=self._coordinator, group=self._group)
        pickled = self._pickled_value(step, sent[0], error)
        result: R = self.vote(step, lambda: pickle.loads(pickled))
        return result

    def vote(self, step: str, act: Callable[[], T]) -> T:
        """Act on each rank; return this rank's own value when all have succeeded."""
        if self._is_alone:
            return self._alone(step, act)
        values: list[T] = []

        def attempt() -> bytes:
            values.append(act())
            return b""

        own, error = self._attempt(attempt)
        outcomes: list[Any] = [None] * self._size
        with _in_touch(step):
            dist.all_gather_object(outcomes, own.failures, group=self._group)
        failures = {rank: failure for outcome in outcomes for rank, failure in outcome.items()}
        if failures:
            self._raise(step, failures, error)
        return values[0]

    def _alone(self, step: str, act: Callable[[], T]) -> T:
        try:
            return act()
        except BaseException as error:  # torch's CheckpointException is no Exception
            self._raise(step, {self.rank: _Failure.of(error)}, error)

    def _attempt(self, act: Callable[[], bytes]) -> tuple[_Outcome, BaseException | None]:
        try:
            return _Outcome(act(), {}), None
        except BaseException as error:
            return _Outcome(b"", {self.rank: _Failure.of(error)}), error

    def _gather(self, step: str, own: _Outcome) -> list[_Outcome] | None:
        gathered: list[Any] | None = [None] * self._size if self.is_coordinator else None
        with _in_touch(step):
            dist.gather_object(own, gathered, dst=self._coordinator, group=self._group)
        return gathered

    def _reduce(
        self, gathered: list[_Outcome], reduce: Callable[[list[Any]], list[bytes]]
    ) -> tuple[list[_Outcome], BaseException | None]:
        """One outcome for each rank: its part or, for all of them, who failed."""
        failures = {rank: failure for outcome in gathered for rank, failure in outcome.failures.items()}
        error: BaseException | None = None
        if not failures:
            try:
                parts = reduce([pickle.loads(outcome.pickled) for outcome in gathered])
                return [_Outcome(part, {}) for part in parts], None
            except BaseException as err:
                error = err
                failures = {self.rank: _Failure.of(err)}
        return [_Outcome(b"", failures)] * self._size, error

    def _pickled_value(self, step: str, outcome: _Outcome, error: BaseException | None) -> bytes:
        if outcome.failures:
            self._raise(step, outcome.failures, error)
        return outcome.pickled

    def _raise(self, step: str, failures: dict[int, _Failure], own: BaseException | None) -> NoReturn:
        """Raise what this rank raises for these failures, of which ``own`` may be one."""
        # A rank that is told to try again must not do so alone: any other failure goes before this one, on all ranks.
        final = [rank for rank, failure in failures.items() if not failure.is_busy]
        if isinstance(own, (GpuDcpError, KeyboardInterrupt, SystemExit)) and not (
            final and isinstance(own, CheckpointBusyError)
        ):
            raise own
        ranks = sorted(failures)
        first = failures[min(final or ranks)]
        where = "" if self._is_alone else f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        message = f"{step} failed{where}: {first.text}"
        if (own is None or isinstance(own, CheckpointBusyError)) and (error := first.error()) is not None:
            error.args = (message,)
            raise error from own
        raise RankFailedError(message, ranks={rank: failures[rank].text for rank in ranks}) from own


@contextmanager
def _in_touch(step: str) -> Iterator[None]:
    """A collective, which fails where a rank has died or does not answer."""
    try:
        yield
    except RuntimeError as err:
        raise RankFailedError(
            f"{step} failed: the ranks lost touch with each other: {_in_a_line(err)}", ranks={}
        ) from err
