"""The benches run, small, and measure what they say: turns, bytes, the page cache, targets. No duration is judged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cache, tensors
from bench.measure import Contender, PartClock, Rounds, Timing, compare
from bench.raw import RawMemory
from bench.results import Suite
from gpudcp.files.tune import file_system_type, supports_direct_io

ROOT = Path(__file__).parents[1]
SUITES = ("small-tensors", "llm", "slices", "memory", "joins", "planning", "planning-ranks", "verify", "async")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one run of all suites, with small sizes, has written: the name of each file, its content."""
    path = tmp_path_factory.mktemp("benches")
    arguments = ["--size=small", f"--results={path / 'results'}", f"--directory={path}", "--benchmark-json=all.json"]
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--rootdir={ROOT}",
            ROOT / "bench",
            *arguments,
        ],
        cwd=path,
        capture_output=True,
        text=True,
        # In what pytest-benchmark takes for a worker of pytest-xdist it measures nothing.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
    )
    assert child.returncode == 0, child.stdout + child.stderr
    written = {file.name[len("2026-01-01-") :]: file.read_text() for file in (path / "results").iterdir()}
    return {**written, "stdout": child.stdout, "all.json": (path / "all.json").read_text()}


@pytest.mark.slow
def test_every_suite_runs_small_and_writes_json_and_a_table(small_run: dict[str, Any]) -> None:
    """So the suites cannot rot."""
    expected = {f"{name}.{kind}" for name in SUITES for kind in ("json", "md")}
    assert expected == small_run.keys() - {"stdout", "all.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_result_names_machine_versions_and_command_beside_its_figures(small_run: dict[str, Any], name: str) -> None:
    """Nobody can judge a figure without them."""
    found = json.loads(small_run[f"{name}.json"])
    assert {"date", "command", "CPU", "memory", "file systems", "kernel", "gpudcp", "torch"} <= found[
        "environment"
    ].keys()
    assert "--size=small" in found["environment"]["command"]
    assert found["tables"]
    assert found["targets"]
    assert all(seconds > 0 for table in found["tables"] for turns in table["seconds"].values() for seconds in turns)
    for target in found["targets"]:
        assert target["what"] in small_run[f"{name}.md"]
    assert found["environment"]["torch"] in small_run[f"{name}.md"]


@pytest.mark.slow
def test_the_issues_peers_stand_beside_gpudcp(small_run: dict[str, Any]) -> None:
    """Stock DCP with one thread and two, torch.save and safetensors, and the raw disk for large tensors."""
    peers = {"gpudcp", "stock DCP", "stock DCP, 2 threads", "torch.save", "safetensors"}
    whole = {
        table["title"]: table["seconds"].keys()
        for name in ("small-tensors", "llm")
        for table in json.loads(small_run[f"{name}.json"])["tables"]
        if "storage's part" not in table["title"]
    }
    assert whole
    for title, names in whole.items():
        assert peers <= names, title
        assert any("raw" in name for name in names) == ("4 KiB" not in title), title


@pytest.mark.slow
def test_a_slice_asks_the_kernel_for_little_more_than_its_own_bytes(small_run: dict[str, Any]) -> None:
    """A count, not a duration, so it holds on every machine: at most 1.02x, where stock reads the whole tensor."""
    targets = json.loads(small_run["slices.json"])["targets"]
    reads = [target for target in targets if "bytes read" in target["what"]]
    assert reads
    assert all(1 <= target["found"] <= 1.02 for target in reads)


@pytest.mark.slow
def test_small_sizes_are_never_called_met_or_missed(small_run: dict[str, Any]) -> None:
    """The targets are for the full sizes."""
    assert "MISSED" not in small_run["stdout"]
    assert "Sizes are small" in small_run["stdout"]


@pytest.mark.slow
def test_pytest_benchmark_has_every_bench_too(small_run: dict[str, Any]) -> None:
    """``--benchmark-json`` works as for any suite."""
    names = {entry["name"] for entry in json.loads(small_run["all.json"])["benchmarks"]}
    assert {"test_saving_small_tensors", "test_saving_a_model[disk]", "test_peak_extra_memory"} <= names


class Driver:
    """Gives turns as pytest-benchmark does, without a clock."""

    def pedantic(
        self,
        target: Callable[[], None],
        *,
        setup: Callable[[], None],
        teardown: Callable[[], None],
        rounds: int,
        warmup_rounds: int,
    ) -> None:
        for _ in range(warmup_rounds + rounds):
            setup()
            target()
            teardown()


def recording(name: str, calls: list[str]) -> Contender:
    """A contender that writes down when it is called."""
    return Contender(
        name=name,
        prepare=lambda: calls.append(f"prepare {name}"),
        run=lambda: calls.append(name),
        check=lambda: calls.append(f"check {name}"),
    )


def test_contenders_take_turns_each_prepared_before_and_checked_after() -> None:
    """Interleaved, never one after all rounds of another."""
    calls: list[str] = []
    compare(Driver(), [recording("a", calls), recording("b", calls)], Rounds(measured=2, warm_up=0))  # type: ignore[arg-type]
    one_round = ["prepare b", "b", "check b", "prepare a", "a", "check a"]
    assert calls == one_round * 2


def test_warm_up_turns_are_taken_and_do_not_count() -> None:
    """Three turns each, two of them count."""
    calls: list[str] = []
    contenders = [recording("a", calls), recording("b", calls)]
    timings = compare(Driver(), contenders, Rounds(measured=2, warm_up=1))  # type: ignore[arg-type]
    assert (calls.count("a"), calls.count("b")) == (3, 3)
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 2, "b": 2}
    assert Rounds(measured=2, warm_up=1).timing([9.0, 1.0, 2.0]).seconds == (1.0, 2.0)


