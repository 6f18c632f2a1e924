"""How far the arms are from the single process, on a terminal: over the model, and layer by layer."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from syncnorm.tools.compare.evidence import ROUNDING, Gap, LayerParity, Parity
from syncnorm.tools.compare.records import ArmResult, Comparison
from syncnorm.tools.report.consoles import PlainTable

# Enough to see where a difference begins; all of them are in the JSON.
MOST_LAYERS = 10
# Longer names keep their end, which tells layers apart.
NAME_WIDTH = 32


def parity_part(comparison: Comparison) -> list[RenderableType]:
    """A row for each arm that ran."""
    last = comparison.settings.parity_steps
    columns = [(1, "output"), (1, "grads"), (1, "params"), (1, "stats")]
    columns += [(last, "output"), (last, "params")] if last > 1 else []
    table = PlainTable("Difference to single, relative" + (f", in step 1 and in step {last}" if last > 1 else ""))
    table.add_column("arm", no_wrap=True)
    for index, (step, kind) in enumerate(columns):
        first = index == 0 or columns[index - 1][0] != step
        table.add_column(f"{f'step {step}' if first else ''}\n{kind}", justify="right", no_wrap=True)
    table.add_column("\nlike single?", no_wrap=True)
    for arm in comparison.arms:
        if arm.not_run:
            continue
        by_step = {parity.step: parity for parity in arm.parity}
        cells = [_gap_text(_gaps(by_step.get(step)).get(kind)) for step, kind in columns]
        table.add_row(arm.label, *cells, _like_single(arm))
    return [table, Text(_PARITY_LEGEND, style="dim"), *_notes(comparison), Text()]


def _gaps(parity: Parity | None) -> dict[str, Gap | None]:
    if parity is None:
        return {}
    stats = [gap for gap in (parity.running_mean, parity.running_var) if gap]
    return {
        "output": parity.output,
        "grads": parity.gradients,
        "params": parity.params,
        "stats": max(stats, key=lambda gap: gap.max_rel, default=None),
    }


def _gap_text(gap: Gap | None) -> Text:
    if gap is None:
        return Text("-")
    if gap.max_rel == 0:
        return Text("0")
    return Text(f"{gap.max_rel:.0e}", style="green" if gap.max_rel <= ROUNDING else "red")


def _like_single(arm: ArmResult) -> Text:
    if not arm.parity:
        return Text("-")
    first = arm.parity[0]
    if arm.name == "single":
        return Text("the reference")
    if first.within_rounding:
        return Text("yes (rounding)", style="bold green")
    if first.running_mean is None:
        return Text("no (other norm)")
    if first.departs_at is None:
        return Text("no (other grads)", style="bold red")
    return Text("no (other stats)", style="bold red")


_PARITY_LEGEND = (
    "max|a - b| / max|b|: the norm layers' outputs for rank 0's samples, gradients and values of all parameters, "
    "running statistics (rank 0's, as DDP saves them). All arms have the same weights and batches, and no dropout "
    "here: one that trains like one process differs by fp32 rounding, about 1e-7. That grows with the steps, so "
    "judge by the first. A '-' stands where the arm's norm keeps no running statistics."
)


def _notes(comparison: Comparison) -> list[Text]:
    noted = [(arm, arm.parity[0].note) for arm in comparison.arms if arm.parity]
    return [Text(f"{arm.label}: {note}.") for arm, note in noted if note]


def layer_part(comparison: Comparison) -> list[RenderableType]:
    """A row for each norm layer, from first to last; some of them where there are many."""
    layers = comparison.task.norm_layers
    arms = {arm.name: arm.parity[0].layers for arm in comparison.arms if arm.parity and arm.name.startswith("ddp")}
    shown = {name: {each.layer: each for each in arms[name]} for name in ("ddp", "ddp+syncbn") if name in arms}
    spread = {each.layer: each for each in comparison.spread}
    if not layers or not (shown or spread):
        return []
    rows = _some(layers)
    some = f", {len(rows)} of {len(layers)} layers" if len(rows) < len(layers) else ""
    table = PlainTable(f"Layer by layer{some}")
    table.add_column("norm layer", no_wrap=True)
    for index, name in enumerate(shown):
        table.add_column(f"{'output in step 1' if index == 0 else ''}\n{name}", justify="right", no_wrap=True)
    for header in ("ranks apart\nmean", "\nvar") if spread else ():
        table.add_column(header, justify="right", no_wrap=True)
    for layer in rows:
        apart = spread.get(layer)
        table.add_row(
            layer if len(layer) <= NAME_WIDTH else "..." + layer[3 - NAME_WIDTH :],
            *(_gap_text(_output(by_layer.get(layer))) for by_layer in shown.values()),
            *((_share(apart.mean if apart else None), _share(apart.var if apart else None)) if spread else ()),
        )
    return [table, *([Text(_SPREAD_LEGEND, style="dim")] if spread else []), Text()]


def _output(parity: LayerParity | None) -> Gap | None:
    return parity.output if parity else None


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _some(layers: tuple[str, ...]) -> list[str]:
    """The first, the last, and others evenly between them."""
    if len(layers) <= MOST_LAYERS:
        return list(layers)
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


_SPREAD_LEGEND = (
    "Ranks apart: what ddp's layers are given after the training. mean: how far a typical rank's mean lies from the "
    "whole batch's, in standard deviations; var: its variance, relative. Small numbers leave SyncBN little to mend."
)
