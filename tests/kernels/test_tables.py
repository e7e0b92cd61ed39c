"""Rows and launch tables: every element of every box, at its two addresses, exactly once."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from gpudcp_kernels.tables import (
    MAX_DIMS,
    SLAB_PADDING_NBYTES,
    Boxes,
    Int64s,
    Rows,
    check_padding,
    on_device_of,
    row_major_strides,
    rows_of,
    table_of,
    table_of_columns,
    to_device,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_boxes import columns_of, poisoned_slab

BASE = 1 << 40
SLAB = torch.empty(1 << 20, dtype=torch.uint8)


@st.composite
def boxes_with_file_strides(draw: st.DrawFn) -> tuple[Boxes, Int64s]:
    """Some boxes of one number of dimensions; each side is gapless, padded or permuted."""
    ndim, nrows = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    lengths = [draw(st.lists(st.integers(0, 3), min_size=ndim, max_size=ndim)) for _ in range(nrows)]
    sides = [[draw(strides_for(row)) for row in lengths] for _ in range(2)]
    boxes = Boxes(
        addresses=BASE + 1000 * np.arange(nrows) * 8,
        byte_offsets=np.array([draw(st.integers(0, 100)) for _ in range(nrows)]),
        lengths=columns_of(lengths, 1),
        strides=columns_of(sides[0], 0),
    )
    return boxes, columns_of(sides[1], 0)


def strides_for(lengths: list[int]) -> st.SearchStrategy[list[int]]:
    """Of a tensor that holds such a box, with its dimensions in some order."""

    @st.composite
    def strides(draw: st.DrawFn) -> list[int]:
        order = draw(st.permutations(range(len(lengths)))) if draw(st.booleans()) else range(len(lengths))
        result, step = [0] * len(lengths), 1
        for j in reversed(order):
            result[j] = step
            step *= max(lengths[j], 1) + draw(st.sampled_from([0, 0, 0, 1]))
        return result

    return strides()


def elements_of_boxes(
    boxes: Boxes, file_strides: Int64s, *, memory_nbytes: int, file_nbytes: int
) -> list[tuple[int, int]]:
    """Both addresses of every element, the slab's counted from its start."""
    found = []
    for address, begin, lengths, strides, steps in zip(
        boxes.addresses, boxes.byte_offsets, boxes.lengths, boxes.strides, file_strides, strict=True
    ):
        for index in product(*map(range, lengths)):
            at = int(address) + int(np.dot(index, strides)) * memory_nbytes
            found.append((at, int(begin) + int(np.dot(index, steps)) * file_nbytes))
    return sorted(found)


def elements_of_rows(rows: Rows, *, memory_nbytes: int, file_nbytes: int) -> list[tuple[int, int]]:
    """Likewise of rows."""
    strides = row_major_strides(rows.lengths) if rows.file_strides is None else rows.file_strides
    begins = rows.file_addresses - SLAB.data_ptr()
    boxes = Boxes(addresses=rows.addresses, byte_offsets=begins, lengths=rows.lengths, strides=rows.strides)
    return elements_of_boxes(boxes, strides, memory_nbytes=memory_nbytes, file_nbytes=file_nbytes)


@settings(deadline=None, max_examples=100)
@given(boxes_with_file_strides(), st.booleans())
def test_rows_hold_every_element_of_their_boxes_at_both_addresses(
    drawn: tuple[Boxes, Int64s], is_row_major: bool
) -> None:
    """Whatever was merged, cut or dropped."""
    boxes, file_strides = drawn
    expected = row_major_strides(boxes.lengths) if is_row_major else file_strides
    rows = rows_of(boxes, SLAB, memory_nbytes=4, file_nbytes=2, file_strides=None if is_row_major else file_strides)
    assert rows.lengths.shape[1] in (1, MAX_DIMS)
    assert elements_of_rows(rows, memory_nbytes=4, file_nbytes=2) == elements_of_boxes(
        boxes, expected, memory_nbytes=4, file_nbytes=2
    )
    assert rows.numels.tolist() == rows.lengths.prod(axis=1).tolist()
    assert (rows.numels > 0).all()


