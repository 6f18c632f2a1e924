"""Whose running statistics a checkpoint holds after DataParallel, DDP and synced batch norm, and what that costs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.comm.process_groups import no_sync_stats
from syncnorm.tools.common.data_parallel import EmulatedDataParallel
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.data import NOTE, Images, Split, batches, load_images, shares
from syncnorm.tools.study.models import WIDTHS, build_net
from syncnorm.tools.study.norms import with_norm
from syncnorm.tools.study.question import Outcome, Question
from syncnorm.tools.study.records import Claim, Row, Settings, Value, View
from syncnorm.tools.study.sentences import by_level
from syncnorm.tools.study.statistics import difference, levels, values
from syncnorm.tools.study.training import Recipe, accuracy, fit
from syncnorm.tools.study.trials import Trials, labelled, run_trials
from syncnorm.tools.study.tuning import FIRST_SEED, MEASURE, best_rates, told
from syncnorm.training import merge_buffers, recalibrate
from syncnorm.training.buffers import running_stats, tracking_layers

BATCH = 16
RATES = (0.05, 0.1, 0.2)
RECALIBRATION_BATCHES = 20
DP, DDP, LAST, MERGED, RECALIBRATED, SYNC = (
    "DataParallel (emulated)",
    "DDP",
    "DDP, last rank's",
    "DDP + merge_buffers",
    "DDP + recalibrate",
    "SyncBN",
)
PAIRS = ((DP, DDP), (DDP, SYNC), (MERGED, DDP), (RECALIBRATED, DDP), (MERGED, SYNC), (RECALIBRATED, SYNC))
SPLITS: tuple[Split, ...] = ("shuffled", "by brightness", "by digit")
# What buffers are compared with: statistics of these, computed anew for the weights at the end.
WHOSE = ("rank 0", "the last rank", "all ranks")
Arm = Literal["dp", "ddp", "own buffers", "sync"]


@dataclass(frozen=True)
class Trial:
    """One training run."""

    arm: Arm
    split: Split
    lr: float
    seed: int
    steps: int
    tuning: bool = False

    def __str__(self) -> str:
        return f"{self.arm}, images {self.split}, {'tuning' if self.tuning else f'seed {self.seed}'}"

    @property
    def norm(self) -> Literal["sync", "batch"]:
        """What its batch norms are."""
        return "sync" if self.arm == "sync" else "batch"


def train(trial: Trial, ranks: Ranks, together: bool) -> list[Row]:
    """Trains one arm and tests what its checkpoint would hold; every trial runs on all ranks together.

    Collective: all ranks. DataParallel trains on rank 0 alone, which then gives its model to the others.
    """
    images = load_images()
    model = with_norm(build_net(trial.seed), trial.norm)
    streams = [
        batches(images.train_x[share], images.train_y[share], BATCH, trial.seed)
        for share in shares(images, trial.split, ranks.world_size)
    ]
    recipe = Recipe(trial.lr, trial.steps)
    if trial.arm != "dp":
        ddp = DistributedDataParallel(model, forward_sync_buffers=trial.arm != "own buffers")
        fit(ddp, streams[ranks.rank], recipe)
    elif ranks.rank == 0:
        fit(EmulatedDataParallel(model, ranks.world_size), _side_by_side(streams), recipe)
    if trial.arm != "own buffers":
        # DDP would hand rank 0's buffers on with the next forward, which does not come.
        model.load_state_dict(ranks.share(model.state_dict() if ranks.rank == 0 else None))
    inputs = [x for x, _ in (next(streams[ranks.rank]) for _ in range(RECALIBRATION_BATCHES))]
    return _tuned(trial, model, images, inputs) if trial.tuning else _measured(trial, model, images, inputs, ranks)


def _side_by_side(streams: Sequence[Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    for parts in zip(*streams, strict=True):
        yield torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _tuned(trial: Trial, model: nn.Module, images: Images, inputs: list[Tensor]) -> list[Row]:
    recalibrate(model, inputs)
    right = accuracy(model, images.validation_x, images.validation_y)
    return [Row({"norm": trial.norm, "lr": trial.lr}, trial.seed, MEASURE, right)]


def _measured(trial: Trial, model: nn.Module, images: Images, inputs: list[Tensor], ranks: Ranks) -> list[Row]:
    def right(network: nn.Module) -> float:
        return accuracy(network, images.test_x, images.test_y)

    cured = copy.deepcopy(model)
    recalibrate(cured, inputs)
    if trial.arm == "own buffers":
        merged = copy.deepcopy(model)
        merge_buffers(merged)
        by_arm = {LAST: ranks.collect(right(model))[-1], MERGED: right(merged), RECALIBRATED: right(cured)}
        distances = {}
    else:
        own = copy.deepcopy(model)
        with no_sync_stats():
            recalibrate(own, inputs)
        here = distance(model, own)
        by_rank = ranks.collect(here)
        arm = {"dp": DP, "ddp": DDP, "sync": SYNC}[trial.arm]
        by_arm = {arm: right(model)}
        distances = dict(zip(WHOSE, (by_rank[0], by_rank[-1], distance(model, cured)), strict=True))
    return [
        *(Row({"arm": name, "images": trial.split}, trial.seed, "accuracy", got) for name, got in by_arm.items()),
        *(
            Row({"arm": arm, "images": trial.split, "statistics of": whose}, trial.seed, "distance", far)
            for whose, far in distances.items()
        ),
    ]


def distance(model: nn.Module, reference: nn.Module) -> float:
    """How far the running means lie from the reference's: root mean square over channels, in standard deviations."""
    apart = []
    for mine, theirs in zip(tracking_layers(model).values(), tracking_layers(reference).values(), strict=True):
        mean, var = running_stats(theirs)
        apart.append((running_stats(mine)[0] - mean) / (var + theirs.eps).sqrt())
    return float(torch.cat(apart).double().square().mean().sqrt())


