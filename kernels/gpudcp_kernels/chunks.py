"""Byte ranges whose CRC-32 is wanted, cut into the chunks that the CRC kernel's programs work on. NumPy; no triton.

A range is widened to whole words and cut from its end, so that only its first chunk may be short: a chunk is preceded
by as many zeros as its program's blocks need, which changes no CRC. The table of a launch is flat int64:

    (blocks, blocks that need masks) of every program, then these columns, one number a chunk:
    0  end, in words of the slab          4  bits of the last two words that lie behind the range
    1  words                              5  slot
    2  bits of the first word that lie    6  what its remainder counts: as a power of x, or a row
       before the range                      of the small ranges' factors
    3  what is added to the first two words (the CRC's initial ones)

then the factors of the lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import numpy as np

from gpudcp_kernels.polynomials import Int64s, lane_factors, multiply, power_of_x
from gpudcp_kernels.tables import Bools, Table

_STEPS = 32  # words of a lane in one block
_MAX_PAD_NBYTES = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Byte ranges of one slab, each a part of a payload whose CRC-32 a slot collects."""

    byte_offsets: Int64s
    """(n,) into the slab."""
    nbytes: Int64s
    """(n,); an empty payload is one part of no bytes."""
    slots: Int64s
    """(n,) where the CRC goes."""
    are_first: Bools
    """(n,) whether the payload begins here. Exactly one part of a payload is its first."""
    nbytes_after: Int64s
    """(n,) bytes of the payload that come after this part, in whatever slab."""

    def __post_init__(self) -> None:
        for name in ("byte_offsets", "nbytes", "slots", "are_first", "nbytes_after"):
            column, dtype = getattr(self, name), np.bool_ if name == "are_first" else np.int64
            if column.shape != self.nbytes.shape or column.ndim != 1 or column.dtype != dtype:
                raise ValueError(f"{name}: {column.dtype} {column.shape}, not {dtype.__name__} ({self.nbytes.size},)")

    def __len__(self) -> int:
        return len(self.nbytes)

    def take(self, which: Bools | Int64s) -> Parts:
        """Some of the parts, by mask or by number."""
        return Parts(
            byte_offsets=self.byte_offsets[which],
            nbytes=self.nbytes[which],
            slots=self.slots[which],
            are_first=self.are_first[which],
            nbytes_after=self.nbytes_after[which],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How a specialisation of the CRC kernel divides the work."""

    lanes: int
    """Of a chunk; a power of two."""
    groups: int
    """Chunks of a program."""
    max_words: int
    """Of a chunk."""

    @property
    def block_words(self) -> int:
        return _STEPS * self.lanes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunks:
    """The columns of a table."""

    end_words: Int64s
    words: Int64s
    head_masks: Int64s
    inits: Int64s
    tail_masks: Int64s
    slots: Int64s
    factors: Int64s


def end_words(parts: Parts) -> Int64s:
    """(n,) where each part ends, in words of the slab: widened to whole words, which have room for the initial ones."""
    return (parts.byte_offsets + np.maximum(parts.nbytes, 4) + 3) >> 2


def are_small(parts: Parts, *, max_nbytes: int) -> Bools:
    """Which parts are one chunk each whose factor is one of a few, whatever its length."""
    small: Bools = (parts.nbytes <= max_nbytes) & (parts.nbytes_after == 0)
    return small


def small_table(parts: Parts, variant: Variant) -> Table:
    """The table of parts that `are_small`: a chunk each, those of like lengths together."""
    parts = parts.take(np.argsort(parts.nbytes, kind="stable"))
    ends = end_words(parts)
    starts = parts.byte_offsets >> 2
    pads = _pads(parts, ends)
    chunks = Chunks(
        end_words=ends,
        words=ends - starts,
        head_masks=_head_masks(parts),
        inits=_inits(parts),
        tail_masks=_tail_masks(pads),
        slots=parts.slots,
        factors=pads,
    )
    return _table(_filled(chunks, variant.groups), variant, _factors_of_pads(variant.lanes))


def large_table(parts: Parts, variant: Variant) -> Table:
    """The table of any parts, each cut into as many chunks as it needs."""
    ends, starts = end_words(parts), parts.byte_offsets >> 2
    counts = -(-(ends - starts) // variant.max_words)
    part = np.repeat(np.arange(len(parts)), counts)
    # Chunk 0 of a part is its last one.
    chunk = np.arange(len(part)) - np.repeat(np.cumsum(counts) - counts, counts)
    chunk_ends = ends[part] - chunk * variant.max_words
    words = np.minimum(chunk_ends - starts[part], variant.max_words)
    before = chunk_ends - words - starts[part]
    pads = _pads(parts, ends)
    exponents = 32 - 8 * pads + 8 * parts.nbytes_after
    chunks = Chunks(
        end_words=chunk_ends,
        words=words,
        head_masks=np.where(before == 0, _head_masks(parts)[part], 0),
        inits=np.where(before < 2, _inits(parts)[part] >> (32 * np.minimum(before, 1)), 0),
        tail_masks=np.where(chunk == 0, _tail_masks(pads)[part], 0),
        slots=parts.slots[part],
        factors=power_of_x(exponents[part] + 32 * variant.max_words * chunk).astype(np.int64),
    )
    return _table(chunks, variant, lane_factors(variant.lanes).astype(np.int64))


def _table(chunks: Chunks, variant: Variant, factors: Int64s) -> Table:
    by_program = chunks.words.reshape(-1, variant.groups)
    blocks = -(-by_program.max(axis=1) // variant.block_words)
    # What is added to a chunk's first two words is added where words are masked.
    are_plain = (chunks.inits | chunks.head_masks) == 0
    plain_words = np.where(are_plain, chunks.words, np.maximum(chunks.words - 2, 0)).reshape(by_program.shape)
    masked_blocks = blocks - plain_words.min(axis=1) // variant.block_words
    programs = np.column_stack((blocks, masked_blocks)).ravel()
    columns = [getattr(chunks, field.name) for field in fields(Chunks)]
    return Table(numbers=np.concatenate((programs, *columns, factors)), nprograms=len(blocks), row_width=len(columns))


def _filled(chunks: Chunks, groups: int) -> Chunks:
    """With empty chunks at the end, which change nothing, so that every program has all of its own."""
    missing = -len(chunks.words) % groups
    return Chunks(**{field.name: np.pad(getattr(chunks, field.name), (0, missing)) for field in fields(Chunks)})


def _pads(parts: Parts, ends: Int64s) -> Int64s:
    """(n,) bytes between a part's end and the end of its last word, 0 to 7."""
    return 4 * ends - parts.byte_offsets - parts.nbytes


def _head_masks(parts: Parts) -> Int64s:
    return (np.int64(1) << (8 * (parts.byte_offsets & 3))) - 1


def _inits(parts: Parts) -> Int64s:
    """The CRC's four initial bytes of ones, where a payload begins."""
    return np.where(parts.are_first, np.int64(0xFFFFFFFF) << (8 * (parts.byte_offsets & 3)), 0)


def _tail_masks(pads: Int64s) -> Int64s:
    return np.where(pads > 0, np.int64(-1) << (64 - 8 * np.maximum(pads, 1)), 0)


@cache
def _factors_of_pads(lanes: int) -> Int64s:
    """(8 * lanes,) what a lane's remainder counts where so many bytes of padding follow the range."""
    of_pads = power_of_x(32 - 8 * np.arange(_MAX_PAD_NBYTES + 1))
    return multiply(of_pads[:, None], lane_factors(lanes)).astype(np.int64).ravel()
