"""The verdict's sentences, from records made by hand."""

from dataclasses import replace

import pytest
import torch

from syncnorm.tools.common.provenance import Hardware
from syncnorm.tools.common.units import encode
from syncnorm.tools.compare.paired import decide
from syncnorm.tools.compare.records import (
    ArmResult,
    CompareSettings,
    Comparison,
    LayerParity,
    MaxError,
    MetricInfo,
    Parity,
    Point,
    SeedResult,
    StepRatio,
    StepTime,
    Task,
)
from syncnorm.tools.compare.verdict import verdict

EXACT = MaxError(1e-8, 1e-7)
FAR = MaxError(0.1, 0.2)
ACCURACY = MetricInfo()
LOSS = MetricInfo("loss", False, False, "batches")


def _arm(name, results, num_test=5_000, units=True, **changes):
    """An arm of so many right answers: the first of the test samples, so that a worse arm is right on a subset."""
    right = [torch.arange(num_test) < round(each * num_test) for each in results]
    texts = [encode(each.float()) if units else "" for each in right]
    seeds = tuple(
        SeedResult(i, each, 0.5, 0.01, units=text) for i, (each, text) in enumerate(zip(results, texts, strict=True))
    )
    return ArmResult(name, name, 2, seeds=seeds, **changes)


def _losses(name, *losses):
    return ArmResult(name, name, 2, seeds=tuple(SeedResult(i, loss, loss, 0.01) for i, loss in enumerate(losses)))


def _comparison(*arms, num_test=5_000, metric=ACCURACY, **settings):
    num_seeds = max(len(arm.seeds) for arm in arms)
    names = tuple(arm.name for arm in arms)
    return Comparison(
        settings=CompareSettings(names, 2, 4, 100, 10, tuple(range(num_seeds)), 0.02, 0.9, 8, **settings),
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
SYNCED = _arm("ddp+syncbn", (0.900, 0.902, 0.898))


def _sentences(*arms, **changes):
    return verdict(_comparison(*arms, **changes))


def test_local_loses_and_syncbn_recovers():
    assert _sentences(SINGLE, LOCAL_LOSES, SYNCED) == [
        "Use SyncBN.",
        "At 4 samples per rank, local BN is worse than single-process training by 3.1 points (95% interval 2.6 to "
        "3.6).",
        "SyncBN is better than local BN by 3.1 points (95% interval 2.6 to 3.6).",
        "SyncBN is equivalent to single-process training within the margin of 0.5 points (95% interval -0.06 to "
        "+0.06).",
    ]


def test_a_norm_without_communication_is_as_good():
    assert _sentences(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.901, 0.902, 0.899)))[0] == (
        "Use SyncBN when starting from weights that were trained with BN; use GroupNorm, which needs no "
        "communication, when training from scratch."
    )


def test_group_norm_loses_so_use_syncbn():
    sentences = _sentences(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.850, 0.855, 0.845)))
    assert sentences[0] == "Use SyncBN."
    assert sentences[-1] == "GroupNorm is worse than SyncBN by 5.0 points (95% interval 4.3 to 5.7)."


def test_group_norm_is_undecided():
    sentences = _sentences(SINGLE, LOCAL_LOSES, SYNCED, _arm("ddp+group", (0.95, 0.85, 0.91)))
    assert sentences[0] == "Use SyncBN; whether GroupNorm is as good is undecided."
    assert sentences[-1].startswith("Undecided: GroupNorm compared with SyncBN, +0.3 points (95% interval -")


def test_local_is_enough():
    sentences = _sentences(SINGLE, LOCAL_EQUAL, SYNCED)
    assert sentences[:2] == [
        "Local BN is enough here: SyncBN is not needed.",
        "At 4 samples per rank, local BN is equivalent to single-process training within the margin of 0.5 points "
        "(95% interval -0.3 to +0.3).",
    ]


def test_local_gains():
    sentences = _sentences(SINGLE, _arm("ddp", (0.930, 0.932, 0.929)), SYNCED)
    assert sentences[0] == "Local BN is enough here: SyncBN is not needed."
    assert sentences[1].startswith("At 4 samples per rank, local BN is better than single-process training by 3.0")


