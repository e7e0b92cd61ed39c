"""What a missing key's message says: all of them, with the names in the checkpoint that come closest."""

from __future__ import annotations

import difflib
import heapq
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMES_SEARCHED = 20_000


_NAMES_COMPARED = 100


_KEYS_EXPLAINED = 10


def closest_names(fqn: str, names: Iterable[str]) -> list[str]:
    """Up to three names that look most like ``fqn``, best first; maybe none.

    At most 20,000 names are looked at, by the triples of characters they share with ``fqn``, and the best 100 of those
    by difflib: milliseconds, however many there are.
    """
    triples = {fqn[i : i + 3] for i in range(max(len(fqn) - 2, 1))}
    likely = heapq.nlargest(
        _NAMES_COMPARED,
        itertools.islice(names, _NAMES_SEARCHED),
        key=lambda name: (sum(triple in name for triple in triples), -abs(len(name) - len(fqn))),
    )
    return difflib.get_close_matches(fqn, likely)


def missing_keys_text(missing: Sequence[str], saved: Iterable[str], wanted: Mapping[str, Any]) -> str:
    """What is missing from the names ``saved``, all of it, the first ten with the closest names there are."""
    # A name that the state dict has as well is no misspelling of another key.
    unclaimed = list(itertools.islice((name for name in saved if name not in wanted), _NAMES_SEARCHED))
    named = []
    for number, fqn in enumerate(missing):
        closest = closest_names(fqn, unclaimed) if number < _KEYS_EXPLAINED else []
        named.append(f"{fqn!r} (it has {', '.join(map(repr, closest))})" if closest else repr(fqn))
    return f"the checkpoint has no {', '.join(named)}"
