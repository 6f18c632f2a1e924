"""What the recipes in this folder share: data, and the figures that show that the norm layers are synchronized."""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncnorm


def digits(count: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """The first ``count`` digits of scikit-learn, (count, 1, size, size) in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:count], dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return nn.functional.interpolate(x, size=(size, size)), torch.tensor(labels[:count])


def report(model: nn.Module, losses: list[Tensor]) -> None:
    """Prints on rank 0 what is the same in one process on the whole batch, if the batch norms are synchronized.

    Args:
        model: whose batch norms are counted and whose running statistics are compared between ranks.
        losses: of each training step, the mean over this rank's part of the batch; all ranks have parts of one size.

    Collective: all ranks must call.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    synced = sum(layer.synced for layer in syncnorm.describe(model))
    mine = torch.cat([torch.cat([layer.running_mean, layer.running_var]) for layer in layers])
    mean, first = torch.stack([loss.detach() for loss in losses]), mine.clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        dist.broadcast(first, 0)
        dist.all_reduce(apart := (mine - first).abs().max(), dist.ReduceOp.MAX)
    else:
        apart = (mine - first).abs().max()
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"{synced} of {len(layers)} batch norms synced, running statistics of ranks differ by {apart:.1e}")
        print("losses", *(f"{loss:.6f}" for loss in mean), flush=True)
