"""The speed of the synced layer against its peers, always as ratios inside one run."""

from syncnorm.tools.bench.growth_records import Growth, Simulation
from syncnorm.tools.bench.records import (
    Benchmark,
    Figure,
    LayerWait,
    Memory,
    ModelResult,
    RankProfile,
    Row,
    Settings,
    Timing,
)
from syncnorm.tools.bench.runner import run
from syncnorm.tools.bench.simulation import Parameters

__all__ = [
    "Benchmark",
    "Figure",
    "Growth",
    "LayerWait",
    "Memory",
    "ModelResult",
    "Parameters",
    "RankProfile",
    "Row",
    "Settings",
    "Simulation",
    "Timing",
    "run",
]
