"""DCP planning: who moves what. No bytes, no files.

torch's protocol, under one roof with what is ours: the default planners, the recipes, the rules, and the
steps of planning as functions, which a planner of one's own is built from.
"""

from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from gpudcp.planners.casts import CastRule
from gpudcp.planners.closest import closest_names
from gpudcp.planners.load import DefaultLoadPlanner, EmptyStateDictLoadPlanner
from gpudcp.planners.plans import (
    global_load_plan,
    global_save_plan,
    local_load_plan,
    local_metadata,
    local_save_plan,
    merge_delta_plans,
    metadata_only_plan,
    plans_equal,
)
from gpudcp.planners.recipes import (
    DDPLoadBalancingPlanner,
    FP16Planner,
    MetaModelMaterialize,
    RenameLoadPlanner,
    RenameSavePlanner,
    SaveExtraDataPlanner,
)
from gpudcp.planners.save import DefaultSavePlanner
from gpudcp.planners.state_dicts import init_state_dict, iterate_state_dict, materialized
from gpudcp.planners.values import (
    chunk_list,
    dtensor_write_items,
    find_shard,
    object_write_item,
    read_items_for,
    read_items_for_chunk_list,
    sharded_tensor_write_items,
    tensor_write_item,
    write_items_for,
)

__all__ = [
    "BytesIOWriteData",
    "BytesStorageMetadata",
    "CastRule",
    "ChunkStorageMetadata",
    "DDPLoadBalancingPlanner",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "EmptyStateDictLoadPlanner",
    "FP16Planner",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "MetaModelMaterialize",
    "Metadata",
    "MetadataIndex",
    "ReadItem",
    "RenameLoadPlanner",
    "RenameSavePlanner",
    "SaveExtraDataPlanner",
    "SavePlan",
    "SavePlanner",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "TensorWriteData",
    "WriteItem",
    "WriteItemType",
    "chunk_list",
    "closest_names",
    "dtensor_write_items",
    "find_shard",
    "global_load_plan",
    "global_save_plan",
    "init_state_dict",
    "iterate_state_dict",
    "local_load_plan",
    "local_metadata",
    "local_save_plan",
    "materialized",
    "merge_delta_plans",
    "metadata_only_plan",
    "object_write_item",
    "plans_equal",
    "read_items_for",
    "read_items_for_chunk_list",
    "sharded_tensor_write_items",
    "tensor_write_item",
    "write_items_for",
]
