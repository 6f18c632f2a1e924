"""Jobs of users on two ranks: steps, batches and metrics of any kind, several optimizers, accumulation, autocast."""

from importlib.util import find_spec

import pytest
import torch
import user_jobs
from torch import nn

from syncnorm.testing import shutdown
from syncnorm.tools.common.units import decode
from syncnorm.tools.compare import run
from syncnorm.tools.compare.wrapping import recalibrated

EDITED = "user_jobs:with_layer_norm"
SHORT = {"steps": 4, "parity_steps": 2, "batch_per_rank": 4, "seeds": 1}
JOB = {
    "build_model": user_jobs.two_views,
    "datasets": user_jobs.pairs,
    "step": user_jobs.two_view_step,
    "collate": user_jobs.batch_of_views,
    **SHORT,
}


@pytest.fixture(scope="module", autouse=True)
def _end_of_ranks():
    yield
    shutdown()


@pytest.fixture(scope="module")
def two_views():
    return run(
        metric=user_jobs.right,
        optimizer=user_jobs.two_optimizers,
        arms=[
            "dp",
            "ddp",
            "ddp+syncbn",
            "ddp+recalibrated",
            "ddp+frozen",
            "ddp+syncbn:1",
            "user_jobs:with_layer_norm",
        ],
        **JOB,
    )


def test_a_step_of_dict_losses_two_forwards_and_an_unused_layer_equals_one_process(two_views):
    synced = two_views["ddp+syncbn"]
    assert synced.parity[0].within_rounding
    assert synced.parity[0].gradients.max_rel < 1e-5
    assert synced.results == pytest.approx(two_views["single"].results)
    assert two_views["ddp"].parity[0].params.max_rel > 1e-3
    assert two_views["ddp+syncbn:1"].parity == two_views["ddp"].parity
    assert [layer.layer for layer in two_views.spread] == ["body.1"]
    assert 0 < two_views.spread[0].mean < 2


def test_the_record_names_the_functions_and_has_a_unit_for_each_sample(two_views):
    task = two_views.task
    assert (task.step, task.collate) == ("user_jobs:two_view_step", "user_jobs:batch_of_views")
    assert (task.optimizer, task.loss) == ("user_jobs:two_optimizers", "computed by user_jobs:two_view_step")
    assert (task.metric.name, task.metric.share, task.metric.units) == ("right labels", True, "samples")
    assert two_views.settings.eval_batch == 4
    for arm in two_views.arms:
        for result in arm.seeds:
            units = decode(result.units)
            assert len(units) == task.num_test == 40
            assert float(units.mean()) == pytest.approx(result.test_metric)
            assert result.test_loss is not None


def test_arms_beyond_the_default(two_views):
    assert two_views["dp"].not_run.startswith("DataParallel splits the tensor")
    recalibrated, local = two_views["ddp+recalibrated"], two_views["ddp"]
    assert recalibrated.parity == local.parity
    # The training is not disturbed: the losses are the same, but the tests are not.
    assert recalibrated.seeds[0].train_loss == local.seeds[0].train_loss
    assert recalibrated.seeds[0].test_loss != local.seeds[0].test_loss
    assert two_views["ddp+frozen"].parity[0].running_mean.max_rel > 0.9  # unchanged zeros
    assert two_views[EDITED].parity[0].running_mean is None


