"""The verdict's sentences, from records made by hand: one test per branch."""

from dataclasses import replace

import pytest

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.stats import t_quantile
from syncnorm.tools.compare.paired import difference
from syncnorm.tools.compare.records import (
    ArmResult,
    CompareSettings,
    Comparison,
    LayerParity,
    MaxError,
    Parity,
    SeedResult,
    Task,
)
from syncnorm.tools.compare.verdict import verdict

EXACT = MaxError(1e-8, 1e-7)
FAR = MaxError(0.1, 0.2)


def _arm(name, results, ms=10.0, metric="accuracy", parity=(), **changes):
    seeds = tuple(
        SeedResult(i, value if metric == "accuracy" else None, value if metric == "loss" else 0.5, ms / 1e3)
        for i, value in enumerate(results)
    )
    return ArmResult(name, name, 2, seeds=seeds, step_seconds=ms / 1e3, parity=parity, **changes)


def _comparison(*arms, num_test=10_000, metric="accuracy"):
    num_seeds = max(len(arm.seeds) for arm in arms)
    names = tuple(arm.name for arm in arms)
    return Comparison(
        settings=CompareSettings(names, 2, 4, 100, 10, tuple(range(num_seeds)), 0.02, 0.9, 8),
        task=Task("nets:build", "nets:data", "cross-entropy", metric, 10, ("a", "b"), 100, num_test),
        hardware=Hardware("cpu", "a processor", "gloo", 2, 1),
        syncnorm_version="0",
        torch_version="0",
        python_version="0",
        date="",
        command="",
        arms=arms,
        spread=(),
        wall_seconds=1.0,
    )


SINGLE = _arm("single", (0.900, 0.902, 0.898))
LOCAL_LOSES = _arm("ddp", (0.868, 0.872, 0.867))
LOCAL_EQUAL = _arm("ddp", (0.901, 0.901, 0.899))
SYNCED = _arm("ddp+syncbn", (0.900, 0.902, 0.898), ms=10.8)


def _sentences(*arms, **changes):
    return verdict(_comparison(*arms, **changes))


def test_local_loses_synced_recovers_and_group_norm_is_as_good():
    assert _sentences(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.901, 0.901, 0.899))) == [
        "At 4 samples per rank, local BN is 3.1 ± 0.2 points worse than single-process training.",
        "SyncBN recovers the difference (+3.1 ± 0.2 points compared with local BN); it increases the step time by 8% "
        "(10.8 vs. 10.0 ms).",
        "GroupNorm is statistically equivalent to SyncBN (+0.0 ± 0.3 points).",
        "Use GroupNorm, which needs no communication, when training from scratch; use SyncBN when starting from "
        "weights that were trained with BN.",
    ]


def test_group_norm_loses_so_take_syncbn():
    sentences = _sentences(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.850, 0.855, 0.845)))
    assert sentences[-2:] == ["GroupNorm is 5.0 ± 0.7 points worse than SyncBN.", "Use SyncBN."]


def test_group_norm_is_unclear():
    sentences = _sentences(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.95, 0.85, 0.91)))
    assert sentences[-2:] == [
        "No verdict on GroupNorm compared with SyncBN: the seeds disagree (+5.0, -5.2, +1.2 points). "
        "Run with --seeds 6.",
        "Use SyncBN, unless more seeds show that GroupNorm is as good.",
    ]


def test_local_is_enough():
    assert _sentences(SINGLE, LOCAL_EQUAL, SYNCED) == [
        "At 4 samples per rank, local BN is statistically equivalent to single-process training (+0.0 ± 0.3 points).",
        "SyncBN has nothing to recover; it increases the step time by 8% (10.8 vs. 10.0 ms).",
        "Local BN is sufficient here: SyncBN is not needed.",
    ]


def test_local_gains():
    sentences = _sentences(SINGLE, _arm("ddp", (0.930, 0.932, 0.929)), SYNCED)
    assert sentences[0] == "At 4 samples per rank, local BN is 3.0 ± 0.1 points better than single-process training."
    assert sentences[-1] == "Local BN is sufficient here: SyncBN is not needed."


