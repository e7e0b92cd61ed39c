"""gpudcp: ``dcp.save`` and ``dcp.load`` at the speed of the hardware; the files stay ordinary DCP checkpoints."""

from gpudcp import errors, planners
from gpudcp.api import async_save, load, save
from gpudcp.manager import CheckpointManager
from gpudcp.options import Options
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.probe import probe
from gpudcp.report import TransferReport
from gpudcp.storage.reader import GpuStorageReader
from gpudcp.storage.writer import GpuStorageWriter
from gpudcp.tuning import tune
from gpudcp.verification.report import Problem, VerifyReport
from gpudcp.verify import verify

__version__ = "0.1.0"

__all__ = [
    "CheckpointManager",
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "GpuStorageReader",
    "GpuStorageWriter",
    "Options",
    "Problem",
    "TransferReport",
    "VerifyReport",
    "async_save",
    "errors",
    "load",
    "planners",
    "probe",
    "save",
    "tune",
    "verify",
]
