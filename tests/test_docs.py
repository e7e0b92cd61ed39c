"""The documents name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@pytest.mark.parametrize("document", sorted(path.name for path in (_ROOT / "docs").glob("*.md")))
def test_every_promise_names_a_test_that_exists(document: str) -> None:
    """And every row of its tables names one."""
    text = (_ROOT / "docs" / document).read_text(encoding="utf-8")
    named = _NAMED.findall(text)
    assert named
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"^def {name}\(", (_ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "|---"))]
    assert [row for row in rows if not _NAMED.search(row)] == []
