"""``python -m gpudcp``: gpudcp for scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TextIO

from gpudcp.errors import GpuDcpError
from gpudcp.options import Options
from gpudcp.verification.report import printable
from gpudcp.verify import verify

_OK, _PROBLEMS, _NOT_VERIFIED = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gpudcp", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify_command = commands.add_parser(
        "verify",
        help="check every byte of a checkpoint",
        epilog="Exit code: 0 all is well, 1 there are problems, 2 there is no checkpoint, or it could not be read.",
    )
    verify_command.add_argument("path", help="the checkpoint's directory")
    verify_command.add_argument("--lanes", type=int, default=Options().lanes, help="slabs read at once")
    given = parser.parse_args(arguments)
    try:
        report = verify(given.path, options=Options(lanes=given.lanes))
    except GpuDcpError as err:
        _show(printable(str(err)), sys.stderr)
        return _NOT_VERIFIED
    _show(str(report), sys.stdout)
    return _OK if report.ok else _PROBLEMS


def _show(text: str, stream: TextIO) -> None:
    """Print, whatever the terminal's encoding lacks."""
    print(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding), file=stream)


if __name__ == "__main__":
    sys.exit(main())
