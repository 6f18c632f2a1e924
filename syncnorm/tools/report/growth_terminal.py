"""Measured growth and the cost model on a terminal: what a step costs by ranks, and how far to believe the model."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from rich.console import RenderableType
from rich.text import Text

from syncnorm.tools.bench.growth_records import Arrangements, Check, Cost, Growth, Simulation
from syncnorm.tools.report.consoles import PlainTable

CLUSTER = "--latency-us 30 --per-message-us 5 --bandwidth-gb 1.25"


def render_growth(growth: Growth, cores: int) -> list[RenderableType]:
    """Tables of layers, stacks and exchanges: a row a size, a column a world."""
    parts: list[RenderableType] = [
        _title("A synced layer's forward and backward by ranks, microseconds (ratio to 2 ranks)"),
        _costs_table("channels", growth.layers, growth.worlds),
        _title(f"Layers of {growth.stack_channels} channels, one after the other"),
        _costs_table("layers", growth.stacks, growth.worlds),
        _title("One bare exchange, of which a layer's step has two"),
        _costs_table("bytes", growth.exchanges, [w for w in growth.worlds if w > 1]),
    ]
    lines = [
        f"Medians; all worlds take turns, the ranks outside one sleep meanwhile. {growth.places} values a channel "
        "and rank, so that the exchanges are most of a step. In a world of 1 the layer is plain batch norm."
    ]
    if any(cost.oversubscribed for cost in growth.layers):
        lines.append(_oversubscribed(cores))
    return [*parts, _legend(lines)]


def render_simulation(simulation: Simulation, cores: int) -> list[RenderableType]:
    """Parameters, checks, the worlds, and what follows in words."""
    parts: list[RenderableType] = [_title("The cost model"), _parameters(simulation)]
    for what, (title, size) in _CHECKS.items():
        checks = [check for check in simulation.checks if check.what == what]
        if checks:
            parts += [_title(title), _checks_table(checks, size)]
    legend = ["Ratio: predicted / measured; above 1 the model sees too high a cost."]
    if any(check.what == "layer" for check in simulation.checks):
        legend.append(
            "A layer's step is predicted as two exchanges and a rank's own work, which takes ranks / cores times as "
            "long where they share cores; that ranks come to an exchange at different times, and wait, it leaves out."
        )
    if any(check.oversubscribed for check in simulation.checks):
        legend.append(_oversubscribed(cores))
    parts.append(_legend(legend))
    for over, name in (("gloo", ""), ("NCCL", "nccl_")):
        parts += [_title(_worlds_title(simulation, over)), _worlds_table(simulation, name)]
    parts += [_legend(_worlds_legend(simulation)), _title("From which world size on"), Text(_words(simulation))]
    return parts


_CHECKS = {
    "exchange": ("Checked: exchanges in worlds that the fit has not seen, microseconds", "bytes"),
    "layer": ("Checked: steps of layers, none of which the fit of the network has seen, microseconds", "channels"),
    "host": ("Checked: a rank's own work in a fake world that the fit has not seen, microseconds", "channels"),
}


def _costs_table(size: str, costs: Sequence[Cost], worlds: Sequence[int]) -> PlainTable:
    over = {cost.world_size for cost in costs if cost.oversubscribed}
    table = _table(size, *(f"{w} rank{'s' * (w > 1)}{'*' * (w in over)}" for w in worlds))
    by_place = {(cost.size, cost.world_size): cost for cost in costs}
    for each in dict.fromkeys(cost.size for cost in costs):
        here = [by_place[each, w] for w in worlds]
        table.add_row(f"{each:,}", *(f"{_micro(cost.median)} ({cost.ratio_to_two:.2f})" for cost in here))
    return table


def _checks_table(checks: Sequence[Check], size: str) -> PlainTable:
    table = _table("ranks", size, "predicted", "measured", "ratio")
    for check in checks:
        ranks = f"{check.world_size:,}{'*' * check.oversubscribed}"
        figures = (_micro(check.predicted), _micro(check.measured), f"{check.ratio:.2f}")
        table.add_row(ranks, f"{check.size:,}", *figures)
    return table


def _parameters(simulation: Simulation) -> Text:
    network, ring, host = simulation.network, simulation.ring, simulation.host

    def said(name: str) -> str:
        return "given" if name in simulation.given else "fitted"

    fitted = ""
    if len(simulation.given) < 3:
        shared = ", the latter oversubscribed*" if simulation.fit_oversubscribed else ""
        fitted = f" Fitted to worlds of 2 and 3 ranks{shared}."
    return Text(
        f"gloo: an exchange takes {_us(network.latency)} us ({said('latency_us')}), and for each other rank "
        f"{_us(network.per_message)} us ({said('per_message_us')}) and\n"
        f"its frame at {_bandwidth(network.per_byte)} ({said('bandwidth_gb')}).{fitted}\n"
        f"NCCL: {_us(ring.launch)} us a collective, {_us(ring.hop)} us a hop of its ring, "
        f"{_bandwidth(ring.per_byte)}; assumed or given, never measured here.\n"
        f"host: {_us(host.base)} us a step and {host.per_channel * 1e9:.2f} ns a channel in any world; merging, "
        f"{host.per_row * 1e9:.0f} ns a rank and\n{host.per_value * 1e9:.2f} ns a rank and channel "
        "(fitted to torch's fake process group)."
    )


def _worlds_title(simulation: Simulation, over: str) -> str:
    beside = "exchanges and merging" if over == "gloo" else "the collectives alone"
    return (
        f"Simulated over {over}, {beside}: a layer of {simulation.channels} channels, microseconds, and\n"
        f"{simulation.model_name} of {len(simulation.model_channels)} layers, milliseconds"
    )


def _worlds_table(simulation: Simulation, prefix: str) -> PlainTable:
    grouped = f"groups\nof {simulation.group_size}"
    kinds = ("flat", "two-level\n(model only)", "best\nsplit", grouped)
    received = () if prefix else ("KiB\na layer",)
    table = _table("ranks", *received, *(f"layer\n{kinds[0]}", *kinds[1:]), *(f"model\n{kinds[0]}", *kinds[1:]))
    for world in simulation.worlds:
        received = () if prefix else (f"{world.layer_bytes / 1024:,.1f}",)
        layer, model = (getattr(world, f"{prefix}{what}") for what in ("layer", "model"))
        cells = (*_cells(layer, world.world_size, 1e6, 0), *_cells(model, world.world_size, 1e3, 2))
        table.add_row(f"{world.world_size:,}", *received, *cells)
    return table


def _cells(step: Arrangements, world_size: int, scale: float, digits: int) -> tuple[str, ...]:
    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * scale:,.{digits}f}"

    split = "-" if step.best_g is None else f"{step.best_g}x{world_size // step.best_g}"
    return shown(step.flat), shown(step.two_level), split, shown(step.grouped)


def _worlds_legend(simulation: Simulation) -> list[str]:
    size = simulation.group_size
    return [
        "Flat: what the layer does. Two-level: first among g ranks, then among W / g, with exact statistics; the "
        f"layer has no such gather. Groups of {size}: group_size={size}; another layer, whose statistics are those "
        f"of {size} ranks. KiB: what a rank receives in a layer's forward and backward over gloo. Steps are fp32, "
        "one layer after the other, hidden behind nothing. NCCL: rings, also for the all_reduce, where NCCL may "
        "choose a tree, and without what a GPU takes to merge."
    ]


def _words(simulation: Simulation) -> str:
    from_ = simulation.pays_from
    size, network, last = simulation.group_size, simulation.network, simulation.worlds[-1]
    channels, layers = simulation.channels, len(simulation.model_channels)
    lines = [
        f"Over gloo a two-level gather would pay {_from(from_.two_level_layer, simulation)} for a layer of "
        f"{channels} channels, and {_from(from_.two_level_model, simulation)} for the {layers} layers of the "
        f"model. Over NCCL: {_from(from_.nccl_two_level_layer, simulation)} and "
        f"{_from(from_.nccl_two_level_model, simulation)}. A world of a prime number of ranks cannot be split.",
        "It saves messages and bytes (W - 1 become g + W / g - 2) and merged rows, and costs one latency more: it "
        "pays the earlier, the smaller the latency is against the cost of a message and its frame, so the wider the "
        f"layers. Here these are {_us(network.latency)} us against "
        f"{_us(_message(simulation))} us for a frame of {channels} channels.",
    ]
    if from_.grouped is None:
        lines.append(f"A group of {size} is a part of none of these worlds.")
    else:
        lines.append(
            f"Groups of {size} cost less from {from_.grouped} ranks on, wherever {size} divides the world: their "
            "cost no longer grows. But only the ranks of a group share statistics: take the smallest group whose "
            "batch is large enough."
        )
        if last.model.grouped is not None:
            saved = f"{last.model.flat / last.model.grouped:,.0f}x less than flat"
            if last.model.two_level is not None:
                saved += f" (two-level: {last.model.flat / last.model.two_level:,.1f}x less)"
            larger = [w for w in simulation.worlds if w.world_size > size]
            better = [w.world_size for w in larger if (w.model.grouped or inf) < (w.model.two_level or inf)]
            if better:
                lines.append(f"Of the worlds above they cost less than two levels from {better[0]:,} ranks on.")
            lines.append(f"With {last.world_size:,} ranks the model's layers then cost {saved}.")
    if simulation.fit_oversubscribed:
        lines.append(
            "Believe these only for ranks that share cores: in the worlds of the fit the last rank had no core of "
            "its own, so a message seems dear, a latency cheap, and two levels seem to pay early."
        )
    if len(simulation.given) < 3:
        lines.append(f"For a cluster give its own figures, such as {CLUSTER}.")
    return "\n".join(lines)


def _message(simulation: Simulation) -> float:
    """Seconds that one more rank adds to an exchange of the layer."""
    exchange = simulation.worlds[0].layer_bytes / 2  # in a world of 2 a rank receives one frame an exchange
    return simulation.network.per_message + exchange * simulation.network.per_byte


def _from(world_size: int | None, simulation: Simulation) -> str:
    if world_size is None:
        return f"nowhere up to {simulation.largest:,} ranks"
    return f"from {world_size:,} ranks on"


def _oversubscribed(cores: int) -> str:
    return f"*: oversubscribed: more ranks than the {cores} cores, so they wait for a core as well as for each other."


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


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"
