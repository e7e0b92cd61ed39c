"""Run the GPU tests and every GPU bench in one go, within a limit of time, and leave what they found in one folder.

Usage: python -m bench.gpu.report --out DIRECTORY [--only PART,PART] [--limit-s SECONDS] [--commit NAME]

For a GPU that is there only for a while: each part has a share of the time and what those before it left of theirs, a
part that fails or hangs takes none of the others with it, and what is found is there as soon as it is found, should
this be ended too. At the end it is packed into three files: report.txt, results.tar.gz, logs.tar.gz.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LIMIT_S = 570.0
_LEAST_S = 3.0
_GRACE_S = 5.0
_SHOWN_LINES = 25
_COUNTS = re.compile(r"^=* ?\d+ (passed|failed|skipped|error|warning|deselected).* in [\d.]+s")
_KERNEL_TESTS = ("pack", "unpack", "dequant", "checksum", "casts")
_TRANSFER_TESTS = ("transfers", "streams", "async", "distributed")
_DESCRIBE = """
import os, shutil, gpudcp
from bench.gpu.hardware import clocks, describe_gpu
for name, value in describe_gpu().items():
    print(f"{name}: {value}")
print("clocks:", clocks())
for place in ("/dev/shm", os.getcwd()):
    print(f"{place}: {shutil.disk_usage(place).free / 2**30:.1f} GiB free")
print(gpudcp.probe(os.getcwd()))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command, in a process of its own."""

    name: str
    command: tuple[str, ...]
    share_s: float
    """Of the time for all parts, when that is `_LIMIT_S` and none is left out."""
    keeps: str | None = None
    """Under which name its output is a result; None: it is a log only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part ended."""

    part: Part
    result: str
    seconds: float
    log: str

    @property
    def is_good(self) -> bool:
        return self.result in ("ok", "skipped")

    @property
    def last_line(self) -> str:
        """For tests: how many passed, and how many were skipped, which is nothing found."""
        lines = self.log.strip().splitlines()
        counts = [line for line in lines if _COUNTS.search(line)]  # compute-sanitizer has the last word after pytest's
        return "" if self.part.keeps or not lines else (counts or lines)[-1].strip(" =")


def all_parts(out: Path, *, commit: str) -> list[Part]:
    """What there is to run, what matters most first."""
    pytest = (sys.executable, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider", "-p", "bench.gpu.interrupts")
    # Hundreds of kernels are compiled for the first time: by as many processes as there are cores, where that works.
    in_parallel = ("-n", str(min(12, os.cpu_count() or 1))) if find_spec("xdist") else ()
    kernel_tests = (f"tests/gpu/test_gpu_{name}.py" for name in _KERNEL_TESTS)
    transfer_tests = (f"tests/gpu/test_gpu_{name}.py" for name in _TRANSFER_TESTS)
    tests = (*pytest, "-v", "-m", "gpu")  # -v: what was ended says what it had run

    def bench(name: str, share_s: float) -> Part:
        command = (*pytest, f"bench/gpu/bench_gpu_{name}.py", "-v", "-s", "--size=full")
        options = (f"--results={out / 'results'}", f"--commit={commit}")
        return Part(name=name, command=(*command, *options), share_s=share_s)

    return [
        Part(name="machine", command=(sys.executable, "-c", _DESCRIBE), share_s=20),
        Part(name="kernels", command=(*tests, *in_parallel, *kernel_tests), share_s=75),
        bench("pack", 35),
        bench("crc", 35),
        bench("small_tensors", 40),
        bench("files", 170),
        Part(name="transfers", command=(*tests, "-rA", *transfer_tests, "tests/files/test_kvikio_gpu.py"), share_s=75),
        bench("async", 30),
        Part(name="casts", command=(sys.executable, "tests/gpu/to_table.py"), share_s=15, keeps="cuda_to.json"),
        Part(name="memory", command=(*tests, "-rA", "tests/gpu/test_gpu_memory.py"), share_s=55),
        Part(
            name="sanitizer",
            command=("make", "--no-print-directory", "sanitize-gpu", f"PYTHON={sys.executable}"),
            share_s=20,
        ),
    ]


def chosen(parts: Sequence[Part], only: str) -> list[Part]:
    """The parts of these names, separated by commas, in their own order; all of them for no name.

    Raises:
        ValueError: there is no part of such a name.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    known = [part.name for part in parts]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no part is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [part for part in parts if not names or part.name in names]


