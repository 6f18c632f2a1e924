"""The verdict's sentences, from records made by hand: one test a branch."""

from dataclasses import replace

import pytest

from syncnorm.tools.common.stats import t_quantile
from syncnorm.tools.compare.evidence import Gap, LayerParity, Parity, SeedResult
from syncnorm.tools.compare.paired import difference
from syncnorm.tools.compare.records import ArmResult, Comparison, Hardware, Settings, Task
from syncnorm.tools.compare.verdict import verdict

EXACT = Gap(1e-8, 1e-7)
FAR = Gap(0.1, 0.2)


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
        settings=Settings(names, 2, 4, 100, 10, tuple(range(num_seeds)), 0.02, 0.9, 8),
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


def _said(*arms, **changes):
    return verdict(_comparison(*arms, **changes))


def test_local_loses_synced_recovers_and_group_norm_is_as_good():
    assert _said(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.901, 0.901, 0.899))) == [
        "At 4 samples a rank local BN loses 3.1 ± 0.2 points against the full batch.",
        "SyncBN recovers it (+3.1 ± 0.2 points over local BN); it costs 8 % more step time (10.8 against 10.0 ms).",
        "GroupNorm is within noise of SyncBN (+0.0 ± 0.3 points).",
        "Take GroupNorm where you train from scratch, with no communication in the layers; SyncBN where you start "
        "from weights that were trained with BN.",
    ]


def test_group_norm_loses_so_take_syncbn():
    said = _said(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.850, 0.855, 0.845)))
    assert said[-2:] == ["GroupNorm loses 5.0 ± 0.7 points against SyncBN.", "Take SyncBN."]


def test_group_norm_is_unclear():
    said = _said(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.95, 0.85, 0.91)))
    assert said[-2:] == [
        "No verdict on GroupNorm against SyncBN: the seeds disagree (+5.0, -5.2, +1.2 points). Run --seeds 6.",
        "Take SyncBN, unless more seeds show GroupNorm to be as good.",
    ]


def test_local_is_enough():
    assert _said(SINGLE, LOCAL_EQUAL, SYNCED) == [
        "At 4 samples a rank local BN is within noise of the full batch (+0.0 ± 0.3 points).",
        "SyncBN has nothing to recover; it costs 8 % more step time (10.8 against 10.0 ms).",
        "Local BN is enough here: nothing asks for SyncBN.",
    ]


def test_local_gains():
    said = _said(SINGLE, _arm("ddp", (0.930, 0.932, 0.929)), SYNCED)
    assert said[0] == "At 4 samples a rank local BN gains 3.0 ± 0.1 points against the full batch."
    assert said[-1] == "Local BN is enough here: nothing asks for SyncBN."


def test_the_seeds_disagree():
    said = _said(SINGLE, _arm("ddp", (0.930, 0.852, 0.948)))
    assert said == [
        "No verdict on local BN against the full batch: the seeds disagree (+3.0, -5.0, +5.0 points). Run --seeds 6."
    ]


def test_seeds_that_agree_in_sign_alone_are_too_few():
    [said] = _said(_arm("single", (0.9, 0.9)), _arm("ddp", (0.80, 0.89)))
    assert said == (
        "No verdict on local BN against the full batch: 2 seeds are too few to tell (-10.0, -1.0 points). "
        "Run --seeds 4."
    )


def test_one_sample_a_rank_is_one_sample():
    found = _comparison(SINGLE, _arm("ddp", (0.7, 0.7, 0.7)))
    said = verdict(replace(found, settings=replace(found.settings, batch_per_rank=1)))
    assert said[0].startswith("At 1 sample a rank local BN loses")


def test_the_seeds_agree_on_less_than_the_test_set_can_show():
    [said] = _said(SINGLE, _arm("ddp", (0.870, 0.862, 0.868)), num_test=500)
    assert said == (
        "At 4 samples a rank local BN is -3.3 ± 1.4 points from the full batch, too little for a test set of 500 "
        "samples, where 4.0 may be chance: no verdict without a larger one."
    )


def test_a_tiny_test_set_is_no_ground_for_calling_arms_equal():
    single, local = _arm("single", (1.0, 1.0, 1.0)), _arm("ddp", (1.0, 1.0, 1.0))
    assert _said(single, local, num_test=1) == [
        "No verdict on local BN against the full batch (+0.0 ± 0.0 points): a test set of 1 sample shows no "
        "difference below 75.4 points."
    ]


def test_one_seed_is_no_verdict():
    assert _said(_arm("single", (0.9,)), _arm("ddp", (0.7,)), _arm("ddp+syncbn", (0.9,), ms=30.0)) == [
        "No verdict on accuracy: one seed cannot tell a difference from chance. Run --seeds 3.",
        "SyncBN costs 200 % more step time (30.0 against 10.0 ms).",
    ]
    assert _said(_arm("single", (0.9,), metric="loss"), metric="loss")[0].startswith(
        "No verdict on the test loss: one"
    )


