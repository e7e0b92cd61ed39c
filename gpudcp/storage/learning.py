"""Remember how fast a transfer was, so that the next one takes the better way."""

from __future__ import annotations

from gpudcp.executors.select import Selection
from gpudcp.files.figures import record_transfer
from gpudcp.options import is_first_rank_of_node
from gpudcp.report import TransferReport


def learn(report: TransferReport, selection: Selection) -> None:
    """From one rank of each node; not from a transfer that another executor took over, nor from one of several GPUs."""
    took_over = selection.device != "cpu" and report.executor == "cpu"
    if is_first_rank_of_node() and not took_over and len(selection.devices) < 2:
        record_transfer(
            report.path,
            selection.device,
            direction="write" if report.direction == "save" else "read",
            way=selection.way,
            threads=selection.threads,
            request_nbytes=selection.executor.slab_nbytes,
            nbytes=report.file_nbytes,
            seconds=report.total_s - report.phases_s.get("compile", 0.0),  # once for all transfers
        )