@pytest.mark.parametrize("margin", [0.2, 0.5, 5.0])
def test_a_wider_margin_makes_more_equivalent_but_never_what_excludes_zero(margin):
    assert ("is enough" in _sentences(SINGLE, LOCAL_EQUAL, margin=margin)[0]) == (margin >= 0.5)
    loses = _sentences(SINGLE, LOCAL_LOSES, SYNCED, margin=margin)[0]
    assert loses == (
        "Local BN loses, but less than the margin of 5.0 points: use SyncBN if that matters."
        if margin == 5
        else "Use SyncBN."
    )


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize(
    ("num_test", "local", "others"),
    [
        (96, (0.93, 0.934, 0.933), (0.97, 0.975, 0.972)),
        (96, (0.9896, 0.969, 0.979), (1.0, 0.9896, 0.99)),
        (450, (0.90, 0.96, 0.93), (0.95, 0.94, 0.96)),
    ],
)
def test_a_difference_that_is_not_excluded_is_never_called_enough(num_test, local, others, units):
    arms = [_arm(name, values, num_test, units) for name, values in (("single", others), ("ddp", local))]
    sentences = _sentences(*arms, num_test=num_test)
    assert sentences[0] == "Undecided whether SyncBN is needed."
    assert sentences[1].startswith("Undecided: local BN compared with single-process training, ")
    assert "would decide" in sentences[1] or "would not decide" in sentences[1]


@pytest.mark.parametrize("units", [True, False])
def test_few_seeds_decide_where_every_seed_loses_much(units):
    values = {"single": (0.944, 0.942, 0.947), "ddp": (0.824, 0.762, 0.894)}
    arms = [_arm(name, each, 450, units) for name, each in values.items()]
    assert _sentences(*arms, num_test=450)[0].startswith("Local BN loses here: compare it with SyncBN")
    fine = {"single": (0.970, 0.975, 0.972), "ddp": (0.958, 0.9645, 0.959)}
    arms = [_arm(name, each, 5_000, units) for name, each in fine.items()]
    assert "worse than single-process training by 1.2 points" in _sentences(*arms)[1]


def test_undecided_says_how_many_more_seeds_or_samples():
    assert _sentences(SINGLE, _arm("ddp", (0.930, 0.852, 0.948)))[1].endswith(
        "; about 32 more seeds (--seeds 35) would decide."
    )
    few = [_arm(name, (value,) * 3, 96) for name, value in (("single", 0.97), ("ddp", 0.93))]
    assert _sentences(*few, num_test=96)[1].endswith("; about 48 more test samples than the 96 would decide.")


def test_forecasts_come_true():
    # With as many samples as the forecast asks for, and the same shares of right answers, the interval decides.
    few = [_arm(name, (value,) * 3, 100) for name, value in (("single", 0.97), ("ddp", 0.93))]
    found = decide(_comparison(*few, num_test=100), few[1], few[0])
    assert found.kind == "undecided"
    num_test = 100 + found.more_samples
    for size, kind in ((num_test + 20, "worse"), (num_test - 30, "undecided")):
        more = [_arm(name, (value,) * 3, size) for name, value in (("single", 0.97), ("ddp", 0.93))]
        assert decide(_comparison(*more, num_test=size), more[1], more[0]).kind == kind


def test_one_sample_per_rank_is_singular():
    found = _comparison(SINGLE, _arm("ddp", (0.7, 0.7, 0.71)))
    sentences = verdict(replace(found, settings=replace(found.settings, batch_per_rank=1)))
    assert sentences[1].startswith("At 1 sample per rank, local BN is")


@pytest.mark.parametrize("units", [True, False])
def test_a_tiny_test_set_is_no_ground_for_calling_arms_equal(units):
    arms = [_arm(name, (1.0, 1.0, 1.0), 1, units) for name in ("single", "ddp")]
    assert _sentences(*arms, num_test=1)[0] == "Undecided whether SyncBN is needed."


def test_one_seed_decides_nothing():
    sentences = _sentences(_arm("single", (0.9,)), _arm("ddp", (0.5,)), _arm("ddp+syncbn", (0.9,)))
    assert sentences[:2] == [
        "Undecided whether SyncBN is needed.",
        "Undecided: local BN compared with single-process training, -40.0 points (one seed has no interval); run "
        "--seeds 3 or --seeds auto.",
    ]


