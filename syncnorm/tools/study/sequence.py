"""Images read as padded sequences: batch norm with the padding in its statistics or masked, and layer norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.conversion.convert import convert
from syncnorm.tools.common.decision import Difference, Rule
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.experiment import COSINE_NOTE, DATA_NOTE, SIDE, Recipe, batches, correct, fit, load_images
from syncnorm.tools.study.findings import (
    Runs,
    Support,
    by_level,
    compared,
    difference,
    levels,
    runs,
    support,
    verdict,
)
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

BN, SYNC, MASKED, LAYER = "BN", "SyncBN", "masked SyncBN", "LN"
NORMS = (BN, SYNC, MASKED, LAYER)
# Minimum and maximum length to pad a batch to; a batch with a longer sequence is padded to that one.
PADDINGS: dict[Value, tuple[int, int]] = {"to the longest": (0, 0), "to 24": (24, 24), "to 8-24 at random": (8, 24)}
LEAST = "to the longest"
PADDING_FRACTION = "padding"
NUM_CLASSES = 10
WIDTH = 32
RANK_BATCH = 8
RATES = (0.05, 0.1, 0.2)
# Value of padding until the network replaces it: a position that the mask misses would show in every output.
PADDING = float("nan")

# Padding -> norm -> learning rate.
_Rates = Mapping[Value, Mapping[Value, float]]
# Padding -> norm -> its runs.
_Accuracies = Mapping[Value, Mapping[str, Runs]]


def columns(images: Tensor) -> list[Tensor]:
    """The columns (length, SIDE) of each image (N, 1, SIDE, SIDE), from the first with ink to the last."""
    inked = (images[:, 0] > -1).any(dim=1).int()
    first, last = inked.argmax(dim=1).tolist(), (SIDE - 1 - inked.flip(1).argmax(dim=1)).tolist()
    return [image[0, :, start : stop + 1].T for image, start, stop in zip(images, first, last, strict=True)]


def padded(sequences: Sequence[Tensor], shortest: int = 0) -> Tensor:
    """(N, length, SIDE), filled with `PADDING`; ``length`` is that of the longest, and at least ``shortest``."""
    length = max(shortest, *(len(each) for each in sequences))
    filled = torch.full((len(sequences), length, SIDE), PADDING)
    for row, each in zip(filled, sequences, strict=True):
        row[: len(each)] = each
    return filled


def mask_of(x: Tensor) -> Tensor:
    """(N, length), False where x (N, length, SIDE) is padding."""
    return ~x[:, :, 0].isnan()


@dataclass(frozen=True)
class Sequences:
    """`columns` of every image: one tensor per image for training, `padded` for evaluation; labels (N,)."""

    train: tuple[Tensor, ...]
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


@lru_cache(maxsize=1)
def load_sequences() -> Sequences:
    """The images of the other studies as sequences."""
    images = load_images()
    validation, test = (padded(columns(x)) for x in (images.validation_x, images.test_x))
    train = tuple(columns(images.train_x))
    return Sequences(train, images.train_y, validation, images.validation_y, test, images.test_y)


def padded_batches(
    sequences: Sequence[Tensor], labels: Tensor, batch: int, seed: int, part: slice, pad_to: tuple[int, int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, `padded` to a length that is drawn for each.

    Args:
        sequences: all of them.
        labels: of ``sequences``.
        batch: size of the global batch.
        seed: of the order and of the lengths; the lengths differ between ranks.
        part: of each global batch, which is what this rank gets.
        pad_to: minimum and maximum of the length that is drawn.
    """
    generator = torch.Generator().manual_seed(2**20 * seed + (part.start or 0))
    for index, y in batches(torch.arange(len(labels)), labels, batch, seed, part):
        least, greatest = pad_to
        length = int(torch.randint(least, greatest + 1, (), generator=generator))
        yield padded([sequences[i] for i in index.tolist()], length), y


