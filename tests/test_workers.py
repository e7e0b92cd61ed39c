"""Threads that do work in its order, and work that is done without any."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import gpudcp
from gpudcp.workers import Workers, until_given_back


@pytest.fixture
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the interpreter's exit."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_work_is_done_by_threads_of_that_name_in_its_order() -> None:
    """One thread does one thing after the other; each result and each error is its own."""
    seen: list[int] = []
    with Workers(1, "some") as workers:
        futures = [workers.submit(lambda n: seen.append(n) or threading.current_thread().name, n) for n in range(20)]
        assert {future.result() for future in futures} == {"some_0"}
        failed = workers.submit(lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            failed.result()
    assert seen == list(range(20))


def test_so_many_work_at_once() -> None:
    """Three that wait for each other."""
    barrier = threading.Barrier(3, timeout=20)
    with Workers(3, "some") as workers:
        for future in [workers.submit(barrier.wait) for _ in range(3)]:
            future.result()


def test_on_leaving_what_has_begun_ends_and_the_rest_is_cancelled() -> None:
    """Also after an error."""
    has_begun, may_end, ended = threading.Event(), threading.Event(), []

    def slow() -> None:
        has_begun.set()
        assert may_end.wait(20)
        ended.append(1)

    def leave() -> None:
        with Workers(1, "some") as workers:
            futures.extend([workers.submit(slow), workers.submit(ended.append, 2)])
            has_begun.wait(20)
            threading.Timer(0.05, may_end.set).start()
            raise ValueError("mine")

    futures: list[Future[None]] = []
    with pytest.raises(ValueError, match="mine"):
        leave()
    assert ended == [1]
    assert [future.cancelled() for future in futures] == [False, True]
    assert not any(thread.name.startswith("some_") for thread in threading.enumerate())


@pytest.mark.usefixtures("_no_threads")
def test_without_threads_who_submits_does_the_work() -> None:
    """At once; errors are the future's."""
    with Workers(3, "some") as workers:
        assert workers.submit(threading.current_thread).result() is threading.current_thread()
        assert isinstance(workers.submit(lambda: 1 // 0).exception(), ZeroDivisionError)


@pytest.mark.usefixtures("_no_threads")
def test_a_borrowed_thread_is_given_back_as_it_was() -> None:
    """When the job at hand is done, however; a job within a job has its own end."""
    done: list[str] = []

    def job(workers: Workers, *names: str) -> None:
        borrowed = until_given_back()
        assert borrowed is not None
        borrowed.callback(done.append, f"{names[0]} given back")
        if names[1:]:
            workers.submit(job, workers, *names[1:])
        assert until_given_back() is borrowed
        done.append(f"{names[0]} ends")
        raise ValueError(names[0])

    with Workers(1, "some") as workers:
        assert isinstance(workers.submit(job, workers, "outer", "inner").exception(), ValueError)
    assert done == ["inner ends", "inner given back", "outer ends", "outer given back"]
    assert until_given_back() is None


def test_a_workers_thread_is_not_given_back() -> None:
    """It is its own."""
    with Workers(1, "some") as workers:
        assert workers.submit(until_given_back).result() is None


def test_with_fewer_threads_than_wanted_those_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the system has."""
    start, started = threading.Thread.start, []

    def one(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", one)
    with Workers(3, "some") as workers:
        assert {workers.submit(lambda: threading.current_thread().name).result() for _ in range(5)} == {"some_0"}


def test_what_is_done_is_let_go_of() -> None:
    """Arguments and results hold memory, and it may be long until the next job."""
    with Workers(1, "some") as workers:
        tensor = torch.zeros(3)
        known = weakref.ref(tensor)
        future = workers.submit(torch.Tensor.sum, tensor)
        future.result()
        workers.submit(int).result()
        del tensor
        gc.collect()
        assert known() is None


@pytest.mark.usefixtures("_no_threads")
@pytest.mark.parametrize("executor", ["cpu", "interpret"])
def test_checkpoints_are_saved_and_loaded_without_any_thread(tmp_path: Path, executor: str) -> None:
    """By the calling thread alone: an index, several files, straight reads and slabs."""
    options = gpudcp.Options(executor=executor, slab_nbytes=1 << 16, direct_io="off")  # type: ignore[arg-type]
    saved = {f"{n}": torch.randn(1200 if n else 200_000) for n in range(40)}
    gpudcp.save(dict(saved), tmp_path, options=options)
    places = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    gpudcp.load(places, tmp_path, options=options)
    assert all(torch.equal(places[name], tensor) for name, tensor in saved.items())
