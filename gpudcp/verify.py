"""verify: every checksum, every range and every file of a checkpoint, ours or stock's."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.distributed.checkpoint.metadata import Metadata

from gpudcp.collector import collector_paused
from gpudcp.errors import CheckpointBusyError, CheckpointNotFoundError, GpuDcpError, TransferError
from gpudcp.executors.select import HOST_SLAB_NBYTES
from gpudcp.files.base import FileReader
from gpudcp.files.commit import metadata_file_name, metadata_names, stale_data_names
from gpudcp.files.regular import open_regular
from gpudcp.files.ways import open_reader
from gpudcp.formats.index import SUFFIX
from gpudcp.formats.metadata import TRAILER_NBYTES, decode_metadata, identity_of
from gpudcp.options import Options
from gpudcp.storage.places import directory_of
from gpudcp.storage.stored import Window
from gpudcp.verification.claims import Claim, claims_of
from gpudcp.verification.expected import ExpectedFile, expected_file, items_by_file
from gpudcp.verification.indexes import Identity, index_problems, is_written_of, read_index
from gpudcp.verification.reading import Comparison
from gpudcp.verification.report import Problem, VerifyReport
from gpudcp.views import ColumnMetadata


def verify(path: str | os.PathLike[str], *, options: Options | None = None) -> VerifyReport:
    """Check a whole checkpoint, gpudcp's or stock torch's, and list everything that is wrong with it.

    Of what gpudcp wrote every byte is checked: payloads, envelopes and objects, ``.metadata`` and its index. Of what
    stock torch wrote, every record that has a checksum, and that files, ranges, chunks and shapes agree; its
    ``.metadata`` and its zip headers have none. Reads every data file once, in ``lanes`` slabs at a time; runs no code
    of a pickle, loads no object, and writes nothing. A problem never ends it.

    Args:
        path: the checkpoint's directory.
        options: ``lanes``, ``threads`` and ``slab_nbytes`` are used: memory is ``lanes * slab_nbytes``.

    Raises:
        CheckpointNotFoundError: there is no checkpoint.
        CheckpointBusyError: a newer checkpoint replaced it meanwhile.
        TransferError: its metadata cannot be read.
    """
    options = options or Options()
    started_s = time.perf_counter()
    directory = directory_of(path)
    try:
        names = metadata_names(directory)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as err:
        raise TransferError(f"{directory}: cannot be read: {err.strerror}", path=directory, errno=err.errno) from err
    if not names:
        raise CheckpointNotFoundError(f"{directory}: no checkpoint: {metadata_file_name(None)} is missing")
    comparison = Comparison(
        lanes=min(options.lanes, options.threads or options.lanes),
        slab_nbytes=options.slab_nbytes or HOST_SLAB_NBYTES,
    )
    found = _Found()
    with collector_paused():
        for name in names:
            _verify_metadata(directory, name, comparison, found)
    problems = found.problems + comparison.problems
    return VerifyReport(
        path=directory,
        problems=tuple(sorted(problems, key=lambda each: (each.file or "", each.byte_offset or 0, each.fqn or ""))),
        unverified=tuple(found.unverified),
        stale=_stale(directory, found),
        nfiles=len(found.data_files),
        nitems=found.nitems,
        nbytes=comparison.nbytes,
        total_s=time.perf_counter() - started_s,
    )


@dataclass(slots=True)
class _Found:
    """What all metadata files of a directory have led to so far."""

    problems: list[Problem] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    data_files: set[str] = field(default_factory=set)
    nitems: int = 0
    is_unreadable: bool = False
    """Whether there is metadata of which nobody knows what it names."""


def _verify_metadata(directory: str, name: str, comparison: Comparison, found: _Found) -> None:
    """Check one metadata file, its index, and all that it names."""
    path = os.path.join(directory, name)
    nproblems = len(found.problems) + len(comparison.problems)
    data = _content(path)
    if data is None:
        raise CheckpointBusyError(f"{directory}: {name} was removed during this verification; verify again")
    identity = identity_of(data[-TRAILER_NBYTES:], len(data))
    metadata = _metadata(data, path, identity, found)
    if metadata is None:
        found.is_unreadable = True
        return
    claims, problems = claims_of(metadata, directory, file=name)
    found.problems += problems
    found.nitems += len(claims)
    comparison.run(_expected_files(directory, claims, found, is_ours=identity is not None))
    if len(found.problems) + len(comparison.problems) > nproblems and _content(path) != data:
        raise CheckpointBusyError(f"{directory}: a newer checkpoint replaced {name} during this verification")


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb", opener=open_regular) as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as err:
        raise TransferError(f"{path}: cannot be read: {err.strerror}", path=path, errno=err.errno) from err


def _metadata(data: bytes, path: str, identity: Identity | None, found: _Found) -> Metadata | None:
    """What the metadata file says or, where it cannot be read, what its index says."""
    name = os.path.basename(path)
    indexed = _indexed(path, identity, found)
    if indexed is not None and is_written_of(data, indexed):
        return indexed
    metadata = None
    try:
        metadata = decode_metadata(data, path=path, trust_pickle=False)
    except GpuDcpError as err:
        found.problems.append(Problem(kind="metadata", file=name, expected="a checkpoint's metadata", found=str(err)))
    if metadata is None or indexed is None:
        return metadata or indexed
    found.problems += index_problems(indexed, metadata, file=name + SUFFIX)
    return metadata


def _indexed(path: str, identity: Identity | None, found: _Found) -> ColumnMetadata | None:
    """What the index says, where there is one of this very metadata."""
    name = os.path.basename(path) + SUFFIX
    try:
        if (data := _content(path + SUFFIX)) is None:
            return None
        indexed, identity_of_its = read_index(data, path=path + SUFFIX)
    except GpuDcpError as err:
        found.problems.append(Problem(kind="index", file=name, expected="an index", found=str(err)))
        return None
    if identity_of_its != identity:
        found.stale.append(name)
        return None
    return indexed


def _expected_files(
    directory: str, claims: list[Claim], found: _Found, *, is_ours: bool
) -> Iterator[tuple[ExpectedFile, FileReader]]:
    """Each file that is there, open, with what it should hold; one is closed when its last slab has been read."""
    for path, own in items_by_file(claims):
        found.data_files.add(path)
        try:
            reader = open_reader(os.path.join(directory, path), "buffered")
        except (CheckpointNotFoundError, TransferError) as err:
            lost = ", ".join(claim.item.fqn for claim in own[:_MOST_NAMED])
            expected = f"a file of {len(own)} items: {lost}{', ...' if len(own) > _MOST_NAMED else ''}"
            found.problems.append(Problem(kind="file", file=path, expected=expected, found=str(err)))
            continue
        file, problems = expected_file(own, Window(reader), path, is_ours=is_ours)
        found.problems += problems
        found.unverified += [item.fqn for item in file.items if item.fqn is not None and not item.is_verified]
        yield file, reader


_MOST_NAMED = 5


def _stale(directory: str, found: _Found) -> tuple[str, ...]:
    if found.is_unreadable:
        return tuple(found.stale)  # what that names is no rubbish
    return (*found.stale, *sorted(set(stale_data_names(directory, rank=None)) - found.data_files))
