"""The experiments behind the studies: data, networks, what each arm trains, and how ranks share the runs."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncnorm.comm.process_groups import subgroup
from syncnorm.testing import run_ranks
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.study import StudySettings, accumulation, batch_size, dp_vs_ddp
from syncnorm.tools.study.experiment import Recipe, batches, build_net, fit, load_images, with_norm
from syncnorm.tools.study.trials import Trial, Trials, run_trials


def _state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "num_batches" not in name}


def _train(norm, world_size, together, steps):
    images, model = load_images(), with_norm(build_net(3), norm)
    part = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4) if together else slice(None)
    module = nn.parallel.DistributedDataParallel(model) if together else model
    fit(module, batches(images.train_x, images.train_y, 4 * world_size, 0, part), Recipe(0.1, steps))
    return _state(model)


def _rank_alone_and_together(norm):
    return _train("BN" if norm == "SyncBN" else norm, 2, False, 3), _train(norm, 2, True, 3)


@pytest.mark.parametrize("norm", ["SyncBN", "GN"])
def test_one_process_with_the_whole_batch_trains_what_two_ranks_train(norm):
    """So batch-size may train the norms of single images in one process; and SyncBN is BN of the whole batch."""
    for alone, together in run_ranks(_rank_alone_and_together, 2, (norm,)):
        assert alone.keys() == together.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-5)  # three steps of fp32 rounding


def _rank_batch_size_alone_and_together(norm):
    with initialized_ranks(torch.device("cpu")) as ranks:
        together = Trial({"norm": norm, batch_size.SIZE: 8}, 0.2, 0, 12, tuning=True)
        alone = replace(together, condition=together.condition | {"norm": "BN" if norm == "SyncBN" else norm})
        return [batch_size.train(trial, ranks, trial is together)[0].value for trial in (alone, together)]


@pytest.mark.parametrize("norm", ["SyncBN", "GN"])
def test_batch_size_trains_the_same_alone_and_together(norm):
    alone, together = run_ranks(_rank_batch_size_alone_and_together, 2, (norm,))[0]
    assert 0.2 < alone < 0.9  # trained, but not converged
    assert together == pytest.approx(alone, abs=0.006)  # three of the 500 images


def test_local_batch_norm_trains_differently_on_two_ranks():
    alone, together = run_ranks(_rank_alone_and_together, 2, ("BN",))[0]
    assert not torch.allclose(alone["1.running_var"], together["1.running_var"], rtol=1e-3)


def _rank_dp_vs_ddp(order):
    with initialized_ranks(torch.device("cpu")) as ranks:
        arms = (dp_vs_ddp.DP, dp_vs_ddp.DDP, dp_vs_ddp.OWN_BUFFERS, dp_vs_ddp.SYNC)
        trials = [Trial({"arm": arm, "images": order}, 0.05, 0, 40) for arm in arms]
        return [dp_vs_ddp.train(trial, ranks, True) for trial in trials]


def test_dataparallel_and_ddp_keep_statistics_of_rank_0_and_syncbn_of_all_ranks():
    for dp, ddp, own, sync in run_ranks(_rank_dp_vs_ddp, 2, ("by brightness",)):
        assert {row.measure for row in own} == {"accuracy"}
        for rows, closest in ((dp, "rank 0"), (ddp, "rank 0"), (sync, "all ranks")):
            distances = {row.condition["statistics of"]: row.value for row in rows if row.measure == "distance"}
            assert min(distances, key=distances.get) == closest
            assert distances[closest] < 0.8 * min(value for name, value in distances.items() if name != closest)
        # The weights are the same, and so are the statistics of rank 0.
        assert [row.value for row in dp] == pytest.approx([row.value for row in ddp], rel=0.02)


def test_each_rank_gets_its_share_of_the_order():
    images = load_images()
    low, high = dp_vs_ddp.shares(images, "by digit", 2)
    assert images.train_y[low].max() < images.train_y[high].min() + 1
    assert len(low) == len(high) == 1250
    dark, bright = dp_vs_ddp.shares(images, "by brightness", 2)
    assert images.train_x[dark].mean() < images.train_x[bright].mean() - 0.1
    first, second = dp_vs_ddp.shares(images, "shuffled", 2)
    assert torch.cat([first, second]).sort().values.equal(torch.arange(2500))


def test_distance_is_in_standard_deviations():
    model, other = nn.BatchNorm1d(2, eps=0.0), nn.BatchNorm1d(2, eps=0.0)
    other.running_mean.copy_(torch.tensor([3.0, 4.0]))
    other.running_var.copy_(torch.tensor([9.0, 4.0]))
    assert dp_vs_ddp.distance(model, other) == pytest.approx(math.sqrt((1 + 4) / 2))


def test_every_batch_size_sees_the_same_number_of_images():
    settings = StudySettings("batch-size", 2, 3, 40)
    assert {batch_size._steps(settings, images) * images for images in batch_size.SIZES} == {40 * 32}


def test_the_sets_are_disjoint_and_balanced_by_digit():
    images = load_images()
    counts = [part.bincount().tolist() for part in (images.train_y, images.validation_y, images.test_y)]
    assert counts == [[250] * 10, [50] * 10, [200] * 10]
    everything = torch.cat([images.train_x, images.validation_x, images.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) == 5000  # none in two sets


@pytest.mark.parametrize(("placement", "kinds"), [
    ("before", ["Conv2d", "BatchNorm2d", "ReLU"]),
    ("after", ["Conv2d", "ReLU", "BatchNorm2d"]),
    ("both", ["Conv2d", "BatchNorm2d", "ReLU", "BatchNorm2d"]),
    ("none", ["Conv2d", "ReLU"]),
])  # fmt: skip
def test_the_placement_of_the_norm(placement, kinds):
    net = build_net(0, (8, 8), placement)
    assert [type(layer).__name__ for layer in net] == [*kinds * 2, "Flatten", "Linear"]
    assert net[0].weight.equal(build_net(0, (8, 8), "before")[0].weight)
    assert net(torch.zeros(2, 1, 14, 14)).shape == (2, 10)


def test_small_weights_are_small():
    net = build_net(0, (32, 32), init="small")
    assert net[3].weight.std().item() == pytest.approx(0.01, rel=0.05)


def _rank_run_trials(trials):
    with initialized_ranks(torch.device("cpu")) as ranks:
        labels = []
        found = run_trials(
            trials, lambda trial, ranks, together: [(trial, ranks.rank, together)], ranks, labels.append
        )
        return found, labels


def test_trials_come_back_in_order_each_run_once_alone_or_by_all():
    trials = Trials(together=["a", "b"], alone=["c", "d", "e"])
    (found, labels), (same, others) = run_ranks(_rank_run_trials, 2, (trials,))
    assert found == same
    assert found == [("a", 0, True), ("b", 0, True), ("c", 0, False), ("d", 1, False), ("e", 0, False)]
    assert (labels, others) == (["a", "b", "c", "e"], ["a", "b", "d"])
    assert trials.num_stages(2) == len(labels)


def _rank_accumulation(norm, size, seeds):
    """Each rank on its own, with a seed of its own."""
    with initialized_ranks(torch.device("cpu")) as ranks:
        subgroup(1)
        trial = Trial({"norm": norm, accumulation.SIZE: size}, 0.1, seeds[ranks.rank], 3)
        return accumulation.train(trial, ranks, False)


@pytest.mark.parametrize("size", [1, 4])
def test_exact_accumulation_trains_what_the_whole_batch_trains(size):
    for rows in run_ranks(_rank_accumulation, 2, ("exact", size, (0, 1))):
        found = {row.measure: row.value for row in rows}
        assert 0 < found[accumulation.AFTER_ONE_STEP] < 1e-13  # rounding
        assert 0 < found[accumulation.AFTER_ALL_STEPS] < 1e-4


def test_runs_of_accumulation_do_not_depend_on_other_ranks():
    together = run_ranks(_rank_accumulation, 2, ("CmBN", 16, (0, 1)))
    alone = [run_ranks(_rank_accumulation, 1, ("CmBN", 16, (seed,)))[0] for seed in (0, 1)]
    assert together == alone
    assert together[0][0].units != together[1][0].units


def test_accumulated_gradients_of_a_norm_of_single_images_are_those_of_the_batch():
    images, states = load_images(), []
    for micro_batches in (1, 4):
        model = with_norm(build_net(3), "GN")
        fit(model, batches(images.train_x, images.train_y, 16, 0), Recipe(0.1, 3), micro_batches=micro_batches)
        states.append(_state(model))
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)
