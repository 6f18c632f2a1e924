"""Findings: what an interval says in words, and the sentences that each study computes from rows."""

from dataclasses import replace

import pytest
from study_rows import accuracy_row, by_size, rows

from syncnorm.tools.common.decision import Difference, Rule
from syncnorm.tools.study import StudyRow, accumulation, batch_size, dp_vs_ddp, learning_rate, placement
from syncnorm.tools.study.findings import by_level, compared, difference, outcome, support, verdict
from syncnorm.tools.study.trials import VALIDATION_ACCURACY, best_rates

RULE = Rule()


def runs(*accuracies):
    return {seed: accuracy_row({}, seed, accuracy) for seed, accuracy in enumerate(accuracies)}


def test_differences_are_paired_by_seed_and_image():
    ours, other = runs(0.9, 0.8, 0.7, 0.6), runs(0.8, 0.85, 0.7)
    found = difference(ours, dict(reversed(other.items())), RULE)
    assert found.by_seed == pytest.approx((10, -5, 0))
    # With the images of the other arm in another order, the two no longer find the same hard.
    shuffled = {seed: replace(row, units=row.units[::-1]) for seed, row in other.items()}
    assert difference(runs(0.8, 0.85, 0.7), shuffled, RULE).high > difference(other, other, RULE).high
    with pytest.raises(ValueError, match="no seed has both"):
        difference({0: ours[0]}, {1: other[1]}, RULE)


def test_accuracies_without_results_per_image_are_refused():
    with pytest.raises(ValueError, match="no results per image: run the study again"):
        difference({0: StudyRow({}, 0, "accuracy", 0.9)}, runs(0.9), RULE)


GOOD, FAIR = runs(0.95, 0.951, 0.952), runs(0.9, 0.901, 0.902)
UNLIKE = runs(0.95, 0.85, 0.91)


def test_there_are_three_sentences():
    better = "A reaches 95.1 % and B 90.1 %: better by 5.0 points (95% interval 4.5 to 5.5)."
    assert compared("A", GOOD, "B", FAIR, RULE) == better
    assert compared("B", FAIR, "A", GOOD, RULE).endswith("worse by 5.0 points (95% interval 4.5 to 5.5).")
    assert compared("C", UNLIKE, "B", FAIR, RULE).endswith(
        "undecided, +0.23 points (95% interval -12.8 to +15.2); about 97 more seeds would decide."
    )
    assert compared("B", FAIR, "B", FAIR, RULE).endswith(
        "equivalent within the margin of 0.5 points (95% interval -0.028 to +0.028)."
    )
    # A margin that is less than what this number of images can show.
    assert "undecided" in compared("B", FAIR, "B", FAIR, Rule(margin=0.01))


def decided(low, high, more_seeds=0):
    mean = (low + high) / 2
    return Difference((mean, mean), low, high, 0.5, 0.05, more_seeds, None)


@pytest.mark.parametrize(("found", "sentence"), [
    (decided(0.02, 0.04), "better by 0.03 points (95% interval 0.02 to 0.04)"),
    (decided(-12, -10), "worse by 11.0 points (95% interval 10.0 to 12.0)"),
    (decided(-0.5, 0.5), "equivalent within the margin of 0.5 points (95% interval -0.5 to +0.5)"),
    (decided(-0.5, 0.51, 1), "undecided, +0.005 points (95% interval -0.5 to +0.51); about 1 more seed would decide"),
    (decided(-3, 2, None), "undecided, -0.5 points (95% interval -3.0 to +2.0); more seeds alone would not decide"),
])  # fmt: skip
def test_the_interval_decides_which_sentence_it_is(found, sentence):
    assert outcome(found) == sentence


def test_one_sentence_compares_two_conditions_at_each_level():
    by_image = {
        1: decided(4, 6),
        2: decided(-6, -4),
        "four": decided(-1, 2, 3),
        8: decided(4.5, 5.5),
        16: decided(-0.2, 0.4),
        32: decided(-0.1, 0.1),
    }
    assert by_level("ours", "B", "images", by_image) == (
        "Ours compared with B, by images, in percentage points (95% intervals): "
        "better at 1 by 5.0 (4.0 to 6.0) and 8 by 5.0 (4.5 to 5.5); worse at 2 by 5.0 (4.0 to 6.0); "
        "equivalent within 0.5 at 16 (-0.2 to +0.4) and 32 (-0.1 to +0.1); "
        'undecided at "four" (-1.0 to +2.0, about 3 more seeds would decide).'
    )


