"""PyTorch-Ignite: convert before ``idist.auto_model`` wraps the model in DistributedDataParallel.

What it shows: ``idist.auto_model(syncnorm.convert(model))``, on gloo and NCCL alike.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/ignite_trainer.py
Needs: pytorch-ignite, scikit-learn for its digits.
"""

import os

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from recipe import digits, report
from torch import nn
from torch.utils.data import TensorDataset

import syncnorm


def training(local_rank: int) -> None:
    """Trains on this rank's part of each batch."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in [(1, 16), (16, 32)]
    ]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    model = idist.auto_model(syncnorm.convert(model))  # and sync_bn=False, which is ignite's default
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.05))
    loader = idist.auto_dataloader(TensorDataset(*digits(64)), batch_size=16, shuffle=False)

    trainer = create_supervised_trainer(
        model, optimizer, nn.CrossEntropyLoss(), idist.device(), output_transform=lambda x, y, y_pred, loss: loss
    )
    losses = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine: Engine) -> None:
        losses.append(engine.state.output)

    trainer.run(loader, max_epochs=1)
    report(model, losses)


if __name__ == "__main__":
    backend = None if "RANK" not in os.environ else "nccl" if torch.cuda.is_available() else "gloo"
    with idist.Parallel(backend=backend) as parallel:
        parallel.run(training)
