"""The default planners: torch's own, made safe and whole. Tensors that no box describes go as objects."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import torch
from torch.distributed.checkpoint import default_planner as torch_planners
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem, WriteItemType

from gpudcp._dcp import ShardedTensor, set_element
from gpudcp.errors import MissingKeyError, PlanError
from gpudcp.formats.dtypes import is_savable
from gpudcp.formats.objects import DumpedObject, load_object


class DefaultSavePlanner(torch_planners.DefaultSavePlanner):
    """torch's DefaultSavePlanner, and it saves sparse, nested and other subclass tensors, as objects.

    ``enable_plan_caching`` is accepted and has no effect: torch's cache does not see a changed dtype, and then writes
    what an old plan says.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,  # noqa: ARG002
    ) -> None:
        super().__init__(
            flatten_state_dict, flatten_sharded_tensors, dedup_replicated_tensors, dedup_save_to_lowest_rank
        )

    def create_local_plan(self) -> SavePlan:
        for fqn, value in self.state_dict.items():
            if isinstance(value, torch.Tensor) and not is_savable(value.dtype):
                raise PlanError(f"{fqn}: dtype {value.dtype} cannot be saved: torch.load reads no such tensor back")
        whole = [fqn for fqn, value in self.state_dict.items() if is_whole(value)]
        everything = self.state_dict
        # torch's planner describes every tensor as a box: it must not see these.
        self.state_dict = {fqn: value for fqn, value in everything.items() if not is_whole(value)}
        try:
            plan = super().create_local_plan()
        finally:
            self.state_dict = everything
        objects = [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO) for fqn in whole]
        self.plan = dataclasses.replace(plan, items=[*plan.items, *objects])
        return self.plan

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        """What is written of a value: a tensor as it is, an object as the bytes of its dump."""
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        try:
            return DumpedObject(object)
        except MemoryError:
            raise
        # What a value's own pickling raises can be anything.
        except Exception as err:
            raise PlanError(
                f"{write_item.index.fqn}: a {type(object).__qualname__} cannot be pickled: {type(err).__name__}: {err}"
            ) from err

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value, or the shard of it, that a write item names."""
        value = self.state_dict.get(index.fqn)
        # Most values are plain tensors, whole; torch's search costs five times this, and decides in all other cases.
        return value if type(value) is torch.Tensor and not any(index.offset or ()) else super().lookup_object(index)


class DefaultLoadPlanner(torch_planners.DefaultLoadPlanner):
    """torch's DefaultLoadPlanner, and objects are loaded without running the code that their pickles name.

    Args:
        flatten_state_dict: the checkpoint's keys are paths of nested dicts and lists, joined by dots.
        flatten_sharded_tensors: undo FSDP's nesting of ShardedTensors.
        allow_partial_load: leave what the checkpoint does not have as it is, instead of raising.
        trust_pickle: load objects with Python's own pickle, as torch's planner does: it runs whatever code they name.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        trust_pickle: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.trust_pickle = trust_pickle

    def create_local_plan(self) -> LoadPlan:
        """What this rank reads.

        Raises:
            MissingKeyError: the checkpoint lacks keys, and ``allow_partial_load`` is False.
            PlanError: a tensor has another shape in the checkpoint, or is an object there.
        """
        try:
            return super().create_local_plan()
        except (RuntimeError, ValueError) as err:
            saved = self.metadata.state_dict_metadata if self.metadata is not None else {}
            missing = [fqn for fqn in self.state_dict if fqn not in saved]
            if missing and not self.allow_partial_load:
                rest = f" and {len(missing) - 1} more keys" * (len(missing) > 1)
                raise MissingKeyError(f"the checkpoint has no {missing[0]!r}{rest}") from err
            raise PlanError(str(err)) from err

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The tensor, or the shard of it, that a read item fills."""
        value = self.state_dict.get(index.fqn)
        return value if type(value) is torch.Tensor and not any(index.offset or ()) else super().lookup_tensor(index)

    def transform_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> torch.Tensor:
        """The box of it that the read item fills."""
        return tensor if tensor.shape == read_item.lengths else super().transform_tensor(read_item, tensor)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object in its place.

        Raises:
            UnsafeCheckpointError: it names a type that is not known to be harmless.
            CorruptCheckpointError: its bytes are no torch.save file.
        """
        fqn = read_item.dest_index.fqn
        loaded = load_object(value, fqn=fqn, trust_pickle=self.trust_pickle)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            # torch's planner has it in the copy alone that flattening sharded tensors makes: the caller never sees it.
            self.original_state_dict[fqn] = self.state_dict[fqn] = loaded


def is_whole(value: object) -> bool:
    """Whether a value is a tensor that no box of plain memory describes: sparse, nested, or of a subclass.

    DTensor and what else implements torch's `_Checkpointable` describe themselves, and so does ShardedTensor.
    """
    if not isinstance(value, torch.Tensor) or isinstance(value, ShardedTensor):
        return False
    if hasattr(value, "__create_write_items__"):
        return False
    if type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return value.layout != torch.strided or value.is_nested
    return True