@pytest.mark.parametrize(("found", "claimed", "expected"), [
    (decided(1, 2), "better", "supports"),
    (decided(-2, -1), "better", "contradicts"),
    (decided(-2, -1), "worse", "supports"),
    (decided(-0.1, 0.1), "better", "contradicts"),
    (decided(-0.1, 1), "better", "open"),
])  # fmt: skip
def test_what_a_difference_says_on_a_claim(found, claimed, expected):
    assert support(found, claimed) == expected


@pytest.mark.parametrize(("parts", "status"), [
    (["supports"], "holds"),
    (["open"], "is undecided"),
    (["contradicts"], "does not hold"),
    (["supports", "supports"], "holds"),
    (["supports", "open"], "is undecided"),
    (["open", "open"], "is undecided"),
    (["supports", "contradicts"], "holds in part"),
    (["supports", "contradicts", "open"], "holds in part"),
    (["contradicts", "open"], "holds at most in part"),
    (["contradicts", "contradicts"], "does not hold"),
])  # fmt: skip
def test_the_verdict_on_a_claim(parts, status):
    assert verdict("x", parts).removesuffix(".").partition(":")[0] == f"The claim that x {status} here"


@pytest.mark.parametrize(("small", "large", "says"), [
    (0.95, 0.85, "holds here: supported by 2, contradicted by 0 and left open by 0 of 2 comparisons."),
    (0.95, 0.95, "holds in part here: supported by 1, contradicted by 1"),
    (0.9, 0.95, "does not hold here: supported by 0, contradicted by 2"),
])  # fmt: skip
def test_batch_size_findings(small, large, says):
    made = by_size({4: (0.9, 0.91, 0.92, small, 0.9, 0.9), 16: (0.9, 0.9, 0.92, large, 0.9, 0.9)})
    found = batch_size.find(made, RULE)
    assert found[0] == (
        "BN compared with SyncBN, by images per rank, in percentage points (95% intervals): "
        "worse at 4 by 2.0 (1.7 to 2.3) and 16 by 2.0 (1.7 to 2.3)."
    )
    assert found[-1].startswith(
        f"The claim that GN is ahead of BN below 16 images per rank and behind it from there on {says}"
    )
    assert found[-2].startswith(
        "A batch of 4 per rank compared with one of 16 (as many images in fewer steps), by norm"
    )
    assert 'better at "BN, recalibrated" by 1.0 (' in found[-2]


def test_a_claim_is_undecided_where_the_intervals_leave_it_open():
    made = by_size({4: (0.9, 0.91, 0.92, 0.95, 0.9, 0.9), 16: (0.9, 0.9, 0.92, 0.85, 0.9, 0.9)})
    noisy = [
        accuracy_row(row.condition, row.seed, 0.88 + 0.02 * row.seed)
        if row.condition == {"norm": "GN", "images a rank": 16}
        else row
        for row in made
    ]
    found = batch_size.find(noisy, RULE)
    assert "undecided at 16 (" in found[1]
    assert "is undecided here: supported by 1, contradicted by 0 and left open by 1 of 2" in found[-1]
    # A larger margin changes only what the interval leaves open.
    wide = batch_size.find(noisy, Rule(margin=20))[1]
    assert "better at 4 by 5.0 (" in wide
    assert "equivalent within 20.0 at 16 (" in wide


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


