"""One step of a synced layer on a GPU, in each of its variants, and the same in fp64.

The process group is torch's fake one, which needs one process: its gather copies the row of this rank to all ranks,
and its sum is that of this rank alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import syncnorm
from syncnorm.layer import device_step
from syncnorm.layer.kernels import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
WORLD = 8
EPS, MOMENTUM = 1e-5, 0.3
SHAPE = (4, 6, 4, 3) if INTERPRETED else (6, 24, 5, 7)


@dataclass(frozen=True)
class Variant:
    """What a layer computes."""

    relu: bool = False
    shortcut: bool = False
    mask: bool = False
    weight: bool = True
    bias: bool = True
    momentum: float | None = MOMENTUM
    running: bool = True
    parameters: torch.dtype = torch.float32


VARIANTS = {
    "plain": Variant(),
    "ReLU": Variant(relu=True),
    "shortcut": Variant(shortcut=True),
    "shortcut and ReLU": Variant(shortcut=True, relu=True),
    "mask": Variant(mask=True),
    "mask and ReLU": Variant(mask=True, relu=True),
    "mask, shortcut and ReLU": Variant(mask=True, shortcut=True, relu=True),
    "no weight": Variant(weight=False, relu=True),
    "no bias": Variant(bias=False, relu=True),
    "no parameters": Variant(weight=False, bias=False),
    "average": Variant(momentum=None),
    "no running statistics": Variant(running=False),
    "bf16 parameters": Variant(parameters=torch.bfloat16),
    "fp16 parameters": Variant(parameters=torch.float16, shortcut=True, relu=True),
}


@dataclass
class Step:
    """A layer's tensors on one device, and its step; the leaves are those that require a gradient.

    Attributes:
        x: the input; what is behind the mask is NaN.
        dy: the gradient of the output.
        leaves: by name.
        buffers: running mean, running variance and number of batches, or nothing.
        mask: True counts.
    """

    variant: Variant
    x: Tensor
    dy: Tensor
    leaves: dict[str, Tensor]
    buffers: dict[str, Tensor]
    mask: Tensor | None
    name: str = "layer"

    def forward(self, name: str | None = None) -> Tensor:
        """The output."""
        mean, var, tracked = (self.buffers.get(key) for key in ("mean", "var", "tracked"))
        weight, bias, shortcut = (self.leaves.get(key) for key in ("weight", "bias", "shortcut"))
        return syncnorm.functional.sync_batch_norm(
            self.x, mean, var, weight, bias, training=True, momentum=self.variant.momentum, eps=EPS, mask=self.mask,
            residual=shortcut, relu=self.variant.relu, num_batches_tracked=tracked, layer_name=name or self.name,
        )  # fmt: skip

    def __call__(self) -> dict[str, Tensor]:
        """The output as "y", and the gradient of each leaf by its name."""
        y = self.forward()
        gradients = torch.autograd.grad(y, list(self.leaves.values()), self.dy)
        return {"y": y.detach(), **dict(zip(self.leaves, gradients, strict=True))}


def make_step(
    variant: Variant,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    shape: tuple[int, ...] = SHAPE,
    device: torch.device = DEVICE,
) -> Step:
    """Random tensors, always the same."""
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, dy, shortcut = (
        (torch.randn(shape, generator=generator) * 2 + mean).to(device, dtype).contiguous(memory_format=layout)
        for mean in (3, 0, 0)
    )
    channels = shape[1]
    mask = (torch.rand(shape[0], *shape[2:], generator=generator) < 0.7).to(device) if variant.mask else None
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(1), torch.nan).contiguous(memory_format=layout)
    weight, bias = torch.rand(2, channels, generator=generator).to(device, variant.parameters).sub(0.3)
    leaves = {"x": x}
    leaves |= {"weight": weight} if variant.weight else {}
    leaves |= {"bias": bias} if variant.bias else {}
    leaves |= {"shortcut": shortcut} if variant.shortcut else {}
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    buffers = {}
    if variant.running:
        tracked = torch.tensor(3, device=device)
        buffers = {"mean": torch.ones(channels, device=device), "var": torch.ones(channels, device=device)}
        buffers["tracked"] = tracked
    return Step(variant, leaves["x"], dy, leaves, buffers, mask)


def in_fp64(step: Step, y: Tensor, forward: str = "gather") -> dict[str, Tensor]:
    """What ``step`` returns, and the running statistics after it, if it has not run yet.

    Args:
        step: of the fake group.
        y: its output: where the ReLU is open is taken from there, because near zero rounding decides.
        forward: whether ranks gather moments, which gives all ranks those of this one, or sum them.
    """
    variant, dims = step.variant, [0, *range(2, step.x.dim())]
    counts = torch.ones_like(step.x, dtype=torch.bool) if step.mask is None else step.mask.unsqueeze(1)
    counts = counts.expand_as(step.x)

    def vector(name: str, absent: float) -> Tensor:
        leaf = step.leaves.get(name)
        values = step.x.new_full((step.x.size(1),), absent, dtype=torch.float64) if leaf is None else leaf.double()
        return values.detach().view(1, -1, *(1,) * (step.x.dim() - 2))

    x = step.x.detach().double().masked_fill(~counts, 0)
    n = counts.sum(dims, keepdim=True)
    mean = x.sum(dims, keepdim=True) / n
    xmu = (x - mean).masked_fill(~counts, 0)
    var = xmu.square().sum(dims, keepdim=True) / n
    invstd = (var + EPS).rsqrt()
    z = xmu * invstd * vector("weight", 1.0) + vector("bias", 0.0)
    z = z + step.leaves["shortcut"].detach().double() if variant.shortcut else z
    z = z.relu() if variant.relu else z

    dz = step.dy.double().masked_fill(~counts, 0)
    dz = dz * (y > 0) if variant.relu else dz
    sum_dz, sum_dz_xmu = dz.sum(dims, keepdim=True), (dz * xmu).sum(dims, keepdim=True)
    total = n * WORLD if forward == "gather" else n
    dx = vector("weight", 1.0) * invstd * (dz - sum_dz / total - xmu * invstd.square() * sum_dz_xmu / total)
    found = {"y": z.masked_fill(~counts, 0), "x": dx.masked_fill(~counts, 0), "shortcut": dz}
    found |= {"weight": (sum_dz_xmu * invstd).flatten(), "bias": sum_dz.flatten()}
    if step.buffers:
        tracked = step.buffers["tracked"] + 1
        factor = 1 / tracked if variant.momentum is None else variant.momentum
        unbiased = var * total / (total - 1)
        for name, value in (("mean", mean), ("var", unbiased)):
            found[f"running {name}"] = torch.lerp(step.buffers[name].double(), value.flatten(), float(factor))
        found["running tracked"] = tracked.clone()
    return found


@contextmanager
def fake_ranks() -> Iterator[None]:
    """This process is rank 0 of eight, of which the others do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # the import registers a backend

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def triton_failing() -> Iterator[None]:
    """Triton cannot compile, which this process has not met yet, and forgets at the end."""
    from syncnorm.layer.kernels import triton_backward, triton_forward  # not at the top: Triton may not be installed

    def fail(kernel: object, grid: object, *args: Tensor) -> None:
        raise launch._failed(args[0].get_device(), RuntimeError("Failed to find C compiler."))

    device_step.works_on.cache_clear()
    try:
        with (
            mock.patch.object(launch, "_failures", {}),
            mock.patch.object(triton_forward, "launch", fail),
            mock.patch.object(triton_backward, "launch", fail),
        ):
            yield
    finally:
        device_step.works_on.cache_clear()
