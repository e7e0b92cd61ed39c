"""The private names of torch, and the extras that ride on its storage records."""

from __future__ import annotations

import dataclasses
import importlib.util
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem

from gpudcp import _dcp
from gpudcp._dcp import ItemExtras, StorageInfo, item_extras, storage_info

EXTRAS = [
    ItemExtras(704, torch.bfloat16, 0xFFFFFFFF),
    ItemExtras(0, torch.float8_e4m3fn, None),
    ItemExtras(None, None, 0),
    ItemExtras(None, None, None),
]


@pytest.mark.parametrize("extras", EXTRAS, ids=str)
def test_extras_ride_on_a_record_that_is_stocks_own(extras: ItemExtras) -> None:
    """Through pickle too; the record equals stock's, and stock's fields say what they always said."""
    info = storage_info("__0_0.distcp", 5, 9, extras)
    for each in (info, pickle.loads(pickle.dumps(info))):
        assert type(each) is filesystem._StorageInfo
        assert each == filesystem._StorageInfo("__0_0.distcp", 5, 9)
        assert item_extras(each) == extras
        assert isinstance(item_extras(each), ItemExtras)


def test_a_record_of_stock_has_no_extras() -> None:
    """All None: find the payload in the item."""
    assert item_extras(filesystem._StorageInfo("__0_0.distcp", 5, 9)) == ItemExtras(None, None, None)
    plain = pickle.loads(pickle.dumps(filesystem._StorageInfo("__0_0.distcp", 5, 9, ["zstd"])))
    assert item_extras(plain) == ItemExtras(None, None, None)


@pytest.mark.parametrize(
    "values",
    [
        5,
        (),
        "abc",
        (1, torch.int8),
        (1, torch.int8, 2, 3),
        (-1, torch.int8, 2),
        (1, torch.int8, -2),
        (1.0, torch.int8, 2),
        (True, torch.int8, 2),
        (1, None, 2),
        (None, torch.int8, 2),
        (1, "int8", 2),
        (1, torch.strided, 2),
        ([1], torch.int8, 2),
    ],
    ids=repr,
)
def test_extras_that_we_did_not_write_are_refused(values: Any) -> None:
    """They come from a file: offsets and checksums are integers, none negative, and a payload has a dtype."""
    info = StorageInfo("__0_0.distcp", 5, 9)
    info.__dict__["gpudcp"] = values
    with pytest.raises(ValueError, match="are no item extras"):
        item_extras(info)


def test_a_torch_whose_record_has_other_fields_is_refused_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """One clear sentence when the package is imported, not an error in mid-save."""

    @dataclasses.dataclass
    class OtherStorageInfo:
        relative_path: str
        offset: int

    monkeypatch.setattr(filesystem, "_StorageInfo", OtherStorageInfo)
    spec = importlib.util.spec_from_file_location("dcp_of_another_torch", _dcp.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"\['relative_path', 'offset'\], this gpudcp knows \['relative_path'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
