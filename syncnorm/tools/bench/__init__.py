"""The speed of the synchronized layer compared with other implementations, always as ratios within one run."""

from syncnorm.tools.bench.records import (
    Benchmark,
    BenchSettings,
    ExchangeLatency,
    ExchangeSituation,
    LayerRow,
    LayerWait,
    MemorySpeed,
    ModelResult,
    RankProfile,
    SummaryLine,
    Timing,
)
from syncnorm.tools.bench.runner import RunOptions, run_layer, run_layer_and_model, run_model
from syncnorm.tools.bench.scaling import run_scaling
from syncnorm.tools.bench.scaling_records import Scaling, Simulation
from syncnorm.tools.bench.simulation import Parameters

__all__ = [
    "BenchSettings",
    "Benchmark",
    "ExchangeLatency",
    "ExchangeSituation",
    "LayerRow",
    "LayerWait",
    "MemorySpeed",
    "ModelResult",
    "Parameters",
    "RankProfile",
    "RunOptions",
    "Scaling",
    "Simulation",
    "SummaryLine",
    "Timing",
    "run_layer",
    "run_layer_and_model",
    "run_model",
    "run_scaling",
]
