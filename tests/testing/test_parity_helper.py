from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncnorm
from syncnorm.errors import InputError
from syncnorm.testing import TOLERANCES, RankError, assert_close, assert_matches_single_process, batch_norm_oracle

torch.manual_seed(0)
IMAGES = torch.randn(6, 3, 5, 5) * 3 + 2
PARTS = [IMAGES[:, :, :2], IMAGES[:4, :, 2:], IMAGES[:0]]


def test_oracle_is_batch_norm_of_the_whole_batch():
    x = IMAGES.double().requires_grad_()
    weight, bias = torch.rand(3).double().requires_grad_(), torch.rand(3).double().requires_grad_()
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    dy = torch.randn(x.shape).double()
    F.batch_norm(x, mean, var, weight, bias, True, 0.3, 1e-3).backward(dy)
    before = torch.zeros(3), torch.ones(3)
    got = batch_norm_oracle(
        IMAGES.split([1, 0, 5]), dy.split([1, 0, 5]), weight, bias, *before, momentum=0.3, eps=1e-3
    )
    assert [tuple(y.shape) for y in got.outputs] == [(1, 3, 5, 5), (0, 3, 5, 5), (5, 3, 5, 5)]
    assert_close(torch.cat(got.grad_inputs), x.grad, torch.float64)
    assert_close(sum(got.grad_weight), weight.grad, torch.float64)
    assert_close(sum(got.grad_bias), bias.grad, torch.float64)
    assert_close(got.running_mean, mean, torch.float64)
    assert_close(got.running_var, var, torch.float64)
    assert before[0].eq(0).all()
    assert got.grad_weight[0].abs().max() > 0.1
    assert got.grad_weight[1].eq(0).all()


def test_oracle_with_ranks_of_different_shapes():
    got = batch_norm_oracle(PARTS, None, None, None, torch.zeros(3), torch.ones(3), momentum=1.0)
    values = torch.cat([part.double().transpose(0, 1).flatten(1) for part in PARTS], dim=1)
    assert_close(got.running_mean, values.mean(1), torch.float64)
    assert_close(got.running_var, values.var(1), torch.float64)
    assert [y.shape for y in got.outputs] == [part.shape for part in PARTS]
    assert got.grad_inputs == []


def test_oracle_without_rows_changes_nothing():
    empty = [IMAGES[:0]] * 2
    got = batch_norm_oracle(empty, empty, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3))
    assert got.running_mean.tolist() == [0.0] * 3
    assert got.running_var.tolist() == [1.0] * 3
    assert got.grad_weight[0].tolist() == [0.0] * 3


def test_oracle_wants_matching_gradients():
    with pytest.raises(InputError, match="one gradient per rank"):
        batch_norm_oracle([IMAGES], [IMAGES[:2]])
    with pytest.raises(InputError, match="input per rank"):
        batch_norm_oracle([])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_tolerance_accepts_one_rounding_and_no_wrong_formula(dtype):
    value = torch.tensor([1.0, -3.0, 100.0], dtype=torch.float64) / 3
    assert_close(value.to(dtype), value, dtype)
    with pytest.raises(AssertionError):
        assert_close(value.to(dtype) * 1.05, value, dtype)
    with pytest.raises(AssertionError):
        assert_close(value[:2], value, dtype)


def small_net(affine=True):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=affine),
        nn.ReLU(),
        nn.Conv2d(4, 5, 1),
        nn.BatchNorm2d(5, momentum=None),
        nn.Flatten(),
        nn.Linear(45, 2),
    )


def synced_net():
    return nn.Sequential(nn.Linear(5, 4), syncnorm.SyncBatchNorm(4))


def half_net():
    return small_net().bfloat16()