def test_the_seeds_disagree():
    sentences = _sentences(SINGLE, _arm("ddp", (0.930, 0.852, 0.948)))
    assert sentences == [
        "No verdict on local BN compared with single-process training: the seeds disagree (+3.0, -5.0, +5.0 points). "
        "Run with --seeds 6."
    ]


def test_seeds_that_agree_in_sign_alone_are_too_few():
    [sentence] = _sentences(_arm("single", (0.9, 0.9)), _arm("ddp", (0.80, 0.89)))
    assert sentence == (
        "No verdict on local BN compared with single-process training: 2 seeds are too few (-10.0, -1.0 points). "
        "Run with --seeds 4."
    )


def test_one_sample_per_rank_is_singular():
    found = _comparison(SINGLE, _arm("ddp", (0.7, 0.7, 0.7)))
    sentences = verdict(replace(found, settings=replace(found.settings, batch_per_rank=1)))
    assert sentences[0].startswith("At 1 sample per rank, local BN is")


def test_the_seeds_agree_on_less_than_the_test_set_can_show():
    [sentence] = _sentences(SINGLE, _arm("ddp", (0.870, 0.862, 0.868)), num_test=500)
    assert sentence == (
        "At 4 samples per rank, local BN differs from single-process training by -3.3 ± 1.4 points, but on a test "
        "set of 500 samples a difference below 4.0 points may be chance: no verdict without a larger test set."
    )


def test_a_tiny_test_set_is_no_ground_for_calling_arms_equal():
    single, local = _arm("single", (1.0, 1.0, 1.0)), _arm("ddp", (1.0, 1.0, 1.0))
    assert _sentences(single, local, num_test=1) == [
        "No verdict on local BN compared with single-process training (+0.0 ± 0.0 points): a test set of 1 sample "
        "cannot confirm a difference below 75.4 points."
    ]


def test_one_seed_is_no_verdict():
    assert _sentences(_arm("single", (0.9,)), _arm("ddp", (0.7,)), _arm("ddp+syncbn", (0.9,), ms=30.0)) == [
        "No verdict on accuracy: with one seed, a difference cannot be distinguished from chance. "
        "Run with --seeds 3.",
        "SyncBN increases the step time by 200% (30.0 vs. 10.0 ms).",
    ]
    assert _sentences(_arm("single", (0.9,), metric="loss"), metric="loss")[0].startswith(
        "No verdict on test loss: with one seed,"
    )


def test_a_smaller_loss_is_better_and_has_a_margin():
    def of(name, *losses):
        return _arm(name, losses, metric="loss")

    single = of("single", 1.00, 1.01, 0.99)
    assert _sentences(single, of("ddp", 1.20, 1.22, 1.19), metric="loss") == [
        "At 4 samples per rank, local BN is 0.203 ± 0.0143 of test loss worse than single-process training."
    ]
    assert _sentences(single, of("ddp", 1.001, 1.012, 0.990), metric="loss")[0] == (
        "At 4 samples per rank, local BN is statistically equivalent to single-process training "
        "(-0.001 ± 0.00248 of test loss)."
    )
    assert _sentences(single, of("ddp", 1.015, 1.028, 1.008), metric="loss")[0] == (
        "At 4 samples per rank, local BN differs from single-process training by -0.017 ± 0.0043 of test loss: the "
        "seeds agree, but a difference below 2% counts as none."
    )


def test_synced_does_worse_than_one_process():
    sentences = _sentences(SINGLE, LOCAL_LOSES, _arm("ddp+syncbn", (0.801, 0.800, 0.799)))
    assert sentences[1] == (
        "SyncBN is 6.9 ± 0.7 points worse than local BN. SyncBN does not measurably increase the step time (10.0 vs. "
        "10.0 ms)."
    )
    assert not any(sentence.startswith("Use") for sentence in sentences)