def test_a_slow_peer_may_have_one_turn() -> None:
    """In the first round that counts."""
    calls: list[str] = []
    slow = replace(recording("slow", calls), has_one_turn=True)
    timings = compare(Driver(), [recording("a", calls), slow], Rounds(measured=3, warm_up=1))  # type: ignore[arg-type]
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "slow": 1}
    assert [call for call in calls if " " not in call] == ["a", "slow", "a", "a", "a"]


SUITE_OF_THREE = """
import os, pathlib, pytest
from bench.results import Table

def found(suite, title):
    suite.tables.append(Table(title=title, columns=("",), rows=((1,),)))

def test_good(suite):
    found(suite, "good")

def test_bad(suite):
    found(suite, "bad")
    raise ValueError("wrong bytes")

def test_ended(suite):
    os._exit(9)
"""


def test_figures_are_kept_as_soon_as_they_are_found_and_none_of_a_bench_that_failed(tmp_path: Path) -> None:
    """Of a run that is killed later there is what came before."""
    (tmp_path / "bench_three.py").write_text(SUITE_OF_THREE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.conftest"]
    child = subprocess.run(
        [*command, f"--rootdir={tmp_path}", f"--results={tmp_path / 'results'}", "bench_three.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 9, child.stdout + child.stderr
    (path,) = (tmp_path / "results").glob("*-three.json")
    found = json.loads(path.read_text())
    assert [table["title"] for table in found["tables"]] == ["good"]
    assert found["notes"] == ["test_bad: FAILED, and gives no figures"]


def test_a_contender_whose_check_fails_gives_no_figure() -> None:
    """Speed at the price of wrong bytes is none."""

    def check() -> None:
        raise ValueError("weight: what was loaded differs from what was saved")

    contenders = [Contender(name="a", run=list), Contender(name="b", run=list, check=check)]
    with pytest.raises(ValueError, match="weight: what was loaded differs"):
        compare(Driver(), contenders, Rounds(measured=1, warm_up=0))  # type: ignore[arg-type]


def test_a_part_clock_counts_the_watched_methods_alone_once_for_every_object() -> None:
    """One figure a turn, also when a watched method was never called."""

    class Storage:
        def write(self, value: int) -> int:
            return value + 1

    clock = PartClock()
    used, unused = Storage(), Storage()
    clock.watch(used, "write")
    clock.watch(unused, "write")
    assert used.write(1) == 2
    assert clock.seconds[0] > 0
    assert clock.seconds[1:] == [0.0]


def test_a_missed_target_is_named_and_a_met_one_is_not() -> None:
    """In the text and in the page alike, with what was found beside what was promised."""
    suite = Suite("demo")
    timings = {"gpudcp": Timing((1.0, 3.0, 2.0)), "stock": Timing((4.0,)), "raw": Timing((1.5,))}
    suite.add_timings("save", timings, nbytes=2 * 10**9)
    suite.expect_speed("save", timings, "gpudcp", ["stock", "absent"], 2)
    suite.expect_speed("save", timings, "gpudcp", ["stock", "raw"], 0.8)
    suite.expect("memory", 300.5, "at most", 300, " MiB")
    assert [(t.found, t.is_met, t.ratio_to_target) for t in suite.targets[:2]] == [
        (2.0, True, 1.0),
        (0.75, False, 0.9375),
    ]
    for page in (suite.as_text(), suite.as_markdown({"date": "2026-01-01"})):
        listed = page.partition("Targets missed: 2 of 3\n")[2].split("\n")
        assert listed[:2] == ["- save: gpudcp beside raw", "- memory"]
    row = suite.tables[0].rows[0]
    assert row == ("gpudcp", 2.0, 1.0, 3.0, 1.0, "")
    assert suite.tables[0].rows[1][-1] == "2.00x as fast"


def test_a_bit_that_differs_is_found_and_named() -> None:
    """Compared as bits, so a NaN equals itself and -0.0 is not 0.0."""
    model = tensors.llama_like(1 << 20, hidden=32)
    tensors.check_filled(model)
    copy = {name: tensor.clone() for name, tensor in model.items()}
    tensors.check_equal(model, copy)
    copy["master.norm.weight"].view(torch.uint8)[5] ^= 1
    with pytest.raises(ValueError, match=r"master\.norm\.weight: "):
        tensors.check_equal(model, copy)
    with pytest.raises(ValueError, match=r"master\.norm\.weight: "):
        tensors.check_filled(copy)


def test_a_llama_like_model_has_about_the_bytes_asked_for_and_both_dtypes() -> None:
    """Every weight in bf16, and again in fp32."""
    model = tensors.llama_like(8 << 20, hidden=128)
    assert abs(tensors.count_nbytes(model) - (8 << 20)) < 1 << 20
    assert {tensor.dtype for tensor in model.values()} == {torch.bfloat16, torch.float32}


def test_dropped_files_are_out_of_the_page_cache_and_warmed_ones_in_it(tmp_path: Path) -> None:
    """Every page of them."""
    if file_system_type(str(tmp_path)) == "tmpfs":
        pytest.skip("tmpfs files are never out of memory")
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * 4096 + 1))
    assert cache.cached_pages(path) == 11
    cache.drop(cache.files_of(tmp_path))
    assert cache.cached_pages(path) == 0
    cache.warm([path])
    assert cache.cached_pages(path) == 11


@pytest.fixture
def shared_memory_file() -> Iterator[Path]:
    try:
        with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="gpudcp-test-") as file:
            file.write(bytes(4096))
            file.flush()
            yield Path(file.name)
    except OSError as err:
        pytest.skip(f"/dev/shm: {err}")


def test_a_file_that_stays_cached_is_never_taken_for_a_cold_one(shared_memory_file: Path) -> None:
    """tmpfs has no device to read from."""
    with pytest.raises(cache.StillCachedError, match="1 pages are still"):
        cache.drop([shared_memory_file])


@pytest.mark.parametrize("is_direct", [False, True])
def test_raw_writes_and_reads_move_the_same_bytes(tmp_path: Path, is_direct: bool) -> None:
    """Off the block at the end, and over several files on the way back."""
    if is_direct and not supports_direct_io(str(tmp_path)):
        pytest.skip("no O_DIRECT here")
    memory = RawMemory(3 * 4096 + 5)
    memory.tensor.copy_(torch.arange(memory.nbytes) % 251)
    paths = [tmp_path / "whole", tmp_path / "again"]
    for path in paths:
        memory.write(path, is_direct=is_direct)
    assert paths[0].read_bytes() == bytes(memory.tensor.numpy())
    both = RawMemory(2 * memory.nbytes)
    both.read(paths)
    both.check_holds(paths)
    assert torch.equal(both.tensor, memory.tensor.repeat(2))
    both.tensor[-1] ^= 1
    with pytest.raises(ValueError, match="again: holds other bytes"):
        both.check_holds(paths)
