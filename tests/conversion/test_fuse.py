"""``convert(fuse=True)``: which blocks are fused, that they compute the same bits, and how it is undone."""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncnorm
from syncnorm.testing import run_ranks


class Basic(nn.Module):
    """A residual block as in torchvision: in-place operations, one ReLU module that is called twice."""

    def __init__(self, width_in: int = 4, width: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Functional(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return (x + self.bn2(self.conv2(y))).relu()


class PreActivation(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        return x + self.conv2(torch.relu(self.bn2(y)))


class AsksForTraining(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) if self.training else F.relu(y) * 1.5


class Branches(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x)) if x.sum() > 0 else x


class UsesTheSumTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y) + y


class WritesToTheShortcut(Basic):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.conv2(x)
        shortcut += self.bn1(self.conv1(x))
        return self.relu(shortcut)


class WritesToItsInput(Basic):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.bn1(x)
        x.add_(1)
        return F.relu(y) + x


class KeepsTheSum(Basic):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        kept = y
        y += F.relu(self.bn1(x))
        return kept * y


class OmitsTheShortcut(Basic):
    """The shortcut is optional: for a tracer the argument is never None."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y + (x if shortcut is None else shortcut))


class IsGivenNoShortcut(Basic):
    def forward(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        y = self.bn1(self.conv1(x))
        return F.relu(y + (x if shortcut is None else shortcut))


class AsksForATensor(Basic):
    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        inputs = [x] if isinstance(x, Tensor) else x
        return F.relu(self.bn1(torch.cat(inputs, 1)))


class WithoutGradients(Basic):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.conv1(x)
        return F.relu(self.bn1(y))


class HalfPrecision(Basic):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv1(x)
        return F.relu(self.bn1(y.float()))


class FullPrecision(Basic):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            y = self.conv1(x)
        return F.relu(self.bn1(y.float()))


class Checkpoints(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(checkpoint(self.conv1, x, use_reentrant=False)))


class DrawsRandomNumbers(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x))) * (random.random() < 2)


class Remembers(Basic):
    def forward(self, x: Tensor) -> Tensor:
        self.features = self.conv1(x)
        return F.relu(self.bn1(self.features))


class Collects(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(self.conv1(x))
        return F.relu(self.bn1(self.features[-1]))


class WritesThroughAnAlias(Basic):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.same(x))
        return F.relu(y + self.relu(x))


class OneLayerTwice(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(x)) + self.bn1(self.conv2(x)))


class WritesToABuffer(Basic):
    def __init__(self, *widths: int) -> None:
        super().__init__(*widths)
        self.register_buffer("seen", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.5).add_(1)
        return F.relu(self.bn1(self.conv1(x))) * self.seen


def sequential() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Basic(), Basic(4, 6), Functional(6, 6), PreActivation(6, 6), nn.Flatten(), nn.LazyLinear(3))


FUSABLE: dict[Callable[[], nn.Module], set[str]] = {
    Basic: {"bn1", "bn2"},
    Functional: {"bn1", "bn2"},
    PreActivation: {"bn1", "bn2"},
    sequential: {"1"},
    KeepsTheSum: {"bn1"},
    OneLayerTwice: {"bn1"},
    WritesToABuffer: {"bn1"},
}
NOT_FUSABLE = [
    *(AsksForTraining, Branches, UsesTheSumTwice, WritesToTheShortcut, WritesToItsInput, OmitsTheShortcut),
    *(AsksForATensor, WithoutGradients, HalfPrecision, FullPrecision, Checkpoints, DrawsRandomNumbers, Remembers),
    *(Collects, WritesThroughAnAlias, IsGivenNoShortcut),
]


def fused(model: nn.Module) -> set[str]:
    return {layer.name for layer in syncnorm.describe(model) if "fused" in layer.note}


@pytest.mark.parametrize("build", FUSABLE)
def test_what_is_fused(build):
    assert fused(syncnorm.convert(build(), fuse=True)) == FUSABLE[build]


@pytest.mark.parametrize("build", NOT_FUSABLE)
def test_what_is_not_fused(build):
    block = build()
    before = {**block.__dict__, "features": list(getattr(block, "features", ()))}
    drawn = random.getstate(), torch.get_rng_state().tolist()
    syncnorm.convert(block, fuse=True)
    assert type(block) is build
    assert not fused(block)
    assert {**block.__dict__, "features": list(getattr(block, "features", ()))} == before
    assert (random.getstate(), torch.get_rng_state().tolist()) == drawn
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_a_hook_that_would_see_the_sum_prevents_fusion():
    for name in ("bn1", "relu"):
        block = Basic()
        seen = []
        block.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        assert "bn1" not in fused(syncnorm.convert(block, fuse=True))
        block(torch.randn(2, 4, 5, 5))
        assert seen


def _rank_steps(fuse: bool, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Three training steps with uneven batches, and an evaluation."""
    torch.manual_seed(0)
    model = build()
    model(torch.zeros(2, 4, 6, 6))  # for the lazy one
    model = syncnorm.convert(model, fuse=fuse)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    inputs = []
    for _ in range(3):
        x = torch.randn(3 - dist.get_rank(), 4, 6, 6, generator=generator).requires_grad_()
        y = ddp(x)
        optimizer.zero_grad()
        y.backward(torch.randn(y.shape, generator=generator))
        optimizer.step()
        inputs.append(x.grad)
    result = {f"dx{i}": g for i, g in enumerate(inputs) if g is not None}
    result["eval"] = model.eval()(torch.randn(2, 4, 6, 6, generator=generator)).detach()
    return result | {k: v.detach() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("build", [network, *FUSABLE, AsksForTraining, UsesTheSumTwice, WritesToTheShortcut])
def test_fused_computes_the_same_bits(build):
    by_fuse = (run_ranks(_rank_steps, 2, (fuse, build)) for fuse in (False, True))
    for plain, ours in zip(*by_fuse, strict=True):
        assert plain.keys() == ours.keys()
        for name in plain:
            assert torch.equal(plain[name], ours[name]), name


def test_revert_and_copies():
    model = network()
    classes = [type(m) for m in model.modules()]
    syncnorm.convert(model, fuse=True)
    assert fused(model)
    assert isinstance(model[0], Basic)
    state = model.state_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not fused(other)
        assert [i.synced for i in syncnorm.describe(other)] == [True] * 9
        assert fused(syncnorm.convert(other, fuse=True)) == fused(model)
    assert type(model[0]).__name__ == "FusedBasic"
    assert not fused(syncnorm.convert(model))
    syncnorm.convert(model, fuse=True)
    syncnorm.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert state.keys() == model.state_dict().keys()


def test_a_fused_block_follows_the_training_mode():
    block = syncnorm.convert(sequential(), fuse=True)
    x = torch.randn(4, 4, 5, 5)
    trained = block(x)
    assert not torch.equal(block.eval()(x), trained)


def test_a_class_derived_from_a_fused_one_raises():
    model = syncnorm.convert(nn.Sequential(Basic(), Basic()), fuse=True)
    block = model[1]
    block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})  # as fully_shard does
    before = [type(m) for m in model.modules()]
    for change in (syncnorm.revert, syncnorm.convert):
        with pytest.raises(syncnorm.SyncNormError, match="1 is a FSDPFusedBasic"):
            change(model)
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("to", ["batch", "group", "layer"])
def test_only_synced_layers_are_fused(to):
    with pytest.raises(syncnorm.SyncNormError, match="fuse"):
        syncnorm.convert(Basic(), to=to, fuse=True)


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_accepts_a_shortcut_and_applies_relu(training):
    torch.manual_seed(0)
    layer = syncnorm.SyncBatchNorm2d(4).train(training)
    plain = copy.deepcopy(layer)
    x, shortcut = torch.randn(3, 4, 5, 5), torch.randn(4, 1, 1)
    assert torch.equal(layer(x, residual=shortcut, relu=True), F.relu(plain(x) + shortcut))
    assert torch.equal(layer(x, relu=True), F.relu(plain(x)))
    assert torch.equal(layer(x, residual=shortcut), plain(x) + shortcut)