def test_synced_without_local_has_no_baseline():
    assert _sentences(SINGLE, SYNCED) == []
    assert _sentences(SINGLE, _arm("ddp+group", (0.80, 0.80, 0.80))) == [
        "GroupNorm is 10.0 ± 0.5 points worse than single-process training."
    ]


def test_step_times_that_disagree_are_unclear():
    seconds = (0.008, 0.020, 0.011)
    seeds = tuple(SeedResult(s.seed, s.test_accuracy, 0.5, t) for s, t in zip(SYNCED.seeds, seconds, strict=True))
    sentences = _sentences(
        SINGLE, LOCAL_LOSES, ArmResult("ddp+syncbn", "ddp+syncbn", 2, seeds=seeds, step_seconds=0.011)
    )
    assert sentences[1].endswith("it may or may not increase the step time: the runs disagree (11.0 vs. 10.0 ms).")


def _parity(output=EXACT, params=EXACT, stats=EXACT, note=None):
    layers = (
        LayerParity("a", EXACT, EXACT, EXACT, EXACT, EXACT),
        LayerParity("b", output, EXACT, EXACT, stats, stats),
    )
    return (Parity(1, output, EXACT, params, stats, stats, 1.0, note, layers),)


@pytest.mark.parametrize(
    ("parity", "sentence"),
    [
        (
            _parity(),
            "SyncBN is correct here: in step 1, outputs, weights and running statistics match those of the single "
            "process to 1e-07, which is fp32 rounding.",
        ),
        (
            _parity(output=FAR),
            "SyncBN does not match the single process here: the first layer that differs by more than rounding is "
            "b, with a relative output error of 2e-01.",
        ),
        (
            _parity(params=FAR),
            "The outputs of SyncBN's layers match those of the single process, but the weights differ after step 1: "
            "the loss may not be a mean over samples, or the model may use random numbers.",
        ),
        (_parity(params=None), None),  # not finite, which another sentence reports
        (_parity(params=FAR, note="gradients are halved"), "With SyncBN, gradients are halved."),
    ],
)
def test_whether_syncbn_is_correct(parity, sentence):
    assert _sentences(SINGLE, _arm("ddp+syncbn", (0.900, 0.902, 0.898), parity=parity)) == (
        [sentence] if sentence else []
    )


def test_arms_that_failed_are_reported():
    refused = ArmResult("ddp", "ddp", 2, not_run="Expected more than 1 value per channel")
    torch_refuses = ArmResult("ddp+torch-syncbn", "ddp+torch-syncbn", 2, not_run="torch refuses")
    seeds = tuple(SeedResult(i, 0.1, None, 0.01) for i in range(3))
    diverged = ArmResult("ddp+layer", "ddp+layer", 2, seeds=seeds, step_seconds=0.01)
    assert _sentences(SINGLE, refused, torch_refuses, diverged)[1:] == [
        "Local BN did not run: Expected more than 1 value per channel.",
        "LayerNorm ended with a loss that is not finite: use a smaller --lr.",
    ]


def test_difference_is_paired_over_seeds():
    # The seeds differ much, while the difference of the arms is almost the same for each.
    arm, other = _arm("ddp", (0.50, 0.70, 0.90)), _arm("single", (0.51, 0.71, 0.912))
    found = difference(_comparison(arm, other), arm, other)
    assert found.by_seed == pytest.approx((-1.0, -1.0, -1.2))
    assert found.mean == pytest.approx(-3.2 / 3)
    assert found.half_width == pytest.approx(4.303 * 0.11547 / 3**0.5, rel=1e-4)
    assert found.resolution == pytest.approx(100 * 1.96 * (2 * 0.7 * 0.3 / 10_000) ** 0.5, rel=0.01)


def test_quantiles_of_t_against_scipy():
    t = pytest.importorskip("scipy.stats").t
    for degrees in (1, 2, 5, 30):
        assert t_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), abs=1e-3)
    assert t_quantile(31) == 1.96