@pytest.mark.parametrize(("none", "bn", "rates", "says"), [
    (0.05, None, "no norm: 2.5; BN: none; GN: 5.", "holds in part here: supported by 1, contradicted by 2"),
    (0.05, 0.1, "no norm: 2.5; BN: 5; GN: 5.", "holds in part here: supported by 2, contradicted by 1"),
    (0.05, 0.6, "no norm: 2.5; BN: 30; GN: 5.", "holds here: supported by 3"),
    (0.2, 0.05, "no norm: 10; BN: 2.5; GN: 5.", "does not hold here: supported by 0, contradicted by 3"),
])  # fmt: skip
def test_learning_rate_findings(none, bn, rates, says):
    found = learning_rate.find(_by_rate(none, bn), RULE)
    assert found[0].startswith(
        "With He initialization and without a norm, the best learning rate is 0.02, at which the network reaches "
        "92.0 %"
    )
    assert rates in found[1]
    assert found[2].startswith(
        "The claim that BN trains at 5 and at 30 times the best learning rate without a norm, and that 5 times is "
        f"too high without one, with He initialization, {says}"
    )
    assert (
        "With weights of std 0.01, the highest learning rate at which a network trains, in multiples of 0.02: "
        "no norm: none" in found[5]
    )
    assert sum("each at its best learning rate" in finding for finding in found) == 4


def test_whether_a_network_trains_is_undecided_where_some_seeds_fail():
    made = [
        accuracy_row(row.condition, row.seed, (0.9, 0.9, 0.5)[row.seed], row.measure)
        if row.condition == {"norm": "BN", "weights": "He initialization", "lr": 0.6}
        else row
        for row in _by_rate(0.05, 0.2)
    ]
    found = learning_rate.find(made, RULE)
    assert "BN: 10, undecided up to 30; GN: 5." in found[1]
    assert "is undecided here: supported by 2, contradicted by 0 and left open by 1 of 3" in found[2]


def test_a_rate_that_was_not_tested_is_left_open():
    made = [row for row in _by_rate(0.05, 0.2) if row.condition["lr"] <= 0.2]
    assert (
        "is undecided here: supported by 2, contradicted by 0 and left open by 1" in learning_rate.find(made, RULE)[2]
    )


def test_the_best_rate_has_the_best_validation_accuracy_and_is_the_smallest_of_equals():
    cells = {(("norm", "BN"), ("lr", lr)): right for lr, right in ((0.4, 0.9), (0.1, 0.8), (0.2, 0.9))}
    assert best_rates(rows(VALIDATION_ACCURACY, cells), "norm") == {"BN": 0.2}


def test_placement_findings():
    cells = {
        (("place", name), ("steps", step)): accuracy
        for step, accuracies in ((25, (0.5, 0.6, 0.4, 0.1)), (200, (0.9, 0.9, 0.95, 0.5)))
        for name, accuracy in zip(placement.PLACEMENTS, accuracies, strict=True)
    }
    found = placement.find(rows("accuracy", cells), RULE)
    assert found[0] == (
        "After ReLU compared with before ReLU, by steps, in percentage points (95% intervals): "
        "better at 25 by 10.0 (9.4 to 10.6); equivalent within 0.5 at 200 (-0.028 to +0.028)."
    )
    assert "After 200 steps, after ReLU reaches 90.0 % and before ReLU 90.0 %: equivalent within the ma" in found[3]
    assert found[4].startswith(
        "After 200 steps, both reaches 95.0 % and before ReLU 90.0 %: better by 5.0 points (95% interval 4.6 to 5.4)"
    )
    assert found[-1] == (
        "The claim that batch norm belongs before the ReLU, not after it, judged after 200 steps, does not hold here."
    )


def test_dp_vs_ddp_findings():
    arms = (dp_vs_ddp.DP, dp_vs_ddp.DDP, dp_vs_ddp.LAST, dp_vs_ddp.MERGED, dp_vs_ddp.RECALIBRATED, dp_vs_ddp.SYNC)
    accuracies = {(("arm", arm), ("images", "by digit")): 0.9 - 0.1 * (arm == dp_vs_ddp.DDP) for arm in arms}
    distances = {
        (("arm", arm), ("images", "by digit"), ("statistics of", reference)): 0.1 + 0.5 * (reference != closest)
        for arm, closest in ((dp_vs_ddp.DP, "rank 0"), (dp_vs_ddp.DDP, "rank 0"), (dp_vs_ddp.SYNC, "all ranks"))
        for reference in dp_vs_ddp.REFERENCES
    }
    made = [*rows("accuracy", accuracies), *rows("distance", distances)]
    found = dp_vs_ddp.find(made, RULE)
    assert found[0].startswith(
        "Images by digit, distances of the buffers, in standard deviations (95% intervals): in DataParallel "
        "(emulated), 0.1 from those of rank 0, closer compared with the last rank (0.5 to 0.5) and closer compared "
        "with all ranks (0.5 to 0.5); in DDP, 0.1 from those of rank 0, "
    )
    assert "in SyncBN, 0.1 from those of all ranks, closer compared with rank 0" in found[0]
    assert any(
        finding.startswith("DDP compared with SyncBN, by images") and 'worse at "by digit" by 10.0 (' in finding
        for finding in found
    )
    assert "keep the statistics of rank 0, where those of the ranks differ, holds here: supported by 4" in found[-2]
    assert found[-1].endswith("recomputing them from the whole data restores it, holds here.")

    odd = [
        replace(row, value=9.0) if (row.seed, row.condition.get("statistics of")) == (1, "rank 0") else row
        for row in made
    ]
    found = dp_vs_ddp.find(odd, RULE)
    assert "0.6 from those of the last rank, undecided compared with rank 0 (-" in found[0]
    assert "equally close compared with all ranks" in found[0]
    assert "where those of the ranks differ, is undecided here" in found[-2]


