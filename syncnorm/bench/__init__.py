"""The speed of the synced layer against its peers, always as ratios inside one run."""

from syncnorm.bench.records import Benchmark, Figure, LayerWait, ModelResult, RankProfile, Row, Settings, Timing
from syncnorm.bench.runner import run

__all__ = [
    "Benchmark",
    "Figure",
    "LayerWait",
    "ModelResult",
    "RankProfile",
    "Row",
    "Settings",
    "Timing",
    "run",
]
