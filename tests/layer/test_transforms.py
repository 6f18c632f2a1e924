"""``torch.func`` in training, compared with one process: grad, vjp, jacrev, second derivatives, vmap."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import syncnorm
from syncnorm.testing import assert_close, run_ranks

ROWS = (3, 2, 0)


def net(track: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=track), nn.Tanh(), nn.Linear(6, 2)
    ).double()
    nn.init.uniform_(model[1].weight, 0.5, 1.5)
    return model


def batch(seed: int = 0, *batches: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batches, sum(ROWS), 4, generator=generator, dtype=torch.float64)
    return x, torch.randn(*batches, sum(ROWS), 2, generator=generator, dtype=torch.float64)


def mine(whole: Tensor, dim: int = 0) -> Tensor:
    return whole.split(ROWS, dim)[dist.get_rank()] if dist.is_initialized() else whole


def summed(value: Tensor) -> Tensor:
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gradients(model: nn.Module, how: str) -> dict[str, Tensor]:
    """The gradients of the parameters, summed over ranks, and of this rank's input."""
    x, c = (mine(whole) for whole in batch())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(model, (parameters, buffers), (x,)).sin() * c).sum()

    if how == "vjp":
        _, pull = vjp(lambda parameters, x: loss(parameters, buffers, x), parameters, x)
        of_parameters, of_x = pull(torch.tensor(1.0, dtype=torch.float64))
    elif how == "jacrev":
        of_parameters, of_x = jacrev(loss)(parameters, buffers, x), jacrev(loss, 2)(parameters, buffers, x)
    elif how == "grad":
        of_parameters, of_x = grad(loss, (0, 2))(parameters, buffers, x)
    else:  # of a penalty, through the derivative at the input

        def penalty(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return (grad(loss, 2)(parameters, buffers, x).square() * c.sum(1, keepdim=True)).sum()

        of_parameters, of_x = grad(penalty, (0, 1))(parameters, x)
    return {name: summed(value) for name, value in of_parameters.items()} | {"x": of_x}


def _rank_gradients(how: str, track: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = syncnorm.convert(net(track))
    return gradients(model, how), dict(model.named_buffers())


@pytest.mark.parametrize("how", ["grad", "vjp", "jacrev", "second"])
@pytest.mark.parametrize("track", [False, True])
def test_derivatives(how, track):
    model = net(track)
    want = gradients(net(), how)  # torch's layer would not update captured running statistics
    ranks = run_ranks(_rank_gradients, len(ROWS), args=(how, track), timeout=30)
    for rank, (got, buffers) in enumerate(ranks):
        for name, value in want.items():
            expected = value.split(ROWS)[rank] if name == "x" else value
            assert_close(got[name], expected, torch.float64)
        if track:
            forwards = {"vjp": 1, "grad": 1, "jacrev": 2, "second": 1}[how]
            assert buffers["1.num_batches_tracked"] == forwards
            hidden = model[0](batch()[0])
            expected = hidden.mean(0) * (1 - 0.9**forwards)
            assert_close(buffers["1.running_mean"], expected.detach(), torch.float64)


def _rank_over_batches(with_grad: bool) -> Tensor:
    model = syncnorm.convert(net()) if dist.is_initialized() else net()
    x, c = (mine(whole, 1) for whole in batch(1, 3))

    def loss(x: Tensor, c: Tensor) -> Tensor:
        return (model(x) * c).sum()

    return vmap(grad(loss))(x, c) if with_grad else vmap(model)(x)


def _rank_gradient_of_batches() -> dict[str, Tensor]:
    model = syncnorm.convert(net()) if dist.is_initialized() else net()
    x, c = (mine(whole, 1) for whole in batch(1, 3))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (vmap(lambda x: functional_call(model, parameters, (x,)))(x) * c).sum()

    return {name: summed(value) for name, value in grad(loss)(dict(model.named_parameters())).items()}


@pytest.mark.parametrize("with_grad", [False, True])
def test_vmap_equals_separate_batches(with_grad):
    want = _rank_over_batches(with_grad)
    for rank, got in enumerate(run_ranks(_rank_over_batches, len(ROWS), args=(with_grad,), timeout=30)):
        assert_close(got.detach(), want.split(ROWS, 1)[rank].detach(), torch.float64)


def test_the_gradient_of_a_vmap():
    want = _rank_gradient_of_batches()
    for got in run_ranks(_rank_gradient_of_batches, len(ROWS), timeout=30):
        for name, value in want.items():
            assert_close(got[name], value, torch.float64)


def _rank_ensemble() -> list[Any]:
    """Three models with separate parameters and running statistics, evaluated as one."""
    models = [net(track=True) for _ in range(3)]
    for i, model in enumerate(models):
        nn.init.uniform_(model[1].weight, 1 + i, 2 + i)
    if dist.is_initialized():
        models = [syncnorm.convert(model) for model in models]
    parameters, buffers = stack_module_state(models)
    x = mine(batch(2)[0])
    y = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(parameters, buffers)
    return [y.detach(), buffers["1.running_var"], buffers["1.num_batches_tracked"]]


def test_an_ensemble():
    y, running_var, counts = _rank_ensemble()
    for rank, got in enumerate(run_ranks(_rank_ensemble, len(ROWS), timeout=30)):
        assert_close(got[0], y.split(ROWS, 1)[rank], torch.float64)
        assert_close(got[1], running_var, torch.float64)
        assert torch.equal(got[2], counts)


class Slim(nn.BatchNorm1d):
    """Uses only part of its channels, as slimmable networks do."""

    def forward(self, x: Tensor) -> Tensor:
        parts = [t[: x.size(1)] for t in (self.running_mean, self.running_var, self.weight, self.bias)]
        return F.batch_norm(x, *parts, training=self.training)


def _rank_slim_gradient() -> list[Tensor]:
    layer = Slim(6).double()
    nn.init.uniform_(layer.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
    if dist.is_initialized():
        layer = syncnorm.convert(layer)
    x, _ = batch(3)
    c = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, c = mine(x), mine(c)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    dx = grad(lambda x, buffers: (functional_call(layer, buffers, (x,)) * c).sum())(x, buffers)
    return [dx, buffers["running_mean"]]


def test_parts_of_buffers():
    dx, running_mean = _rank_slim_gradient()
    for rank, got in enumerate(run_ranks(_rank_slim_gradient, len(ROWS), timeout=30)):
        assert_close(got[0], dx.split(ROWS)[rank], torch.float64)
        assert_close(got[1], running_mean, torch.float64)


def _rank_refused(how: str) -> tuple[str, bool]:
    model = syncnorm.convert(net(track=how == "shared statistics"))
    x = mine(batch()[0])
    before = {name: value.clone() for name, value in model.named_buffers()}
    try:
        if how == "shared statistics":
            vmap(model)(torch.stack([x, x]))
        elif how == "jvp":
            jvp(model, (x,), (x,))
        elif how == "hessian":  # forward over reverse
            hessian(lambda x: model(x).square().sum())(x)
        else:  # a third derivative
            first = grad(lambda x: model(x).sin().sum())
            second = grad(lambda x: first(x).sin().sum())
            grad(lambda x: second(x).sin().sum())(x)
    except syncnorm.SyncNormError as error:
        same = all(torch.equal(value, before[name]) for name, value in model.named_buffers())
        return str(error), same
    return "", False


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("shared statistics", "vmap over 1 would update the same running statistics once for each of 2 batches"),
        ("jvp", "1 has no forward-mode derivative in training"),
        ("hessian", "1 has no forward-mode derivative in training"),
        ("third", "1 has no third derivative"),
    ],
)
def test_unsupported_transforms_raise_and_leave_the_layer_unchanged(how, message):
    for error, same in run_ranks(_rank_refused, len(ROWS), args=(how,), timeout=30):
        assert message in error
        assert same


def test_one_process_equals_torchs_layer():
    model, plain = syncnorm.convert(net()), net()
    x, c = batch()
    got = grad(lambda x: (model(x) * c).sum())(x)
    assert torch.equal(got, grad(lambda x: (plain(x) * c).sum())(x))
