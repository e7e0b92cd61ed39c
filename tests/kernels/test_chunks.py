"""Parts cut into chunks: everything is covered once, and every program's blocks hold its chunks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from gpudcp_kernels import chunks
from gpudcp_kernels.chunks import Parts, Variant
from gpudcp_kernels.tables import Table
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = Variant(lanes=8, groups=4, max_words=1 << 30)
LARGE = Variant(lanes=16, groups=1, max_words=1024)
COLUMNS = ("end_words", "words", "head_masks", "inits", "tail_masks", "slots", "factors")


def parts_of(rows: list[tuple[int, int, bool]], nbytes_after: int = 0) -> Parts:
    """From (byte offset, bytes, whether the payload begins here)."""
    return Parts(
        byte_offsets=np.array([row[0] for row in rows], np.int64),
        nbytes=np.array([row[1] for row in rows], np.int64),
        slots=np.arange(len(rows)),
        are_first=np.array([row[2] for row in rows], np.bool_),
        nbytes_after=np.full(len(rows), nbytes_after, np.int64),
    )


def columns_of(table: Table, variant: Variant) -> dict[str, list[int]]:
    nchunks = table.nprograms * variant.groups
    columns = table.numbers[2 * table.nprograms :][: len(COLUMNS) * nchunks].reshape(len(COLUMNS), nchunks)
    return dict(zip(COLUMNS, columns.tolist(), strict=True))


ROWS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 20000), st.booleans()), min_size=1, max_size=12)
TABLES = [pytest.param(chunks.small_table, SMALL, id="small"), pytest.param(chunks.large_table, LARGE, id="large")]


@pytest.mark.parametrize(("table_of", "variant"), TABLES)
@given(rows=ROWS)
@settings(max_examples=60, deadline=None)
def test_every_byte_of_every_part_is_in_one_chunk(
    table_of: Callable[[Parts, Variant], Table], variant: Variant, rows: list[tuple[int, int, bool]]
) -> None:
    """Its words are those of the part without gaps, the bits outside it are masked, the initial ones added once."""
    table = table_of(parts_of(rows), variant)
    columns = columns_of(table, variant)
    for slot, (byte_offset, nbytes, is_first) in enumerate(rows):
        words, masked, ones = [], 0, 0
        for row in range(len(columns["slots"])):
            if columns["slots"][row] != slot or columns["words"][row] == 0:
                continue
            end, count = columns["end_words"][row], columns["words"][row]
            assert count <= variant.max_words
            words += range(end - count, end)
            masked |= columns["head_masks"][row] << (64 + 32 * (end - count))
            masked |= (columns["tail_masks"][row] & (2**64 - 1)) << (32 * end)
            ones |= columns["inits"][row] << (32 * (end - count))
        words.sort()
        assert words == list(range(byte_offset // 4, words[-1] + 1))
        span = (1 << 32 * (words[-1] + 1)) - (1 << 32 * words[0])
        payload = (1 << 8 * (byte_offset + nbytes)) - (1 << 8 * byte_offset)
        assert masked == (span & ~payload) << 64
        assert ones == is_first * (0xFFFFFFFF << 8 * byte_offset)
        assert ones & ~span == 0


@pytest.mark.parametrize(("table_of", "variant"), TABLES)
@given(rows=ROWS)
@settings(max_examples=60, deadline=None)
def test_blocks_without_masks_are_full_and_need_no_correction(
    table_of: Callable[[Parts, Variant], Table], variant: Variant, rows: list[tuple[int, int, bool]]
) -> None:
    """And a program has as many blocks as its longest chunk needs, no more."""
    table = table_of(parts_of(rows), variant)
    columns = columns_of(table, variant)
    for program, (blocks, masked_blocks) in enumerate(table.numbers[: 2 * table.nprograms].reshape(-1, 2).tolist()):
        rows_of_program = range(program * variant.groups, (program + 1) * variant.groups)
        assert blocks == -(-max(columns["words"][row] for row in rows_of_program) // variant.block_words)
        for row in rows_of_program:
            corrected = 2 if columns["inits"][row] or columns["head_masks"][row] else 0
            plain = min((blocks - masked_blocks) * variant.block_words, blocks * variant.block_words)
            assert columns["words"][row] - plain >= min(corrected, columns["words"][row])


def test_small_ranges_of_like_lengths_share_a_program() -> None:
    """So that no short range waits for a long one."""
    table = chunks.small_table(parts_of([(0, n, True) for n in (30000, 4, 30000, 8, 30000, 4, 30000, 4)]), SMALL)
    assert [blocks for blocks, _ in table.numbers[:4].reshape(2, 2).tolist()] == [1, 30]


def test_parts_before_others_of_their_payload_are_not_small() -> None:
    """Small ranges count one of eight factors, which say nothing of bytes after them."""
    rows = [(0, 100, True), (0, 101, True)]
    assert chunks.are_small(parts_of(rows), max_nbytes=100).tolist() == [True, False]
    assert chunks.are_small(parts_of(rows, nbytes_after=1), max_nbytes=100).tolist() == [False, False]


def test_columns_of_other_lengths_and_types_are_refused() -> None:
    """The message names the column."""
    right = parts_of([(0, 4, True)])
    with pytest.raises(ValueError, match=r"slots: int64 \(2,\), not int64 \(1,\)"):
        Parts(
            byte_offsets=right.byte_offsets,
            nbytes=right.nbytes,
            slots=np.arange(2),
            are_first=right.are_first,
            nbytes_after=right.nbytes_after,
        )
    with pytest.raises(ValueError, match=r"are_first: int64 \(1,\), not bool \(1,\)"):
        Parts(
            byte_offsets=right.byte_offsets,
            nbytes=right.nbytes,
            slots=right.slots,
            are_first=right.slots,
            nbytes_after=right.nbytes_after,
        )
