"""Batch norm under gradient accumulation: micro-batches of 1, 2 and 4 images, against the whole batch at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from syncnorm.comm.process_groups import subgroup
from syncnorm.conversion.convert import convert
from syncnorm.tools.common.decision import Difference, Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import (
    COSINE_NOTE,
    DATA_NOTE,
    NUM_GROUPS,
    Recipe,
    batches,
    build_net,
    correct,
    fit,
    load_images,
    net_note,
    with_norm,
)
from syncnorm.tools.study.findings import Runs, by_level, difference, levels, runs, support, values, verdict
from syncnorm.tools.study.records import Claim, Outcome, Question, StudyRow, StudySettings, Value, View
from syncnorm.tools.study.trials import (
    FIRST_TUNING_SEED,
    VALIDATION_ACCURACY,
    Trial,
    Trials,
    best_rates,
    rates_text,
    run_trials,
)
from syncnorm.training import whole_batch

SIZE = "images a micro-batch"
SIZE_TEXT = "images per micro-batch"
BATCH = 32
SIZES = (1, 2, 4)
QUICK_SIZES = (4,)
BN, CMBN, EXACT, GN = "BN", "CmBN", "exact", "GN"
NORMS: tuple[Value, ...] = (BN, CMBN, EXACT, GN)
WIDTHS = (8, 8, 16, 16, 32, 32)
RATES = (0.05, 0.1, 0.2)
# Those whose best rate may depend on the micro-batch; the others compute the same for all of them.
TUNED_BY_SIZE = (BN, CMBN)
# Largest difference between the weights of the exact runs and those of the whole batch, relative to the largest.
AFTER_ONE_STEP = "difference of weights after one step in fp64"
AFTER_ALL_STEPS = "difference of weights after all steps"

# Images per micro-batch -> norm -> learning rate.
_Rates = Mapping[int, Mapping[Value, float]]


def _with_norm(model: nn.Module, norm: Value, micro_batches: int) -> nn.Module:
    """``model`` with ``norm``, whose statistics are those of this process alone."""
    if norm == CMBN:
        return convert(model, group_size=1, accumulate=micro_batches)
    if norm == EXACT:
        return convert(model, group_size=1)
    return with_norm(model, norm)


def _trained(trial: Trial, norm: Value, size: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    images, number = load_images(), BATCH // size
    model = _with_norm(build_net(trial.seed, WIDTHS).to(dtype), norm, number)
    data = batches(images.train_x.to(dtype), images.train_y, BATCH, trial.seed)
    in_step: AbstractContextManager[Any] = nullcontext()
    if norm == EXACT:
        in_step, number = whole_batch(model, micro_batches=number), 1  # one forward of the whole batch
    with in_step:
        fit(model, data, Recipe(trial.lr, trial.steps), micro_batches=number)
    return model


def train(trial: Trial, ranks: Ranks, together: bool) -> list[StudyRow]:
    """Trains and tests; an exact run also trains the whole batch at once, and compares the weights."""
    images, norm, size = load_images(), trial.condition["norm"], int(trial.condition[SIZE])
    model = _trained(trial, norm, size)
    if trial.tuning:
        return [trial.accuracy(VALIDATION_ACCURACY, correct(model, images.validation_x, images.validation_y))]
    rows = [trial.accuracy("accuracy", correct(model, images.test_x, images.test_y))]
    if norm == EXACT:
        rows += [trial.row(AFTER_ONE_STEP, one_step_difference(trial, size))]
        rows += [trial.row(AFTER_ALL_STEPS, _relative(model, _trained(trial, BN, BATCH)))]
    return rows


def one_step_difference(trial: Trial, size: int) -> float:
    """Of the weights of an exact run from those of the whole batch, after one step in fp64.

    In fp32 a ReLU whose input is 0 up to rounding may pass the gradient in one of the two and not in the other.
    """
    one_step = replace(trial, steps=1)
    exact = _trained(one_step, EXACT, size, torch.float64)
    return _relative(exact, _trained(one_step, BN, BATCH, torch.float64))


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def _relative(ours: nn.Module, other: nn.Module) -> float:
    return float((_weights(ours) - _weights(other)).abs().max() / _weights(other).abs().max())


def _cells(settings: StudySettings) -> Iterable[tuple[Value, int]]:
    """Norm and images per micro-batch, those of similar cost next to each other."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    return [*((norm, size) for size in sizes for norm in NORMS), (BN, BATCH), (GN, BATCH)]


def _tuning(settings: StudySettings) -> Trials:
    return Trials(
        alone=[
            Trial({"norm": norm, SIZE: size}, lr, FIRST_TUNING_SEED, settings.steps, tuning=True)
            for norm, size in _cells(settings)
            if norm in TUNED_BY_SIZE or size == BATCH
            for lr in (RATES[1:] if settings.quick else RATES)
        ]
    )


