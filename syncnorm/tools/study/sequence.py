"""Padded sequences of unequal length: batch norm with the padding in its statistics or left out, and layer norm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.conversion.convert import convert
from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.data import NOTE
from syncnorm.tools.study.question import Outcome, Question
from syncnorm.tools.study.records import Claim, Row, Settings, Value, View
from syncnorm.tools.study.recurrent import build_reader, load_sequences, mask_of, padded_batches
from syncnorm.tools.study.sentences import by_level, compared
from syncnorm.tools.study.statistics import Difference, difference, levels, values
from syncnorm.tools.study.training import Recipe, accuracy, fit
from syncnorm.tools.study.trials import Trials, labelled, run_trials
from syncnorm.tools.study.tuning import FIRST_SEED, MEASURE, best_rates, told

BN, SYNC, MASKED, LAYER = "BN", "SyncBN", "masked SyncBN", "LN"
NORMS = (BN, SYNC, MASKED, LAYER)
# Least and greatest length to pad a batch to; a batch whose longest sequence is longer has that one's length.
PADDINGS = {"to the longest": (0, 0), "to 24": (24, 24), "to 8-24 at random": (8, 24)}
LEAST = "to the longest"
SHARE = "padding"
WIDTH = 32
PER_RANK = 8
RATES = (0.05, 0.1, 0.2)

# padding -> norm -> learning rate
_Rates = Mapping[str, Mapping[Value, float]]
# padding -> norm -> seed -> accuracy
_Accuracies = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True)
class Trial:
    """One training run."""

    norm: str
    padding: str
    lr: float
    seed: int
    steps: int
    tuning: bool = False

    def __str__(self) -> str:
        return (
            f"{self.norm}, padded {self.padding}, lr {self.lr:g}, {'tuning' if self.tuning else f'seed {self.seed}'}"
        )


def _model(trial: Trial) -> nn.Module:
    model = build_reader(trial.seed, WIDTH, masked=trial.norm == MASKED)
    if trial.norm == LAYER:
        return convert(model, to="layer")
    return model if trial.norm == BN else convert(model)


def _train(trial: Trial, ranks: Ranks, together: bool) -> list[Row]:
    data, model, shares = load_sequences(), _model(trial), list[float]()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        global_batch = PER_RANK * ranks.world_size
        part = slice(ranks.rank * PER_RANK, (ranks.rank + 1) * PER_RANK)
        pad_to = PADDINGS[trial.padding]
        for x, y in padded_batches(data.train, data.train_y, global_batch, trial.seed, part, pad_to):
            shares.append(1 - float(mask_of(x).float().mean()))
            yield x, y

    fit(DistributedDataParallel(model), batches(), Recipe(trial.lr, trial.steps))
    condition: dict[str, Value] = {"norm": trial.norm, "padding": trial.padding, "lr": trial.lr}
    if ranks.rank:  # the record has rank 0's rows
        return []
    if trial.tuning:
        return [Row(condition, trial.seed, MEASURE, accuracy(model, data.validation_x, data.validation_y))]
    return [
        Row(condition, trial.seed, "accuracy", accuracy(model, data.test_x, data.test_y)),
        Row(condition, trial.seed, SHARE, fmean(shares)),
    ]


def _paddings(settings: Settings) -> list[str]:
    return list(PADDINGS)[:2] if settings.quick else list(PADDINGS)


def _tuning(settings: Settings) -> Trials[Trial]:
    """Each norm at each padding that it sees; in a quick run there is nothing to choose from."""
    return Trials(
        [
            Trial(norm, padding, lr, FIRST_SEED, settings.steps, tuning=True)
            for padding in _paddings(settings)
            for norm in NORMS
            if padding == LEAST or norm in (BN, SYNC)
            for lr in RATES
            if not settings.quick
        ]
    )


def _measured(settings: Settings, rates: _Rates) -> Trials[Trial]:
    return Trials(
        [
            Trial(norm, padding, rates[padding].get(norm, rates[LEAST][norm]), seed, settings.steps)
            for seed in range(settings.seeds)
            for padding in _paddings(settings)
            for norm in NORMS
        ]
    )


def _some_rates(settings: Settings) -> _Rates:
    return {padding: dict.fromkeys(NORMS, RATES[1]) for padding in _paddings(settings)}


def num_stages(settings: Settings) -> int:
    """Runs of rank 0."""
    both = (_tuning(settings), _measured(settings, _some_rates(settings)))
    return sum(trials.num_stages(settings.world_size) for trials in both)


def run(settings: Settings, ranks: Ranks, tell: Tell) -> Outcome:
    """Tunes a learning rate for each norm and padding, then trains them all. Collective: all ranks."""
    rates, tuned = _some_rates(settings), list[Row]()
    if not settings.quick:
        tuned = run_trials(_tuning(settings), _train, ranks, labelled(tell))
        rates = {
            padding: best_rates([row for row in tuned if row.condition["padding"] == padding], "norm")
            for padding in _paddings(settings)
        }
    rows = run_trials(_measured(settings, rates), _train, ranks, labelled(tell))
    lengths = [len(each) for each in load_sequences().train]
    notes = {
        "data": f"{NOTE} Read column by column, left to right, from the first ink to the last: "
        f"{min(lengths)} to {max(lengths)} columns, {fmean(lengths):.1f} in the mean.",
        "model": f"linear, norm, GRU, norm, GRU, each of width {WIDTH}, a linear classifier of the last state; "
        f"{ranks.world_size} ranks of {PER_RANK} sequences, DDP, SGD with momentum 0.9, a learning rate that falls "
        f"along a cosine, {settings.steps} steps.",
        "padding": "zeros behind the sequence, up to the longest of a rank's batch, to 24 columns, or to a length "
        "from 8 to 24 that each rank draws for each batch. BN and SyncBN count them in their statistics, the masked "
        "layer does not; LN normalises each column by itself. At the test all are padded to the longest.",
        "learning rates": f"the best of {', '.join(f'{rate:g}' for rate in RATES)} by accuracy on the validation "
        "images over a seed that is not measured: "
        + "; ".join(f"padded {padding}, {told(best)}" for padding, best in rates.items())
        + f". {MASKED} and {LAYER} do not see the padding, and keep theirs."
        if tuned
        else f"{RATES[1]:g} throughout.",
    }
    return Outcome([*tuned, *rows], notes)


def find(rows: Sequence[Row]) -> list[str]:
    """BN against LN, what padding costs BN, what masking brings back; then the claim, by how often each holds."""
    accuracies = [row for row in rows if row.measure == "accuracy"]
    by_norm = {
        str(padding): {norm: values(accuracies, "accuracy", norm=norm, padding=padding) for norm in NORMS}
        for padding in levels(accuracies, "padding")
    }
    found = [by_level(a, b, "padding", _apart(by_norm, a, b)) for a, b in ((BN, LAYER), (MASKED, SYNC))]
    least = by_norm[LEAST]
    for padding, norm in ((padding, norm) for padding in by_norm if padding != LEAST for norm in (BN, SYNC)):
        found.append(compared(f"{norm} padded {padding}", by_norm[padding][norm], LEAST, least[norm]))
    return [*found, _unmoved(by_norm), _verdict(by_norm)]


def _apart(by_norm: _Accuracies, a: str, b: str) -> dict[Value, Difference]:
    return {padding: difference(reached[a], reached[b]) for padding, reached in by_norm.items()}


def _unmoved(by_norm: _Accuracies) -> str:
    """Whether the two that need not see the padding do not."""
    moved = {
        norm: max(
            abs(accuracy - by_norm[LEAST][norm][seed])
            for reached in by_norm.values()
            for seed, accuracy in reached[norm].items()
        )
        for norm in (MASKED, LAYER)
    }
    return (
        "From padding to padding, a run with "
        + " and one with ".join(f"{norm} changes by {100 * most:.1f} points at most" for norm, most in moved.items())
        + "."
    )


def _verdict(by_norm: _Accuracies) -> str:
    def said(a: str, b: str) -> str:
        won = sum(apart.agreed > 0 for apart in _apart(by_norm, a, b).values())
        return f"at {won} of {len(by_norm)} paddings" if won else "at none"

    return (
        f"Where the seeds agree, LN beats BN {said(LAYER, BN)}, and BN beats LN {said(BN, LAYER)}; masking beats "
        f"SyncBN with padding in its statistics {said(MASKED, SYNC)}, and loses to it {said(SYNC, MASKED)}."
    )


def views(rows: Sequence[Row]) -> list[View]:
    """Accuracy by norm and padding, and how much padding that was."""
    return [
        View("Test accuracy by padding", "accuracy", "norm", "padding", {}),
        View("Share of the training positions that is padding", SHARE, "norm", "padding", {"norm": BN}),
    ]


QUESTION = Question(
    name="sequence",
    about="Batch norm on padded sequences, masked batch norm, layer norm.",
    question="Does batch norm lose to layer norm on padded sequences, and does a mask bring it back?",
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
