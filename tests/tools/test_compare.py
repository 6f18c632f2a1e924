"""A whole comparison, and the arguments, models and data that it rejects."""

import pytest
import records
import torch
from torch import nn

from syncnorm.errors import InputError
from syncnorm.tools.common.nets import build_residual_net
from syncnorm.tools.common.records import read_json, write_json
from syncnorm.tools.compare import ARMS, Comparison, run
from syncnorm.tools.compare.checks import are_class_targets

STEPS = 4
PARITY_STEPS = 3
# Relative to max|b|. fp32 has 1.2e-7; summing 8 images in a different order loses little more, which grows with
# the steps.
ROUNDING = {1: 2e-6, 2: 5e-6, PARITY_STEPS: 1e-5}
KINDS = ("params", "running_mean", "running_var")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return run(build_residual_net, arms=list(ARMS), batch_per_rank=4, steps=STEPS, parity_steps=PARITY_STEPS, seeds=1)


def test_every_arm_is_present_in_order(comparison):
    assert [arm.name for arm in comparison.arms] == list(ARMS)
    assert comparison["dp"].label == "dp (emulated)"
    assert [parity.step for parity in comparison["ddp"].parity] == [1, 2, PARITY_STEPS]


@pytest.mark.parametrize("kind", ["output", "gradients", *KINDS])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_synced_arm_is_one_process_up_to_rounding(comparison, kind, index):
    at = comparison["ddp+syncbn"].parity[index]
    assert getattr(at, kind).max_rel < ROUNDING[at.step]
    assert (at.note, at.first_divergent_layer) == (None, None)
    assert at.gradient_factor == pytest.approx(1, abs=1e-4)
    assert [layer.layer for layer in at.layers] == list(comparison.task.norm_layers)
    assert max(getattr(layer, kind).max_rel for layer in at.layers) < 10 * ROUNDING[at.step]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dp", "ddp"])
def test_local_statistics_differ_by_orders_more(comparison, name, kind):
    synced = getattr(comparison["ddp+syncbn"].parity[0], kind)
    local = getattr(comparison[name].parity[0], kind)
    assert local.max_rel > 1e-3
    assert local.max_abs > 1000 * synced.max_abs
    assert comparison[name].parity[0].first_divergent_layer == "0.1"  # the stem's


def test_dp_and_ddp_train_the_same_model(comparison):
    # Both average the gradients of local statistics and keep the running statistics of the first slice.
    for kind in KINDS:
        dp, ddp = (getattr(comparison[name].parity[0], kind) for name in ("dp", "ddp"))
        assert dp.max_abs == pytest.approx(ddp.max_abs, rel=1e-3)


@pytest.mark.parametrize("name", ["ddp+group", "ddp+layer", "ddp+instance"])
def test_other_norms_have_weights_to_compare_but_no_statistics(comparison, name):
    first = comparison[name].parity[0]
    assert first.params.max_rel > 1e-3
    assert first.running_mean is None
    assert first.running_var is None


def test_synced_arm_adds_two_exchanges_per_layer(comparison):
    layers = len(comparison.task.norm_layers)
    ddp, synced = comparison["ddp"], comparison["ddp+syncbn"]
    assert [c for c in synced.collectives if c.origin == "ddp"] == list(ddp.collectives)
    norm = {c.op: c for c in synced.collectives if c.origin == "norm"}
    channels = [m.num_features for m in build_residual_net().modules() if isinstance(m, nn.BatchNorm2d)]
    # Forward and backward: one frame per rank, a header and 2C fp32 numbers.
    assert {op: c.calls for op, c in norm.items()} == {"exchange": 2 * layers}
    assert norm["exchange"].payload_bytes == 2 * sum(8 * c for c in channels)


def test_ddp_reduces_each_gradient_once(comparison):
    [gradients] = [c for c in comparison["ddp"].collectives if c.op == "all_reduce"]
    assert gradients.payload_bytes == 4 * comparison.task.num_parameters
    assert comparison["single"].collectives == ()


@pytest.mark.slow
def test_the_count_does_not_depend_on_the_number_of_steps(comparison):
    assert (
        run(build_residual_net, arms=["ddp"], batch_per_rank=4, steps=1, seeds=1)["ddp"].collectives
        == comparison["ddp"].collectives
    )


def test_torch_syncbn_says_why_it_did_not_run(comparison):
    arm = comparison["ddp+torch-syncbn"]
    assert arm.not_run == "torch refuses: SyncBatchNorm layers only work with GPU modules"
    assert arm.test_metric is None


def test_speed_and_accuracy_are_measured(comparison):
    for arm in comparison.arms:
        if not arm.not_run:
            assert 0 < arm.test_metric < 1
            assert comparison.samples_per_second(arm) == pytest.approx(8 / arm.step.seconds)
            assert 0 < arm.wall_seconds < comparison.wall_seconds
            [only] = arm.seeds
            assert [point.step for point in only.train_loss] == [1, 2, 3, 4]
            assert [point.step for point in only.test_losses] == [1, 2, 3, 4]
            assert only.test_metrics[-1].value == arm.test_metric


