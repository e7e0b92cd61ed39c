"""DCP planning: who moves what. No bytes, no files."""

from gpudcp.planners.default import DefaultLoadPlanner, DefaultSavePlanner

__all__ = ["DefaultLoadPlanner", "DefaultSavePlanner"]
