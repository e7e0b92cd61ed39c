"""Whether an index is sound, and says what its ``.metadata`` says. Opens no file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from torch.distributed.checkpoint.metadata import Metadata

from gpudcp._dcp import item_extras
from gpudcp.errors import CorruptCheckpointError
from gpudcp.files.commit import rank_of_data_file
from gpudcp.formats.index import decode_index
from gpudcp.formats.metadata import encode_metadata
from gpudcp.names import Names
from gpudcp.verification.report import Problem
from gpudcp.views import ANNOUNCEMENT, ColumnMetadata

Identity = tuple[int, int]
"""Length and CRC-32 of a pickle: what binds an index to its ``.metadata``."""


def read_index(data: bytes, *, path: str) -> tuple[ColumnMetadata, Identity]:
    """An index by itself, and the identity of the metadata that it is of.

    Raises:
        CorruptCheckpointError: it is damaged, be it by one bit that changes nothing.
    """
    header = _header(data, path)
    try:
        identity = int(header["metadata_nbytes"]), int(header["metadata_crc32"])
    except (KeyError, TypeError, ValueError) as err:
        raise CorruptCheckpointError(f"{path}: no readable index: {type(err).__name__}: {err}", path=path) from err
    indexed = decode_index(data, path=path, nbytes=identity[0], crc=identity[1])
    if indexed is None:
        raise CorruptCheckpointError(f"{path}: an index of a format that this gpudcp does not know", path=path)
    return indexed, identity


def _header(data: bytes, path: str) -> dict[str, Any]:
    """The index's own header, inside that of the safetensors file.

    The index's checksum covers what its headers say, not how: JSON can say the same in other bytes, with a space or
    another escape. These were written in one way, so a bit that makes it another way is damage.
    """
    try:
        nbytes = int.from_bytes(data[:8], "little")
        text = data[8 : 8 + nbytes].decode()
        outer: Any = json.loads(text)
        inner = outer["__metadata__"]["gpudcp"]
        header: Any = json.loads(inner)
    # Arbitrary bytes make a parser, and who takes its word, raise almost anything.
    except Exception as err:
        raise CorruptCheckpointError(f"{path}: no readable index: {type(err).__name__}: {err}", path=path) from err
    compact = json.dumps(outer, separators=(",", ":"), ensure_ascii=False)
    if text.rstrip(" ") != compact or json.dumps(header) != inner:
        raise CorruptCheckpointError(f"{path}: the header's JSON is not spelled as an index's is", path=path)
    return dict(header)


def is_written_of(data: bytes, indexed: ColumnMetadata) -> bool:
    """Whether a ``.metadata`` is, byte for byte, what a save writes of what the index says.

    Then the two agree, and it is as harmless as what this package writes: it needs no unpickling, nor the longer look
    before that. False says nothing: a save of other strings that are one object, or by another release, writes others.
    """
    return any(_is_written_of(data, each) for each in _as_saved(indexed))


def _is_written_of(data: bytes, metadata: ColumnMetadata) -> bool:
    records = metadata.row_records
    if records is None:
        return False
    # As the coordinator had them: one rank's after the other's.
    ranks = np.array([rank_of_data_file(path) or 0 for path in records.paths], dtype=np.int64)[records.path_ids]
    encoded = encode_metadata(metadata, records.reordered(np.argsort(ranks, kind="stable")))
    if encoded.nbytes != len(data):
        return False
    found, at = memoryview(data), 0
    for part in encoded.parts():
        if found[at : at + len(part)] != part:
            return False
        at += len(part)
    return True


def _as_saved(indexed: ColumnMetadata) -> Iterator[ColumnMetadata]:
    """The metadata with those texts made one object that are one on save, as a pickle says which are."""
    meta = indexed.storage_meta
    if meta is not None and meta.modules == [ANNOUNCEMENT]:
        meta = replace(meta, modules=[ANNOUNCEMENT])
    fields = {"storage_meta": meta, "version": indexed.version}
    yield ColumnMetadata(indexed.columns, indexed.row_records, **fields)
    names = indexed.columns.names
    if names.paths is not None:  # of one process the keys of nested dicts are what they were there
        known = {fqn: fqn for fqn in names.fqns}

        def one(part: Any) -> Any:
            return known.setdefault(part, part) if type(part) is str else part

        paths = {fqn: tuple(map(one, path)) for fqn, path in names.paths.items()}
        columns = replace(indexed.columns, names=Names(names.fqns, paths))
        yield ColumnMetadata(columns, indexed.row_records, **fields)


def index_problems(indexed: ColumnMetadata, metadata: Metadata, *, file: str) -> list[Problem]:
    """Every item of which the index says something else than the metadata."""
    own, found = indexed.plain(), metadata
    differing: set[str] = set()
    for fqn in own.state_dict_metadata.keys() | found.state_dict_metadata.keys():
        if own.state_dict_metadata.get(fqn) != found.state_dict_metadata.get(fqn):
            differing.add(fqn)
    own_records, records = own.storage_data or {}, found.storage_data or {}
    for index in own_records.keys() | records.keys():
        one, other = own_records.get(index), records.get(index)
        # Records are equal whatever their extras.
        if one is None or one != other or item_extras(one) != item_extras(other):
            differing.add(index.fqn)
    problems = [
        Problem(kind="index", fqn=fqn, file=file, expected="what the metadata says", found="something else")
        for fqn in sorted(differing)
    ]
    for name in ("planner_data", "storage_meta", "version"):
        one, other = getattr(own, name), getattr(found, name)
        if one != other:
            problems.append(Problem(kind="index", file=file, expected=f"the metadata's {name}", found="another"))
    return problems