def _measured(settings: StudySettings, rates: _Rates) -> Trials:
    def rate(norm: Value, size: int) -> float:
        return rates[size][norm] if norm in TUNED_BY_SIZE else rates[BATCH][GN if norm == GN else BN]

    return Trials(
        alone=[
            Trial({"norm": norm, SIZE: size}, rate(norm, size), seed, settings.steps)
            for norm, size in _cells(settings)
            for seed in range(settings.seeds)
        ]
    )


def num_stages(settings: StudySettings) -> int:
    """Number of training runs of rank 0."""
    some_rates: _Rates = {size: dict.fromkeys(NORMS, RATES[0]) for size in (*SIZES, BATCH)}
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _measured(settings, some_rates)))


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes learning rates, then trains each norm at each micro-batch. Collective: all ranks."""
    subgroup(1)  # all ranks create the groups of one, which the trials use
    tuned = run_trials(_tuning(settings), train, ranks, tell)
    rates = {
        int(size): best_rates([row for row in tuned if row.condition[SIZE] == size], "norm")
        for size in levels(tuned, SIZE)
    }
    rows = run_trials(_measured(settings, rates), train, ranks, tell)
    return Outcome([*tuned, *rows], _notes(settings, rates))


def _notes(settings: StudySettings, rates: _Rates) -> dict[str, str]:
    tuned = "; ".join(f"at {size} {SIZE_TEXT}, {rates_text(best)}" for size, best in rates.items())
    return {
        "data": DATA_NOTE,
        "model": f"{net_note(WIDTHS)}, {NUM_GROUPS} groups in GN; {settings.steps} steps of {BATCH} images, "
        f"{COSINE_NOTE}. One process per run.",
        "norms": f"BN: each micro-batch has its own statistics; with {BATCH} images it is the whole batch. CmBN: "
        "syncnorm.convert(model, accumulate=K), each micro-batch has the statistics of those so far. exact: "
        "syncnorm.training.whole_batch, the statistics of all. GN does not depend on other images. The gradients of "
        "the micro-batches are accumulated.",
        "learning rates": f"the one of {rates_text(RATES)} with the best validation accuracy, with a seed that is "
        f"not used for the results: {tuned}. exact uses the rate of the whole batch, and GN one rate for all.",
    }


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """How far each norm is from the whole batch, what CmBN gains over BN, how GN compares, whether exact is exact."""
    measured = [row for row in rows if row.measure == "accuracy"]
    sizes = sorted((size for size in levels(measured, SIZE) if size != BATCH), key=float)

    def at(norm: Value, size: Value) -> Runs:
        return runs(measured, "accuracy", **{"norm": norm, SIZE: size})

    whole = at(BN, BATCH)

    def from_whole(norm: Value) -> dict[Value, Difference]:
        return {size: difference(at(norm, size), whole, rule) for size in sizes}

    def from_local(norm: Value) -> dict[Value, Difference]:
        return {size: difference(at(norm, size), at(BN, size), rule) for size in sizes}

    gain, loss = from_local(CMBN), from_whole(CMBN)
    return [
        *(by_level(norm, "the whole batch", SIZE_TEXT, from_whole(norm)) for norm in (BN, CMBN)),
        *(by_level(norm, BN, SIZE_TEXT, from_local(norm)) for norm in (CMBN, GN)),
        by_level(GN, CMBN, SIZE_TEXT, {size: difference(at(GN, size), at(CMBN, size), rule) for size in sizes}),
        by_level(EXACT, "the whole batch", SIZE_TEXT, from_whole(EXACT)),
        _exactness(rows),
        verdict("CmBN is better than BN at small micro-batches", [support(each, "better") for each in gain.values()]),
        verdict("CmBN is as good as the whole batch", [support(each, "equivalent") for each in loss.values()]),
    ]


def _exactness(rows: Sequence[StudyRow]) -> str:
    first, last = (
        max(value for size in levels(rows, SIZE) for value in values(rows, measure, **{SIZE: size}).values())
        for measure in (AFTER_ONE_STEP, AFTER_ALL_STEPS)
    )
    return (
        f"The weights of exact runs differ from those of the whole batch by at most {first:.0e} of the largest after "
        f"one step in fp64, and by at most {last:.0e} after all steps in fp32, in which rounding errors grow."
    )


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Accuracy against images per micro-batch."""
    return [View(f"Test accuracy by {SIZE_TEXT}, {BATCH} per step", "accuracy", "norm", SIZE, {}, scale="log")]


QUESTION = Question(
    name="accumulation",
    about="BN, CmBN, the exact whole batch and GN under gradient accumulation.",
    question="What do micro-batches cost batch norm under gradient accumulation, and which remedy restores it?",
    claim=Claim(
        "with few images per iteration, statistics over several iterations are better than those of one, and as good "
        "as those of a large batch (COCO, Faster R-CNN: AP 37.6 for CBN, 37.5 for SyncBN, 37.7 for GN); CmBN takes "
        "them over the micro-batches of one step",
        "Yao et al. 2021, Cross-Iteration Batch Normalization, abstract and the authors' table for COCO; Bochkovskiy "
        "et al. 2020, YOLOv4, section 3.3",
    ),
    seeds=5,
    steps=80,
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
