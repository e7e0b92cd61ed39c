"""The cast rule: what it casts, what it leaves, what it refuses."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor

from gpudcp.errors import PlanError
from gpudcp.planners.casts import CastRule

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
OTHERS = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128]
NEVER = [torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.bits8, torch.bits16, torch.int4, torch.uint1]
PACKED = [getattr(torch, "float4_e2m1fn_x2")] if hasattr(torch, "float4_e2m1fn_x2") else []  # noqa: B009


def test_without_a_request_every_dtype_stays() -> None:
    """None is the rule that changes nothing."""
    rule = CastRule.of(None)
    for dtype in (*FLOATS, *OTHERS, *NEVER):
        assert rule.dtype_for("a", dtype) is dtype


@pytest.mark.parametrize("source", FLOATS)
def test_a_dtype_is_that_of_all_floating_point_tensors(source: torch.dtype) -> None:
    """Narrower or wider."""
    assert CastRule.of(torch.float16).dtype_for("a", source) is torch.float16
    assert CastRule.of(torch.float8_e4m3fn).dtype_for("a", source) is torch.float8_e4m3fn


@pytest.mark.parametrize("source", OTHERS)
def test_other_tensors_keep_their_dtype_unless_told(source: torch.dtype) -> None:
    """By the flag; complex numbers keep theirs even then."""
    assert CastRule.of(torch.float16).dtype_for("a", source) is source
    assert CastRule.of({"*": torch.float16}).dtype_for("a", source) is source
    told = CastRule.of(torch.float16, floating_point_only=False)
    assert told.dtype_for("a", source) is (source if source.is_complex else torch.float16)


@pytest.mark.parametrize("source", [*NEVER, *PACKED])
def test_quantized_packed_and_raw_dtypes_never_change(source: torch.dtype) -> None:
    """Whatever is asked for, and by whom."""
    for request in (torch.float16, {"*": torch.float16}, lambda *_: torch.float16):
        assert CastRule.of(request, floating_point_only=False).dtype_for("a", source) is source


def test_complex_numbers_never_become_real() -> None:
    """Half of them would be lost; from one complex dtype to another they go."""
    rule = CastRule.of(lambda *_: torch.float32)
    assert rule.dtype_for("a", torch.complex64) is torch.complex64
    rule = CastRule.of(torch.complex64, floating_point_only=False)
    assert rule.dtype_for("a", torch.complex128) is torch.complex64


def test_the_first_pattern_that_matches_decides() -> None:
    """Dots are matched by a star, case counts, brackets are sets; without a match nothing changes."""
    rule = CastRule.of(
        {
            "model.head.*": torch.float32,
            "model.*.weight": torch.bfloat16,
            "*": torch.float16,
            "optim.*": torch.float64,
        }
    )
    assert rule.dtype_for("model.head.weight", torch.float64) is torch.float32
    assert rule.dtype_for("model.layers.0.weight", torch.float32) is torch.bfloat16
    assert rule.dtype_for("model.layers.0.bias", torch.float32) is torch.float16
    assert rule.dtype_for("optim.step", torch.float32) is torch.float16
    some = CastRule.of({"layer[12].*": torch.float16})
    assert some.dtype_for("layer1.weight", torch.float32) is torch.float16
    assert some.dtype_for("layer3.weight", torch.float32) is torch.float32
    assert some.dtype_for("Layer1.weight", torch.float32) is torch.float32
    assert some.dtype_for("model.layer1.weight", torch.float32) is torch.float32
    assert CastRule.of({}).dtype_for("a", torch.float32) is torch.float32


def test_a_callable_is_asked_once_for_each_name_and_dtype() -> None:
    """For integers too, unless the flag says no; None keeps the dtype."""
    asked: list[tuple[str, torch.dtype]] = []

    def choose(fqn: str, dtype: torch.dtype) -> torch.dtype | None:
        asked.append((fqn, dtype))
        return torch.int32 if dtype is torch.int64 else None

    rule = CastRule.of(choose)
    for _ in range(2):
        assert rule.dtype_for("a", torch.int64) is torch.int32
        assert rule.dtype_for("a", torch.float32) is torch.float32
        assert rule.dtype_for("b", torch.int64) is torch.int32
    assert asked == [("a", torch.int64), ("a", torch.float32), ("b", torch.int64)]
    assert CastRule.of(choose, floating_point_only=True).dtype_for("a", torch.int64) is torch.int64
    assert len(asked) == 3


@pytest.mark.parametrize("target", [*NEVER, *PACKED])
def test_a_dtype_that_nothing_can_be_cast_to_is_refused(target: torch.dtype) -> None:
    """At once, or when a callable says it; the dtype and what asked for it are named."""
    with pytest.raises(PlanError, match=f"{target} is no dtype that tensors can be cast to"):
        CastRule.of(target)
    with pytest.raises(PlanError, match=rf"pattern 'a\.\*': {target}"):
        CastRule.of({"a.*": target})
    with pytest.raises(PlanError, match=f"weight: {target}"):
        CastRule.of(lambda *_: target).dtype_for("weight", torch.float32)


@pytest.mark.parametrize("request_", ["float16", 3, [torch.float16], {"a": "float16"}, {1: torch.float16}])
def test_what_is_no_request_is_refused(request_: Any) -> None:
    """Names of dtypes among them: there is one way to say it."""
    with pytest.raises(PlanError, match=r"dtype|pattern"):
        CastRule.of(request_)


def test_a_callable_that_returns_no_dtype_is_refused() -> None:
    """When it does; the key is named."""
    rule: Any = CastRule.of(lambda *_: "float16")  # type: ignore[arg-type, return-value]
    with pytest.raises(PlanError, match=r"weight: 'float16' is no torch\.dtype"):
        rule.dtype_for("weight", torch.float32)


@pytest.mark.parametrize("request_", [None, torch.float16, {"a.*": torch.float16, "*": torch.bfloat16}])
def test_a_rule_pickles(request_: Any) -> None:
    """As process-based async saves send planners to another process."""
    rule = CastRule.of(request_)
    again = pickle.loads(pickle.dumps(rule))
    for fqn in ("a.b", "b"):
        assert again.dtype_for(fqn, torch.float32) is rule.dtype_for(fqn, torch.float32)


def test_a_rule_is_its_own_rule() -> None:
    """So that planners can hand theirs on."""
    rule = CastRule.of(torch.float16)
    assert CastRule.of(rule) is rule


def test_wrapper_subclasses_keep_their_dtype() -> None:
    """Only their class knows how to cast them; a DTensor is its local tensor."""
    rule = CastRule.of(torch.float16)
    plain = torch.zeros(4)
    assert rule.dtype_of("a", plain) is torch.float16
    assert rule.dtype_of("a", torch.nn.Parameter(plain)) is torch.float16
    wrapper = TwoTensor(plain, plain.clone())
    assert rule.dtype_of("a", wrapper) is torch.float32
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        assert rule.dtype_of("a", DTensor.from_local(plain, mesh, [Shard(0)], run_check=False)) is torch.float16
        assert rule.dtype_of("a", DTensor.from_local(wrapper, mesh, [Shard(0)], run_check=False)) is torch.float32
    finally:
        dist.destroy_process_group()
