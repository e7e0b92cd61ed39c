"""ExpectedFile: which items may have bytes in a range, also where items overlap."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.verification.expected import Expected, ExpectedFile

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(ranges=RANGES, start=st.integers(0, 90), nbytes=st.integers(1, 40))
def test_every_item_with_a_byte_in_a_range_is_among_those_named(
    ranges: list[tuple[int, int]], start: int, nbytes: int
) -> None:
    """Against all of them, one by one; without overlaps, and without empty ones, no other is named."""
    items = [Expected("fqn", first, first + length, tuple) for first, length in sorted(ranges)]
    stop = start + nbytes
    found = set(ExpectedFile("file", items, 100).between(start, stop))
    wanted = {number for number, item in enumerate(items) if max(item.start, start) < min(item.stop, stop)}
    assert wanted <= found
    in_order = all(one.stop <= other.start for one, other in pairwise(items))
    if in_order and all(item.start < item.stop for item in items):
        assert wanted == found
