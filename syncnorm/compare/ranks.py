"""The ranks of a comparison; see `syncnorm.ranks`, whose names these are."""

from syncnorm.hardware import cpu_count, hardware_of
from syncnorm.ranks import (
    DEFAULT_RANKS,
    WAIT,
    Ranks,
    a_gpu_for_each_launched_rank,
    initialised_ranks,
    launched_ranks,
    world_size_for,
)

__all__ = [
    "DEFAULT_RANKS",
    "WAIT",
    "Ranks",
    "a_gpu_for_each_launched_rank",
    "cpu_count",
    "hardware_of",
    "initialised_ranks",
    "launched_ranks",
    "world_size_for",
]
