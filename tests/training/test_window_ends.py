"""Where windows of micro-batches end: in training loops of torch, Accelerate and Lightning."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shims.torchvision_operators import make_torchvision_importable
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import syncnorm
from syncnorm.testing import run_ranks
from syncnorm.training import end_window, joinable


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))


def counts(model: nn.Module) -> list[int]:
    """Values per channel in the window of each layer."""
    return [int(m._sync_window.count) for m in model.modules() if hasattr(m, "_sync_window")]


def step(model: nn.Module, rows: int = 4) -> Tensor:
    """A forward and a backward; returns the input."""
    x = torch.randn(rows, 3)
    model(x).square().sum().backward()
    return x


def assert_tracked(layer: nn.Module, windows: list[list[Tensor]]) -> None:
    """The running statistics of a first layer are those of ``F.batch_norm`` of each concatenated window."""
    plain = nn.BatchNorm1d(3)
    for window in windows:
        plain(torch.cat(window))
    for got, want in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, want)


def test_an_optimizer_step_ends_the_window_of_every_layer():
    model = syncnorm.convert(net(), accumulate=4)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    windows = []
    for micro_batches in (2, 4, 1):
        windows.append([step(model) for _ in range(micro_batches)])
        assert counts(model) == [4 * micro_batches] * 2
        optimizer.step()
        assert counts(model) == [0, 0]
    assert_tracked(model[0], windows)


def test_a_last_incomplete_window_is_in_the_running_statistics():
    model = syncnorm.convert(net(), accumulate=4)
    windows = [[step(model) for _ in range(4)], [step(model)]]
    assert_tracked(model[0], windows)


def test_without_a_known_optimizer_a_window_ends_after_all_micro_batches_or_explicitly():
    model = syncnorm.convert(net(), accumulate=2)
    windows = [[step(model), step(model)], [step(model)]]
    end_window(model)
    windows.append([step(model)])
    assert counts(model) == [4, 4]
    assert_tracked(model[0], windows)


def test_another_optimizer_leaves_the_window_alone():
    """Two models that were converted as one, as in a module of Lightning for a GAN; and a third one."""
    gan, other = syncnorm.convert(nn.ModuleList([net(), net()]), accumulate=8), net()
    generator, discriminator, stranger = (torch.optim.SGD(m.parameters(), 0.1) for m in (*gan, other))
    for model in gan:
        step(model)
        step(model)
    stranger.step()
    assert counts(gan) == [8, 8, 8, 8]
    discriminator.step()
    assert counts(gan) == [8, 0, 0, 0]  # a layer without parameters belongs to what has been converted
    generator.step()
    assert counts(gan) == [0, 0, 0, 0]


def test_models_that_were_converted_apart_end_their_windows_apart():
    models = [syncnorm.convert(net(), accumulate=8) for _ in range(2)]
    for model in models:
        step(model)
    torch.optim.SGD(models[1].parameters(), 0.1).step()
    assert [counts(model) for model in models] == [[4, 4], [0, 0]]


def test_a_frozen_model_inside_a_trained_one():
    model = syncnorm.convert(net(), accumulate=8)
    model[:3].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), 0.1)
    step(model)
    step(model)
    assert counts(model) == [8, 8]
    optimizer.step()
    assert counts(model) == [0, 0]


def test_a_gradient_scaler_that_skips_a_step():
    model = syncnorm.convert(net(), accumulate=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    windows = []
    for skipped in (False, True, False):
        windows.append([torch.randn(4, 3) for _ in range(2)])
        for x in windows[-1]:
            scaler.scale(model(x).square().sum()).backward()
        if skipped:
            model[1].weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert counts(model) == ([8, 8] if skipped else [0, 0])
        optimizer.zero_grad()
    assert_tracked(model[0], windows)


def test_an_ema_copy_in_training_mode_has_windows_of_its_own():
    model = syncnorm.convert(net(), accumulate=2)
    teacher = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for _ in range(3):
        step(model)
        with torch.no_grad():
            teacher(torch.randn(5, 3))
        seen.append((counts(model), counts(teacher)))
        optimizer.step()
    assert seen == [([4, 4], [5, 5]), ([4, 4], [10, 10]), ([4, 4], [5, 5])]


def test_torch_swa_utils():
    model = syncnorm.convert(net(), accumulate=3)
    average = torch.optim.swa_utils.AveragedModel(model)
    step(model)
    average.update_parameters(model)
    batches = [torch.randn(4, 3) for _ in range(6)]
    torch.optim.swa_utils.update_bn(batches, average)
    first = average.module[0]
    torch.testing.assert_close(first.running_mean, torch.cat(batches).mean(0))
    assert first.num_batches_tracked == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # of torch's own modules
def test_a_compiled_optimizer_step_ends_the_window():
    model = syncnorm.convert(net(), accumulate=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model)
    torch.compile(optimizer.step, backend="eager")()
    assert counts(model) == [0, 0]


def _rank_ddp() -> tuple[list[list[int]], list[Tensor], Tensor]:
    ddp = DistributedDataParallel(syncnorm.convert(net(), accumulate=3))
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    torch.manual_seed(dist.get_rank())
    seen, inputs = [], []
    for number in range(5):
        last = number in (2, 4)
        if last:
            inputs.append(step(ddp))
        else:
            with ddp.no_sync():
                inputs.append(step(ddp))
        seen.append(counts(ddp))
        if last:
            optimizer.step()
            optimizer.zero_grad()
    assert_tracked_by = ddp.module[0].running_var
    return seen, inputs, assert_tracked_by


def test_ddp_with_no_sync():
    ranks = run_ranks(_rank_ddp, 2)
    plain = nn.BatchNorm1d(3)
    for window in (range(3), range(3, 5)):
        plain(torch.cat([inputs[number] for number in window for _, inputs, _ in ranks]))
    for seen, _, running_var in ranks:
        assert seen == [[8, 8], [16, 16], [24, 24], [8, 8], [16, 16]]
        torch.testing.assert_close(running_var, plain.running_var)


def _rank_join() -> tuple[list[int], list[int], Tensor]:
    ddp = DistributedDataParallel(syncnorm.convert(net(), accumulate=2))
    optimizer = torch.optim.SGD(ddp.parameters(), 0.01)
    seen = []
    for _ in range(2):  # epochs
        with Join([ddp, joinable(ddp)]):
            for number in range(3 + dist.get_rank()):
                step(ddp)
                seen.append(counts(ddp)[0])
                if number % 2:
                    optimizer.step()
    return seen, counts(ddp), ddp.module[0].running_var


def test_ranks_that_run_out_of_data_in_a_window():
    (seen_0, after_0, var_0), (seen_1, after_1, var_1) = run_ranks(_rank_join, 2)
    assert seen_0 == [8, 16, 8] * 2
    assert seen_1 == [8, 16, 8, 12] * 2
    assert after_0 == after_1 == [0, 0]
    assert torch.equal(var_0, var_1)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = syncnorm.convert(net(), accumulate=2)
    data = torch.utils.data.DataLoader(torch.randn(20, 3), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), data)
    seen, windows = [], [[]]
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().sum())
            windows[-1].append(x)
            before = counts(model)[0]
            optimizer.step()
            optimizer.zero_grad()
            seen.append((before, counts(model)[0]))
        if counts(model)[0] == 0:
            windows.append([])
    assert seen == [(4, 4), (8, 0), (4, 4), (8, 0), (4, 0)]
    assert_tracked(model[0], windows[:-1])


@pytest.mark.slow
@pytest.mark.timeout(300)  # the import takes long
@pytest.mark.filterwarnings("ignore")  # Lightning's
def test_lightning(tmp_path):
    make_torchvision_importable()
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]  # imported if it is installed
        def __init__(self) -> None:
            super().__init__()
            self.net = syncnorm.convert(net(), accumulate=2)
            self.seen: list[int] = []

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            loss: Tensor = F.mse_loss(self.net(batch[0]), torch.zeros(4, 2))
            self.seen.append(counts(self.net)[0])
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.randn(20, 3)
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=2, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4))
    assert module.seen == [4, 8, 4, 8, 4]
    batches = list(data.split(4))
    assert_tracked(module.net[0], [batches[:2], batches[2:4], batches[4:]])
