"""Run the GPU tests and every GPU bench in one go, within a limit of time, and leave what they found in one folder.

Usage: python -m bench.gpu.report --out DIRECTORY [--limit-s SECONDS] [--commit NAME]

For a GPU that is there only for a while: each part has a limit of its own, a part that fails or hangs takes none of the
others with it, and what is found is packed into three files: report.txt, results.tar.gz, logs.tar.gz.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LIMIT_S = 570.0
_LEAST_S = 3.0
_SHOWN_LINES = 25
_BENCHES = {"pack": 60.0, "small_tensors": 90.0, "crc": 60.0, "files": 240.0}
_KERNEL_TESTS = ("pack", "unpack", "dequant", "checksum", "casts")
_TRANSFER_TESTS = ("transfers", "streams", "distributed", "memory")
_DESCRIBE = """
import os, gpudcp
from bench.gpu.hardware import clocks, describe_gpu
for name, value in describe_gpu().items():
    print(f"{name}: {value}")
print("clocks:", clocks())
print(gpudcp.probe(os.getcwd()))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One command, in a process of its own."""

    name: str
    command: tuple[str, ...]
    limit_s: float
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
        return self.result == "ok"

    @property
    def last_line(self) -> str:
        """For tests: how many passed, and how many were skipped, which is nothing found."""
        lines = self.log.strip().splitlines()
        return "" if self.part.keeps or not lines else lines[-1].strip(" =")


def all_parts(out: Path, *, commit: str) -> list[Part]:
    """What there is to run, what matters most first."""
    pytest = (sys.executable, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider")
    # Hundreds of kernels are compiled for the first time: by as many processes as there are cores, where that works.
    in_parallel = ("-n", str(min(12, os.cpu_count() or 1))) if find_spec("xdist") else ()
    kernel_tests = (f"tests/gpu/test_gpu_{name}.py" for name in _KERNEL_TESTS)
    transfer_tests = (f"tests/gpu/test_gpu_{name}.py" for name in _TRANSFER_TESTS)
    bench = ("-s", "--size=full", f"--results={out / 'results'}", f"--commit={commit}")
    benches = {
        name: Part(name=f"bench {name}", command=(*pytest, f"bench/gpu/bench_gpu_{name}.py", *bench), limit_s=limit_s)
        for name, limit_s in _BENCHES.items()
    }
    return [
        Part(name="machine", command=(sys.executable, "-c", _DESCRIBE), limit_s=60),
        Part(name="kernel tests", command=(*pytest, "-m", "gpu", *in_parallel, *kernel_tests), limit_s=180),
        benches["pack"],
        benches["crc"],
        benches["small_tensors"],
        Part(
            name="transfer tests",
            command=(*pytest, "-m", "gpu", "-rA", *transfer_tests, "tests/files/test_kvikio_gpu.py"),
            limit_s=180,
        ),
        benches["files"],
        Part(
            name="casts of CUDA",
            command=(sys.executable, "tests/gpu/to_table.py"),
            limit_s=60,
            keeps="cuda_to.json",
        ),
        Part(name="sanitizer", command=("make", "sanitize-gpu", f"PYTHON={sys.executable}"), limit_s=120),
    ]


def run_all(parts: Sequence[Part], out: Path, *, limit_s: float) -> list[Outcome]:
    """One after the other; what is left when the time is up is not run, and said so."""
    for name in ("results", "logs"):
        (out / name).mkdir(parents=True, exist_ok=True)
    end_s = time.monotonic() + limit_s
    outcomes = []
    for part in parts:
        left_s = end_s - time.monotonic()
        if left_s < _LEAST_S:
            outcomes.append(Outcome(part=part, result="not run: no time left", seconds=0.0, log=""))
            continue
        outcomes.append(_run(part, out, limit_s=min(part.limit_s, left_s)))
        print(f"{part.name}: {outcomes[-1].result}, {outcomes[-1].seconds:.1f} s", flush=True)
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
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            result = f"STOPPED after {limit_s:.0f} s"
    text = log.read_text(encoding="utf-8", errors="replace")
    if part.keeps and result == "ok":
        (out / "results" / part.keeps).write_text(text, encoding="utf-8")
    elif errors:
        text += errors.read_text(encoding="utf-8", errors="replace")
    return Outcome(part=part, result=result, seconds=time.monotonic() - start_s, log=text)


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
    """Run everything; 0 if all of it was well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="the folder for what is found")
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S, help="for everything together")
    parser.add_argument("--commit", default="", help="of this tree, where git is not there to be asked")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    outcomes = run_all(all_parts(out, commit=arguments.commit), out, limit_s=arguments.limit_s)
    text = summary(outcomes, out / "results")
    (out / "report.txt").write_text(text, encoding="utf-8")
    pack_up(out)
    print(text, end="")
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
