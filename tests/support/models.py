"""Layers and models that the tests convert; ranks can import them."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Scale(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def without_bias(layer: nn.Module) -> nn.Module:
    """``layer`` as its constructor makes it with ``bias=False``, which torch before 2.13 does not take."""
    layer.register_parameter("bias", None)
    return layer


class BatchNormAct(nn.BatchNorm2d):
    """A batch norm with an activation, written as in timm."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.act = nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(y)


class BatchNormPlusOne(nn.BatchNorm2d):
    """Calls the forward of its parent class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class BatchNormTorchCall(nn.BatchNorm2d):
    """Calls ``torch.batch_norm`` through a function of its module."""

    def forward(self, x: Tensor) -> Tensor:
        return normalized(self, x)


def normalized(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    return torch.batch_norm(x, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.training, 0.1, bn.eps, False)


class BatchNormAliased(nn.BatchNorm2d):
    """Calls ``F.batch_norm`` under another name, through a partial."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(
            x, self.running_mean, self.running_var, bias=self.bias, weight=self.weight, training=self.training
        )


normalize = functools.partial(F.batch_norm, eps=1e-5)


class BatchNormKeywords(nn.BatchNorm2d):
    """Calls ``torch.batch_norm`` with keyword arguments."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=0.1,
            eps=self.eps,
            cudnn_enabled=False,
        )


class Frozen(nn.Module):
    """A batch norm with constant statistics."""

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.full((x.size(1),), 3.0, dtype=x.dtype)
        return F.batch_norm(x, mean, mean + 1)


class BatchNormWithFrozenChild(nn.BatchNorm2d):
    """Its activation also normalizes, with separate statistics."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.act = Frozen()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class BatchNormOwnPickle(nn.BatchNorm2d):
    """Is pickled through its constructor."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def __reduce__(self) -> tuple:
        return type(self), (self.num_features,), self.__dict__


class BatchNormWithGroup(nn.BatchNorm2d):
    """Has an attribute with a name that synced layers use."""

    process_group = "none"

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.process_group = "mine"


class BatchNormNamed(nn.BatchNorm2d):
    """A subclass that changes nothing in the forward."""

    color = "blue"


SUBCLASSES = [
    BatchNormAct,
    BatchNormPlusOne,
    BatchNormTorchCall,
    BatchNormAliased,
    BatchNormKeywords,
    BatchNormWithFrozenChild,
    BatchNormOwnPickle,
    BatchNormWithGroup,
    BatchNormNamed,
]


class OwnArithmetic(nn.BatchNorm2d):
    """Normalizes without calling batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3), keepdim=True)
        return (x - mean) / (x.var((0, 2, 3), keepdim=True) + self.eps).sqrt()


class OwnInTraining(nn.BatchNorm2d):
    """Normalizes without batch_norm, in training only, although its code refers to batch_norm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return x - x.mean((0, 2, 3), keepdim=True)


class Net(nn.Module):
    """A small residual network: conv, norm, add, linear."""

    def __init__(self, norm: type[nn.BatchNorm2d] = nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = norm(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = norm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(y + self.norm2(self.conv2(y)))
        return self.head(y.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def net_with_activations() -> Net:
    torch.manual_seed(1)
    return Net(BatchNormAct)
