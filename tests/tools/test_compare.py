import copy
import random
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncnorm.comm.frames import capacity_for
from syncnorm.errors import InputError
from syncnorm.monitor.divergence import spread
from syncnorm.testing import run_ranks
from syncnorm.tools.common.data import Batches, batch_indices, digits
from syncnorm.tools.common.data_parallel import EmulatedDataParallel
from syncnorm.tools.common.nets import build_residual_net
from syncnorm.tools.common.ranks import initialized_ranks
from syncnorm.tools.common.records import read_json, write_json
from syncnorm.tools.compare import ARMS, Comparison, run
from syncnorm.tools.compare.examination import _are_classes
from syncnorm.tools.compare.layer_spread import BATCHES, measure_spread
from syncnorm.tools.compare.measure import CollectiveRecorder, median_step
from syncnorm.tools.compare.memory import watch_memory
from syncnorm.tools.compare.parity import Recorder, WithoutDropout, parity, steps_to_measure
from syncnorm.tools.compare.training import curve, evaluate
from syncnorm.tools.compare.waiting import StepTimes, measure_wait

STEPS = 4
PARITY_STEPS = 3
# Of max|b|. fp32 has 1.2e-7; a sum over 8 images in another order loses little more. Three steps amplify it.
ROUNDING = {1: 2e-6, 2: 5e-6, PARITY_STEPS: 1e-5}
KINDS = ("params", "running_mean", "running_var")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return run(steps=STEPS, parity_steps=PARITY_STEPS)


def test_every_arm_is_there_in_order(comparison):
    assert [arm.name for arm in comparison.arms] == list(ARMS)
    assert comparison["dp"].label == "dp (emulated)"
    assert [parity.step for parity in comparison["ddp"].parity] == [1, 2, PARITY_STEPS]


@pytest.mark.parametrize("kind", ["output", "gradients", *KINDS])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_synced_arm_is_one_process_up_to_rounding(comparison, kind, index):
    at = comparison["ddp+syncbn"].parity[index]
    assert getattr(at, kind).max_rel < ROUNDING[at.step]
    assert (at.note, at.departs_at) == (None, None)
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
    assert comparison[name].parity[0].departs_at == "0.1"  # the stem's


def test_dp_and_ddp_train_the_same_model(comparison):
    # Both average the gradients of local statistics and keep the first slice's running ones.
    for kind in KINDS:
        dp, ddp = (getattr(comparison[name].parity[0], kind) for name in ("dp", "ddp"))
        assert dp.max_abs == pytest.approx(ddp.max_abs, rel=1e-3)


@pytest.mark.parametrize("name", ["ddp+group", "ddp+layer", "ddp+instance"])
def test_other_norms_have_weights_to_compare_but_no_statistics(comparison, name):
    first = comparison[name].parity[0]
    assert first.params.max_rel > 1e-3
    assert first.running_mean is None
    assert first.running_var is None


def test_synced_arm_adds_two_exchanges_a_layer(comparison):
    layers = len(comparison.task.norm_layers)
    ddp, synced = comparison["ddp"], comparison["ddp+syncbn"]
    assert [c for c in synced.collectives if c.origin == "ddp"] == list(ddp.collectives)
    norm = {c.op: c for c in synced.collectives if c.origin == "norm"}
    channels = [m.num_features for m in build_residual_net().modules() if isinstance(m, nn.BatchNorm2d)]
    # Forward and backward: frames for each rank, of 2C numbers of fp32 under a header.
    assert {op: c.calls for op, c in norm.items()} == {"all_to_all": 2 * layers}
    assert norm["all_to_all"].payload_bytes == 2 * 2 * sum(capacity_for(8 * c) for c in channels)


def test_ddp_reduces_each_gradient_once(comparison):
    [gradients] = [c for c in comparison["ddp"].collectives if c.op == "all_reduce"]
    assert gradients.payload_bytes == 4 * comparison.task.num_parameters
    assert comparison["single"].collectives == ()


@pytest.mark.slow
def test_the_count_does_not_depend_on_the_number_of_steps(comparison):
    assert run(arms=["ddp"], steps=1)["ddp"].collectives == comparison["ddp"].collectives


def test_torch_syncbn_says_why_it_did_not_run(comparison):
    arm = comparison["ddp+torch-syncbn"]
    assert arm.not_run == "torch refuses: SyncBatchNorm layers only work with GPU modules"
    assert arm.test_accuracy is None


def test_speed_and_accuracy_are_measured(comparison):
    for arm in comparison.arms:
        if not arm.not_run:
            assert 0 < arm.test_accuracy < 1
            assert arm.samples_per_second == pytest.approx(8 / arm.step_seconds)
            assert STEPS * arm.step_seconds / 2 < arm.wall_seconds < comparison.wall_seconds
            [only] = arm.seeds
            assert [point.step for point in only.train_loss] == [1, 2, 3, 4]
            assert [point.step for point in only.test_losses] == [1, 2, 3, 4]
            assert only.test_accuracies[-1].value == arm.test_accuracy