def test_recalibrated_statistics_are_those_of_the_batches_and_end_with_the_block():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(1))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])]
    with recalibrated(model, lambda model, batch: model(batch).sum(), batches):
        assert model[1].running_mean.item() == 3.0
        assert model[1].running_var.item() == pytest.approx(20 / 3)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_networks_without_a_forward_train_by_themselves():
    found = run(
        user_jobs.gan,
        user_jobs.pairs,
        step=user_jobs.gan_step,
        optimizer=user_jobs.gan_optimizers,
        metric=user_jobs.distance,
        arms=["dp", "ddp", "ddp+syncbn", "ddp+recalibrated"],
        **SHORT,
    )
    for parity in found["ddp+syncbn"].parity:
        assert parity.within_rounding
        assert parity.gradients.max_rel < 1e-4
    assert found["ddp"].parity[0].params.max_rel > 1e-3
    assert found["ddp+syncbn"].seeds[0].test_loss is None
    assert found["ddp+syncbn"].results == pytest.approx(found["single"].results, rel=1e-4)
    assert "trains by itself" in found["ddp+recalibrated"].not_run
    assert not found.task.metric.higher_is_better
    assert found.task.norm_layers == ("G.0.1", "D.0.1")
    assert found["ddp"].seeds[0].train_loss[0].value > 1


def test_an_accumulating_metric_has_a_unit_for_each_group():
    found = run(metric=user_jobs.LARGEST, arms=["ddp"], eval_batch=3, **JOB)
    assert (found.task.metric.name, found.task.metric.units) == ("largest error", "groups")
    units = decode(found["single"].seeds[0].units)
    assert len(units) == 14  # batches of 3 of 40 samples: fewer than 20 groups
    largest = found["single"].test_metric
    # Leaving out a group changes the largest error in at most one of them.
    assert sorted(units.tolist())[:-1] == pytest.approx([largest] * 13)
    assert max(units.tolist()) >= largest


@pytest.mark.parametrize("more", [{"accumulate": 2}, {"amp": "bfloat16"}, {"num_workers": 1}], ids=str)
def test_accumulation_autocast_and_workers(more, two_views):
    found = run(metric=user_jobs.right, optimizer=user_jobs.two_optimizers, arms=["ddp", "ddp+syncbn"], **JOB, **more)
    synced, plain = found["ddp+syncbn"], two_views["ddp+syncbn"]
    assert synced.parity[0].within_rounding
    all_reduces = {c.op: c.calls for c in synced.collectives if c.origin == "ddp"}
    assert all_reduces["all_reduce"] == {c.op: c.calls for c in plain.collectives if c.origin == "ddp"}["all_reduce"]
    if "num_workers" in more:  # the same samples with the same noise
        assert found["ddp"].parity == two_views["ddp"].parity
        assert found["ddp"].seeds[0].train_loss == two_views["ddp"].seeds[0].train_loss
    elif "amp" in more:  # parity is measured in full precision
        assert synced.parity == plain.parity
        assert synced.seeds[0].train_loss != plain.seeds[0].train_loss
    else:
        assert found["ddp"].parity != two_views["ddp"].parity
        # The mean over the two batches of a step, and not their sum.
        first, of_one_batch = (each["ddp"].seeds[0].train_loss[0].value for each in (found, two_views))
        assert first == pytest.approx(of_one_batch, rel=0.4)


def test_float16_scales_the_loss_and_leaves_gradients_finite():
    found = run(metric=user_jobs.right, arms=["ddp+syncbn"], amp="float16", **JOB)
    assert found["ddp+syncbn"].test_metric is not None
    losses = [point.value for point in found["ddp+syncbn"].seeds[0].train_loss]
    assert all(value is not None and value > 0.01 for value in losses)


@pytest.mark.skipif(find_spec("torchmetrics") is None, reason="needs torchmetrics: pip install '.[metrics]'")
def test_a_metric_of_torchmetrics_does_not_wait_for_the_other_rank():
    found = run(metric=user_jobs.ByTorchmetrics, arms=["ddp"], **JOB)
    by_sample = run(metric=user_jobs.right, arms=["ddp"], **JOB)
    assert found["ddp"].results == pytest.approx(by_sample["ddp"].results)


def test_a_model_of_pairs_by_default_is_judged_by_accuracy():
    assert run(arms=["ddp"], steps=1, seeds=1).task.metric.name == "accuracy"
    assert isinstance(user_jobs.two_views().body[1], nn.BatchNorm1d)
    assert torch.is_tensor(user_jobs.pairs()[0][0]["left"])