@pytest.mark.parametrize(
    ("build", "inputs", "options"),
    [
        (small_net, IMAGES, {"steps": 3}),
        (small_net, [IMAGES, IMAGES[:4]], {"steps": 2, "world_size": 3}),
        (small_net, IMAGES, {"splits": [5, 1]}),
        (small_net, IMAGES, {"splits": [0, 6]}),
        (partial(small_net, affine=False), IMAGES, {}),
        (synced_net, torch.randn(6, 5), {}),
        (partial(nn.BatchNorm1d, 5, affine=False), torch.randn(6, 5), {}),  # no parameters, no DDP
        (partial(nn.BatchNorm1d, 5, track_running_stats=False), torch.randn(6, 5), {"world_size": 1}),
    ],
)
def test_synced_models_match(build, inputs, options):
    assert_matches_single_process(build, inputs, **options)


def test_half_precision_has_its_own_tolerance():
    assert_matches_single_process(half_net, IMAGES.bfloat16(), rtol=0.1, atol=0.1)
    with pytest.raises(AssertionError):
        assert_matches_single_process(half_net, IMAGES.bfloat16(), rtol=1e-5, atol=1e-5)


class Broken(nn.Module):
    def __init__(self, broken):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.broken = broken

    def forward(self, x):
        return getattr(self, f"forward_{self.broken}")(x)

    def forward_second(self, x):
        with Plain(self.second):
            return self.second(self.first(x))

    def forward_backward(self, x):
        return WrongBackward.apply(self.second(self.first(x)))

    def forward_buffer(self, x):
        y = self.first(x)
        if x.dtype == torch.float32 and torch.distributed.get_rank() == 1:
            self.first.running_var.mul_(1.01)
        return self.second(y)

    def forward_row(self, x):
        return self.first(x).sum()

    def forward_raise(self, x):
        if x.dtype == torch.float32:
            raise ValueError("only on ranks")
        return x


class Plain:
    """Reverts a layer while the block runs."""

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        syncnorm.revert(self.layer)

    def __exit__(self, *_):
        syncnorm.convert(self.layer)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy if dy.dtype == torch.float64 else dy * 1.01


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("second", r"step 0, rank 0: running_\w+ of layer 'second' differs, max abs error"),
        ("backward", r"step 0, rank 0: input gradient differs"),
        ("buffer", r"step 0, rank 1: running_var of layer 'first' differs"),
    ],
)
def test_the_first_difference_is_named(broken, says):
    with pytest.raises(AssertionError, match=says):
        assert_matches_single_process(partial(Broken, broken), torch.randn(6, 5) * 2 + 1)


class WithUnused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.left = nn.BatchNorm2d(3), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def with_unused():
    return WithUnused()


def test_unused_parameters_as_in_ddp():
    assert_matches_single_process(with_unused, IMAGES[:, :3], steps=2, find_unused_parameters=True)


def test_errors_of_the_model_are_reported():
    with pytest.raises(InputError, match=r"a row for each of the 6 rows .* got shape \(\)"):
        assert_matches_single_process(partial(Broken, "row"), torch.randn(6, 5))
    with pytest.raises(RankError, match="only on ranks"):
        assert_matches_single_process(partial(Broken, "raise"), torch.randn(6, 5))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"splits": [3, 4]}, "add up to the batch of 6, got"),
        ({"splits": [6]}, "2 row counts"),
        ({"steps": 0}, "steps must be 1 or more"),
        ({"steps": 2, "inputs": [IMAGES]}, "got 1 batches for steps=2"),
        ({"build_model": list}, "return an nn.Module, got list"),
        ({"build_model": lambda: small_net()}, "lambda"),
        ({"world_size": 0}, "world_size must be 1 or more, got 0"),
        ({"splits": [3.0, 3.0]}, r"2 row counts .* got \[3.0, 3.0\]"),
        ({"inputs": torch.tensor(1.0)}, r"tensors of one row or more, got shape \(\)"),
        ({"inputs": IMAGES[:0]}, "tensors of one row or more"),
        ({"inputs": "abc"}, "tensors of one row or more, got str"),
        ({"build_model": partial(nn.LazyBatchNorm2d)}, "lazy layers"),
        ({"build_model": with_unused}, "left.bias, left.weight got no gradient: pass find_unused_parameters=True"),
    ],
)
def test_invalid_arguments_raise(arguments, says):
    with pytest.raises(InputError, match=says):
        assert_matches_single_process(**{"build_model": small_net, "inputs": IMAGES, **arguments})
