"""Norms without communication, as modules that can replace a batch norm.

All three are group norms: with groups of several channels, with one group of all channels (layer norm over
(C, *spatial)), or with one group per channel (instance norm).
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncnorm.errors import InputError


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, as a class of this module like the other two.

    Source: Wu and He, "Group Normalization" (2018).
    """


class LayerNorm(nn.GroupNorm):
    """Layer norm over (C, *spatial) of each sample, for any spatial size; with weight and bias per channel.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); on images as in Wu and He (2018), figure 2.
    """


class InstanceNorm(nn.GroupNorm):
    """Instance norm over the spatial positions of each sample and channel; with weight and bias per channel.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalizes each channel of each sample.

        Raises:
            InputError: the input is (batch, C): a single value per channel and sample would always become zero.
        """
        check_instances(input, self.num_groups)
        return super().forward(input)


def check_instances(input: Tensor, num_groups: int) -> None:
    """Raises if each group would hold a single value.

    Raises:
        InputError: the input is (batch, C) and there are C groups.
    """
    if input.dim() < 3 and input.size(1) == num_groups:
        raise InputError(
            f"instance norm needs spatial dimensions, got input of shape {tuple(input.shape)}: use to='layer' "
            f"for (batch, C)"
        )


CLASSES: dict[str, type[nn.GroupNorm]] = {"group": GroupNorm, "layer": LayerNorm, "instance": InstanceNorm}


def groups_for(kind: str, channels: int, num_groups: int, name: str) -> int:
    """The number of groups with which group norm over ``channels`` is the norm ``kind``.

    Raises:
        InputError: ``num_groups`` does not divide ``channels``; the message names the layer and the nearest divisors.
    """
    if kind != "group":
        return 1 if kind == "layer" else channels
    if channels % num_groups:
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        nearest = [max([n for n in divisors if n < num_groups]), *[n for n in divisors if n > num_groups][:1]]
        raise InputError(
            f"num_groups={num_groups} does not divide the {channels} channels of layer {name!r}; "
            f"nearest divisors: {' and '.join(map(str, nearest))}"
        )
    return num_groups


def build(kind: str, batch_norm: _BatchNorm, num_groups: int) -> nn.GroupNorm:
    """A norm that replaces ``batch_norm``, with the same parameters (shared, not copied), eps and training flag."""
    norm = CLASSES[kind](num_groups, batch_norm.num_features, batch_norm.eps, affine=False)
    norm.affine = batch_norm.affine
    for name in ("weight", "bias"):
        norm.register_parameter(name, batch_norm._parameters.get(name))
    return norm.train(batch_norm.training)
