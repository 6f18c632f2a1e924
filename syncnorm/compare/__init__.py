"""One model, one seed, one data order: trained side by side with every way of normalising a batch."""

from syncnorm.compare.arms import ARMS, Arm
from syncnorm.compare.records import ArmResult, CollectiveCount, Comparison, Gap, Hardware, Parity, Settings
from syncnorm.compare.runner import run

__all__ = [
    "ARMS",
    "Arm",
    "ArmResult",
    "CollectiveCount",
    "Comparison",
    "Gap",
    "Hardware",
    "Parity",
    "Settings",
    "run",
]
