"""If one rank cannot normalize its input, all ranks raise in that call with its reason, and buffers stay."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle, run_ranks

ROWS = (3, 2)


class Act(nn.BatchNorm2d):
    """Applies an activation after the norm, as timm does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class OwnCheck(nn.BatchNorm2d):
    """Raises before it calls the norm."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise TypeError(f"expected images, got {x.dim()} axes")
        return super().forward(x)


class OwnCall(nn.BatchNorm2d):
    """Calls ``F.batch_norm`` itself, after an operation that may fail."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        x = x.view(x.size(0), 6, 2, 2)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Built(syncnorm.SyncBatchNorm2d):
    """A user's subclass of the synced layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


def good(seed: int) -> Tensor:
    whole = torch.randn(sum(ROWS), 6, 2, 2, generator=torch.Generator().manual_seed(seed))
    return whole.split(ROWS)[dist.get_rank()]


def in_inference_mode(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x * 1


INPUTS: dict[str, Callable[[Tensor], object]] = {
    "three axes": lambda x: x[..., 0],
    "five channels": lambda x: x[:, :5],
    "integers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
    "inference tensor": in_inference_mode,
    "list": lambda x: x.tolist(),
    "array": lambda x: np.asarray(x),
    "None": lambda x: None,
}
LAYERS: dict[str, Callable[[nn.Module], object]] = {
    "weight on meta": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.data.to("meta"))),
    "integer running_mean": lambda layer: setattr(layer, "running_mean", layer.running_mean.long()),
    "inference running_var": lambda layer: setattr(layer, "running_var", in_inference_mode(layer.running_var)),
    "short bias": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.data[:3])),
    "running_mean without running_var": lambda layer: setattr(layer, "running_var", None),
}


def _rank_refuses(build: type[nn.BatchNorm2d], wrong: str) -> tuple[str, bool, Tensor]:
    """The error, whether the buffers stayed unchanged, and the running mean after another step on all ranks."""
    torch.manual_seed(0)
    layer = syncnorm.convert(nn.Sequential(build(6)))
    layer(good(1))
    before = {k: v.clone() for k, v in layer.named_buffers()}
    attributes = dict(layer[0]._parameters), dict(layer[0]._buffers)
    x: object = good(2)
    if dist.get_rank() == 1:
        x = INPUTS.get(wrong, lambda x: x)(good(2))
        LAYERS.get(wrong, lambda layer: None)(layer[0])
    try:
        layer(x)
        message = ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    layer[0]._parameters.update(attributes[0])
    layer[0]._buffers.update(attributes[1])
    stayed = all(torch.equal(v, before[k]) for k, v in layer.named_buffers())
    layer(good(3))
    return message, stayed, layer[0].running_mean


def check_refused(build: type[nn.BatchNorm2d], wrong: str) -> None:
    results = run_ranks(_rank_refuses, args=(build, wrong), timeout=30)
    (message, _, mean), (own, _, _) = results
    assert "rank 1 did not take part in forward of 0 (call 2 of the group" in message or "SyncBatchNorm" in message
    reason = own.split(": ", 1)[1] if "InputError" in own else own
    assert own
    assert reason.splitlines()[0][:60] in message, (own, message)
    assert [stayed for _, stayed, _ in results] == [True, True]
    running = torch.zeros(6), torch.ones(6)
    for seed in (1, 3):
        whole = torch.randn(sum(ROWS), 6, 2, 2, generator=torch.Generator().manual_seed(seed))
        want = batch_norm_oracle([whole], [whole], running_mean=running[0], running_var=running[1])
        running = want.running_mean, want.running_var
    assert_close(mean, running[0], torch.float32)


@pytest.mark.parametrize("wrong", [*INPUTS, *LAYERS])
def test_a_plain_layer(wrong):
    check_refused(nn.BatchNorm2d, wrong)


@pytest.mark.parametrize("build", [Act, OwnCheck, OwnCall, Built])
@pytest.mark.parametrize("wrong", ["three axes", "five channels", "list", "meta", "weight on meta"])
def test_a_layer_with_its_own_forward(build, wrong):
    check_refused(build, wrong)


def _rank_with_another_shortcut() -> tuple[str, bool]:
    layer = syncnorm.SyncBatchNorm2d(6)
    before = layer.running_mean.clone()
    residual = torch.zeros(5, 6, 2, 2) if dist.get_rank() == 0 else good(1)
    try:
        layer(good(1), residual=residual, relu=True)
    except syncnorm.SyncNormError as error:
        return str(error), torch.equal(layer.running_mean, before)
    return "", False


def test_a_shortcut_of_a_wrong_shape():
    for message, stayed in run_ranks(_rank_with_another_shortcut, timeout=30):
        assert "expected a residual that broadcasts to shape (3, 6, 2, 2), on cpu, got shape (5, 6, 2, 2)" in message
        assert stayed


SKIP = RuntimeError("skip this batch")


class Skipping(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 50:
            raise SKIP
        return F.relu(super().forward(x))


def _rank_the_same_exception_again() -> list[str]:
    """Rank 0 raises the same object at every other batch; the other rank must raise each time."""
    layer, errors = syncnorm.convert(nn.Sequential(Skipping(6))), []
    for seed in range(4):
        try:
            layer(good(seed) + 100 * (seed % 2 == 1 and dist.get_rank() == 0))
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_an_exception_object_that_is_raised_twice():
    first, second = run_ranks(_rank_the_same_exception_again, timeout=30)
    assert first == ["skip this batch"] * 2
    assert len(second) == 2
    assert all("because it raised RuntimeError: skip this batch" in message for message in second)


class Failing(nn.BatchNorm2d):
    """Fails after its norm, while the other ranks go on to the next one."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if x.mean() > 50:
            raise MemoryError("no room for the activation")
        return y


def _rank_fails_after_its_norm() -> list[str]:
    net = syncnorm.convert(nn.Sequential(Failing(6), nn.BatchNorm2d(6)))
    errors = []
    for seed in range(3):
        try:
            net(good(seed) + 100 * (seed == 1 and dist.get_rank() == 0))
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        else:
            errors.append("")
    return errors


def test_an_error_after_a_norm_is_reported_at_the_next_one():
    first, second = run_ranks(_rank_fails_after_its_norm, timeout=30)
    assert first == ["", "MemoryError: no room for the activation", ""]
    assert (second[0], second[2]) == ("", "")
    assert "rank 0 did not take part in forward of 1 (call 4 of the group" in second[1]
    assert "because it raised MemoryError: no room for the activation" in second[1]
