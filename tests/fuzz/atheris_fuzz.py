"""Coverage-guided fuzzing of one target, needs `pip install atheris`; the tests do without.

Usage: atheris_fuzz.py TARGET [libFuzzer options, e.g. -max_total_time=600]. What it finds goes into the working
directory; what is worth keeping belongs into the corpus.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["gpudcp"]):
    import fuzz_targets


def main(name: str, options: list[str]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fuzz-"))
    fuzzed = fuzz_targets.target(name, directory)
    for number, data in enumerate(fuzzed.seeds):
        (directory / f"seed-{number}").write_bytes(data)

    def attempt(data: bytes) -> None:
        fuzz_targets.attempt(fuzzed, data)

    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=4096", "-timeout=20", str(directory)], attempt)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
