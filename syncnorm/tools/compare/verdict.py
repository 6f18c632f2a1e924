"""From the record to sentences: is SyncBN needed, is it correct, what does it cost, is another norm as good?"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from syncnorm.tools.compare.paired import ResultDifference, difference
from syncnorm.tools.compare.records import ArmResult, Comparison

BASELINES = {"ddp+group": "GroupNorm", "ddp+layer": "LayerNorm", "ddp+instance": "InstanceNorm"}
NAMES = {"ddp": "local BN", "ddp+syncbn": "SyncBN", **BASELINES}
REFERENCE = "single-process training"
# With fewer seeds the t-quantile is above 4.
ENOUGH_SEEDS = 3
# Medians of the same step on the same machine differ by this share by chance.
STEP_TIME_NOISE = 0.03


def verdict(comparison: Comparison) -> list[str]:
    """Sentences, the answer first and the reasons after it; a pure function of the record.

    Example:
        >>> verdict(comparison)  # doctest: +SKIP
        ['At 4 samples per rank, local BN is 3.1 ± 0.6 points worse than single-process training.', ...]
    """
    arms = {arm.name: arm for arm in comparison.arms}
    sentences = [*_accuracy(comparison, arms), *_correctness(arms), *_failures(comparison)]
    # Names of arms are never capitalized.
    capitalized = ("local", "no verdict")
    return [each[0].upper() + each[1:] if each.startswith(capitalized) else each for each in sentences]


def _failures(comparison: Comparison) -> Iterator[str]:
    for arm in comparison.arms:
        if arm.not_run and arm.name in NAMES:
            yield f"{NAMES[arm.name]} did not run: {arm.not_run}."
        if arm.seeds and arm.test_loss is None:
            yield f"{NAMES.get(arm.name, arm.name)} ended with a loss that is not finite: use a smaller --lr."


def _accuracy(comparison: Comparison, arms: dict[str, ArmResult]) -> Iterator[str]:
    if len(comparison.settings.seeds) < 2:
        metric = "accuracy" if comparison.task.metric == "accuracy" else "test loss"
        yield (
            f"No verdict on {metric}: with one seed, a difference cannot be distinguished from chance. "
            f"Run with --seeds {ENOUGH_SEEDS}."
        )
        if cost := _cost(arms):
            yield f"SyncBN {cost}."
        return
    local = _between(comparison, arms, "ddp", "single")
    synced = _between(comparison, arms, "ddp+syncbn", "ddp")
    synced_single = _between(comparison, arms, "ddp+syncbn", "single")
    if local is not None:
        sentence = _compared(local, comparison, "local BN", REFERENCE)
        prefix = "" if sentence.startswith("no verdict") else f"At {_samples(comparison)} per rank, "
        yield f"{prefix}{sentence}."
    if synced is not None and synced_single is not None:
        yield _synced(comparison, local, synced, synced_single, _cost(arms))
    other = "ddp+syncbn" if synced_single is not None else "single"
    differences = {name: _between(comparison, arms, name, other) for name in BASELINES}
    known = {name: found for name, found in differences.items() if found is not None}
    for name, found in known.items():
        yield f"{_compared(found, comparison, BASELINES[name], NAMES.get(other, REFERENCE))}."
    if advice := _advice(local, synced, known):
        yield advice


def _synced(
    comparison: Comparison,
    local: ResultDifference | None,
    synced: ResultDifference,
    synced_single: ResultDifference,
    cost: str,
) -> str:
    and_cost = f"; it {cost}" if cost else ""
    if local is not None and local.equivalent and not synced.significant:
        return f"SyncBN has nothing to recover{and_cost}."
    if synced.significant and synced.mean > 0 and not (synced_single.significant and synced_single.mean < 0):
        lost = local is not None and local.significant and local.mean < 0
        what = "recovers the difference" if lost else "is better than local BN"
        return f"SyncBN {what} ({_figures(synced)} compared with local BN){and_cost}."
    and_cost = f". SyncBN {cost}" if cost else ""
    return f"{_compared(synced, comparison, 'SyncBN', 'local BN')}{and_cost}."


def _advice(
    local: ResultDifference | None,
    synced: ResultDifference | None,
    others: dict[str, ResultDifference],
) -> str | None:
    if local is None:
        return None
    if local.equivalent or (local.significant and local.mean > 0):
        return "Local BN is sufficient here: SyncBN is not needed."
    if not local.significant or synced is None or not (synced.significant and synced.mean > 0):
        return None
    as_good = [
        BASELINES[name]
        for name, found in others.items()
        if found.equivalent or (found.significant and found.mean > 0)
    ]
    if as_good:
        return (
            f"Use {' or '.join(as_good)}, which needs no communication, when training from scratch; use SyncBN when "
            f"starting from weights that were trained with BN."
        )
    unclear = [BASELINES[name] for name, found in others.items() if not found.significant]
    unless = f", unless more seeds show that {' or '.join(unclear)} is as good" if unclear else ""
    return f"Use SyncBN{unless}."


def _samples(comparison: Comparison) -> str:
    number = comparison.settings.batch_per_rank
    return f"{number} sample{'s' * (number > 1)}"


def _compared(found: ResultDifference, comparison: Comparison, name: str, other: str) -> str:
    num_test = comparison.task.num_test
    if found.significant:
        return f"{name} is {_figures(found, signed=False)} {'better' if found.mean > 0 else 'worse'} than {other}"
    if found.equivalent:
        return f"{name} is statistically equivalent to {other} ({_figures(found)})"
    if found.underpowered:
        return (
            f"no verdict on {name} compared with {other} ({_figures(found)}): a test set of {num_test:,} "
            f"sample{'s' * (num_test > 1)} cannot confirm a difference below {_number(found.resolution, found)} "
            "points"
        )
    if found.below_resolution:
        differs = f"{name} differs from {other} by {_figures(found)}"
        if found.metric == "loss":
            return f"{differs}: the seeds agree, but a difference below 2% counts as none"
        return (
            f"{differs}, but on a test set of {num_test:,} samples a difference below "
            f"{_number(found.resolution, found)} points may be chance: no verdict without a larger test set"
        )
    by_seed = ", ".join(_number(value, found, signed=True) for value in found.by_seed)
    one_sign = len({value > 0 for value in found.by_seed}) == 1
    why = f"{len(found.by_seed)} seeds are too few" if one_sign else "the seeds disagree"
    return (
        f"no verdict on {name} compared with {other}: {why} ({by_seed}{_unit(found)}). "
        f"Run with --seeds {max(ENOUGH_SEEDS, 2 * len(found.by_seed))}"
    )


def _correctness(arms: dict[str, ArmResult]) -> Iterator[str]:
    arm = arms.get("ddp+syncbn")
    first = arm.parity[0] if arm is not None and arm.parity else None
    if first is None:
        return
    if first.note:
        yield f"With SyncBN, {first.note}."
    if first.within_rounding:
        errors = (first.output, first.params, first.running_mean, first.running_var)
        largest = max(error.max_rel for error in errors if error)
        yield (
            f"SyncBN is correct here: in step 1, outputs, weights and running statistics match those of the single "
            f"process to {largest:.0e}, which is fp32 rounding."
        )
    elif first.first_divergent_layer is not None:
        output = next(layer for layer in first.layers if layer.layer == first.first_divergent_layer).output
        size = f", with a relative output error of {output.max_rel:.0e}" if output else ""
        yield (
            f"SyncBN does not match the single process here: the first layer that differs by more than rounding is "
            f"{first.first_divergent_layer}{size}."
        )
    elif not first.note and first.params is not None:
        yield (
            "The outputs of SyncBN's layers match those of the single process, but the weights differ after step 1: "
            "the loss may not be a mean over samples, or the model may use random numbers."
        )


def _cost(arms: dict[str, ArmResult]) -> str:
    synced, local = arms.get("ddp+syncbn"), arms.get("ddp")
    if synced is None or local is None or not synced.step_seconds or not local.step_seconds:
        return ""
    ratios = [a.step_seconds / b.step_seconds for a, b in zip(synced.seeds, local.seeds, strict=False)]
    times = f"{synced.step_seconds * 1e3:.1f} vs. {local.step_seconds * 1e3:.1f} ms"
    if min(ratios) < 1 < max(ratios):
        return f"may or may not increase the step time: the runs disagree ({times})"
    increase = median(ratios) - 1
    if increase > STEP_TIME_NOISE:
        return f"increases the step time by {100 * increase:.0f}% ({times})"
    return f"does not measurably increase the step time ({times})"


def _between(comparison: Comparison, arms: dict[str, ArmResult], name: str, other: str) -> ResultDifference | None:
    arm, reference = arms.get(name), arms.get(other)
    return None if arm is None or reference is None else difference(comparison, arm, reference)


def _figures(found: ResultDifference, signed: bool = True) -> str:
    value = found.mean if signed else abs(found.mean)
    return f"{_number(value, found, signed)} ± {_number(found.half_width, found)}{_unit(found)}"


def _number(value: float, found: ResultDifference, signed: bool = False) -> str:
    return format(value, ("+" if signed else "") + (".1f" if found.metric == "accuracy" else ".3g"))


def _unit(found: ResultDifference) -> str:
    return " points" if found.metric == "accuracy" else " of test loss"
