"""One model, one data order, one seed after the other: trained side by side with every way of normalising a batch."""

from syncnorm.tools.compare.arms import ARMS, Arm
from syncnorm.tools.compare.evidence import (
    ROUNDING,
    CollectiveCount,
    Gap,
    LayerParity,
    LayerSpread,
    Memory,
    Parity,
    Point,
    SeedResult,
    Wait,
)
from syncnorm.tools.compare.records import ArmResult, Comparison, Settings, Sweep, Task
from syncnorm.tools.compare.runner import run

__all__ = [
    "ARMS",
    "ROUNDING",
    "Arm",
    "ArmResult",
    "CollectiveCount",
    "Comparison",
    "Gap",
    "LayerParity",
    "LayerSpread",
    "Memory",
    "Parity",
    "Point",
    "SeedResult",
    "Settings",
    "Sweep",
    "Task",
    "Wait",
    "run",
]