def boxes_at(lengths: list[list[int]], strides: list[list[int]], byte_offsets: list[int] | None = None) -> Boxes:
    """Boxes 4096 bytes apart."""
    n = len(lengths)
    return Boxes(
        addresses=BASE + 4096 * np.arange(n),
        byte_offsets=np.array([4096 * i for i in range(n)] if byte_offsets is None else byte_offsets),
        lengths=columns_of(lengths, 1),
        strides=columns_of(strides, 0),
    )


def rows_at(boxes: Boxes, file_strides: Int64s | None = None, nbytes: int = 4) -> Rows:
    """Rows of elements of one size."""
    return rows_of(boxes, SLAB, memory_nbytes=nbytes, file_nbytes=nbytes, file_strides=file_strides)


def test_gapless_boxes_become_lines() -> None:
    """Of one dimension, whatever they had; so are numbers without one."""
    rows = rows_at(boxes_at([[2, 3, 4], [1, 5, 1], [1, 1, 1]], [[12, 4, 1], [9, 1, 7], [5, 6, 7]]))
    assert rows.lengths.tolist() == [[24], [5], [1]]
    assert rows.strides.tolist() == [[1], [1], [1]]
    assert rows_at(boxes_at([[], []], [[], []])).lengths.tolist() == [[1], [1]]


def test_a_box_of_more_dimensions_than_a_kernel_takes_becomes_several_rows() -> None:
    """One for every index into the outer ones."""
    rows = rows_at(boxes_at([[2, 3, 2, 2, 2, 2]], [[1000, 200, 50, 20, 8, 3]]))
    assert len(rows) == 6
    assert rows.addresses.tolist() == [BASE + 4 * (1000 * i + 200 * j) for i in range(2) for j in range(3)]


def test_elements_of_16_bytes_are_pairs_of_8() -> None:
    """So a gapless box of them is a line of twice as many."""
    rows = rows_at(boxes_at([[3], [3]], [[1], [2]]), nbytes=16)
    assert rows.numels.tolist() == [6, 6]
    assert rows.lengths.tolist() == [[1, 1, 1, 6], [1, 1, 3, 2]]
    assert rows.strides[1].tolist()[-2:] == [4, 1]


def test_file_strides_that_say_row_major_are_dropped() -> None:
    """Then the faster kernels serve."""
    boxes = boxes_at([[3, 4]], [[1, 3]])
    assert rows_at(boxes, np.array([[4, 1]])).file_strides is None
    assert rows_at(boxes, np.array([[5, 1]])).file_strides is not None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.sampled_from([1, 8]), st.sampled_from([1, 64, 1024]))
