"""A comparison made by hand, with one arm of each kind."""

from dataclasses import replace

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.compare.paired import decisions
from syncnorm.tools.compare.records import (
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
    Task,
)

LAYERS = ("0.1", "1.norm1")


def parity(rel):
    error = MaxError(rel / 2, rel)
    layers = tuple(LayerParity(name, *[error] * 5) for name in LAYERS)
    return tuple(Parity(step, *[error] * 5, layers=layers) for step in (1, 10))


def seed(seed, accuracy):
    return SeedResult(
        seed,
        accuracy,
        0.2,
        0.008,
        test_metrics=(Point(252, 0.5), Point(504, accuracy)),
        test_losses=(Point(252, 1.5), Point(504, 0.2)),
    )


def arm(name, **changes):
    values = {
        "label": name,
        "ranks": 2,
        "seeds": (seed(0, 0.97), seed(1, 0.98)),
        "step": StepTime(0.008, 0.0, 0.0015),
        "collectives": (CollectiveCount("all_reduce", "ddp", 1, 2048),),
        "memory": PeakMemory(3 * 2**20, "rss growth"),
        "wall_seconds": 12.34,
    }
    return ArmResult(name, **{**values, **changes})


def comparison() -> Comparison:
    synced = (CollectiveCount("all_reduce", "ddp", 1, 2048), CollectiveCount("all_gather", "norm", 9, 1024))
    error = MaxError(0.01, 0.02)
    other_norm = tuple(Parity(step, error, error, error, None, None) for step in (1, 10))
    return Comparison(
        settings=CompareSettings(("single",), 2, 4, 504, 10, (0, 1), 0.02, 0.9, 8),
        task=Task("a residual CNN", "scikit-learn's digits", "cross-entropy", MetricInfo(), 77754, LAYERS, 1347, 450),
        hardware=Hardware(
            "cpu", "A processor with a name as long as vendors like to make them @ 2.0 GHz", "gloo", 2, 1
        ),
        syncnorm_version="0.1.0",
        torch_version="2.13.0",
        python_version="3.11",
        date="2024-01-01T00:00:00+00:00",
        command="syncnorm compare",
        arms=(
            arm("single", parity=parity(0.0), collectives=(), step=StepTime(0.008)),
            arm("dp", label="dp (emulated)", parity=parity(4e-3), collectives=(), step=StepTime(0.008)),
            arm("ddp", parity=parity(4e-3)),
            arm(
                "ddp+syncbn",
                parity=parity(2e-7),
                collectives=synced,
                step=StepTime(0.008, 0.004, 0.001),
                cost=StepRatio(1.3, 1.2, 1.4, 12),
            ),
            arm("ddp+group", parity=other_norm, memory=None),
            ArmResult("ddp+torch-syncbn", "ddp+torch-syncbn", 2, not_run="torch refuses: [CPU]"),
        ),
        spread=tuple(LayerDivergence(name, 0.1234, None) for name in LAYERS),
        decisions=(Decision("ddp", "single", "equivalent", 0.1, (0.0, 0.2), -0.3, 0.4, 0.5, 0.95, 0, 0),),
        verdict=("Local BN is sufficient here: SyncBN is not needed.", "A second sentence."),
        wall_seconds=61.0,
    )


def judged() -> Comparison:
    """The same with decisions, of which its verdict is the first."""
    made = comparison()
    return replace(made, decisions=decisions(made))