def _accumulated(cmbn, exact=0.9, first=1e-7, last=3e-5):
    """The whole batch at 90 %, local statistics 4 points behind, GN in between."""
    sizes = (2, 4)
    by_norm = {"BN": (0.86, 0.86), "CmBN": cmbn, "exact": (exact, exact), "GN": (0.88, 0.88)}
    cells = {
        (("norm", norm), (accumulation.SIZE, size)): accuracy
        for norm, accuracies in by_norm.items()
        for size, accuracy in zip(sizes, accuracies, strict=True)
    }
    cells |= {(("norm", norm), (accumulation.SIZE, 32)): {"BN": 0.9, "GN": 0.88}[norm] for norm in ("BN", "GN")}
    return [
        *rows("accuracy", cells),
        *(
            StudyRow({"norm": "exact", accumulation.SIZE: size}, 0, measure, value / size)
            for size in sizes
            for measure, value in ((accumulation.AFTER_ONE_STEP, 2 * first), (accumulation.AFTER_ALL_STEPS, 2 * last))
        ),
    ]


@pytest.mark.parametrize(("cmbn", "gains", "restores"), [
    ((0.9, 0.9), "holds here: supported by 2", "holds here: supported by 2"),
    ((0.88, 0.88), "holds here: supported by 2", "does not hold here: supported by 0, contradicted by 2"),
    ((0.86, 0.9), "holds in part here: supported by 1, contradicted by 1", "holds in part here: supported by 1"),
    ((0.8, 0.8), "does not hold here: supported by 0, contradicted by 2", "does not hold here: supported by 0"),
])  # fmt: skip
def test_accumulation_findings(cmbn, gains, restores):
    found = accumulation.find(_accumulated(cmbn), RULE)
    assert found[0] == (
        "BN compared with the whole batch, by images per micro-batch, in percentage points (95% intervals): "
        "worse at 2 by 4.0 (3.6 to 4.4) and 4 by 4.0 (3.6 to 4.4)."
    )
    assert found[1].startswith("CmBN compared with the whole batch, by images per micro-batch")
    assert found[2].startswith("CmBN compared with BN, by images per micro-batch")
    assert found[3].startswith("GN compared with BN, by images per micro-batch")
    assert "better at 2 by 2.0" in found[3]
    assert found[-2].startswith(f"The claim that CmBN is better than BN at small micro-batches {gains}")
    assert found[-1].startswith(f"The claim that CmBN is as good as the whole batch {restores}")


def test_whether_exact_accumulation_is_exact_is_measured():
    found = accumulation.find(_accumulated((0.9, 0.9)), RULE)
    assert found[-4].startswith("Exact compared with the whole batch")
    assert "equivalent within 0.5 at 2 (-0.028 to +0.028) and 4" in found[-4]
    assert "by at most 1e-07 of the largest after one step in fp64, and by at most 3e-05 after all" in found[-3]
    wrong = accumulation.find(_accumulated((0.9, 0.9), exact=0.88, first=0.02, last=0.5), RULE)
    assert "worse at 2 by 2.0" in wrong[-4]
    assert "by at most 2e-02 of the largest after one step in fp64, and by at most 5e-01 after all" in wrong[-3]
