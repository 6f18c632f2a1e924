"""From the record to sentences: the decision, its reasons, the cost of SyncBN, and whether SyncBN is correct."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from syncnorm.tools.compare.paired import (
    ACCUMULATED,
    ACCUMULATED_EXACTLY,
    ACCUMULATED_LOCALLY,
    LOCAL,
    REFERENCE,
    SYNCED,
    decisions,
    pairs,
)
from syncnorm.tools.compare.records import ArmResult, Comparison, Decision, MetricInfo, StepRatio

NO_COMMUNICATION = {"ddp+group": "GroupNorm", "ddp+layer": "LayerNorm", "ddp+instance": "InstanceNorm"}
NAMES = {
    LOCAL: "local BN",
    SYNCED: "SyncBN",
    REFERENCE: "single-process training",
    "dp": "DataParallel",
    "ddp+recalibrated": "recalibrated local BN",
    "ddp+frozen": "frozen BN",
    "ddp+torch-syncbn": "torch.nn.SyncBatchNorm",
    ACCUMULATED_LOCALLY: "accumulation with local BN",
    ACCUMULATED: "accumulation with CmBN",
    ACCUMULATED_EXACTLY: "exact accumulation",
    **NO_COMMUNICATION,
}
# An interval whose ends differ by more than this factor says too little: the first if it contains 1, else the second.
MAX_RATIO_AROUND_ONE, MAX_RATIO_OF_ENDS = 1.25, 1.6
# With two seeds the interval is 4 times as wide.
ENOUGH_SEEDS = 3

Pair = tuple[str, str]


def verdict(comparison: Comparison) -> list[str]:
    """The decision first, then its reasons, the cost, and correctness; a pure function of the record.

    A difference is described by one of three sentences, which depends on its confidence interval alone: better or
    worse, equivalent within the margin, or undecided.

    Example:
        >>> verdict(comparison)  # doctest: +SKIP
        ['Use SyncBN.', 'At 2 samples per rank, local BN is worse than single-process training by 10.9 points ...']
    """
    arms = {arm.name: arm for arm in comparison.arms}
    found = {(each.arm, each.other): each for each in decisions(comparison)}
    sentences = [
        *_advice(comparison, found),
        *(_reason(comparison, found[pair]) for pair in pairs(arms) if pair in found and _informative(found[pair])),
        *_failures(comparison),
        *_cost(arms),
        *(sentence for arm in comparison.arms if _must_match(arm.name) for sentence in _correctness(arm)),
    ]
    return [f"{each[0].upper()}{each[1:]}" if _starts_with_a_word(each) else each for each in sentences]


def _starts_with_a_word(sentence: str) -> bool:
    # Names of arms and functions are never capitalized.
    local = ("local BN", "recalibrated local", "frozen BN", "accumulation with", "exact accumulation")
    return sentence.startswith((*local, "undecided", "single-process"))


def _advice(comparison: Comparison, found: Mapping[Pair, Decision]) -> Iterator[str]:
    local, gain = found.get((LOCAL, REFERENCE)), found.get((SYNCED, LOCAL))
    if local is None:
        return
    if local.kind in ("equivalent", "better"):
        yield "Local BN is enough here: SyncBN is not needed."
    elif local.kind == "undecided":
        yield "Undecided whether SyncBN is needed."
    elif -local.difference <= local.margin and (local.low or 0) >= -local.margin:
        margin = _amount(local.margin, comparison)
        yield f"Local BN loses, but less than the margin of {margin}: use SyncBN if that matters."
    elif gain is None:
        yield "Local BN loses here: compare it with SyncBN (--arms ddp,ddp+syncbn)."
    elif gain.kind == "better":
        yield _use_syncbn(found)
    elif gain.kind == "undecided":
        yield "Local BN loses here; undecided whether SyncBN recovers it."
    else:
        yield "Local BN loses here, and SyncBN does not recover it."


def _use_syncbn(found: Mapping[Pair, Decision]) -> str:
    others = {name: found[name, SYNCED].kind for name in NO_COMMUNICATION if (name, SYNCED) in found}
    as_good = [NO_COMMUNICATION[name] for name, kind in others.items() if kind in ("equivalent", "better")]
    if as_good:
        return (
            f"Use SyncBN when starting from weights that were trained with BN; use {' or '.join(as_good)}, which "
            f"needs no communication, when training from scratch."
        )
    unclear = [NO_COMMUNICATION[name] for name, kind in others.items() if kind == "undecided"]
    return f"Use SyncBN{f'; whether {_either(unclear)} as good is undecided' if unclear else ''}."


def _either(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]} is"


def _informative(decision: Decision) -> bool:
    # That SyncBN trains like the single process is shown by parity, to which no noise of seeds or samples is added.
    return (decision.arm, decision.other) != (SYNCED, REFERENCE) or decision.kind != "undecided"


def _reason(comparison: Comparison, decision: Decision) -> str:
    name, other = arm_name(decision.arm), arm_name(decision.other)
    interval = interval_text(decision, comparison.task.metric)
    if decision.kind == "equivalent":
        margin = _amount(decision.margin, comparison)
        sentence = f"{name} is equivalent to {other} within the margin of {margin} ({interval})"
    elif decision.kind == "undecided":
        size = _amount(decision.difference, comparison, signed=True)
        why = _what_would_decide(comparison, decision)
        sentence = f"undecided: {name} compared with {other}, {size} ({interval}); {why}"
    else:
        size = _amount(abs(decision.difference), comparison)
        sentence = f"{name} is {decision.kind} than {other} by {size} ({interval})"
    if (decision.arm, decision.other) == (LOCAL, REFERENCE) and decision.kind != "undecided":
        number = comparison.settings.batch_per_rank
        sentence = f"At {number} sample{'s' * (number > 1)} per rank, {sentence}"
    return f"{sentence}."


def arm_name(arm: str) -> str:
    """An arm in a sentence: ``"local BN"``."""
    base, colon, size = arm.partition(":")
    if colon and base == SYNCED:
        return f"SyncBN in groups of {size}"
    if colon and base in NAMES:
        return f"{NAMES[base]} in {size} micro-batches"
    return NAMES.get(arm, arm)


def interval_text(decision: Decision, metric: MetricInfo) -> str:
    """The confidence interval: ``95% interval -0.2 to +1.4``; without signs if the sentence says better or worse."""
    if decision.low is None or decision.high is None:
        return f"one {'seed' if len(decision.by_seed) < 2 else 'test sample'} has no interval"
    ends, signed = [decision.low, decision.high], True
    if decision.kind in ("better", "worse"):
        ends, signed = sorted(map(abs, ends)), False
    low, high = (_number(value, metric, signed) for value in ends)
    return f"{100 * decision.confidence:.4g}% interval {low} to {high}"


def _what_would_decide(comparison: Comparison, decision: Decision) -> str:
    num_seeds, num_test = len(decision.by_seed), comparison.task.num_test
    if num_seeds < 2:
        return f"run --seeds {ENOUGH_SEEDS} or --seeds auto"
    ways = []
    if decision.more_seeds is not None:
        more, total = decision.more_seeds, num_seeds + decision.more_seeds
        ways.append(f"about {more} more seed{'s' * (more > 1)} (--seeds {total})")
    if decision.more_samples is not None and comparison.task.metric.units == "samples":
        ways.append(f"about {_two_digits(decision.more_samples):,} more test samples than the {num_test:,}")
    if not ways:
        return "more seeds or more test samples alone would not decide: use more of both"
    return f"{' or '.join(ways)} would decide"


def _two_digits(number: int) -> int:
    return int(float(f"{number:.2g}"))


def _amount(value: float, comparison: Comparison, signed: bool = False) -> str:
    metric = comparison.task.metric
    unit = "points" if metric.share else f"of {'test loss' if metric.name == 'loss' else metric.name}"
    return f"{_number(value, metric, signed)} {unit}"


def _number(value: float, metric: MetricInfo, signed: bool = False) -> str:
    spec = (".2f" if abs(value) < 0.095 else ".1f") if metric.share else ".3g"
    return format(value, ("+" if signed else "") + spec)


def _cost(arms: Mapping[str, ArmResult]) -> Iterator[str]:
    local, synced = arms.get(LOCAL), arms.get(SYNCED)
    if local is None or synced is None or local.step is None or synced.step is None:
        return
    times = f"{synced.step.seconds * 1e3:.1f} against {local.step.seconds * 1e3:.1f} ms"
    if synced.cost is None:
        yield f"A training step takes {times} with SyncBN and with local BN, which were timed one after the other."
    elif too_noisy(synced.cost):
        yield (
            f"The cost of SyncBN is too noisy to time here: a training step takes {_ends(synced.cost)} times that of "
            f"local BN."
        )
    elif synced.cost.low <= 1 <= synced.cost.high:
        yield f"SyncBN takes {_ends(synced.cost)} times the step time of local BN ({times}): no measurable cost."
    else:
        more = f"{100 * abs(synced.cost.ratio - 1):.0f}% {'more' if synced.cost.ratio > 1 else 'less'}"
        yield f"SyncBN takes {more} time per step than local BN: {_ends(synced.cost)} times as long ({times})."


def too_noisy(cost: StepRatio) -> bool:
    """Whether the interval is too wide to say anything."""
    widest = MAX_RATIO_AROUND_ONE if cost.low <= 1 <= cost.high else MAX_RATIO_OF_ENDS
    return cost.high > widest * cost.low


def _ends(cost: StepRatio) -> str:
    return f"{cost.low:.2f} to {cost.high:.2f}"


def _must_match(arm: str) -> bool:
    """Whether the arm computes what one process with the whole batch computes."""
    return arm == SYNCED or arm.partition(":")[0] == ACCUMULATED_EXACTLY


def _correctness(arm: ArmResult) -> Iterator[str]:
    first = arm.parity[0] if arm.parity else None
    if first is None:
        return
    name = arm_name(arm.name)
    if first.note:
        yield f"With {name}, {first.note}."
    if first.within_rounding:
        errors = (first.output, first.update, first.running_mean, first.running_var)
        largest = max(error.max_rel for error in errors if error)
        updated = "weights" if first.update == first.params else "gradients"
        yield (
            f"{name} is correct here: in step 1, outputs, {updated} and running statistics match those of the single "
            f"process to {largest:.0e}, which is fp32 rounding."
        )
    elif first.first_divergent_layer is not None:
        output = next(layer for layer in first.layers if layer.layer == first.first_divergent_layer).output
        size = f", with a relative output error of {output.max_rel:.0e}" if output else ""
        yield (
            f"{name} does not match the single process here: the first layer that differs by more than rounding is "
            f"{first.first_divergent_layer}{size}."
        )
    elif not first.note and first.params is not None:
        yield (
            f"With {name}, the outputs of the norm layers match those of the single process, but the weights differ "
            f"after step 1: the loss may not be a mean over samples, or the model may use random numbers."
        )


def _failures(comparison: Comparison) -> Iterator[str]:
    for arm in comparison.arms:
        if arm.not_run and arm_name(arm.name) != arm.name:
            yield f"{arm_name(arm.name)} did not run: {arm.not_run}."
        if arm.seeds and arm.test_metric is None:
            yield f"{arm_name(arm.name)} ended with a result that is not finite: use a smaller --lr."
        elif arm.diverged:
            yield f"{arm_name(arm.name)} ended with a training loss that is not finite: use a smaller --lr."
