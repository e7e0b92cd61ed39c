"""Missing keys are all named, with what comes closest."""

from __future__ import annotations

import pytest
import torch

from gpudcp import planners
from gpudcp.errors import MissingKeyError

pytestmark = pytest.mark.filterwarnings("ignore:Please use DTensor instead:FutureWarning")


def test_all_missing_keys_are_named_with_what_comes_closest() -> None:
    """And, in the same error, what does not fit."""
    saved = planners.local_metadata(
        {"model.layer.0.weight": torch.zeros(2), "model.layer.0.bias": torch.zeros(2), "here": torch.zeros(2), "lr": 1}
    )
    wanted = {
        "model.layers.0.weight": torch.zeros(2),
        "model.layers.0.bias": torch.zeros(2),
        "zzzzzz": 1,
        "here": torch.zeros(3),
    }
    with pytest.raises(MissingKeyError) as told:
        planners.local_load_plan(wanted, saved)
    text = str(told.value)
    assert "'model.layers.0.weight' (it has 'model.layer.0.weight'" in text
    assert "'model.layers.0.bias' (it has 'model.layer.0.bias'" in text
    assert "'zzzzzz'" in text
    assert "'zzzzzz' (" not in text
    assert "here: size (2,) in the checkpoint, (3,) in the state dict" in text


def test_a_name_that_the_state_dict_has_too_is_not_proposed() -> None:
    """It is taken: 'weight2' is missing because it is new, not because 'weight' is meant."""
    saved = planners.local_metadata({"weight": torch.zeros(2)})
    with pytest.raises(MissingKeyError, match=r"the checkpoint has no 'weight2'$"):
        planners.local_load_plan({"weight": torch.zeros(2), "weight2": torch.zeros(2)}, saved)


def test_a_thousand_missing_keys_are_all_named_without_comparing_them_all() -> None:
    """Only the first ten are compared, with the likeliest hundred of a bounded number of names."""
    saved = planners.local_metadata({f"layers.{i}.weight": i for i in range(30_000)})
    wanted = {f"layer.{i}.weight": 0 for i in range(1000)}
    with pytest.raises(MissingKeyError) as told:
        planners.local_load_plan(wanted, saved)
    text = str(told.value)
    assert all(f"'layer.{i}.weight'" in text for i in range(1000))
    assert "'layer.7.weight' (it has 'layers.7.weight'" in text
    assert text.count("(it has") == 10
