"""Features that training scripts use, on two uneven ranks, compared with one fp64 process on the whole batch."""

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from versions import sharded_on_cpus

import syncnorm
from syncnorm.comm.call import observing
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

ROWS = (5, 2)

Batch = tuple[Tensor, Tensor]  # input, gradient of the output
State = dict[str, Tensor]  # state and gradients after training, by name


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Batch:
    """The whole batch and the gradient of its output, divided by the number of rows as for a mean loss."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(ROWS), 3, 6, 6, generator=generator)
    dy = torch.randn(sum(ROWS), 4, generator=generator) / sum(ROWS)
    return x.to(dtype), dy.to(dtype)


def mine(seed: int) -> Batch:
    """This rank's rows, scaled so that DDP's and FSDP's average over ranks is the gradient of the whole batch."""
    x, dy = (t.split(ROWS)[dist.get_rank()] for t in batch(seed, torch.float32))
    return x, dy * len(ROWS)


def train(model: nn.Module, batches: Sequence[Batch]) -> State:
    """One SGD step per batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for x, dy in batches:
        optimizer.zero_grad()
        model(x).backward(dy)
        optimizer.step()
    return state_of(model)


def state_of(model: nn.Module) -> State:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    everything = {**model.state_dict(), **gradients}
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in everything.items()}
    return {name: t.detach().clone() for name, t in whole.items()}


def check(ranks: Sequence[State], want: State, dtype: torch.dtype = torch.float32) -> None:
    for got in ranks:
        assert got.keys() == want.keys()
        for name, value in got.items():
            assert_close(value, want[name], dtype if value.is_floating_point() else torch.float64)
            if "running" in name or "tracked" in name:
                assert torch.equal(value, ranks[0][name]), name


def synced_net() -> DistributedDataParallel:
    return DistributedDataParallel(syncnorm.convert(models.net()))


PARAMETERS = ("0.weight", "1.weight", "1.bias")


def _rank_scaled_steps(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Three steps with a GradScaler; in the second, the gradient overflows on one rank."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), syncnorm.SyncBatchNorm2d(4)
    model = DistributedDataParallel(nn.Sequential(conv, norm))
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    seen: dict[str, Tensor] = {}
    conv.register_forward_hook(lambda module, args, y: seen.update(h=y))
    steps = []
    for step in range(3):
        x, dy = (t.split(ROWS)[dist.get_rank()] for t in half_batch(step))
        if step == 1 and dist.get_rank() == 1:
            dy = dy * 1e37
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        seen["h"].retain_grad()
        scale = scaler.get_scale()
        scaler.scale((y * dy).sum() * len(ROWS)).backward()
        scaler.step(optimizer)
        scaler.update()
        dh = seen["h"].grad.double() / (len(ROWS) * scale)
        steps.append({"h": seen["h"].detach(), "y": y.detach(), "dh": dh, "scale": scale, **state_of(model)})
    return steps


def half_batch(seed: int) -> Batch:
    """A gradient with few significant bits, so that neither scaling nor half precision rounds it."""
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randint(-8, 9, (sum(ROWS), 4, 4, 4), generator=generator) / 16
    return batch(seed, torch.float32)[0], dy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_a_grad_scaler_that_skips_a_step(dtype):
    ranks = run_ranks(_rank_scaled_steps, args=(dtype,))
    mean, var, weight, bias = torch.zeros(4), torch.ones(4), torch.ones(4), torch.zeros(4)
    for step, (first, second) in enumerate(zip(*ranks, strict=True)):
        dy = half_batch(step)[1].split(ROWS)
        want = batch_norm_oracle([first["h"], second["h"]], dy, weight, bias, mean, var)
        mean, var = want.running_mean, want.running_var
        skipped = step == 1
        for rank, got in enumerate((first, second)):
            assert got["h"].dtype == got["y"].dtype == dtype
            assert_close(got["y"], want.outputs[rank], dtype)
            assert_close(got["1.running_mean"], mean, torch.float32)  # the forward completed
            assert_close(got["1.running_var"], var, torch.float32)
            assert got["1.num_batches_tracked"] == step + 1
            assert all(torch.equal(got[name], first[name]) for name in first if name[:2] in ("0.", "1."))
            assert got["scale"] == (256, 256, 128)[step]
            if skipped:
                assert all(torch.equal(got[name], ranks[rank][0][name]) for name in PARAMETERS)
                continue
            assert not any(torch.equal(got[name], ranks[rank][step - 1][name]) for name in PARAMETERS) or step == 0
            assert_close(got["dh"], want.grad_inputs[rank], dtype)
            assert_close(got["gradient of 1.weight"], sum(want.grad_weight), torch.float32)
            assert_close(got["gradient of 1.bias"], sum(want.grad_bias), torch.float32)
        weight, bias = first["1.weight"], first["1.bias"]


def _rank_two_views(seeds: tuple[int, int]) -> State:
    model = synced_net()
    return both_backward(model, [mine(seed) for seed in seeds])


def both_backward(model: nn.Module, batches: Sequence[Batch]) -> State:
    outputs = [model(x) for x, _ in batches]
    torch.autograd.backward(outputs, [dy for _, dy in batches])
    return state_of(model)


def test_two_forwards_of_a_ddp_model_before_one_backward():
    want = both_backward(models.net().double(), [batch(1), batch(2)])
    check(run_ranks(_rank_two_views, args=((1, 2),)), want)
    assert want["norm1.num_batches_tracked"] == 2


def frozen_net(frozen: tuple[str, ...]) -> nn.Module:
    model = models.net()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    return model


def _rank_train_frozen(frozen: tuple[str, ...]) -> State:
    return train(DistributedDataParallel(syncnorm.convert(frozen_net(frozen))), [mine(0), mine(1)])


@pytest.mark.parametrize("frozen", [("conv1",), ("norm1",), ("conv1", "norm1"), ("conv2", "norm2")], ids=str)
def test_fine_tuning_with_frozen_layers(frozen):
    want = train(frozen_net(frozen).double(), [batch(0), batch(1)])
    check(run_ranks(_rank_train_frozen, args=(frozen,)), want)
    assert not any(name.startswith(f"gradient of {frozen[0]}") for name in want)
    assert want["norm1.num_batches_tracked"] == 2


def net_with_eval_norm(name: str) -> nn.Module:
    model = models.net()
    for norm in (model.norm1, model.norm2):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    model.get_submodule(name).eval()
    return model


def _rank_train_with_eval_norm(name: str) -> tuple[State, list[str]]:
    model = DistributedDataParallel(syncnorm.convert(net_with_eval_norm(name)))
    layers: list[str] = []
    with observing(lambda call, seconds: layers.append(call.layer)):
        result = train(model, [mine(0), mine(1)])
    return result, layers


@pytest.mark.parametrize(("frozen", "trained"), [("norm1", "norm2"), ("norm2", "norm1")])
def test_some_layers_in_eval_inside_a_training_model(frozen, trained):
    results = run_ranks(_rank_train_with_eval_norm, args=(frozen,))
    model = net_with_eval_norm(frozen).double()
    before = copy.deepcopy(model.state_dict())
    check([got for got, _ in results], train(model, [batch(0), batch(1)]))
    for got, communicated in results:
        assert communicated == [trained] * 4  # two forwards, two backwards
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(got[f"{frozen}.{name}"].double(), before[f"{frozen}.{name}"].double())


def _rank_accumulated(seeds: tuple[int, ...]) -> State:
    model = synced_net()
    for seed in seeds:
        x, dy = mine(seed)
        with nullcontext() if seed == seeds[-1] else model.no_sync():
            model(x).backward(dy)
    return state_of(model)


def test_gradient_accumulation_with_no_sync():
    seeds = (1, 2)
    model = models.net().double()
    for x, dy in map(batch, seeds):
        model(x).backward(dy)
    want = state_of(model)
    check(run_ranks(_rank_accumulated, args=(seeds,)), want)
    assert want["norm2.num_batches_tracked"] == 2


def average(model: nn.Module, wrap: Callable[[nn.Module], nn.Module], batches: Sequence[Batch]) -> list[State]:
    """Two steps with a moving average; then a copy of the model and the average itself train separately."""
    wrapped = wrap(model)
    ema = AveragedModel(model, avg_fn=lambda old, new, _: 0.75 * old + 0.25 * new)
    for one in batches[:2]:
        train(wrapped, [one])
        ema.update_parameters(model)
    averaged, twin = state_of(ema.module), copy.deepcopy(model)
    return [averaged, train(wrap(twin), batches[2:]), train(wrap(ema.module), batches[2:]), state_of(model)]


def _rank_copies_in_a_group() -> tuple[list[State], list[bool]]:
    group = dist.new_group([0, 1])
    model = syncnorm.convert(models.net(), process_group=group)
    copies = (AveragedModel(model).module, copy.deepcopy(model))
    shared = [norm.process_group is group for twin in copies for norm in (twin.norm1, twin.norm2)]
    return average(model, partial(DistributedDataParallel, process_group=group), [mine(s) for s in range(4)]), shared


def test_a_moving_average_and_a_copy_of_a_model_with_a_group():
    model = models.net().double()
    want = average(model, lambda m: m, [batch(seed) for seed in range(4)])
    results = run_ranks(_rank_copies_in_a_group)
    assert all(all(shared) for _, shared in results)
    for turn, expected in enumerate(want):
        check([result[turn] for result, _ in results], expected)


def _rank_through_a_file() -> tuple[State, str]:
    """One step, saving and loading, another step."""
    model = syncnorm.convert(models.net(), process_group=dist.new_group([0, 1]))
    train(DistributedDataParallel(model), [mine(0)])
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(syncnorm.SyncNormError) as caught:
        loaded(mine(1)[0])
    syncnorm.convert(loaded, process_group=dist.group.WORLD)
    return train(DistributedDataParallel(loaded), [mine(1)]), str(caught.value)


def test_a_model_from_a_file_trains_on_once_its_group_is_bound_again():
    results = run_ranks(_rank_through_a_file)
    check([got for got, _ in results], train(models.net().double(), [batch(0), batch(1)]))
    assert all("Bind it again before training: syncnorm.convert(model, process_group=" in says for _, says in results)


def _rank_swap_state_dicts(other: type[nn.Module]) -> tuple[State, State]:
    """From torch's layers to ours, training, then through a file and back."""
    theirs, ours = models.Net(other), models.Net(syncnorm.SyncBatchNorm2d)
    theirs.load_state_dict(models.net().state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    trained = train(DistributedDataParallel(ours), [mine(0), mine(1)])
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return trained, state_of(theirs)


@pytest.mark.parametrize("other", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_state_dicts_of_a_model_come_from_and_go_to_torchs_layers(other):
    results = run_ranks(_rank_swap_state_dicts, args=(other,))
    check([trained for trained, _ in results], train(models.net().double(), [batch(0), batch(1)]))
    for trained, back in results:
        assert all(torch.equal(back[name], trained[name]) for name in back)
        assert back["norm1.num_batches_tracked"] == 2


def _rank_sharded(order: str) -> State:
    mesh = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    model = models.net()
    if order == "convert, then shard":
        syncnorm.convert(model, process_group=mesh)
    fully_shard(model.norm2, mesh=mesh)  # a separate unit; norm1 is in the root unit
    fully_shard(model, mesh=mesh)
    if order == "shard, then convert":
        syncnorm.convert(model, process_group=mesh)
    return train(model, [mine(0), mine(1)])


@sharded_on_cpus
@pytest.mark.parametrize("order", ["convert, then shard", "shard, then convert"])
def test_fully_shard_over_the_mesh_that_syncs(order):
    want = train(models.net().double(), [batch(0), batch(1)])
    check(run_ranks(_rank_sharded, args=(order,)), want)
    assert "gradient of norm2.weight" in want


def transforms(model: nn.Module, dtype: torch.dtype) -> list[Tensor]:
    x, dy = (t.to(dtype)[:3] for t in batch(5))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(model, {**state, **weights}, (x.unsqueeze(0),)) * dy[0]).sum()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    doubled = functional_call(model, {name: 2 * w for name, w in weights.items()}, (x,))
    ensemble = [copy.deepcopy(model), copy.deepcopy(model)]
    ensemble[1].norm1.running_mean.add_(0.5)
    stacked = vmap(lambda p, b: functional_call(model, (p, b), (x,)))(*stack_module_state(ensemble))
    return [doubled, stacked, jacrev(model)(x[:1]), *per_sample.values()]


def _rank_transforms() -> list[Tensor]:
    model = syncnorm.convert(models.net())
    train(DistributedDataParallel(model), [mine(0)])  # running statistics of a batch
    if dist.get_rank() == 0:
        return []  # any communication would hang without this rank
    return [t.detach() for t in transforms(model.eval(), torch.float32)]


def test_torch_func_over_a_model_in_evaluation():
    model = models.net().double()
    train(model, [batch(0)])
    want = transforms(model.eval(), torch.float64)
    _, results = run_ranks(_rank_transforms, timeout=30)
    assert len(results) == len(want) == 3 + len(list(model.parameters()))
    for got, expected in zip(results, want, strict=True):
        assert_close(got, expected, torch.float32)
