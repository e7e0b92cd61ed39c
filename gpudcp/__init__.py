"""gpudcp: ``dcp.save`` and ``dcp.load`` at the speed of the hardware; the files stay ordinary DCP checkpoints."""

from gpudcp import errors, planners
from gpudcp.api import load, save
from gpudcp.options import Options
from gpudcp.planners import DefaultLoadPlanner, DefaultSavePlanner
from gpudcp.probe import probe
from gpudcp.report import TransferReport
from gpudcp.storage.reader import GpuStorageReader
from gpudcp.storage.writer import GpuStorageWriter
from gpudcp.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "DefaultLoadPlanner",
    "DefaultSavePlanner",
    "GpuStorageReader",
    "GpuStorageWriter",
    "Options",
    "TransferReport",
    "errors",
    "load",
    "planners",
    "probe",
    "save",
    "tune",
]