def test_the_programs_of_a_table_cover_every_unit_of_every_row_once(
    numels: list[int], unit: int, units_per_program: int
) -> None:
    """In order, and each row has a program even if it is less than a unit."""
    rows = rows_at(boxes_at([[n] for n in numels], [[1]] * len(numels)))
    table = table_of(rows, unit=unit, units_per_program=units_per_program)
    entries = table.numbers[: table.nprograms]
    expected = [(row, b) for row, n in enumerate(numels) for b in range(max(1, -(-(n // unit) // units_per_program)))]
    assert [(int(e) >> 32, int(e) & 0xFFFFFFFF) for e in entries] == expected
    assert table.row_width == 5
    assert table.numbers[table.nprograms :].reshape(-1, 5)[:, 2].tolist() == numels


def test_tables_reach_the_device_whole_and_aligned() -> None:
    """Several in one buffer, each at 16 bytes, where kernels may load them wide."""
    tables = [table_of_columns([np.arange(n)], units=np.ones(n, np.int64), units_per_program=1) for n in (3, 1, 8)]
    buffers = to_device(tables, torch.device("cpu"))
    assert [buffer.tolist() for buffer in buffers] == [table.numbers.tolist() for table in tables]
    assert all(buffer.data_ptr() % 16 == 0 for buffer in buffers)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            boxes_at([[4], [8]], [[1], [1]], [0, (1 << 20) - 31]),
            r"row 1: bytes 1048545 to 1048577, the slab has 1048576",
        ),
        (boxes_at([[4]], [[1]], [-1]), r"row 0: bytes -1 to 15"),
        (boxes_at([[4], [-1]], [[1], [1]]), r"row 1: lengths \[-1\]"),
        (boxes_at([[1 << 20, 1 << 12]], [[0, 0]]), r"row 0: 4294967296 elements"),
    ],
)
def test_a_row_that_cannot_be_moved_is_refused_by_number(boxes: Boxes, message: str) -> None:
    """Before anything is launched."""
    with pytest.raises(ValueError, match=message):
        rows_at(boxes)


@pytest.mark.parametrize(("address", "message"), [(0, "row 0: address 0 of 4"), (BASE + 2, "is not a multiple of 4")])
def test_an_address_that_no_element_can_have_is_refused(address: int, message: str) -> None:
    """A typed access there would be an error that the device never recovers from."""
    column = np.array([address])
    boxes = Boxes(addresses=column, byte_offsets=column * 0, lengths=np.array([[4]]), strides=np.array([[1]]))
    with pytest.raises(ValueError, match=message):
        rows_at(boxes)


def test_file_strides_are_held_against_the_slab() -> None:
    """Their last element must lie in it too, and none before it."""
    boxes = boxes_at([[2, 2]], [[2, 1]])
    with pytest.raises(ValueError, match=r"row 0: bytes 0 to 1200008, the slab has 1048576"):
        rows_at(boxes, np.array([[300_000, 1]]))
    with pytest.raises(ValueError, match=r"row 0: file strides \[-2, 1\]"):
        rows_at(boxes, np.array([[-2, 1]]))
    with pytest.raises(ValueError, match="file strides are int64"):
        rows_at(boxes, np.array([[2, 1], [2, 1]]))


def test_columns_that_do_not_fit_together_are_refused() -> None:
    """As shapes or as dtypes."""
    one, two = np.zeros(1, np.int64), np.zeros((1, 2), np.int64)
    with pytest.raises(ValueError, match=r"lengths of shape \(1, 2\), strides \(1, 3\)"):
        Boxes(addresses=one, byte_offsets=one, lengths=two, strides=np.zeros((1, 3), np.int64))
    with pytest.raises(ValueError, match="are no columns"):
        Boxes(addresses=one, byte_offsets=np.zeros(2, np.int64), lengths=two, strides=two)
    with pytest.raises(ValueError, match="lengths are int32, not int64"):
        Boxes(addresses=one, byte_offsets=one, lengths=two.astype(np.int32), strides=two)  # type: ignore[arg-type]


def test_a_slab_is_flat_bytes_where_the_kernels_run() -> None:
    """Else an error that says which."""
    with pytest.raises(ValueError, match="flat uint8"):
        on_device_of(torch.zeros(4, 4, dtype=torch.uint8), on_host=True)
    with pytest.raises(ValueError, match="flat uint8"):
        on_device_of(torch.zeros(4), on_host=True)
    with pytest.raises(ValueError, match="the slab is on cpu, the kernels run on a GPU"):
        on_device_of(torch.zeros(4, dtype=torch.uint8), on_host=False)


def test_a_slab_without_padding_is_refused() -> None:
    """Kernels read words: up to some bytes past the end."""
    check_padding(poisoned_slab(100))
    with pytest.raises(ValueError, match=f"followed by 0 bytes, kernels may read {SLAB_PADDING_NBYTES}"):
        check_padding(torch.zeros(100, dtype=torch.uint8))
