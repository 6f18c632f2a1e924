"""The numbers of a sampled step, each with a stable name, for experiment trackers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from syncnorm.monitor.divergence import root_mean_square
from syncnorm.monitor.findings import Sample, find_straggler, total_waits

WriteScalar = Callable[[str, float, int], object]
"""Called with a name, a value and the number of the step, as ``add_scalar`` of TensorBoard's SummaryWriter is."""

LAST_NAME = "syncnorm/all/buffers_differ"
_NO_STRAGGLER = -1.0


def scalars_of(sample: Sample) -> Iterator[tuple[str, float]]:
    """The names and values of one step, in the same order at every step; ``LAST_NAME`` is the last one.

    ``<layer>`` is the name of the batch norm in the model, and "model" if the model itself is one. Means and maxima
    of times are over the ranks, in milliseconds. What is unknown is left out: divergences of a layer that did not
    run, waits that were not measured.

    For each layer:
        - ``syncnorm/divergence_mean/<layer>``: distance of the ranks' means from the global mean, in standard
          deviations of the global batch; see `RankDivergence`
        - ``syncnorm/divergence_var/<layer>``: relative deviation of the ranks' variances from the global variance
        - ``syncnorm/wait_ms/<layer>``, ``syncnorm/wait_ms_max/<layer>``: the time a rank waits in the layer's
          exchanges, forward and backward: mean and maximum
        - ``syncnorm/buffers_differ/<layer>``: 1 if bits of its running statistics differ between ranks, otherwise 0

    For all layers:
        - ``syncnorm/all/divergence_mean``, ``syncnorm/all/divergence_var``: root mean square over the layers
        - ``syncnorm/all/wait_ms``, ``syncnorm/all/wait_ms_max``: the time a rank waits in all layers and in DDP's
          broadcast of buffers: mean and maximum
        - ``syncnorm/all/straggler``: the rank that the others wait for; -1 if none stands out
        - ``syncnorm/all/step_ms``: the duration of the step: maximum
        - ``syncnorm/all/buffers_differ``: the number of layers whose running statistics differ between ranks
    """
    for layer in sample.layers:
        name = "model" if layer.name == "(model)" else layer.name  # MLflow refuses parentheses
        yield from _known(
            {
                f"syncnorm/divergence_mean/{name}": layer.spread_mean,
                f"syncnorm/divergence_var/{name}": layer.spread_var,
                **_waits(layer.wait_ms, "", f"/{name}"),
                f"syncnorm/buffers_differ/{name}": float(bool(layer.differing)),
            }
        )
    waits = total_waits(sample.layers, sample.ddp_wait_ms)
    straggler = find_straggler(waits)
    yield from _known(
        {
            "syncnorm/all/divergence_mean": root_mean_square([layer.spread_mean for layer in sample.layers]),
            "syncnorm/all/divergence_var": root_mean_square([layer.spread_var for layer in sample.layers]),
            **_waits(waits, "all/", ""),
            "syncnorm/all/straggler": None if waits is None else _NO_STRAGGLER if straggler is None else straggler,
            "syncnorm/all/step_ms": max(sample.step_ms),
            LAST_NAME: float(sum(bool(layer.differing) for layer in sample.layers)),
        }
    )


def _waits(wait_ms: tuple[float, ...] | None, before: str, after: str) -> dict[str, float | None]:
    mean, largest = (None, None) if wait_ms is None else (sum(wait_ms) / len(wait_ms), max(wait_ms))
    return {f"syncnorm/{before}wait_ms{after}": mean, f"syncnorm/{before}wait_ms_max{after}": largest}


def _known(scalars: dict[str, float | None]) -> Iterator[tuple[str, float]]:
    return ((name, float(value)) for name, value in scalars.items() if value is not None)
