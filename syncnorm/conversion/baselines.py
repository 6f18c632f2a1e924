"""Norms that need no other rank, as modules that can stand where a batch norm stood.

All three are group norm: over groups of channels, over all of them (layer norm over (C, *spatial)), over one
each (instance norm).
"""

from typing import Any

from torch import Tensor, nn

from syncnorm.errors import InputError


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, under the name that the other two go by.

    Source: Wu and He, "Group Normalization" (2018).
    """


class LayerNorm(nn.GroupNorm):
    """Layer norm over (C, *spatial) of each sample, for any spatial size; affine by channel.

    Source: Ba, Kiros, Hinton, "Layer Normalization" (2016); on images as in Wu and He (2018), figure 2.
    """


class InstanceNorm(nn.GroupNorm):
    """Instance norm over the spatial positions of each sample and channel; affine by channel.

    Source: Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016).
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalises each channel of each sample.

        Raises:
            InputError: input (batch, C): one value a channel and sample would become zero, whatever it was.
        """
        check_instances(input, self.num_groups)
        return super().forward(input)


def check_instances(input: Tensor, num_groups: int) -> None:
    """Refuses groups of one value each.

    Raises:
        InputError: (batch, C) in C groups.
    """
    if input.dim() < 3 and input.size(1) == num_groups:
        raise InputError(
            f"instance norm needs spatial dimensions, got input of shape {tuple(input.shape)}: use to='layer' "
            f"for (batch, C)"
        )


CLASSES: dict[str, type[nn.GroupNorm]] = {"group": GroupNorm, "layer": LayerNorm, "instance": InstanceNorm}


def groups_for(kind: str, channels: int, num_groups: int, name: str) -> int:
    """The number of groups that makes group norm the norm ``kind`` for a layer of ``channels``.

    Raises:
        InputError: ``num_groups`` does not divide ``channels``; names the layer and the nearest divisors.
    """
    if kind != "group":
        return 1 if kind == "layer" else channels
    if channels % num_groups:
        divisors = [n for n in range(1, channels + 1) if channels % n == 0]
        near = [max([n for n in divisors if n < num_groups]), *[n for n in divisors if n > num_groups][:1]]
        raise InputError(
            f"num_groups={num_groups} does not divide the {channels} channels of layer {name!r}; "
            f"nearest that do: {' and '.join(map(str, near))}"
        )
    return num_groups


def build(kind: str, batch_norm: Any, num_groups: int) -> nn.GroupNorm:
    """A norm in place of ``batch_norm``, with the same parameters (the very tensors), eps and training flag."""
    norm = CLASSES[kind](num_groups, batch_norm.num_features, batch_norm.eps, affine=False)
    norm.affine = batch_norm.affine
    for name in ("weight", "bias"):
        norm.register_parameter(name, batch_norm._parameters.get(name))
    return norm.train(batch_norm.training)
