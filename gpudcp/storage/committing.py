"""The commit of a checkpoint whose bytes are on stable storage: name them, then remove what nothing names any more."""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import suppress

from torch.distributed.checkpoint.metadata import Metadata

from gpudcp.errors import GpuDcpError
from gpudcp.files.commit import (
    file_to_replace,
    is_data_file_name,
    metadata_file_name,
    metadata_names,
    rank_of_data_file,
    remove_files,
    replace_file,
    stale_data_names,
)
from gpudcp.files.regular import open_regular
from gpudcp.formats import index as index_format
from gpudcp.formats.metadata import decode_metadata, encode_metadata
from gpudcp.records import ItemRecords
from gpudcp.workers import Workers

_logger = logging.getLogger("gpudcp")

_MOST_NAMED = 3


def commit(directory: str, metadata: Metadata, records: ItemRecords, *, rank: int | None, fsync: bool) -> None:
    """Put the metadata in place of the old one, then remove the data files that the old one alone named.

    Args:
        directory: the checkpoint's.
        metadata: of all ranks' items.
        records: where those are.
        rank: of a save without collectives, which has metadata of its own; None: of all ranks together.
        fsync: whether each step is on stable storage before the next one.
    """
    _warn_of_unseen(directory, records)
    name = metadata_file_name(rank)
    replaced = _replaced_names(directory, name)
    _replace_metadata(directory, name, metadata, records, fsync=fsync)
    _clean_up(directory, set(records.paths), replaced, rank, fsync=fsync)


def _replace_metadata(directory: str, name: str, metadata: Metadata, records: ItemRecords, *, fsync: bool) -> None:
    """Put the metadata in place, with an index beside it where that is worth it."""
    encoded = encode_metadata(metadata, records)
    with Workers(1, "gpudcp-index") as beside:
        # Beside each other, as NumPy lets go of the interpreter.
        columns = beside.submit(index_format.index_columns, metadata, records)
        with file_to_replace(directory, name, encoded.parts(), fsync=fsync):
            index = columns.result()
            # The index first: beside the old .metadata it is of another one, and not read.
            if index is not None:
                data = index.encoded(nbytes=encoded.pickle_nbytes, crc=encoded.crc32)
                replace_file(directory, name + index_format.SUFFIX, [data], fsync=fsync)
    if index is None:
        with suppress(OSError):
            os.unlink(os.path.join(directory, name + index_format.SUFFIX))


def _warn_of_unseen(directory: str, records: ItemRecords) -> None:
    """Say so where the ranks' files are not all here. No error: some gather files of their nodes' own disks later.

    One listing, as a look for each of thousands of files takes its time on a file system of many machines; of what
    such a listing lacks, which may be behind, each is looked for.
    """
    listed = set(os.listdir(directory))
    unseen = [
        path for path in records.paths if path not in listed and not os.path.lexists(os.path.join(directory, path))
    ]
    if not unseen:
        return
    named = ", ".join(f"{path} of rank {rank_of_data_file(path)}" for path in unseen[:_MOST_NAMED])
    warnings.warn(
        f"{directory}: {len(unseen)} of {len(records.paths)} files that the ranks have written are not in it: "
        f"{named}{', ...' if len(unseen) > _MOST_NAMED else ''}; this checkpoint cannot be loaded without them. "
        "All ranks must be given the same directory, on a file system that all of them see",
        UserWarning,
        stacklevel=2,
    )


def _replaced_names(directory: str, metadata_name: str) -> set[str]:
    """Data files that the metadata about to be replaced names, by stock's names, which carry no save id."""
    if not any(is_data_file_name(name, has_save_id=False) for name in os.listdir(directory)):
        return set()
    names = _names_in(directory, metadata_name) or set()
    return {name for name in names if is_data_file_name(name, has_save_id=False)}


def _clean_up(directory: str, needed: set[str], replaced: set[str], rank: int | None, *, fsync: bool) -> None:
    for metadata_name in metadata_names(directory):
        if metadata_name != metadata_file_name(rank):
            named = _names_in(directory, metadata_name)
            if named is None:
                return  # unreadable: what it needs is unknown, so nothing is removed
            needed |= named
    stale = (set(stale_data_names(directory, rank=rank)) | replaced) - needed
    remove_files(directory, stale, fsync=fsync, rank=rank)


def _names_in(directory: str, metadata_name: str) -> set[str] | None:
    """The files that a metadata file names; none if it does not exist, None if it cannot be read."""
    path = os.path.join(directory, metadata_name)
    try:
        with open(path, "rb", opener=open_regular) as file:
            metadata = decode_metadata(file.read(), path=path, trust_pickle=False)
        paths = [info.relative_path for info in (metadata.storage_data or {}).values()]
        return {path for path in paths if isinstance(path, str)}
    except FileNotFoundError:
        return set()
    except (OSError, GpuDcpError, AttributeError) as err:
        _logger.warning("%s: cannot be read, so old files are left in place: %s", path, err)
        return None