def run_all(parts: Sequence[Part], out: Path, *, limit_s: float) -> list[Outcome]:
    """One after the other, each with its share of the time and what those before it left of theirs.

    What finds no time is not run, and said so. The report is written again after each part.
    """
    for name in ("results", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As a shell leaves it to what it starts in the background; parts inherit it, and could not be asked to end.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    start_s = time.monotonic()
    all_shares_s = sum(part.share_s for part in parts)
    shares_s = 0.0
    outcomes: list[Outcome] = []
    for part in parts:
        shares_s += part.share_s
        left_s = start_s + (limit_s - _GRACE_S) * shares_s / all_shares_s - time.monotonic()
        if left_s < _LEAST_S:
            outcomes.append(Outcome(part=part, result="not run: no time left", seconds=0.0, log=""))
            continue
        outcomes.append(_run(part, out, limit_s=left_s))
        print(f"{part.name}: {outcomes[-1].result}, {outcomes[-1].seconds:.1f} s", flush=True)
        (out / "report.txt").write_text(summary(outcomes, out / "results"), encoding="utf-8")
    return outcomes


def _run(part: Part, out: Path, *, limit_s: float) -> Outcome:
    log = out / "logs" / f"{part.name.replace(' ', '-')}.txt"
    path = os.pathsep.join(filter(None, (str(_ROOT), str(_ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    start_s = time.monotonic()
    errors = log.with_suffix(".stderr.txt") if part.keeps else None  # a result is what was printed, and no warnings
    with log.open("wb") as into, errors.open("wb") if errors else nullcontext(subprocess.STDOUT) as errors_into:
        # A session of its own: what hangs is ended with all that it has started.
        child = subprocess.Popen(
            part.command, cwd=_ROOT, env=environment, stdout=into, stderr=errors_into, start_new_session=True
        )
        try:
            code = child.wait(limit_s)
            result = "ok" if code == 0 else f"FAILED, exit code {code}"
        except subprocess.TimeoutExpired:
            _end(child)
            result = f"STOPPED after {limit_s:.0f} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    if result == "ok" and text.strip().rpartition("\n")[2].startswith("sanitize-gpu: skipped"):
        result = "skipped"
    if part.keeps and result == "ok":
        (out / "results" / part.keeps).write_text(text, encoding="utf-8")
    elif errors:
        text += errors.read_text(encoding="utf-8", errors="replace")
    return Outcome(part=part, result=result, seconds=time.monotonic() - start_s, log=text)


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it has started. Asked first: so pytest says what failed, and takes gigabytes of files away."""
    for signal_number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal_number)
        with suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE_S)


def summary(outcomes: Sequence[Outcome], results: Path) -> str:
    """The ends of what failed, then every target beside what was found, then the parts: the shortest comes last."""
    lines: list[str] = []
    for outcome in outcomes:
        if not outcome.is_good and outcome.log:
            lines += [f"--- {outcome.part.name}", *outcome.log.splitlines()[-_SHOWN_LINES:]]
    lines += ["", "target | found | asked for | "]
    for path in sorted(results.glob("*-gpu-*.json")):
        for target in json.loads(path.read_text(encoding="utf-8"))["targets"]:
            found, asked = (f"{target[key]:.4g}{target['unit']}" for key in ("found", "target"))
            verdict = "met" if target["is_met"] else "MISSED"
            lines.append(f"{target['what']} | {found} | {target['relation']} {asked} | {verdict}")
    lines += ["", "part | result | s | last line"]
    lines += [f"{o.part.name} | {o.result} | {o.seconds:.1f} | {o.last_line}" for o in outcomes]
    return "\n".join(lines) + "\n"


def pack_up(out: Path) -> None:
    """The folders as one archive each: few files are easily carried."""
    for name in ("results", "logs"):
        with tarfile.open(out / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(out / name, arcname=name)
        shutil.rmtree(out / name)


def main() -> int:
    """Run what is asked for; 0 if all of it was well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the folder for what is found")
    parser.add_argument("--only", default="", help="the names of some parts, as in files,transfers")
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S, help="for everything together")
    parser.add_argument("--commit", default="", help="of this tree, where git is not there to be asked")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    try:
        parts = chosen(all_parts(out, commit=arguments.commit), arguments.only)
    except ValueError as err:
        parser.error(str(err))
    outcomes = run_all(parts, out, limit_s=arguments.limit_s)
    text = summary(outcomes, out / "results")
    (out / "report.txt").write_text(text, encoding="utf-8")
    pack_up(out)
    print(text, end="")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
