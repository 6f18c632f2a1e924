import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from syncnorm.collectives.frames import capacity_for
from syncnorm.compare import ARMS, Comparison, run
from syncnorm.compare.arms import EmulatedDataParallel
from syncnorm.compare.data import batch_indices, load_digits
from syncnorm.compare.measure import CollectiveRecorder, median_step, parity, snapshot
from syncnorm.compare.models import build_model
from syncnorm.errors import InputError
from syncnorm.report.records_json import read_json, write_json
from syncnorm.testing import run_ranks

STEPS = 4
PARITY_STEPS = 3
# Of max|b|. fp32 has 1.2e-7; a sum over 8 images in another order loses little more. Three steps amplify it.
ROUNDING = {1: 1e-6, PARITY_STEPS: 1e-5}
KINDS = ("params", "running_mean", "running_var")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return run(steps=STEPS, parity_steps=PARITY_STEPS)


def test_every_arm_is_there_in_order(comparison):
    assert [arm.name for arm in comparison.arms] == list(ARMS)
    assert comparison["dp"].label == "dp (emulated)"
    assert [parity.step for parity in comparison["ddp"].parity] == [1, PARITY_STEPS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", [0, 1])
def test_synced_arm_is_one_process_up_to_rounding(comparison, kind, index):
    at = comparison["ddp+syncbn"].parity[index]
    assert getattr(at, kind).max_rel < ROUNDING[at.step]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dp", "ddp"])
def test_local_statistics_differ_by_orders_more(comparison, name, kind):
    synced = getattr(comparison["ddp+syncbn"].parity[0], kind)
    local = getattr(comparison[name].parity[0], kind)
    assert local.max_rel > 1e-3
    assert local.max_abs > 1000 * synced.max_abs


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
    layers = comparison.num_norm_layers
    ddp, synced = comparison["ddp"], comparison["ddp+syncbn"]
    assert [c for c in synced.collectives if c.origin == "ddp"] == list(ddp.collectives)
    norm = {c.op: c for c in synced.collectives if c.origin == "norm"}
    channels = [m.num_features for m in build_model(0).modules() if isinstance(m, nn.BatchNorm2d)]
    # Forward and backward: frames for each rank, of 2C numbers of fp32 under a header.
    assert {op: c.calls for op, c in norm.items()} == {"all_to_all": 2 * layers}
    assert norm["all_to_all"].payload_bytes == 2 * 2 * sum(capacity_for(8 * c) for c in channels)


def test_ddp_reduces_each_gradient_once(comparison):
    [gradients] = [c for c in comparison["ddp"].collectives if c.op == "all_reduce"]
    assert gradients.payload_bytes == 4 * comparison.num_parameters
    assert comparison["single"].collectives == ()


def test_the_count_does_not_depend_on_the_number_of_steps(comparison):
    assert run(["ddp"], steps=1)["ddp"].collectives == comparison["ddp"].collectives


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


def test_json_round_trip(comparison, tmp_path):
    file = tmp_path / "result.json"
    write_json(comparison, file)
    assert read_json(file) == comparison
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ValueError, match=r"expected schema syncnorm\.compare version 1, got .* 2"):
        read_json(file)


def test_same_seed_same_numbers_and_single_comes_first(comparison):
    again = run(["ddp"], steps=STEPS, parity_steps=PARITY_STEPS)
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


def test_parity_finds_the_one_entry_that_differs():
    model = _tiny_model()
    before = snapshot(model)
    with torch.no_grad():
        model[3].weight[1, 2] += 0.25
        model[1].running_mean[0] = -2.0
    found = parity(7, before, snapshot(model))
    largest = max(p.abs().max().item() for p in model.parameters())
    assert found.step == 7
    assert found.params.max_abs == pytest.approx(0.25)
    assert found.params.max_rel == pytest.approx(0.25 / largest)
    assert (found.running_mean.max_abs, found.running_mean.max_rel) == (2.0, 1.0)
    assert found.running_var.max_abs == 0


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
    digits = load_digits()
    assert (len(digits.train_y), len(digits.test_y)) == (1347, 450)
    assert digits.train_x.shape[1:] == (1, 8, 8)
    assert (digits.train_x.min(), digits.train_x.max()) == (-1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"arms": ["ddp+sync"]},
            r"no arm is called 'ddp\+sync': did you mean ddp\+syncbn\? the arms are single, dp,",
        ),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_per_rank": 0}, "batch_per_rank must be at least 1, got 0"),
        ({"batch_per_rank": 674}, "a global batch of 1348, more than the 1347 training images"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"steps": 5, "parity_steps": 6}, r"parity_steps must be between 1 and steps \(5\), got 6"),
        ({"ranks": -3}, "compare needs at least 2 ranks, got -3: ask for --ranks 2"),
    ],
)
def test_unusable_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        run(**arguments)