class PositionNorm(nn.Module):
    """Batch norm of (N, length, C) over all positions of all sequences; converted to layer norm, over C per position.

    Args:
        width: C.
        masked: whether the statistics exclude padding; needs a synced layer.
    """

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.norm, self.masked = nn.BatchNorm1d(width), masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(N, length, C), mask (N, length) -> (N, length, C)."""
        positions = x.flatten(0, 1)
        kwargs = {"mask": mask.flatten()} if self.masked else {}
        normed: Tensor = self.norm(positions, **kwargs)
        return normed.view_as(x)


class Reader(nn.Module):
    """Linear, norm, GRU, norm, GRU, and a linear classifier of the state after the last column.

    Padding is zero in the input of each norm, as in packed sequences, so its amount affects the norms only.
    """

    def __init__(self, width: int, masked: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width, bias=False)
        self.norms = nn.ModuleList(PositionNorm(width, masked) for _ in range(2))
        self.layers = nn.ModuleList(nn.GRU(width, width, batch_first=True) for _ in range(2))
        self.classify = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, length, SIDE), padded -> (N, NUM_CLASSES)."""
        mask = mask_of(x)
        states = self.embed(x.nan_to_num())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            states, _ = layer(norm(states * mask.unsqueeze(2), mask))
        last = mask.sum(dim=1) - 1
        logits: Tensor = self.classify(states[torch.arange(len(x)), last])
        return logits


def build_reader(seed: int, width: int, norm: Value) -> nn.Module:
    """The network with ``norm``, one of `NORMS`; the same weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader(width, masked=norm == MASKED)
    if norm == LAYER:
        return convert(model, to="layer")
    return model if norm == BN else convert(model)


def _train(trial: Trial, ranks: Ranks, together: bool) -> list[StudyRow]:
    data, model = load_sequences(), build_reader(trial.seed, WIDTH, trial.condition["norm"])
    fractions: list[float] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        global_batch = RANK_BATCH * ranks.world_size
        part = slice(ranks.rank * RANK_BATCH, (ranks.rank + 1) * RANK_BATCH)
        pad_to = PADDINGS[trial.condition["padding"]]
        for x, y in padded_batches(data.train, data.train_y, global_batch, trial.seed, part, pad_to):
            fractions.append(1 - float(mask_of(x).float().mean()))
            yield x, y

    fit(DistributedDataParallel(model), batches(), Recipe(trial.lr, trial.steps))
    if ranks.rank:  # the record has the rows of rank 0
        return []
    if trial.tuning:
        return [trial.accuracy(VALIDATION_ACCURACY, correct(model, data.validation_x, data.validation_y))]
    return [
        trial.accuracy("accuracy", correct(model, data.test_x, data.test_y)),
        trial.row(PADDING_FRACTION, fmean(fractions)),
    ]


def _paddings(settings: StudySettings) -> list[Value]:
    return list(PADDINGS)[:2] if settings.quick else list(PADDINGS)


def _tuning(settings: StudySettings) -> Trials:
    """Each norm at each padding that affects it; none in a quick run."""
    return Trials(
        [
            Trial({"norm": norm, "padding": padding}, lr, FIRST_TUNING_SEED, settings.steps, tuning=True)
            for padding in _paddings(settings)
            for norm in NORMS
            if padding == LEAST or norm in (BN, SYNC)
            for lr in RATES
            if not settings.quick
        ]
    )


def _measured(settings: StudySettings, rates: _Rates) -> Trials:
    return Trials(
        [
            Trial(
                {"norm": norm, "padding": padding},
                rates[padding].get(norm, rates[LEAST][norm]),
                seed,
                settings.steps,
            )
            for seed in range(settings.seeds)
            for padding in _paddings(settings)
            for norm in NORMS
        ]
    )


def _default_rates(settings: StudySettings) -> _Rates:
    return {padding: dict.fromkeys(NORMS, RATES[1]) for padding in _paddings(settings)}


def num_stages(settings: StudySettings) -> int:
    """Number of training runs of rank 0."""
    both = (_tuning(settings), _measured(settings, _default_rates(settings)))
    return sum(trials.num_stages(settings.world_size) for trials in both)


def run(settings: StudySettings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes a learning rate for each norm and padding, then trains them all. Collective: all ranks."""
    rates, tuned = _default_rates(settings), list[StudyRow]()
    if not settings.quick:
        tuned = run_trials(_tuning(settings), _train, ranks, tell)
        rates = {
            padding: best_rates([row for row in tuned if row.condition["padding"] == padding], "norm")
            for padding in _paddings(settings)
        }
    rows = run_trials(_measured(settings, rates), _train, ranks, tell)
    return Outcome([*tuned, *rows], _notes(settings, rates))


