"""Trains a model with each way of normalizing a batch, from the same weights on the same data, and compares them."""

from syncnorm.tools.compare.arms import ARMS, MORE_ARMS, Arm, arm_named
from syncnorm.tools.compare.metrics import Metric
from syncnorm.tools.compare.records import (
    ROUNDING,
    ArmResult,
    CollectiveCount,
    CompareSettings,
    Comparison,
    Decision,
    LayerDivergence,
    LayerParity,
    MaxError,
    MetricInfo,
    Parity,
    PeakMemory,
    Point,
    SeedResult,
    StepRatio,
    StepTime,
    Sweep,
    Task,
)
from syncnorm.tools.compare.runner import run

__all__ = [
    "ARMS",
    "MORE_ARMS",
    "ROUNDING",
    "Arm",
    "ArmResult",
    "CollectiveCount",
    "CompareSettings",
    "Comparison",
    "Decision",
    "LayerDivergence",
    "LayerParity",
    "MaxError",
    "Metric",
    "MetricInfo",
    "Parity",
    "PeakMemory",
    "Point",
    "SeedResult",
    "StepRatio",
    "StepTime",
    "Sweep",
    "Task",
    "arm_named",
    "run",
]