def test_one_test_sample_decides_nothing():
    arms = [_arm(name, (share,) * 3, num_test=1) for name, share in (("single", 1.0), ("ddp", 0.0))]
    assert _sentences(*arms, num_test=1) == [
        "Undecided whether SyncBN is needed.",
        "Undecided: local BN compared with single-process training, -100.0 points (one test sample has no interval); "
        "more seeds or more test samples alone would not decide: use more of both.",
    ]


def test_a_smaller_loss_is_better_and_has_a_margin_in_percent():
    single = _losses("single", 1.00, 1.01, 0.99)
    assert _sentences(single, _losses("ddp", 1.20, 1.22, 1.19), metric=LOSS)[1] == (
        "At 4 samples per rank, local BN is worse than single-process training by 0.203 of test loss (95% interval "
        "0.189 to 0.218)."
    )
    assert _sentences(single, _losses("ddp", 1.001, 1.012, 0.990), metric=LOSS)[1] == (
        "At 4 samples per rank, local BN is equivalent to single-process training within the margin of 0.02 of test "
        "loss (95% interval -0.00348 to +0.00148)."
    )
    # Excludes zero, though it is within the margin.
    assert _sentences(single, _losses("ddp", 1.015, 1.025, 1.006), metric=LOSS)[0] == (
        "Local BN loses, but less than the margin of 0.02 of test loss: use SyncBN if that matters."
    )


def test_synced_does_worse_than_one_process():
    sentences = _sentences(SINGLE, LOCAL_LOSES, _arm("ddp+syncbn", (0.801, 0.800, 0.799)))
    assert sentences[0] == "Local BN loses here, and SyncBN does not recover it."
    assert sentences[2].startswith("SyncBN is worse than local BN by 6.9 points")


def test_synced_without_local_has_no_baseline():
    assert _sentences(SINGLE, _arm("ddp+group", (0.80, 0.80, 0.80))) == [
        "GroupNorm is worse than single-process training by 10.0 points (95% interval 8.9 to 11.1)."
    ]


@pytest.mark.parametrize(
    ("cost", "sentence"),
    [
        (
            StepRatio(1.08, 1.06, 1.10, 12),
            "SyncBN takes 8% more time per step than local BN: 1.06 to 1.10 times as long",
        ),
        (StepRatio(0.80, 0.78, 0.83, 12), "SyncBN takes 20% less time per step than local BN: 0.78 to 0.83 times as"),
        (StepRatio(1.01, 0.97, 1.04, 12), "SyncBN takes 0.97 to 1.04 times the step time of local BN (10.8 against "),
        (
            StepRatio(1.4, 0.9, 2.2, 12),
            "The cost of SyncBN is too noisy to time here: a training step takes 0.90 to 2.2",
        ),
        (
            None,
            "A training step takes 10.8 against 10.0 ms with SyncBN and with local BN, which were timed one after",
        ),
    ],
)
def test_cost(cost, sentence):
    local, synced = replace(LOCAL_LOSES, step=StepTime(0.01)), replace(SYNCED, step=StepTime(0.0108), cost=cost)
    assert _sentences(SINGLE, local, synced)[-1].startswith(sentence)


def _parity(output=EXACT, params=EXACT, stats=EXACT, note=None):
    layers = (
        LayerParity("a", EXACT, EXACT, EXACT, EXACT, EXACT),
        LayerParity("b", output, EXACT, EXACT, stats, stats),
    )
    return (Parity(1, output, params, params, stats, stats, 1.0, note, layers),)


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
            "With SyncBN, the outputs of the norm layers match those of the single process, but the weights differ "
            "after step 1: the loss may not be a mean over samples, or the model may use random numbers.",
        ),
        (_parity(params=None), None),  # not finite, which another sentence reports
        (_parity(params=FAR, note="gradients are halved"), "With SyncBN, gradients are halved."),
    ],
)
def test_whether_syncbn_is_correct(parity, sentence):
    first, *rest = _sentences(SINGLE, replace(SYNCED, parity=parity))
    assert first.startswith("SyncBN is equivalent to single-process training")
    assert rest == ([sentence] if sentence else [])