def test_losses_count_downwards_and_have_a_margin_of_their_own():
    def of(name, *losses):
        return _arm(name, losses, metric="loss")

    single = of("single", 1.00, 1.01, 0.99)
    assert _said(single, of("ddp", 1.20, 1.22, 1.19), metric="loss") == [
        "At 4 samples a rank local BN loses 0.203 ± 0.0143 of test loss against the full batch."
    ]
    assert _said(single, of("ddp", 1.001, 1.012, 0.990), metric="loss")[0] == (
        "At 4 samples a rank local BN is within noise of the full batch (-0.001 ± 0.00248 of test loss)."
    )
    assert _said(single, of("ddp", 1.015, 1.028, 1.008), metric="loss")[0] == (
        "At 4 samples a rank local BN is -0.017 ± 0.0043 of test loss from the full batch: all seeds agree, but less "
        "than 2 % counts as none."
    )


def test_synced_does_worse_than_one_process():
    said = _said(SINGLE, LOCAL_LOSES, _arm("ddp+syncbn", (0.801, 0.800, 0.799)))
    assert said[1] == (
        "SyncBN loses 6.9 ± 0.7 points against local BN. SyncBN shows no cost in step time (10.0 against 10.0 ms)."
    )
    assert not any(sentence.startswith("Take") for sentence in said)


def test_synced_without_local_is_set_beside_nothing():
    assert _said(SINGLE, SYNCED) == []
    assert _said(SINGLE, _arm("ddp+group", (0.80, 0.80, 0.80))) == [
        "GroupNorm loses 10.0 ± 0.5 points against the full batch."
    ]


def test_step_times_that_disagree_are_no_cost():
    seconds = (0.008, 0.020, 0.011)
    seeds = tuple(SeedResult(s.seed, s.test_accuracy, 0.5, t) for s, t in zip(SYNCED.seeds, seconds, strict=True))
    said = _said(SINGLE, LOCAL_LOSES, ArmResult("ddp+syncbn", "ddp+syncbn", 2, seeds=seeds, step_seconds=0.011))
    assert said[1].endswith("it may cost step time or not: the runs disagree (11.0 against 10.0 ms).")


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
            "SyncBN is right here: in step 1 outputs, weights and running statistics are the single process's to "
            "1e-07, fp32 rounding.",
        ),
        (
            _parity(output=FAR),
            "SyncBN is not the single process here: it departs at layer b, by 2e-01 of its largest output, and "
            "rounding does not explain that.",
        ),
        (
            _parity(params=FAR),
            "SyncBN's layers give the single process's outputs, but its weights differ after step 1: a loss that is "
            "no mean over samples, or randomness in the model, does that.",
        ),
        (_parity(params=None), None),  # not finite, of which another sentence tells
        (_parity(params=FAR, note="gradients are 1/2 of single's"), "In SyncBN, gradients are 1/2 of single's."),
    ],
)
def test_whether_syncbn_is_right(parity, sentence):
    assert _said(SINGLE, _arm("ddp+syncbn", (0.900, 0.902, 0.898), parity=parity)) == ([sentence] if sentence else [])


def test_arms_that_failed_are_told():
    refused = ArmResult("ddp", "ddp", 2, not_run="Expected more than 1 value per channel")
    torch_refuses = ArmResult("ddp+torch-syncbn", "ddp+torch-syncbn", 2, not_run="torch refuses")
    seeds = tuple(SeedResult(i, 0.1, None, 0.01) for i in range(3))
    diverged = ArmResult("ddp+layer", "ddp+layer", 2, seeds=seeds, step_seconds=0.01)
    assert _said(SINGLE, refused, torch_refuses, diverged)[1:] == [
        "Local BN did not run: Expected more than 1 value per channel.",
        "LayerNorm ended with a loss that is not finite: lower --lr.",
    ]


def test_difference_is_paired_over_seeds():
    # Seeds that differ much from each other, and arms that differ alike in each.
    arm, other = _arm("ddp", (0.50, 0.70, 0.90)), _arm("single", (0.51, 0.71, 0.912))
    found = difference(_comparison(arm, other), arm, other)
    assert found.of_seed == pytest.approx((-1.0, -1.0, -1.2))
    assert found.mean == pytest.approx(-3.2 / 3)
    assert found.half_width == pytest.approx(4.303 * 0.11547 / 3**0.5, rel=1e-4)
    assert found.resolution == pytest.approx(100 * 1.96 * (2 * 0.7 * 0.3 / 10_000) ** 0.5, rel=0.01)


def test_quantiles_of_t_against_scipy():
    t = pytest.importorskip("scipy.stats").t
    for degrees in (1, 2, 5, 30):
        assert t_quantile(degrees) == pytest.approx(t.ppf(0.975, degrees), abs=1e-3)
    assert t_quantile(31) == 1.96
