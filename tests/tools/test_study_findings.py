"""Findings: when the seeds agree on a difference, and the sentences that each study computes from rows."""

import math
from dataclasses import replace

import pytest
from study_rows import by_size, rows

from syncnorm.tools.common.stats import PairedDifference
from syncnorm.tools.study import batch_size, dp_vs_ddp, learning_rate, placement
from syncnorm.tools.study.findings import agreed_sign, by_level, compared, difference
from syncnorm.tools.study.trials import VALIDATION_ACCURACY, best_rates


@pytest.mark.parametrize(("by_seed", "agreed"), [
    ((0.01, 0.011, 0.012), 1),
    ((-0.01, -0.011, -0.012), -1),
    ((0.01, 0.011, -0.0001), 0),  # one seed disagrees
    ((0.01,) * 7 + (-0.001,), 0),  # one of eight disagrees, though their mean is far from zero
    ((0.001, 0.02, 0.04), 0),  # all of one sign, but too far apart
    ((0.0, 0.0, 0.0), 0),
    ((0.01,), 0),  # one seed is no evidence
])  # fmt: skip
def test_when_seeds_agree(by_seed, agreed):
    assert agreed_sign(PairedDifference(by_seed)) == agreed


@pytest.mark.parametrize(("factor", "agreed"), [(1.01, 1), (0.99, 0)])
def test_the_interval_is_students(factor, agreed):
    """Three seeds: 4.303 standard errors."""
    error = 1 / math.sqrt(3)  # of -1, 0, 1
    assert agreed_sign(PairedDifference(tuple(4.303 * error * factor + d for d in (-1, 0, 1)))) == agreed


def test_differences_are_paired_by_seed():
    assert difference({0: 1.0, 1: 2.0, 3: 9.0}, {1: 0.5, 0: 0.25}).by_seed == (0.75, 1.5)
    with pytest.raises(ValueError, match="no seed has both"):
        difference({0: 1.0}, {1: 1.0})


GOOD, FAIR, SAME = ({seed: base + 0.001 * seed for seed in range(3)} for base in (0.95, 0.90, 0.9))
UNLIKE = {0: 0.95, 1: 0.85, 2: 0.91}


def test_sentences_say_what_the_seeds_agree_on():
    assert compared("A", GOOD, "B", FAIR) == "A reaches 95.1 % and B 90.1 %: 5.0 ± 0.0 points better."
    assert compared("B", FAIR, "A", GOOD) == "B reaches 90.1 % and A 95.1 %: 5.0 ± 0.0 points worse."
    assert "the seeds do not agree on a difference (+0.2 ± 2.9 points)" in compared("C", UNLIKE, "B", FAIR)
    apart = {
        1: difference(GOOD, FAIR),
        2: difference(FAIR, GOOD),
        4: difference(SAME, UNLIKE),
        8: difference(GOOD, FAIR),
    }
    assert by_level("A", "B", "images", apart) == (
        "A compared with B, by images, in percentage points: better at 1 (+5.0 ± 0.0) and 8 (+5.0 ± 0.0); "
        "worse at 2 (-5.0 ± 0.0); the seeds do not agree at 4."
    )


@pytest.mark.parametrize(("small", "large", "verdict"), [
    (0.95, 0.85, "holds here: GN is ahead at 1 of the 1 smaller sizes, and behind at 1 of the 1"),
    (0.95, 0.95, "holds in part here: GN is ahead at 1 of the 1 smaller sizes, and behind at 0 of the 1"),
    (0.85, 0.95, "does not hold here: GN is ahead at 0 of the 1 smaller sizes, and behind at 0 of the 1"),
])  # fmt: skip
def test_batch_size_findings(small, large, verdict):
    found = batch_size.find(by_size({4: (0.9, 0.91, 0.92, small, 0.9, 0.9), 16: (0.9, 0.9, 0.92, large, 0.9, 0.9)}))
    assert found[0].startswith(
        "BN compared with SyncBN, by images per rank, in percentage points: worse at 4 (-2.0 ± 0.0) and 16"
    )
    assert verdict in found[-1]
    assert "-1.0 ± 0.0" not in found[-2]
    assert "+1.0 ± 0.0 (BN, recalibrated)" in found[-2]