def test_waiting_and_memory_are_measured(comparison):
    assert comparison["single"].wait is None
    for name in ("ddp", "ddp+syncbn"):
        wait, memory = comparison[name].wait, comparison[name].memory
        assert 0 < wait.ddp_seconds < wait.step_seconds
        assert (0 < wait.norm_seconds < wait.step_seconds) == (name == "ddp+syncbn")
        assert memory is None or (memory.measure == "rss growth" and memory.peak_bytes < 2**30)


def test_ranks_of_the_ddp_arm_lie_apart_in_every_layer(comparison):
    assert [each.layer for each in comparison.spread] == list(comparison.task.norm_layers)
    assert all(0 < each.mean < 1 and 0 < each.var < 1 for each in comparison.spread)


def test_json_round_trip(comparison, tmp_path):
    file = tmp_path / "result.json"
    write_json(comparison, file)
    assert read_json(Comparison, file) == comparison
    file.write_text(file.read_text().replace('"schema_version": 2', '"schema_version": 3'))
    with pytest.raises(ValueError, match=r"expected schema syncnorm\.compare version 2, got .* 3"):
        read_json(Comparison, file)


@pytest.mark.slow
def test_same_seed_same_numbers_and_single_comes_first(comparison):
    again = run(arms=["ddp"], steps=STEPS, parity_steps=PARITY_STEPS)
    assert [arm.name for arm in again.arms] == ["single", "ddp"]
    assert again["ddp"].parity == comparison["ddp"].parity
    assert again["ddp"].test_accuracy == comparison["ddp"].test_accuracy


def _tiny_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 5))


@pytest.mark.parametrize("replicas", [2, 3])
def test_emulated_data_parallel_against_replicas_by_hand(replicas):
    model, x, y = _tiny_model(), torch.randn(6, 1, 6, 6), torch.randint(5, (6,))
    copies = [copy.deepcopy(model) for _ in range(replicas)]
    emulated = EmulatedDataParallel(model, replicas)
    for _ in range(2):
        outputs = torch.cat([replica(part) for replica, part in zip(copies, x.chunk(replicas), strict=True)])
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        got = emulated(x)
        torch.testing.assert_close(got, outputs)
        F.cross_entropy(got, y).backward()
        # Replica 0 is the one that is kept: its buffers, the gradients' sum.
        for name, parameter in model.named_parameters():
            by_hand = sum(replica.get_parameter(name).grad for replica in copies)
            torch.testing.assert_close(parameter.grad, by_hand)
        torch.testing.assert_close(dict(model.named_buffers()), dict(copies[0].named_buffers()))
        for replica in copies[1:]:
            replica.load_state_dict(copies[0].state_dict())


def _known_collectives():
    ours, all_of_them = torch.ones(3), [torch.empty(3) for _ in range(2)]
    with CollectiveRecorder() as recorder:
        dist.all_gather(all_of_them, ours)
        dist.all_reduce(torch.ones(5, dtype=torch.float64))
        dist.all_reduce(torch.ones(1, dtype=torch.float64))
        dist.broadcast(torch.ones(7, dtype=torch.uint8), src=0)
    return [(c.op, c.origin, c.calls, c.payload_bytes) for c in recorder.counts()]


def test_recorder_counts_calls_and_bytes():
    expected = [("all_gather", "ddp", 1, 12), ("all_reduce", "ddp", 2, 48), ("broadcast", "ddp", 1, 7)]
    assert run_ranks(_known_collectives) == [expected, expected]


def _snapshot(model, layers, x=None):
    recorder = Recorder(model, layers, (1, 1))
    x = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(1)) if x is None else x
    with recorder.recording():
        model(x).square().mean().backward()
    recorder.keep_gradients()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return recorder.snapshot()


def _deep_model():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(1 if i == 0 else 3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(True)) for i in range(4)]
    return nn.Sequential(*blocks), [f"{i}.1" for i in range(4)]


@pytest.mark.parametrize("wrong", [0, 2])
def test_parity_shows_a_wrong_eps_at_that_very_layer(wrong):
    (right, layers), (planted, _) = _deep_model(), _deep_model()
    planted[wrong][1].eps = 1e-2
    found = parity(1, _snapshot(planted, layers), _snapshot(right, layers), layers, 1)
    assert found.departs_at == layers[wrong]
    assert [layer.output.max_rel > 1e-3 for layer in found.layers[: wrong + 1]] == [False] * wrong + [True]
    assert not found.within_rounding


