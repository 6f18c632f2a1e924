"""The scaling benchmark on a terminal: the cost of a step by ranks, and the cost model and its accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from rich.console import RenderableType
from rich.text import Text

from syncnorm.tools.bench.scaling_records import (
    Arrangements,
    Cost,
    GpuSimulation,
    ModelCheck,
    Scaling,
    Simulation,
)
from syncnorm.tools.report.consoles import PlainTable

_CLUSTER = "--latency-us 30 --per-message-us 5 --bandwidth-gb 1.25"


def render_scaling(scaling: Scaling, cores: int) -> list[RenderableType]:
    """Tables of layers, stacks and exchanges: a row per size, a column per world."""
    parts: list[RenderableType] = [
        _title("Forward and backward of one synchronized layer, microseconds (ratio to 2 ranks)"),
        _costs_table("channels", scaling.layers, scaling.worlds),
        _title(f"Forward and backward of consecutive layers of {scaling.stack_channels} channels"),
        _costs_table("layers", scaling.stacks, scaling.worlds),
        _title("One bare exchange, of which a step of a layer has two"),
        _costs_table("bytes", scaling.exchanges, [w for w in scaling.worlds if w > 1]),
    ]
    lines = [
        "Medians of the time on the slowest rank; all worlds take turns, and the ranks outside a world sleep "
        f"meanwhile. {scaling.places} values per channel and rank, so that the exchanges are most of a step. In a "
        f"world of 1 the layer is plain batch norm. Transport: {scaling.transport}."
    ]
    if any(cost.oversubscribed for cost in scaling.layers):
        lines.append(_oversubscribed(cores))
    return [*parts, _legend(lines)]


def render_simulation(simulation: Simulation, cores: int) -> list[RenderableType]:
    """Parameters, checks, the worlds, and conclusions in words."""
    parts: list[RenderableType] = [_title("The cost model"), _parameters(simulation)]
    for what, (title, size) in _CHECKS.items():
        checks = [check for check in simulation.checks if check.what == what]
        if checks:
            parts += [_title(title), _checks_table(checks, size)]
    legend = ["Ratio: predicted / measured; above 1, the model overestimates the cost."]
    if any(check.what == "layer" for check in simulation.checks):
        legend.append(
            "A step of a layer is predicted as two exchanges and the rank's own work, which takes ranks / cores "
            "times as long where ranks share cores. The wait for ranks that reach an exchange later is not included."
        )
    if any(check.oversubscribed for check in simulation.checks):
        legend.append(_oversubscribed(cores))
    parts.append(_legend(legend))
    parts += [_title(_worlds_title(simulation)), _worlds_table(simulation), _legend([_worlds_legend(simulation)])]
    parts += [_title("Break-even world sizes"), Text("\n".join(_conclusions(simulation)))]
    return parts if simulation.gpus is None else [*parts, *_render_gpus(simulation.gpus)]


_CHECKS = {
    "exchange": ("Check: exchanges in worlds outside the fit, microseconds", "bytes"),
    "layer": ("Check: steps of layers, to which the network was not fitted, microseconds", "channels"),
    "host": ("Check: a rank's own work in a fake world outside the fit, microseconds", "channels"),
}


def _costs_table(size: str, costs: Sequence[Cost], worlds: Sequence[int]) -> PlainTable:
    oversubscribed = {cost.world_size for cost in costs if cost.oversubscribed}
    table = _table(size, *(f"{w} rank{'s' * (w > 1)}{'*' * (w in oversubscribed)}" for w in worlds))
    by_size_and_world = {(cost.size, cost.world_size): cost for cost in costs}
    for each in dict.fromkeys(cost.size for cost in costs):
        row = [by_size_and_world[each, w] for w in worlds]
        table.add_row(f"{each:,}", *(f"{_microseconds(cost.median)} ({cost.ratio_to_two:.2f})" for cost in row))
    return table


def _checks_table(checks: Sequence[ModelCheck], size: str) -> PlainTable:
    table = _table("ranks", size, "predicted", "measured", "ratio")
    for check in checks:
        ranks = f"{check.world_size:,}{'*' * check.oversubscribed}"
        figures = (_microseconds(check.predicted), _microseconds(check.measured), f"{check.ratio:.2f}")
        table.add_row(ranks, f"{check.size:,}", *figures)
    return table


def _parameters(simulation: Simulation) -> Text:
    network, host = simulation.network, simulation.host

    def source(name: str) -> str:
        return "given" if name in simulation.given else "fitted"

    fitted = ""
    if len(simulation.given) < 3:
        shared = ", the latter oversubscribed*" if simulation.fit_oversubscribed else ""
        fitted = f" Fitted to worlds of 2 and 3 ranks{shared}."
    return Text(
        f"gloo: {_us(network.latency)} us per exchange ({source('latency_us')}), and for each other rank "
        f"{_us(network.per_message)} us ({source('per_message_us')}) and\n"
        f"its frame at {_bandwidth(network.per_byte)} ({source('bandwidth_gb')}).{fitted}\n"
        f"host: {_us(host.base)} us per step and {host.per_channel * 1e9:.2f} ns per channel in any world; merging, "
        f"{host.per_row * 1e9:.0f} ns per rank and\n{host.per_value * 1e9:.2f} ns per rank and channel "
        "(fitted to torch's fake process group)."
    )


def _worlds_title(simulation: Simulation) -> str:
    return (
        f"Simulated over gloo, exchanges and merging: a layer of {simulation.channels} channels, microseconds, and\n"
        f"{simulation.model_name} of {len(simulation.model_channels)} layers, milliseconds"
    )


def _worlds_table(simulation: Simulation) -> PlainTable:
    grouped = f"groups\nof {simulation.group_size}"
    kinds = ("flat", "two-level\n(model only)", "best\nsplit", grouped)
    table = _table(
        "ranks", "KiB per\nlayer", *(f"layer\n{kinds[0]}", *kinds[1:]), *(f"model\n{kinds[0]}", *kinds[1:])
    )
    for world in simulation.worlds:
        received = f"{world.layer_bytes / 1024:,.1f}"
        cells = (*_cells(world.layer, world.world_size, 1e6, 0), *_cells(world.model, world.world_size, 1e3, 2))
        table.add_row(f"{world.world_size:,}", received, *cells)
    return table


def _cells(step: Arrangements, world_size: int, scale: float, digits: int) -> tuple[str, ...]:
    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * scale:,.{digits}f}"

    split = "-" if step.best_g is None else f"{step.best_g}x{world_size // step.best_g}"
    return shown(step.flat), shown(step.two_level), split, shown(step.grouped)


def _worlds_legend(simulation: Simulation) -> str:
    size = simulation.group_size
    return (
        "Flat: every rank sends to every other. Two-level: first among g ranks, then among W / g, with exact "
        "statistics; the layer does so over gloo if g ranks share memory, and their messages then cost next to "
        f"nothing, which the model does not know. Groups of {size}: group_size={size}; a different layer, whose "
        f"statistics are those of {size} ranks. KiB: received by a rank in the forward and backward of a layer over "
        "gloo. Steps are fp32, one layer after the other, without any overlap."
    )


def _conclusions(simulation: Simulation) -> list[str]:
    pays_from = simulation.pays_from
    channels, layers = simulation.channels, len(simulation.model_channels)
    for_layer, for_model = (
        _from(ranks, simulation.largest) for ranks in (pays_from.two_level_layer, pays_from.two_level_model)
    )
    lines = [
        f"Over gloo a two-level gather pays {for_layer} for a layer of {channels} channels, and {for_model} for the "
        f"{layers} layers of the model. A world of a prime number of ranks cannot be split.",
        "It saves messages and bytes (W - 1 become g + W / g - 2) and merged rows, and costs one more latency. It "
        "pays earlier if the latency is small compared with the cost of a message and its frame, so for wide layers. "
        f"Here the latency is {_us(simulation.network.latency)} us, and a frame of {channels} channels costs "
        f"{_us(_message_seconds(simulation))} us.",
        *_grouped_conclusions(simulation),
    ]
    if simulation.fit_oversubscribed:
        lines.append(
            "These figures hold only for ranks that share cores: in the worlds of the fit, the last rank had no core "
            "of its own, so messages seem expensive, the latency small, and two levels seem to pay early."
        )
    if len(simulation.given) < 3:
        lines.append(f"For a cluster, give its own figures, such as {_CLUSTER}.")
    return lines


def _grouped_conclusions(simulation: Simulation) -> list[str]:
    size, last = simulation.group_size, simulation.worlds[-1]
    if simulation.pays_from.grouped is None:
        return [f"None of these worlds can be split into several groups of {size}."]
    lines = [
        f"Groups of {size} cost less from {simulation.pays_from.grouped} ranks on, if {size} divides the world size: "
        "their cost no longer grows. But only the ranks of a group share statistics: choose the smallest group whose "
        "batch is large enough."
    ]
    if last.model.grouped is not None:
        saved = f"{last.model.flat / last.model.grouped:,.0f}x less than flat"
        if last.model.two_level is not None:
            saved += f" (two-level: {last.model.flat / last.model.two_level:,.1f}x less)"
        larger = [w for w in simulation.worlds if w.world_size > size]
        better = [w.world_size for w in larger if (w.model.grouped or inf) < (w.model.two_level or inf)]
        if better:
            lines.append(f"In the worlds above, they cost less than two levels from {better[0]:,} ranks on.")
        lines.append(f"With {last.world_size:,} ranks, the layers of the model then cost {saved}.")
    return lines


def _render_gpus(gpus: GpuSimulation) -> list[RenderableType]:
    """A table of the worlds, and what it assumes and shows."""
    layers = f"the {len(gpus.model_channels)} norm layers of {gpus.model_name}"
    kinds = ("gather", "sum", "two-level*")
    table = _table("ranks", *(f"{kind}\n{unit}" for unit in ("MiB", "ms") for kind in kinds))
    for world in gpus.worlds:
        costs = (world.gather, world.summed, world.two_level)
        received = ("-" if cost is None else f"{cost.received / 2**20:,.2f}" for cost in costs)
        seconds = ("-" if cost is None else f"{cost.seconds * 1e3:,.2f}" for cost in costs)
        table.add_row(f"{world.world_size:,}", *received, *seconds)
    cluster, largest = gpus.cluster, gpus.worlds[-1].world_size
    size = cluster.ranks_per_node
    legend = (
        "MiB received by a rank and milliseconds of collectives in a step, by the collective of the forward; that of "
        "the backward is an all_reduce. Gather: of fp32 rows, by a ring. Sum: an all_reduce of fp64 rows, by a tree "
        "or a ring. *Two-level, only in this model: a gather on each node, then one between nodes. None of this is "
        f"measured. Assumed or given: nodes of {size} GPUs; {_us(cluster.launch)} us per collective; "
        f"{_us(cluster.node_hop)} us per hop inside a node, or {_us(cluster.ring_node_hop)} in a ring over several; "
        f"between nodes {_us(cluster.hop)} us in a ring and {_us(cluster.tree_hop)} in a tree or from node to node, "
        f"and {_bandwidth(cluster.per_byte)} per rank. What GPUs compute is not included; the merge of gathered rows "
        "also grows with the ranks."
    )
    conclusion = (
        f"A sum costs less than a gather {_from(gpus.sum_pays_from, largest)} for all these layers together, and "
        f"{_from(gpus.sum_pays_from_layer, largest)} for each of them; counted in full nodes. With "
        f"group_size={size}, whose statistics are those of {size} ranks, they cost {gpus.node.seconds * 1e3:,.2f} ms "
        "in any world."
    )
    return [_title(f"Simulated on GPUs over NCCL: {layers}"), table, _legend([legend]), Text(conclusion)]


def _message_seconds(simulation: Simulation) -> float:
    """Seconds that one more rank adds to an exchange of the layer."""
    frame_bytes = simulation.worlds[0].layer_bytes / 2  # in a world of 2, a rank receives one frame per exchange
    return simulation.network.per_message + frame_bytes * simulation.network.per_byte


def _from(world_size: int | None, largest: int) -> str:
    if world_size is None:
        return f"nowhere up to {largest:,} ranks"
    return f"from {world_size:,} ranks on"


def _oversubscribed(cores: int) -> str:
    return (
        f"*: oversubscribed: more ranks than the {cores} cores, so ranks wait for a core as well as for each other."
    )


def _bandwidth(per_byte: float) -> str:
    return "no measurable cost" if per_byte == 0 else f"{1e-9 / per_byte:.3g} GB/s"


def _table(*headers: str) -> PlainTable:
    table = PlainTable(gap=1)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _title(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _legend(lines: Sequence[str]) -> Text:
    return Text("\n".join(lines), style="dim")


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f}"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"
