"""How often the rule of `syncnorm.tools.common.decision` is wrong, and how often it decides: simulated comparisons.

``python tests/support/calibration.py`` writes the tables of ``docs/decision.md``.

The model: an arm classifies a test sample correctly if its score is positive. The score is the sum of the arm's
level, the noise of the seed, the difficulty of the sample, which the arms share, what is special to this arm and this
sample, and what changes whenever this arm is trained again. All of them are normal; the last three have a variance of
1 together, so that an arm without noise of the seeds is right on the share ``Phi(level)`` of all samples.

Shapes: S = seeds, U = test samples.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt
from zlib import crc32

import torch
from torch import Tensor

from syncnorm.tools.common.decision import Difference, Rule, Scores, level_of_look

# Standard deviations of the score. Most samples are hard or easy for every network.
SHARED, ARM, RETRAINED = sqrt(0.75), sqrt(0.05), sqrt(0.2)
# Standard deviations of the seeds' noise in the score, of our arm and of the other. At 97 %, 0.2 are 1.4 points.
NO_NOISE, LITTLE, MEDIUM, MUCH, ONE_ARM = (0.0, 0.0), (0.05, 0.05), (0.1, 0.1), (0.2, 0.2), (0.2, 0.0)
NOISE_NAMES = {NO_NOISE: "none", LITTLE: "little", MEDIUM: "medium", MUCH: "much", ONE_ARM: "much, in one arm"}
# Numbers of seeds at which `Rule` looks at the results, if seeds are added until they decide.
LOOKS = (3, 5, 8, 12)


@dataclass(frozen=True)
class Case:
    """Two arms whose true difference is known: that of their accuracies at a seed without noise.

    Attributes:
        samples: size of the test set.
        accuracy: of the other arm, between 0 and 1.
        noise: standard deviation of the seeds' noise in the score, of our arm and of the other.
        seeds: with which both arms are trained.
        effect: our accuracy minus the other, in percentage points.
        margin: of equivalence, in percentage points.
        shared: standard deviation of the difficulty that the samples have for both arms.
    """

    samples: int
    accuracy: float
    noise: tuple[float, float] = NO_NOISE
    seeds: int = 3
    effect: float = 0.0
    margin: float = 0.5
    shared: float = SHARED

    def draw(self, generator: torch.Generator) -> tuple[Scores, Scores]:
        """The results of our arm and of the other in one comparison."""
        difficulty_U = self.shared * torch.randn(self.samples, generator=generator)
        accuracies = (self.accuracy + self.effect / 100, self.accuracy)
        scores = []
        for accuracy, noise in zip(accuracies, self.noise, strict=True):
            level = sqrt(self.shared**2 + ARM**2 + RETRAINED**2) * float(torch.special.ndtri(torch.tensor(accuracy)))
            score_SU = RETRAINED * torch.randn(self.seeds, self.samples, generator=generator)
            score_SU += noise * torch.randn(self.seeds, 1, generator=generator)
            score_SU += level + difficulty_U + ARM * torch.randn(self.samples, generator=generator)
            scores.append(of_units((score_SU > 0).double()))
        return scores[0], scores[1]


def of_units(units_SU: Tensor) -> Scores:
    """The results of an arm from whether it is right (1) or wrong (0) on each sample."""
    return Scores(tuple(units_SU.mean(dim=1).tolist()), units_SU, units_SU.shape[1])


def decisions(case: Case, runs: int) -> Counter[str]:
    """How many of ``runs`` simulated comparisons end in each kind of decision."""
    generator, rule = _generator(case), Rule(margin=case.margin)
    return Counter(rule.decide(*case.draw(generator)).kind for _ in range(runs))


def decisions_of_looks(case: Case, runs: int) -> Counter[str]:
    """As `decisions`, but seeds are added until the interval decides: 3, 5, 8 and at most 12."""
    generator, most = _generator(case), replace(case, seeds=max(LOOKS))
    return Counter(_last_look(*most.draw(generator), case.margin).kind for _ in range(runs))


def _generator(case: Case) -> torch.Generator:
    # Another one for each case, so that the cases are independent.
    return torch.Generator().manual_seed(crc32(repr(case).encode()))


def _last_look(ours: Scores, other: Scores, margin: float) -> Difference:
    for look, seeds in enumerate(LOOKS, 1):
        found = Rule(margin=margin, level=level_of_look(look)).decide(_first(ours, seeds), _first(other, seeds))
        if found.kind != "undecided":
            break
    return found


def _first(scores: Scores, seeds: int) -> Scores:
    assert scores.units_SU is not None
    return of_units(scores.units_SU[:seeds])


SIZES, ACCURACIES, SEEDS = (96, 1000, 5000), (0.75, 0.97), (2, 3, 5, 10)
# Arms that do not differ.
SAME = [
    Case(samples, accuracy, noise)
    for samples, accuracy, noise in product(SIZES, ACCURACIES, (NO_NOISE, LITTLE, MUCH, ONE_ARM))
]
# Arms that differ by exactly a margin for which the samples suffice: a little less would be equivalent.
AT_MARGIN = [
    Case(samples, accuracy, noise, effect=-margin, margin=margin)
    for (samples, accuracy, margin), noise in product(
        ((1000, 0.75, 5.0), (5000, 0.75, 2.0), (1000, 0.97, 2.0), (5000, 0.97, 0.5), (5000, 0.97, 1.0)),
        (NO_NOISE, LITTLE, MEDIUM),
    )
]
WITHIN_MARGIN = [replace(case, effect=0.0) for case in AT_MARGIN]
NOISY = [case for case in SAME if case.noise in (LITTLE, MUCH)]


def _points(number: float) -> str:
    return f"{number:g} point{'s' * (number != 1)}"


# Title -> the fields of a case that a column sets.
Columns = Mapping[str, Mapping[str, float]]
BY_SEEDS: Columns = {f"{seeds} seeds": {"seeds": seeds} for seeds in SEEDS}
BY_EFFECT: Columns = {
    f"{_points(effect)}, {seeds} seeds": {"effect": -effect, "seeds": seeds}
    for seeds, effect in product((3, 10), (1.0, 2.0, 5.0, 10.0))
}


def tables(runs: int) -> Iterator[str]:
    """The tables of ``docs/decision.md``, as Markdown."""
    yield "### No difference: better or worse"
    yield from _table(SAME, BY_SEEDS, ("better", "worse"), lambda case: decisions(case, runs))
    yield "### No difference, and seeds are added until the interval decides: better or worse"
    yield from _table(NOISY, {"3 to 12 seeds": {}}, ("better", "worse"), lambda case: decisions_of_looks(case, runs))
    yield "### A difference of exactly the margin: equivalent"
    yield from _table(AT_MARGIN, BY_SEEDS, ("equivalent",), lambda case: decisions(case, runs))
    yield "### No difference: equivalent"
    yield from _table(WITHIN_MARGIN, BY_SEEDS, ("equivalent",), lambda case: decisions(case, runs // 2))
    yield "### A loss of 1, 2, 5 or 10 points: worse"
    yield from _table(NOISY, BY_EFFECT, ("worse",), lambda case: decisions(case, runs // 2))


def _table(
    cases: Sequence[Case], columns: Columns, kinds: Sequence[str], simulate: Callable[[Case], Counter[str]]
) -> Iterator[str]:
    """A row per case and a cell per column: the percentage of the simulated comparisons that end in ``kinds``."""
    with_margin = len({case.margin for case in cases}) > 1
    head = ["samples", "accuracy", "noise of the seeds", *["margin"] * with_margin, *columns]
    yield ""
    yield _row(head)
    yield _row(["---:" if name in columns else "---" for name in head])
    for case in cases:
        cells = [f"{case.samples:,}", f"{100 * case.accuracy:.0f} %", NOISE_NAMES[case.noise]]
        cells += [_points(case.margin)] * with_margin
        for changes in columns.values():
            found = simulate(replace(case, **changes))  # type: ignore[arg-type]
            cells.append(f"{100 * sum(found[kind] for kind in kinds) / found.total():.1f} %")
        yield _row(cells)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=500, help="simulated comparisons per cell, half for the power")
    torch.set_num_threads(1)
    for line in tables(parser.parse_args().runs):
        print(line, flush=True)