def _by_rate(none, bn):
    """Networks train up to these rates, best at 0.02; at none with None, or with small weights and no norm."""
    cells = {}
    for weights in learning_rate.INITS:
        for name, highest in (("no norm", none), ("BN", bn), ("GN", 0.1)):
            for lr in learning_rate.RATES:
                trains = (
                    highest is not None and lr <= highest and (weights, name) != ("weights of std 0.01", "no norm")
                )
                best = 0.02 * (lr == 0.02)
                cells[("norm", name), ("weights", weights), ("lr", lr)] = 0.9 + best if trains else 0.1 + best
    return [*rows("accuracy", cells), *rows(VALIDATION_ACCURACY, cells)]


@pytest.mark.parametrize(("none", "bn", "rates", "verdict"), [
    (0.05, None, "no norm: 2.5, BN: none and GN: 5.",
     "BN trains at none; without a norm, 5 times is too high."),
    (0.05, 0.1, "no norm: 2.5, BN: 5 and GN: 5.", "BN trains at 5 times; without a norm, 5 times is too"),
    (0.2, 0.6, "no norm: 10, BN: 30 and GN: 5.", "BN trains at 5 and 30 times; without a norm, 5 times is not"),
])  # fmt: skip
def test_learning_rate_findings(none, bn, rates, verdict):
    found = learning_rate.find(_by_rate(none, bn))
    assert found[0].startswith(
        "With He initialization and without a norm, the best learning rate is 0.02, at which the network reaches "
        "92.0 %"
    )
    assert rates in found[1]
    assert verdict in found[2]
    assert (
        "With weights of std 0.01, the highest learning rate at which a network trains, in multiples of 0.02: "
        "no norm: none" in found[5]
    )
    assert sum("each at its best learning rate" in finding for finding in found) == 4


def test_the_best_rate_has_the_best_validation_accuracy_and_is_the_smallest_of_equals():
    cells = {(("norm", "BN"), ("lr", lr)): right for lr, right in ((0.4, 0.9), (0.1, 0.8), (0.2, 0.9))}
    assert best_rates(rows(VALIDATION_ACCURACY, cells), "norm") == {"BN": 0.2}


def test_placement_findings():
    cells = {
        (("place", name), ("steps", step)): accuracy
        for step, accuracies in ((25, (0.5, 0.6, 0.4, 0.1)), (200, (0.9, 0.9, 0.95, 0.5)))
        for name, accuracy in zip(placement.PLACEMENTS, accuracies, strict=True)
    }
    found = placement.find(rows("accuracy", cells))
    assert found[0] == (
        "After ReLU compared with before ReLU, by steps, in percentage points: better at 25 (+10.0 ± 0.0); "
        "the seeds do not agree at 200."
    )
    assert "After 200 steps, after ReLU reaches 90.0 % and before ReLU 90.0 %: the seeds do not agree" in found[3]
    assert found[4] == "After 200 steps, both reaches 95.0 % and before ReLU 90.0 %: 5.0 ± 0.0 points better."


def test_dp_vs_ddp_findings():
    arms = (dp_vs_ddp.DP, dp_vs_ddp.DDP, dp_vs_ddp.LAST, dp_vs_ddp.MERGED, dp_vs_ddp.RECALIBRATED, dp_vs_ddp.SYNC)
    accuracies = {(("arm", arm), ("images", "by digit")): 0.9 - 0.1 * (arm == dp_vs_ddp.DDP) for arm in arms}
    distances = {
        (("arm", arm), ("images", "by digit"), ("statistics of", reference)): 0.1 + 0.5 * (reference != closest)
        for arm, closest in ((dp_vs_ddp.DP, "rank 0"), (dp_vs_ddp.DDP, "rank 0"), (dp_vs_ddp.SYNC, "all ranks"))
        for reference in dp_vs_ddp.REFERENCES
    }
    made = [*rows("accuracy", accuracies), *rows("distance", distances)]
    found = dp_vs_ddp.find(made)
    assert found[0].startswith(
        "Images by digit, the statistics closest to the buffers (distances in standard deviations): in DataParallel "
        "(emulated) those of rank 0 for every seed (rank 0 0.10, the last rank 0.60, all ranks 0.60); in DDP those "
        "of rank 0 "
    )
    assert "in SyncBN those of all ranks for every seed" in found[0]
    assert 'DDP compared with SyncBN, by images, in percentage points: worse at "by digit" (-10.0 ± 0.0).' in found

    odd = [
        replace(row, value=9.0) if (row.seed, row.condition.get("statistics of")) == (1, "rank 0") else row
        for row in made
    ]
    assert dp_vs_ddp.find(odd)[0].count("the seeds do not agree (") == 2