def test_arms_that_failed_are_reported():
    refused = ArmResult("ddp", "ddp", 2, not_run="Expected more than 1 value per channel")
    seeds = tuple(SeedResult(i, None, None, 0.01) for i in range(3))
    diverged = ArmResult("ddp+layer", "ddp+layer", 2, seeds=seeds)
    assert _sentences(SINGLE, refused, diverged) == [
        "Local BN did not run: Expected more than 1 value per channel.",
        "LayerNorm ended with a result that is not finite: use a smaller --lr.",
    ]


def test_training_that_diverged_is_not_judged():
    """The largest of NaN logits is that of class 0, so the accuracy of such a model is finite."""
    losses = (Point(50, 1.0), Point(100, None))
    diverged = replace(LOCAL_LOSES, seeds=(*LOCAL_LOSES.seeds[:2], replace(LOCAL_LOSES.seeds[2], train_loss=losses)))
    assert _sentences(SINGLE, diverged) == [
        "Local BN ended with a training loss that is not finite: use a smaller --lr."
    ]


def test_groups_and_functions_as_arms_have_names():
    arms = [replace(LOCAL_LOSES, name=name) for name in ("ddp+syncbn:8", "mine:edit")]
    sentences = _sentences(SINGLE, SYNCED, *arms)
    assert sentences[-2].startswith("SyncBN in groups of 8 is worse than SyncBN by 3.1 points")
    assert sentences[-1].startswith("mine:edit is worse than SyncBN by 3.1 points")


def test_exact_accumulation_is_judged_like_syncbn_and_cmbn_is_not():
    arms = [
        replace(SYNCED, name=name, parity=_parity(output=output))
        for name, output in (("accumulate-exact:4", EXACT), ("accumulate-exact", FAR), ("accumulate:4", FAR))
    ]
    sentences = _sentences(SINGLE, SYNCED, *arms, replace(LOCAL_LOSES, name="accumulate-bn:4"))
    assert "Accumulation with local BN in 4 micro-batches is worse than SyncBN by 3.1 points" in " ".join(sentences)
    better = "Accumulation with CmBN in 4 micro-batches is better than accumulation with local BN in 4 micro-batches"
    assert any(sentence.startswith(better) for sentence in sentences)
    assert sentences[-2].startswith("Exact accumulation in 4 micro-batches is correct here: in step 1, outputs, weig")
    assert sentences[-1].startswith("Exact accumulation does not match the single process here: the first layer that")


def test_difference_is_paired_over_seeds_and_samples():
    # The seeds differ much, while the difference of the arms is almost the same for each.
    arm, other = _arm("ddp", (0.50, 0.70, 0.90)), _arm("single", (0.53, 0.73, 0.92))
    found = decide(_comparison(arm, other), arm, other)
    assert found.by_seed == pytest.approx((-3.0, -3.0, -2.0))
    assert found.difference == pytest.approx(-8 / 3)
    assert found.kind == "worse"


def test_versions_of_files_that_are_kept():
    old = _comparison(SINGLE, LOCAL_LOSES).to_dict()
    old["schema_version"], old["task"]["metric"] = 2, "accuracy"
    del old["looks"], old["decisions"]
    for field in ("accumulate", "eval_batch", "num_workers", "amp", "margin", "budget_seconds"):
        del old["settings"][field]
    for field in ("step", "collate", "optimizer"):
        del old["task"][field]
    for arm in old["arms"]:
        del arm["step"], arm["cost"]
        arm |= {"step_seconds": 0.02, "samples_per_second": 400.0}
        arm["wait"] = {"norm_seconds": 0.001, "ddp_seconds": 0.002, "step_seconds": 0.01}
        for run in arm["seeds"]:
            run |= {"test_accuracy": run.pop("test_metric"), "test_accuracies": run.pop("test_metrics")}
            del run["units"]
    found = Comparison.from_dict(old)
    assert found["ddp"].step == StepTime(0.02, 0.002, 0.004)
    assert found["ddp"].results == LOCAL_LOSES.results
    assert "is worse than single-process training by 3.1 points (95% interval 1.8 to 4.4)" in verdict(found)[1]
