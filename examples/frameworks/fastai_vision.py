"""fastai: a callback that converts the model before the training and reverts it afterwards.

What it shows: ``SyncNorm`` runs before fastai's own ``DistributedTrainer`` (order 11), which wraps the model in
               DistributedDataParallel. ``sync_bn=False``, because fastai's converter builds torch's layers, which do
               not run on CPUs.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/fastai_vision.py
Needs: fastai, accelerate, scikit-learn for its digits.
"""

import torch
import torch.distributed as dist
from fastai.distributed import DistributedDL
from fastai.vision.all import (
    SGD,
    Callback,
    DataLoaders,
    Learner,
    TfmdDL,
    accuracy,
    num_distrib,
    set_seed,
    xresnet18,
)
from recipe import digits, report
from torch import nn
from torch.utils.data import TensorDataset

import syncnorm


class SyncNorm(Callback):
    """Synchronizes the batch norms during ``fit``."""

    order = 10

    def before_fit(self) -> None:
        """Converts in place: the parameters stay those of fastai's optimizer."""
        syncnorm.convert(self.learn.model)

    def after_fit(self) -> None:
        """Reverts, so that neither ``learn.save`` nor ``learn.export`` writes synced layers."""
        syncnorm.revert(self.learn.model)


class Report(Callback):
    """Prints the figures of the training while the layers are synced."""

    order = 9

    def before_fit(self) -> None:
        """Starts an empty list."""
        self.losses = []

    def after_batch(self) -> None:
        """Keeps the loss of a training batch."""
        if self.training:
            self.losses.append(self.learn.loss)

    def after_fit(self) -> None:
        """Prints, before the callback of a higher order reverts the layers."""
        report(self.learn.model, self.losses)


class CPUDistributedDL(DistributedDL):
    """fastai's loader, which sends the indices of each epoch over GPUs, on CPUs."""

    def _broadcast(self, indices: list[int], rank: int) -> list[int]:
        dist.broadcast(sent := torch.tensor(indices), rank)
        return sent.tolist()


ranks = max(num_distrib(), 1)
cpu = not torch.cuda.is_available()
set_seed(0)  # the same weights on every rank
loader = TfmdDL(TensorDataset(*digits(32, size=32)), bs=32 // ranks)
if ranks > 1 and cpu:
    loader = CPUDistributedDL(loader)
model = xresnet18(c_in=1, n_out=10)
learn = Learner(
    DataLoaders(loader, loader), model, nn.CrossEntropyLoss(), SGD, metrics=accuracy, cbs=[SyncNorm(), Report()]
)
with learn.distrib_ctx(sync_bn=False, cpu=cpu), learn.no_bar(), learn.no_logging():
    learn.fit(3, lr=0.01)
if ranks > 1:
    dist.destroy_process_group()
