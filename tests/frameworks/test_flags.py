"""The flags by which frameworks synchronize batch norms give syncnorm's layers inside ``syncnorm.replacing_torch``.

Each runs in the real framework on two ranks and must equal the whole batch in one process.
"""

import copy
import importlib
import warnings
from importlib.util import find_spec
from unittest import mock

import models
import pytest
import torch
import torch.nn.functional as F
from shims.torchvision_operators import make_torchvision_importable
from torch import Tensor, nn

import syncnorm
from syncnorm.testing import assert_matches_single_process, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),  # importing these frameworks takes long
    pytest.mark.filterwarnings("ignore"),  # theirs
]
LR = 0.1


def needs(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"no {name}")


def framework(name: str):
    """The module ``name`` of a framework."""
    make_torchvision_importable()
    warnings.simplefilter("ignore")
    return importlib.import_module(name)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randn(8, 4, generator=generator)


def mine(whole: Tensor, rank: int) -> Tensor:
    return whole[rank * 4 : rank * 4 + 4]


def trained_in_one_process(steps: int = 2) -> dict[str, Tensor]:
    """The state of the model after steps of SGD on the whole batch, in fp64."""
    model, (x, target) = models.net().double(), data()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x.double()), target.double()).backward()
        optimizer.step()
    return model.state_dict()


def check(states: list[dict[str, Tensor]]) -> None:
    for state in states:
        for name, want in trained_in_one_process().items():
            torch.testing.assert_close(state[name].to(want), want, rtol=1e-4, atol=1e-5, msg=name)


def by_ignite() -> nn.Module:
    idist = framework("ignite.distributed")
    with syncnorm.replacing_torch():
        model = idist.auto_model(models.net(), sync_bn=True)
    return getattr(model, "module", model)  # it has wrapped the model in DDP on the ranks


def by_mmengine() -> nn.Module:
    framework("mmengine")
    with syncnorm.replacing_torch():
        return framework("mmengine.model").convert_sync_batchnorm(models.net_with_activations(), "torch")


def by_timm() -> nn.Module:
    model = framework("timm").create_model("test_efficientnet", num_classes=2).double()
    with syncnorm.replacing_torch():
        return framework("timm.layers").convert_sync_batchnorm(model)


@pytest.mark.parametrize(
    ("build", "package", "x"),
    [
        (by_ignite, "ignite", torch.randn(6, 3, 6, 6)),
        (by_mmengine, "mmengine", torch.randn(6, 3, 6, 6)),
        (by_timm, "timm", torch.randn(6, 3, 32, 32, dtype=torch.float64)),
    ],
)
def test_a_converted_model_trains_like_one_process_on_the_whole_batch(build, package, x):
    needs(package)
    if package != "ignite":  # it converts in a distributed run alone
        assert all(layer.synced for layer in syncnorm.describe(build()) if "Norm" in layer.type)
    assert_matches_single_process(build, x, steps=2, splits=(4, 2), timeout=140)


def _rank_lightning(package: str) -> tuple[dict[str, Tensor], list[str], list[str]]:
    L = framework(package)
    inside = []

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = models.net()

        def training_step(self, batch, index):
            if not inside:
                inside.extend(type(m).__name__ for m in self.modules() if isinstance(m, nn.BatchNorm2d))
            return F.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), LR)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=4)
    environment = framework(f"{package}.{'fabric.' if package == 'lightning' else ''}plugins.environments")
    with syncnorm.replacing_torch():
        trainer = L.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", sync_batchnorm=True, max_epochs=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            plugins=[environment.LightningEnvironment()],
        )  # fmt: skip
        trainer.fit(module, loader)
        reverted = [type(m).__name__ for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        module.eval().net(data()[0])
    return module.net.state_dict(), inside, reverted


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_lightnings_sync_batchnorm(package):
    needs(package)
    results = run_ranks(_rank_lightning, args=(package,), timeout=200)
    for _, inside, reverted in results:
        assert inside == ["SyncBatchNorm2d"] * 2
        assert reverted == ["_BatchNormXd"] * 2  # Lightning's own, as after a run with torch's layers
    check([state for state, *_ in results])


def _rank_fastai(flag: str) -> tuple[dict[str, Tensor], bool]:
    framework("fastai.distributed")
    learner, load, optimizer = (framework(f"fastai.{name}") for name in ("learner", "data.load", "optimizer"))
    loader = load.DataLoader(list(zip(*data(), strict=True)), bs=4)
    dls = framework("fastai.data.core").DataLoaders(loader, loader)
    learn = learner.Learner(dls, models.net(), loss_func=nn.MSELoss(), opt_func=optimizer.SGD, lr=LR, wd=0.0)
    # fastai broadcasts the order of the samples through a GPU.
    with mock.patch.object(Tensor, "cuda", lambda tensor: tensor), syncnorm.replacing_torch():
        if flag == "to_distributed":
            learn.to_distributed(sync_bn=True, cpu=True).fit(2)
        else:
            with learn.distrib_ctx(sync_bn=True, cpu=True):
                learn.fit(2)
    return learn.model.state_dict(), all(layer.synced for layer in syncnorm.describe(learn.model))


@pytest.mark.parametrize("flag", ["to_distributed", "distrib_ctx"])
def test_fastais_sync_bn(flag):
    needs("fastai")
    results = run_ranks(_rank_fastai, args=(flag,), timeout=200)
    assert all(synced for _, synced in results)
    check([copy.copy(state) for state, _ in results])
