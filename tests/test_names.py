"""The keys of a state dict, sent once."""

from __future__ import annotations

import pickle

import pytest

from gpudcp.arrays import Path
from gpudcp.names import Names


@pytest.mark.parametrize(
    "paths",
    [
        None,
        {"a.b": ("a", "b"), "c": ("c",)},
        {"a.b": ("a", "b"), "c": ("c",), "of another rank": ("of another rank",)},
        {"a.b": ("a", "b"), "c": ("c",), "a.0": ("a", 0)},
    ],
)
def test_names_and_their_paths_survive_the_wire(paths: dict[str, Path] | None) -> None:
    """Also the paths of keys that are none of the names, as this rank has no item of them."""
    names = Names(["a.b", "c", "\u00e9\n\U0001f600", "\ud83d\ude00", "\ud800"], paths)
    data = pickle.dumps(names)
    again = pickle.loads(data)
    assert again.fqns == names.fqns
    if paths is not None:
        paths = {fqn: (fqn,) for fqn in names.fqns} | paths
    assert again.paths == paths
    assert again.digest == names.digest
    assert pickle.loads(data) is again
