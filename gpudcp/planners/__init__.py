"""DCP planning: who moves what. No bytes, no files.

torch's protocol, under one roof with what is ours: the default planners, the recipes, the rules, the helpers.
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

from gpudcp.planners import helpers
from gpudcp.planners.casts import CastRule
from gpudcp.planners.load import DefaultLoadPlanner, EmptyStateDictLoadPlanner
from gpudcp.planners.recipes import (
    DDPLoadBalancingPlanner,
    FP16Planner,
    MetaModelMaterialize,
    RenameLoadPlanner,
    RenameSavePlanner,
    SaveExtraDataPlanner,
)
from gpudcp.planners.save import DefaultSavePlanner

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
    "helpers",
]
