"""Which of our methods a planner, or a reader, has kept."""

from __future__ import annotations

from collections.abc import Sequence


def are_untouched(value: object, names: Sequence[str], owner: type) -> bool:
    """Whether these methods of a value are ``owner``'s: overridden neither by a subclass nor on the value itself."""
    kind, own = type(value), getattr(value, "__dict__", {})
    return all(getattr(kind, name, None) is getattr(owner, name, None) and name not in own for name in names)