def _tuning(settings: Settings) -> Trials[Trial]:
    arms: tuple[Arm, ...] = ("ddp", "sync")
    rates = RATES[1:2] if settings.quick else RATES
    return Trials([Trial(arm, "shuffled", lr, FIRST_SEED, settings.steps, True) for arm in arms for lr in rates])


def _trials(settings: Settings, local: float, synced: float) -> Trials[Trial]:
    arms: dict[Arm, float] = {"dp": local, "ddp": local, "own buffers": local, "sync": synced}
    return Trials(
        [
            Trial(arm, split, lr, seed, settings.steps)
            for seed in range(settings.seeds)
            for split in (SPLITS[::2] if settings.quick else SPLITS)
            for arm, lr in arms.items()
        ]
    )


def num_stages(settings: Settings) -> int:
    """Runs of rank 0."""
    return sum(t.num_stages(settings.world_size) for t in (_tuning(settings), _trials(settings, 0.1, 0.1)))


def run(settings: Settings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes two learning rates, then trains every arm on every split. Collective: all ranks."""
    tuned = run_trials(_tuning(settings), train, ranks, labelled(tell))
    rates = best_rates(tuned, "norm")
    rows = run_trials(_trials(settings, rates["batch"], rates["sync"]), train, ranks, labelled(tell))
    notes = {
        "data": f"{NOTE} Each of the {settings.world_size} ranks trains on an equal share of its own: of the "
        "shuffled images, of all images in order of brightness, or of digit. The test images are those of all.",
        "model": f"{len(WIDTHS)} convolutions 3x3 of {', '.join(map(str, WIDTHS))} channels, a linear classifier; "
        f"{settings.steps} steps of {BATCH} images a rank, SGD with momentum 0.9, a learning rate that falls along a "
        "cosine.",
        "arms": f"'{DP}' computes on one device what torch.nn.DataParallel computes on {settings.world_size} GPUs. "
        f"'{DDP}' is torch's default, which gives rank 0's buffers to all ranks before each forward; with "
        f"forward_sync_buffers=False each rank keeps its own: those of the last rank ('{LAST}'), all of them "
        f"merged, or computed anew on {RECALIBRATION_BATCHES} batches of each rank. All of these have the "
        "same weights.",
        "distance": "root mean square over all channels of (running mean - reference mean) / reference standard "
        f"deviation; the reference is computed from {RECALIBRATION_BATCHES} batches of a rank, or of all, for the "
        "weights at the end.",
        "learning rates": f"for batch norm and for SyncBN the best of {', '.join(f'{rate:g}' for rate in RATES)} on "
        "the validation images, with recalibrated statistics, on shuffled images, with a seed that is not measured: "
        f"{told(rates)}.",
    }
    return Outcome([*tuned, *rows], notes)


def find(rows: Sequence[Row]) -> list[str]:
    """Whose statistics the buffers hold, what that does to accuracy, and what cures it."""
    splits = levels(rows, "images")

    def at(arm: str, split: Value) -> dict[int, float]:
        return values(rows, "accuracy", arm=arm, images=split)

    found = [
        f"Images {split}, nearest to the buffers: {'; '.join(_whose(rows, arm, split) for arm in (DP, DDP, SYNC))}."
        for split in splits
    ]
    found += [
        by_level(arm, other, "images", {split: difference(at(arm, split), at(other, split)) for split in splits})
        for arm, other in PAIRS
    ]
    return found


def _whose(rows: Sequence[Row], arm: str, split: Value) -> str:
    far = {whose: values(rows, "distance", arm=arm, images=split, **{"statistics of": whose}) for whose in WHOSE}
    nearest = {min(WHOSE, key=lambda whose: far[whose][seed]) for seed in far[WHOSE[0]]}
    verdict = f"those of {nearest.pop()} with every seed" if len(nearest) == 1 else "the seeds do not agree whose"
    told = ", ".join(f"{whose} {fmean(by_seed.values()):.2f}" for whose, by_seed in far.items())
    return f"in {arm} {verdict} ({told} standard deviations away)"


def views(rows: Sequence[Row]) -> list[View]:
    """Accuracy of each arm, and the distances of each that leaves one set of buffers."""
    return [
        View("Test accuracy of what a checkpoint holds", "accuracy", "arm", "images", {}),
        *(
            View(
                f"Distance of the buffers from each one's statistics, images {split}",
                "distance",
                "arm",
                "statistics of",
                {"images": split},
                unit="number",
            )
            for split in levels(rows, "images")
        ),
    ]


QUESTION = Question(
    name="dp-vs-ddp",
    about="Whose running statistics DataParallel, DDP and SyncBN leave, and what that costs.",
    question="Whose running statistics does a checkpoint hold, and what does that do to its accuracy?",
    claim=Claim(
        "DataParallel keeps the buffers of the module on the first device, DDP those of rank 0, which it "
        "broadcasts before each forward; statistics that are not of the whole data make a network worse than it "
        "is, and computing them anew from the whole data cures it",
        "PyTorch's documentation of DataParallel and DistributedDataParallel; Wu and Johnson 2021, Rethinking "
        "'Batch' in BatchNorm, sections 3 and 5",
    ),
    seeds=8,
    steps=100,
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