def test_the_parts_of_a_step_add_up_and_its_cost_is_a_ratio_to_ddp(comparison):
    assert comparison["ddp"].cost is None
    for arm in comparison.arms:
        if arm.not_run:
            continue
        step = arm.step
        assert step.work_seconds > 0
        assert step.work_seconds + step.ddp_seconds + step.norm_seconds == pytest.approx(step.seconds)
        assert (step.norm_seconds > 0) == (arm.name == "ddp+syncbn")
        assert (step.ddp_seconds > 0) == arm.name.startswith("ddp")
        if arm.name != "ddp":
            assert 0 < arm.cost.low <= arm.cost.ratio <= arm.cost.high
            assert arm.cost.rounds >= 6


def test_memory_is_measured(comparison):
    for name in ("ddp", "ddp+syncbn"):
        memory = comparison[name].memory
        assert memory is None or (memory.measure == "rss growth" and memory.peak_bytes < 2**30)


def test_ranks_of_the_ddp_arm_diverge_in_every_layer(comparison):
    assert [each.layer for each in comparison.spread] == list(comparison.task.norm_layers)
    assert all(0 < each.mean < 1 and 0 < each.var < 1 for each in comparison.spread)


def test_json_round_trip(comparison, tmp_path):
    file = tmp_path / "result.json"
    write_json(comparison, file)
    assert read_json(Comparison, file) == comparison
    file.write_text(file.read_text().replace('"schema_version": 3', '"schema_version": 4'))
    with pytest.raises(ValueError, match=r"expected schema syncnorm\.compare version 3, got .* 4"):
        read_json(Comparison, file)


def test_json_keys_are_those_of_files_written_before():
    found = records.comparison().to_dict()
    parity = ["output", "gradients", "params", "running_mean", "running_var"]
    expected = {
        "settings": "arms world_size batch_per_rank steps parity_steps seeds lr momentum num_groups accumulate "
        "eval_batch num_workers amp margin budget_seconds",
        "task": "model data loss metric num_parameters norm_layers num_train num_test step collate optimizer",
        "arms": "name label ranks not_run seeds step cost collectives memory parity wall_seconds",
        "spread": "layer mean var",
        "decisions": "arm other kind difference by_seed low high margin confidence more_seeds more_samples",
    }
    for name, keys in expected.items():
        record = found[name] if isinstance(found[name], dict) else found[name][0]
        assert list(record) == keys.split()
    arm = found["arms"][3]
    assert list(arm["parity"][0]) == ["step", *parity, "gradient_factor", "note", "layers"]
    assert list(arm["parity"][0]["layers"][0]) == ["layer", *parity]
    assert list(arm["parity"][0]["output"]) == ["max_abs", "max_rel"]
    assert list(arm["memory"]) == ["peak_bytes", "measure"]
    assert list(arm["step"]) == ["seconds", "norm_seconds", "ddp_seconds"]
    assert list(arm["cost"]) == ["ratio", "low", "high", "rounds"]
    assert list(arm["collectives"][0]) == ["op", "origin", "calls", "payload_bytes"]
    seed = "seed test_metric test_loss step_seconds train_loss test_metrics test_losses units"
    assert list(arm["seeds"][0]) == seed.split()
    assert list(arm["seeds"][0]["test_losses"][0]) == ["step", "value"]
    assert list(found["task"]["metric"]) == ["name", "higher_is_better", "share", "units"]


def test_same_seed_same_numbers_and_single_comes_first(comparison):
    again = run(build_residual_net, arms=["ddp"], batch_per_rank=4, steps=STEPS, parity_steps=PARITY_STEPS, seeds=1)
    assert [arm.name for arm in again.arms] == ["single", "ddp"]
    assert again["ddp"].parity == comparison["ddp"].parity
    assert again["ddp"].test_metric == comparison["ddp"].test_metric


NORM = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))


def _same_model_again():
    return nn.Sequential(nn.Flatten(), NORM)


def _with_a_generator_that_is_not_seeded():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    nn.init.normal_(model[1].weight, generator=_GENERATOR)
    return model


_GENERATOR = torch.Generator()


class Auxiliary(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return (y, y) if self.training else y


def _different_output_in_training():
    return Auxiliary(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_same_model_again, r"returns the same model again: it must build a new one"),
        (_with_a_generator_that_is_not_seeded, r"returns different weights for the same seed"),
        (_different_output_in_training, r"the loss cross-entropy raised in training, on outputs tuple:"),
    ],
)
def test_models_that_cannot_be_compared(build, message):
    with pytest.raises(InputError, match=message):
        run(build)


def test_a_single_logit_has_no_class_targets():
    targets = torch.tensor([0, 1])
    assert not are_class_targets(torch.randn(2, 1), targets)
    assert are_class_targets(torch.randn(2, 2), targets)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"arms": ["ddp+sync"]},
            r"no arm is called 'ddp\+sync': did you mean ddp\+syncbn\? the arms are single, dp,",
        ),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_per_rank": 0}, "batch_per_rank must be at least 1, got 0"),
        ({"batch_per_rank": 674}, "a global batch of 1348, more than the 1347 training samples"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"lr": float("inf")}, "lr must be a positive number, got inf"),
        ({"margin": 0}, "margin must be a positive number, got 0"),
        ({"seeds": "auto", "budget": -1}, "budget must be a positive number, got -1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 5, "parity_steps": 6}, r"parity_steps must be between 1 and steps \(5\), got 6"),
        ({"ranks": -3}, "compare needs at least 2 ranks, got -3: ask for --ranks 2"),
    ],
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        run(**arguments)