def _notes(settings: StudySettings, rates: _Rates) -> dict[str, str]:
    lengths = [len(each) for each in load_sequences().train]
    best = "; ".join(f"padded {padding}, {rates_text(of_norm)}" for padding, of_norm in rates.items())
    return {
        "data": f"{DATA_NOTE} Each image is the sequence of its columns from the first with ink to the last: "
        f"{min(lengths)} to {max(lengths)} columns, {fmean(lengths):.1f} on average.",
        "model": f"linear, norm, GRU, norm, GRU, each of width {WIDTH}, and a linear classifier of the last state; "
        f"{settings.world_size} ranks of {RANK_BATCH} sequences with DDP, {settings.steps} steps, {COSINE_NOTE}.",
        "padding": "zeros after the sequence, up to the longest of the rank's batch, to 24 columns, or to a random "
        "length from 8 to 24 that each rank draws for each batch. The statistics of BN and SyncBN include the "
        "padding, those of the masked layer do not; LN normalizes each column separately. For testing, all sequences "
        "are padded to the longest.",
        "learning rates": f"{RATES[1]:g} throughout."
        if settings.quick
        else f"the one of {rates_text(RATES)} with the best validation accuracy, with a seed that is not used for "
        f"the results: {best}. Padding does not affect {MASKED} and {LAYER}, which use the same rate at each.",
    }


def find(rows: Sequence[StudyRow], rule: Rule) -> list[str]:
    """BN compared with LN, what padding costs BN, what masking restores; then whether the claims hold."""
    accuracies = [row for row in rows if row.measure == "accuracy"]
    by_padding = {
        padding: {norm: runs(accuracies, "accuracy", norm=norm, padding=padding) for norm in NORMS}
        for padding in levels(accuracies, "padding")
    }
    least = by_padding[LEAST]

    def differences(a: str, b: str) -> dict[Value, Difference]:
        return {padding: difference(reached[a], reached[b], rule) for padding, reached in by_padding.items()}

    layer, masked = differences(LAYER, BN), differences(MASKED, SYNC)
    return [
        by_level(LAYER, BN, "padding", layer),
        by_level(MASKED, SYNC, "padding", masked),
        *(
            compared(f"{norm} padded {padding}", reached[norm], f"padded {LEAST}", least[norm], rule)
            for padding, reached in by_padding.items()
            for norm in (BN, SYNC)
            if padding != LEAST
        ),
        _effect_of_padding(by_padding),
        verdict(f"{LAYER} is better than {BN} on padded sequences", _supports(layer)),
        verdict(f"{MASKED} is better than {SYNC}, whose statistics include the padding,", _supports(masked)),
    ]


def _supports(differences: Mapping[Value, Difference]) -> list[Support]:
    return [support(found, "better") for found in differences.values()]


def _effect_of_padding(by_padding: _Accuracies) -> str:
    """By how much padding changes the two norms that should not depend on it."""
    changes = {
        norm: max(
            abs(row.value - by_padding[LEAST][norm][seed].value)
            for reached in by_padding.values()
            for seed, row in reached[norm].items()
        )
        for norm in (MASKED, LAYER)
    }
    return (
        "Padding changes the accuracy of a run by at most "
        + " and by at most ".join(f"{100 * change:.1f} points with {norm}" for norm, change in changes.items())
        + "."
    )


def views(rows: Sequence[StudyRow]) -> list[View]:
    """Accuracy by norm and padding, and the amount of padding."""
    return [
        View("Test accuracy by padding", "accuracy", "norm", "padding", {}),
        View("Fraction of the training positions that is padding", PADDING_FRACTION, "norm", "padding", {"norm": BN}),
    ]


QUESTION = Question(
    name="sequence",
    about="Batch norm on padded sequences, masked batch norm, layer norm.",
    question="Is batch norm worse than layer norm on padded sequences, and does a mask help?",
    claim=Claim(
        "batch norm does not suit recurrent networks, whose sequences differ in length: layer norm trains them "
        "faster and to a better result",
        "Ba, Kiros and Hinton 2016, sections 1 and 6",
    ),
    seeds=5,
    steps=150,
    quick_steps=4,
    num_stages=num_stages,
    run=run,
    find=find,
    views=views,
)
