"""From the evidence to sentences: is syncing needed, is it right, what does it cost, is another norm as good?"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from syncnorm.tools.compare.paired import Difference, difference
from syncnorm.tools.compare.records import ArmResult, Comparison

BASELINES = {"ddp+group": "GroupNorm", "ddp+layer": "LayerNorm", "ddp+instance": "InstanceNorm"}
NAMES = {"ddp": "local BN", "ddp+syncbn": "SyncBN", **BASELINES}
# Fewer than these leave the t-quantile at 4 and more.
ENOUGH_SEEDS = 3
# Two medians of one step's time on one machine are this close by chance.
SAME_TIME = 0.03


def verdict(comparison: Comparison) -> list[str]:
    """Sentences, the answer first and the reasons after it; a pure function of the record.

    Example:
        >>> verdict(comparison)  # doctest: +SKIP
        ['At 4 samples a rank local BN loses 3.1 ± 0.6 points against the full batch.', ...]
    """
    arms = {arm.name: arm for arm in comparison.arms}
    sentences = [*_accuracy(comparison, arms), *_correctness(comparison, arms), *_failures(comparison)]
    # Names of arms keep their small letters.
    words = ("local", "no verdict")
    return [each[0].upper() + each[1:] if each.startswith(words) else each for each in sentences]


def _failures(comparison: Comparison) -> Iterator[str]:
    for arm in comparison.arms:
        if arm.not_run and arm.name in NAMES:
            yield f"{NAMES[arm.name]} did not run: {arm.not_run}."
        if arm.seeds and arm.test_loss is None:
            yield f"{_name(arm)} ended with a loss that is not finite: lower --lr."


def _accuracy(comparison: Comparison, arms: dict[str, ArmResult]) -> Iterator[str]:
    if len(comparison.settings.seeds) < 2:
        yield (
            f"No verdict on {_result(comparison)}: one seed cannot tell a difference from chance. "
            f"Run --seeds {ENOUGH_SEEDS}."
        )
        if cost := _cost(arms):
            yield f"SyncBN {cost}."
        return
    local = _between(comparison, arms, "ddp", "single")
    synced = _between(comparison, arms, "ddp+syncbn", "ddp")
    synced_single = _between(comparison, arms, "ddp+syncbn", "single")
    if local is not None:
        said = _said(local, comparison, "local BN", "the full batch")
        prefix = "" if said.startswith("no verdict") else f"At {_samples(comparison)} a rank "
        yield f"{prefix}{said}."
    if synced is not None and synced_single is not None:
        yield _synced(comparison, local, synced, synced_single, _cost(arms))
    against = "ddp+syncbn" if synced_single is not None else "single"
    others = {name: _between(comparison, arms, name, against) for name in BASELINES}
    known = {name: found for name, found in others.items() if found is not None}
    for name, found in known.items():
        other = "SyncBN" if against == "ddp+syncbn" else "the full batch"
        yield f"{_said(found, comparison, BASELINES[name], other)}."
    if advice := _advice(local, synced, synced_single, known):
        yield advice


def _synced(
    comparison: Comparison, local: Difference | None, synced: Difference, synced_single: Difference, cost: str
) -> str:
    price = f"; it {cost}" if cost else ""
    if local is not None and local.is_none and not synced.is_real:
        return f"SyncBN has nothing to recover{price}."
    if synced.is_real and synced.mean > 0 and not (synced_single.is_real and synced_single.mean < 0):
        lost = local is not None and local.is_real and local.mean < 0
        what = "recovers it" if lost else "does better than local BN"
        return f"SyncBN {what} ({_figures(synced)} over local BN){price}."
    price = f". SyncBN {cost}" if cost else ""
    return f"{_said(synced, comparison, 'SyncBN', 'local BN')}{price}."


def _advice(
    local: Difference | None,
    synced: Difference | None,
    synced_single: Difference | None,
    others: dict[str, Difference],
) -> str | None:
    if local is None:
        return None
    if local.is_none or (local.is_real and local.mean > 0):
        return "Local BN is enough here: nothing asks for SyncBN."
    if not local.is_real or synced is None or not (synced.is_real and synced.mean > 0):
        return None
    as_good = [
        BASELINES[name] for name, found in others.items() if found.is_none or (found.is_real and found.mean > 0)
    ]
    if as_good:
        return (
            f"Take {' or '.join(as_good)} where you train from scratch, with no communication in the layers; "
            f"SyncBN where you start from weights that were trained with BN."
        )
    unclear = [BASELINES[name] for name, found in others.items() if not found.is_real]
    unless = f", unless more seeds show {' or '.join(unclear)} to be as good" if unclear else ""
    return f"Take SyncBN{unless}."


def _samples(comparison: Comparison) -> str:
    number = comparison.settings.batch_per_rank
    return f"{number} sample{'s' * (number > 1)}"


def _said(found: Difference, comparison: Comparison, who: str, other: str) -> str:
    if found.is_real:
        return f"{who} {'gains' if found.mean > 0 else 'loses'} {_figures(found, signed=False)} against {other}"
    if found.is_none:
        return f"{who} is within noise of {other} ({_figures(found)})"
    if found.is_blind:
        number = comparison.task.num_test
        return (
            f"no verdict on {who} against {other} ({_figures(found)}): a test set of {number:,} "
            f"sample{'s' * (number > 1)} shows no difference below {_number(found.resolution, found)} points"
        )
    if found.is_too_small:
        if found.metric == "loss":
            return f"{who} is {_figures(found)} from {other}: all seeds agree, but less than 2 % counts as none"
        return (
            f"{who} is {_figures(found)} from {other}, too little for a test set of {comparison.task.num_test:,} "
            f"samples, where {_number(found.resolution, found)} may be chance: no verdict without a larger one"
        )
    each = ", ".join(_number(value, found, signed=True) for value in found.of_seed)
    one_sided = len({value > 0 for value in found.of_seed}) == 1
    why = f"{len(found.of_seed)} seeds are too few to tell" if one_sided else "the seeds disagree"
    return (
        f"no verdict on {who} against {other}: {why} ({each}{_unit(found)}). "
        f"Run --seeds {max(ENOUGH_SEEDS, 2 * len(found.of_seed))}"
    )


def _correctness(comparison: Comparison, arms: dict[str, ArmResult]) -> Iterator[str]:
    arm = arms.get("ddp+syncbn")
    first = arm.parity[0] if arm is not None and arm.parity else None
    if first is None:
        return
    if first.note:
        yield f"In {_name(arm)}, {first.note}."
    gaps = [gap.max_rel for gap in (first.output, first.params, first.running_mean, first.running_var) if gap]
    if first.within_rounding:
        yield (
            f"SyncBN is right here: in step 1 outputs, weights and running statistics are the single process's to "
            f"{max(gaps):.0e}, fp32 rounding."
        )
    elif first.departs_at is not None:
        gap = next(layer for layer in first.layers if layer.layer == first.departs_at).output
        size = f", by {gap.max_rel:.0e} of its largest output" if gap else ""
        yield (
            f"SyncBN is not the single process here: it departs at layer {first.departs_at}{size}, and "
            f"rounding does not explain that."
        )
    elif not first.note and first.params is not None:
        yield (
            "SyncBN's layers give the single process's outputs, but its weights differ after step 1: a loss that is "
            "no mean over samples, or randomness in the model, does that."
        )


def _cost(arms: dict[str, ArmResult]) -> str:
    synced, local = arms.get("ddp+syncbn"), arms.get("ddp")
    if synced is None or local is None or not synced.step_seconds or not local.step_seconds:
        return ""
    ratios = [a.step_seconds / b.step_seconds for a, b in zip(synced.seeds, local.seeds, strict=False)]
    times = f"{synced.step_seconds * 1e3:.1f} against {local.step_seconds * 1e3:.1f} ms"
    if min(ratios) < 1 < max(ratios):
        return f"may cost step time or not: the runs disagree ({times})"
    more = median(ratios) - 1
    how = f"costs {100 * more:.0f} % more" if more > SAME_TIME else "shows no cost in"
    return f"{how} step time ({times})"


def _between(comparison: Comparison, arms: dict[str, ArmResult], name: str, other: str) -> Difference | None:
    arm, reference = arms.get(name), arms.get(other)
    return None if arm is None or reference is None else difference(comparison, arm, reference)


def _figures(found: Difference, signed: bool = True) -> str:
    value = found.mean if signed else abs(found.mean)
    return f"{_number(value, found, signed)} ± {_number(found.half_width, found)}{_unit(found)}"


def _number(value: float, found: Difference, signed: bool = False) -> str:
    return format(value, ("+" if signed else "") + (".1f" if found.metric == "accuracy" else ".3g"))


def _unit(found: Difference) -> str:
    return " points" if found.metric == "accuracy" else " of test loss"


def _result(comparison: Comparison) -> str:
    return "accuracy" if comparison.task.metric == "accuracy" else "the test loss"


def _name(arm: ArmResult | None) -> str:
    return "" if arm is None else NAMES.get(arm.name, arm.name)