def test_parity_finds_the_one_entry_that_differs():
    (ours, layers), (reference, _) = _deep_model(), _deep_model()
    with torch.no_grad():
        ours[3][1].weight[1] += 0.25
        ours[1][1].running_mean[0] = -2.0
    momentum = 0.9
    found = parity(7, _snapshot(ours, layers), _snapshot(reference, layers), layers, 1)
    by_layer = {layer.layer: layer for layer in found.layers}
    assert found.step == 7
    assert by_layer["3.1"].params.max_abs == pytest.approx(0.25, rel=0.1)  # one step has followed
    assert by_layer["1.1"].running_mean.max_abs == found.running_mean.max_abs == pytest.approx(2 * momentum)
    assert by_layer["0.1"].running_mean.max_abs == 0
    assert found.running_var.max_abs == 0
    assert by_layer["2.1"].output.max_rel == 0
    assert found.departs_at == "1.1"


def test_a_factor_of_the_gradients_is_explained_by_averaging_where_nothing_else_differs():
    (ours, layers), (reference, _), (local, _) = (_deep_model() for _ in range(3))
    whole, halved, turned = (_snapshot(model, layers) for model in (reference, ours, local))
    for tensor in halved.tensors["gradients"].values():
        tensor *= 0.5
    turned.tensors["gradients"] = {n: t.flip(0) * 0.5 for n, t in turned.tensors["gradients"].items()}
    found = parity(1, halved, whole, layers, 2)
    assert found.gradient_factor == pytest.approx(0.5)
    assert found.note.startswith("gradients are 1/2 of single's: the loss adds up its samples")
    assert parity(1, halved, whole, layers, 4).note is None
    assert parity(1, turned, whole, layers, 2).note is None


def test_steps_of_parity():
    assert [steps_to_measure(last) for last in (1, 3, 10)] == [(1,), (1, 2, 3), (1, 2, 5, 10)]


def test_parity_needs_no_dropout():
    x = torch.ones(100)
    with WithoutDropout():
        for drop in (nn.Dropout(0.5), lambda x: F.dropout(x, 0.5), nn.AlphaDropout(0.5)):
            assert torch.equal(drop(x), x)
    assert not torch.equal(nn.Dropout(0.5)(x), x)


