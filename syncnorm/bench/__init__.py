"""The speed of the synced layer against its peers, always as ratios inside one run."""

from syncnorm.bench.growth_records import Growth, Simulation
from syncnorm.bench.records import (
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
from syncnorm.bench.runner import run
from syncnorm.bench.simulation import Parameters

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
