"""What folding batch norm into the convolutions before it gains at inference, and whether the outputs stay."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncnorm.conversion.convert import convert, revert
from syncnorm.conversion.fold import fold
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.data import NOTE, batches, load_images
from syncnorm.tools.study.fold_models import MODELS, RESIDUAL
from syncnorm.tools.study.question import Outcome, Question
from syncnorm.tools.study.records import Claim, Row, Settings, Value, View
from syncnorm.tools.study.sentences import percent
from syncnorm.tools.study.statistics import difference, levels, values
from syncnorm.tools.study.training import Recipe, accuracy, fit
from syncnorm.tools.study.trials import Trials, labelled, run_trials

SPEEDUP, APART, SAME, LEFT, LAYERS = "speed-up", "relative difference", "same answer", "norms left", "norms"
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
BATCHES = (1, 32)
RANK_BATCH = 16
LR = 0.05
# Images whose outputs are compared.
COMPARED = 256
REPETITIONS, QUICK_REPETITIONS = 15, 3
# What a clock's reading takes is nothing beside it, and a block is over before the machine's mood changes.
BLOCK_SECONDS = 0.02


@dataclass(frozen=True)
class Trial:
    """One network, trained, folded and timed."""

    model: str
    seed: int
    steps: int
    repetitions: int

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"


def _work(trial: Trial, ranks: Ranks, together: bool) -> list[Row]:
    images = load_images()
    model = convert(MODELS[trial.model](trial.seed))
    part = slice(ranks.rank * RANK_BATCH, (ranks.rank + 1) * RANK_BATCH)
    data = batches(images.train_x, images.train_y, RANK_BATCH * ranks.world_size, trial.seed, part)
    fit(DistributedDataParallel(model), data, Recipe(LR, trial.steps))
    rows = _measured(model, trial) if ranks.rank == 0 else []
    ranks.wait()  # the other ranks leave the cores to rank 0 while it measures
    return rows


@torch.inference_mode()
def _measured(model: nn.Module, trial: Trial) -> list[Row]:
    images = load_images()
    unfolded, folded = revert(copy.deepcopy(model)).eval(), fold(model)
    x, y = images.test_x[:COMPARED], images.test_y[:COMPARED]

    def row(measure: str, value: float, **condition: Value) -> Row:
        return Row({"model": trial.model, **condition}, trial.seed, measure, value)

    want, got = unfolded(x), folded(x)
    rows = [
        row("accuracy", accuracy(unfolded, x, y)),
        row(APART, float((got - want).abs().max() / want.abs().max())),
        row(SAME, float((got.argmax(dim=1) == want.argmax(dim=1)).double().mean())),
        row(LAYERS, _norms(unfolded)),
        row(LEFT, _norms(folded)),
    ]
    for name, memory_format in FORMATS.items():
        for module in (unfolded, folded):
            module.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stubs lack it
        for batch in BATCHES:
            sample = images.test_x[:batch].to(memory_format=memory_format)
            rows.append(row(SPEEDUP, speedup(unfolded, folded, sample, trial.repetitions), format=name, batch=batch))
    return rows


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def speedup(slow: nn.Module, fast: nn.Module, x: Tensor, repetitions: int) -> float:
    """Median over the repetitions of ``slow``'s time / ``fast``'s: both are timed in each, in turns."""
    calls = max(1, round(BLOCK_SECONDS / max(_seconds(fast, x, 1) for _ in range(3))))
    _seconds(slow, x, 1)
    ratios = []
    for repetition in range(repetitions):
        order = (slow, fast) if repetition % 2 == 0 else (fast, slow)
        taken = {module: _seconds(module, x, calls) for module in order}
        ratios.append(taken[slow] / taken[fast])
    return median(ratios)


def _seconds(module: nn.Module, x: Tensor, calls: int) -> float:
    # The thread's own clock stands still while another process has its core. All of the pass is in this one thread.
    started = time.thread_time()
    for _ in range(calls):
        module(x)
    return time.thread_time() - started


def _trials(settings: Settings) -> Trials[Trial]:
    repetitions = QUICK_REPETITIONS if settings.quick else REPETITIONS
    models = [name for name in MODELS if name != RESIDUAL or not settings.quick]
    return Trials(
        [Trial(model, seed, settings.steps, repetitions) for seed in range(settings.seeds) for model in models]
    )


def num_stages(settings: Settings) -> int:
    """Networks that are trained."""
    return _trials(settings).num_stages(settings.world_size)


def run(settings: Settings, ranks: Ranks, tell: Tell) -> Outcome:
    """Trains each network with each seed, synced; folds and times it on rank 0. Collective: all ranks."""
    rows = run_trials(_trials(settings), _work, ranks, labelled(tell))
    right = ", ".join(f"{name} {percent(values(rows, 'accuracy', model=name))}" for name in levels(rows, "model"))
    notes = {
        "data": NOTE,
        "model": f"each trained synced, {ranks.world_size} ranks of {RANK_BATCH} images, {settings.steps} steps; of "
        f"{COMPARED} test images they get right: {right}. Then syncnorm.revert (plain batch norms) against "
        "syncnorm.fold.",
        "timing": f"forward passes in fp32 under torch.inference_mode, one "
        f"thread by that thread's clock, the other ranks asleep; both take turns in blocks of "
        f"{1e3 * BLOCK_SECONDS:.0f} ms or one call, and each seed's value is the median of "
        f"{_trials(settings).together[0].repetitions} ratios.",
    }
    return Outcome(rows, notes)


def find(rows: Sequence[Row]) -> list[str]:
    """Whether the folded networks say the same, and how much faster they are; then where folding pays most."""
    models = [str(model) for model in levels(rows, "model")]
    found = [_equal(rows)]
    gains: dict[str, float] = {}
    for model in models:
        for batch in levels(rows, "batch"):
            parts = []
            for name in levels(rows, "format"):
                sample = values(rows, SPEEDUP, model=model, batch=batch, format=name)
                apart = difference(sample, dict.fromkeys(sample, 1.0))
                remark = {1: "", 0: " (the seeds do not agree)", -1: " (slower)"}[apart.agreed]
                parts.append(f"{fmean(sample.values()):.2f} ± {apart.error:.2f} {name}{remark}")
                if apart.agreed > 0:
                    gains[f"{model}, batch of {batch}, {name}"] = fmean(sample.values())
            found.append(f"{model}, batch of {batch}, times as fast when folded: {', '.join(parts)}.")
    num_cells = len(models) * len(levels(rows, "batch")) * len(levels(rows, "format"))
    if not gains:
        return [*found, f"In none of {num_cells} cases do the seeds agree that folding is faster."]
    most = max(gains, key=lambda case: gains[case])
    return [
        *found,
        f"Folding is faster in {len(gains)} of {num_cells} cases; most in this one: {most} ({gains[most]:.2f}).",
    ]


def _equal(rows: Sequence[Row]) -> str:
    def all_of(measure: str) -> list[float]:
        return [row.value for row in rows if row.measure == measure]

    left, layers = sum(all_of(LEFT)), sum(all_of(LAYERS))
    norms = "All batch norms are folded" if not left else f"{left:.0f} of {layers:.0f} batch norms are left unfolded"
    same = min(all_of(SAME))
    answers = "every answer stays" if same == 1 else f"in the worst network {100 * same:.1f} % of the answers stay"
    return f"{norms}; outputs differ by {max(all_of(APART)):.0e} of the largest at most, and {answers}."


def views(rows: Sequence[Row]) -> list[View]:
    """Speed-up by model and batch, a view a memory format."""
    return [
        View(f"Times as fast when folded, {name}", SPEEDUP, "model", "batch", {"format": name}, unit="number")
        for name in levels(rows, "format")
    ]


QUESTION = Question(
    name="fold",
    about="Folding batch norm into convolutions: speed at inference, equality.",
    question="What does folding batch norm into the convolutions gain at inference, and do the outputs stay?",
    claim=Claim(
        "for inference batch norm belongs in the weights and biases of the convolution before it, where it costs "
        "nothing and the network computes the same",
        "Jacob et al. 2018, section 3.2",
    ),
    seeds=3,
    steps=40,
    quick_steps=2,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
