"""Training runs, how the ranks share them, and how runs that are not part of the result choose learning rates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from syncnorm.tools.common.progress import Tell
from syncnorm.tools.common.ranks import Ranks
from syncnorm.tools.study.findings import levels, values
from syncnorm.tools.study.records import Condition, StudyRow, Value

VALIDATION_ACCURACY = "validation accuracy"
# Tuning runs use the seeds from here on; the runs of the result count from 0.
FIRST_TUNING_SEED = 1000


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        condition: what the study varies, by name.
        lr: learning rate of the first step.
        seed: of the weights and of the order of the data.
        steps: optimizer steps.
        tuning: whether the run only serves to choose a learning rate: it is evaluated on the validation images.
    """

    condition: Condition
    lr: float
    seed: int
    steps: int
    tuning: bool = False

    def __str__(self) -> str:
        condition = "".join(f"{name} {value}, " for name, value in self.condition.items())
        return f"{condition}lr {self.lr:g}, {'tuning' if self.tuning else f'seed {self.seed}'}"

    def row(self, measure: str, value: float) -> StudyRow:
        """A value of this run; its learning rate is part of the condition."""
        return StudyRow({**self.condition, "lr": self.lr}, self.seed, measure, value)

    def accuracy(self, measure: str, correct_N: Tensor) -> StudyRow:
        """The accuracy of this run, from whether each image is classified correctly."""
        return StudyRow.of_images({**self.condition, "lr": self.lr}, self.seed, measure, correct_N)


@dataclass(frozen=True)
class Trials:
    """Training runs and how the ranks share them.

    Attributes:
        together: each is run by all ranks, in this order.
        alone: each is run by one rank while the others run theirs. Rank r runs every ``world_size``-th, starting
            with the r-th, so trials of similar cost should be next to each other.
    """

    together: Sequence[Trial] = ()
    alone: Sequence[Trial] = ()

    def num_stages(self, world_size: int) -> int:
        """How many of them rank 0 runs."""
        return len(self.together) + len(self.alone[::world_size])


# Trial, ranks, whether all ranks run it -> rows.
Train = Callable[[Trial, Ranks, bool], Sequence[StudyRow]]


def run_trials(trials: Trials, train: Train, ranks: Ranks, tell: Tell) -> list[StudyRow]:
    """The rows of each trial, in order, on all ranks; of a trial that all ranks run, those of rank 0.

    Args:
        trials: the same on all ranks.
        train: runs one trial. It must not call a collective if its last argument is False.
        ranks: the ranks of the command.
        tell: called with ``str(trial)`` before each trial.

    Collective: all ranks: the collectives of the trials that run together, and one object gather.
    """
    found: dict[int, Sequence[StudyRow]] = {}

    def run(index: int, trial: Trial, together: bool) -> None:
        tell(str(trial))
        found[index] = train(trial, ranks, together)
        ranks.keep(found[index])

    for index, trial in enumerate(trials.together):
        run(index, trial, True)
    for index in range(ranks.rank, len(trials.alone), ranks.world_size):
        run(len(trials.together) + index, trials.alone[index], False)
    # Reversed, so that rank 0's entries overwrite those of the other ranks.
    by_index = {index: rows for of_rank in reversed(ranks.collect(found)) for index, rows in of_rank.items()}
    for index in by_index.keys() - found.keys():
        ranks.keep(by_index[index])
    return [row for index in sorted(by_index) for row in by_index[index]]


def best_rates(rows: Sequence[StudyRow], name: str) -> dict[Value, float]:
    """The ``lr`` with the best mean validation accuracy for each value of the condition ``name``.

    The smallest of equally good ones.
    """
    rates = sorted(float(rate) for rate in levels(rows, "lr"))
    best = {}
    for level in levels(rows, name):
        found = {rate: values(rows, VALIDATION_ACCURACY, **{name: level}, lr=rate) for rate in rates}
        means = {rate: fmean(by_seed.values()) for rate, by_seed in found.items() if by_seed}
        best[level] = max(means, key=lambda rate: means[rate])
    return best


def rates_text(rates: Iterable[float] | Mapping[Value, float]) -> str:
    """Learning rates for the notes of a record: ``0.1, 0.2``, or ``BN 0.1, GN 0.2`` of a mapping."""
    if isinstance(rates, Mapping):
        return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    return ", ".join(f"{rate:g}" for rate in rates)