class Augmented:
    """Items that are drawn anew each time."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.randn(2) + random.random() + index, index % 3


def test_augmented_items_are_the_same_on_every_rank_and_new_in_every_step():
    whole, second = Batches(Augmented(), 6, slice(0, 6), seed=1), Batches(Augmented(), 6, slice(3, 6), seed=1)
    steps = []
    for _ in range(2):
        (x, y), (part_x, part_y) = whole.next(), second.next()
        assert torch.equal(x[3:], part_x)
        assert torch.equal(y[3:], part_y)
        steps.append(x - x.round())
    assert not torch.equal(*steps)


def test_evaluation_of_classes_by_pixel():
    def logits(x):
        return torch.stack([x, -x], 1)  # class 0 where x is positive

    model = nn.Module()
    model.forward = logits
    x = torch.tensor([[[1.0, -1.0], [2.0, -3.0]]])
    y = torch.tensor([[[0, 1], [1, 1]]])
    accuracy, loss = evaluate(model, F.cross_entropy, [(x[0], y[0])], "accuracy", torch.device("cpu"))
    assert accuracy == 0.75
    assert loss == pytest.approx(float(F.cross_entropy(logits(x), y)))
    assert evaluate(model, F.cross_entropy, [(x[0], y[0])], "loss", torch.device("cpu"))[0] is None
    for ignored in (-100, 255):
        partly = torch.where(x > 0, y, ignored)  # one right, one wrong, two that the loss leaves out
        loss_of = partial(F.cross_entropy, ignore_index=ignored)
        assert evaluate(model, loss_of, [(x[0], partly[0])], "accuracy", torch.device("cpu"))[0] == 0.5


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.norm(x)
        return {"logits": y, "others": (y.sum(), [y * 2])}


def test_emulated_data_parallel_joins_what_is_nested():
    x = torch.randn(8, 3)
    found = EmulatedDataParallel(InADict(), 2)(x)
    parts = [InADict()(part) for part in x.chunk(2)]
    assert torch.equal(found["logits"], torch.cat([part["logits"] for part in parts]))
    assert torch.equal(found["others"][0], torch.stack([part["others"][0] for part in parts]))
    assert torch.equal(found["others"][1][0], found["logits"] * 2)


def test_a_model_without_running_statistics_has_none_that_differ():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    taken = _snapshot(model, ["1"], torch.randn(5, 3))
    assert parity(1, taken, taken, ["1"], 2).within_rounding


NORM = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))


def _always_the_same():
    return nn.Sequential(nn.Flatten(), NORM)


def _of_its_own_generator():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    nn.init.normal_(model[1].weight, generator=_GENERATOR)
    return model


_GENERATOR = torch.Generator()


class Auxiliary(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return (y, y) if self.training else y


def _another_output_in_training():
    return Auxiliary(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_always_the_same, r"returns the same model again: build a new one"),
        (_of_its_own_generator, r"returns other weights after the same seed"),
        (_another_output_in_training, r"the loss cross-entropy raised in training, on outputs tuple:"),
    ],
)
def test_models_that_cannot_be_compared(build, message):
    with pytest.raises(InputError, match=message):
        run(build)


def test_one_logit_is_no_class():
    targets = torch.tensor([0, 1])
    assert not _are_classes(torch.randn(2, 1), targets)
    assert _are_classes(torch.randn(2, 2), targets)


def test_learning_curve_is_the_mean_of_stretches():
    assert [(p.step, p.value) for p in curve([1.0, 3.0, 5.0, 9.0], most=2)] == [(2, 2.0), (4, 7.0)]
    assert [p.value for p in curve([1.0, float("nan")])] == [1.0, None]
    assert len(curve([0.0] * 504)) == 50


def test_memory_sees_what_is_allocated_meanwhile():
    held = torch.ones(10 * 2**20)
    peak = watch_memory(torch.device("cpu"))
    if peak() is None:
        pytest.skip("this system does not tell")
    torch.ones(20 * 2**20)  # 80 MiB, freed at once
    assert 70 * 2**20 < peak().peak_bytes < 200 * 2**20
    del held


def _spread_of_a_known_layer():
    rank = dist.get_rank()
    data = [(torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) * (i + 1), i) for i in range(8 * BATCHES)]
    mine, whole = (Batches(data, 8, part, seed=0) for part in (slice(4 * rank, 4 * rank + 4), slice(0, 8)))
    with initialized_ranks(torch.device("cpu")) as ranks:
        [found] = measure_spread(nn.Sequential(nn.BatchNorm1d(3)), ["0"], mine, ranks)
    expected = []
    for _ in range(BATCHES):
        halves = whole.next()[0].double().chunk(2)
        moments = [torch.var_mean(half, (0, 2), correction=0) for half in halves]
        means, variances = torch.stack([m for _, m in moments]), torch.stack([v for v, _ in moments])
        expected.append(spread(means, variances, torch.tensor([1, 1])))
    return found, torch.tensor(expected).double().square().mean(0).sqrt().tolist()


def test_spread_of_a_layer_against_both_halves_by_hand():
    for found, expected in run_ranks(_spread_of_a_known_layer):
        assert [found.mean, found.var] == pytest.approx(expected)


class Late(nn.Linear):
    def forward(self, x):
        time.sleep(0.05 * dist.get_rank())
        return super().forward(x)


def _wait_for_a_late_rank():
    model = Late(2, 2)
    wrapper = DistributedDataParallel(model)

    def step():
        started = time.perf_counter()
        wrapper(torch.ones(1, 2)).sum().backward()
        now = time.perf_counter()
        return StepTimes(now - started, now)

    with initialized_ranks(torch.device("cpu")) as ranks:
        return measure_wait(step, wrapper, model, ranks)


def test_ddp_waits_for_a_rank_that_is_late():
    both = run_ranks(_wait_for_a_late_rank)
    assert both[0] == both[1]
    assert both[0].norm_seconds == 0
    assert 0.02 < both[0].ddp_seconds < both[0].step_seconds  # the mean of 50 ms and next to nothing


@pytest.mark.parametrize(("seconds", "expected"), [([9], 9), ([9, 1], 5), ([9, 1, 1], 1), ([9] * 5 + [2] * 15, 2)])
def test_median_step_leaves_warm_up_out(seconds, expected):
    assert median_step(seconds) == expected


def test_batches_depend_on_the_seed_alone_and_cover_an_epoch():
    batches = batch_indices(11, 4, seed=3)
    first, second, third = (next(batches) for _ in range(3))
    assert len({*first.tolist(), *second.tolist()}) == 8  # the last three of eleven are dropped
    assert [len(b) for b in (first, second, third)] == [4, 4, 4]
    assert torch.equal(first, next(batch_indices(11, 4, seed=3)))
    assert not torch.equal(first, next(batch_indices(11, 4, seed=4)))


def test_split_keeps_train_and_test_apart():
    (train_x, _), (test_x, _) = (data.tensors for data in digits())
    assert (len(train_x), len(test_x)) == (1347, 450)
    assert train_x.shape[1:] == (1, 8, 8)
    assert (train_x.min(), train_x.max()) == (-1, 1)


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
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 5, "parity_steps": 6}, r"parity_steps must be between 1 and steps \(5\), got 6"),
        ({"ranks": -3}, "compare needs at least 2 ranks, got -3: ask for --ranks 2"),
    ],
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        run(**arguments)
