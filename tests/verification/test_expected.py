"""ExpectedFile: which items have bytes in a range."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gpudcp.verification.expected import Expected, ExpectedFile

GAPS_AND_LENGTHS = st.lists(st.tuples(st.integers(0, 10), st.integers(0, 30)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=200)
@given(places=GAPS_AND_LENGTHS, start=st.integers(0, 90), nbytes=st.integers(1, 40))
def test_every_item_with_a_byte_in_a_range_is_among_those_named(
    places: list[tuple[int, int]], start: int, nbytes: int
) -> None:
    """Against all of them, one by one; where none is empty, no other is named."""
    items, end, stop = [], 0, start + nbytes
    for gap, length in places:
        items.append(Expected("fqn", end + gap, end + gap + length, tuple))
        end += gap + length
    found = set(ExpectedFile("file", items, 100).between(start, stop))
    wanted = {number for number, item in enumerate(items) if max(item.start, start) < min(item.stop, stop)}
    assert wanted <= found
    if all(item.start < item.stop for item in items):
        assert wanted == found
