"""Lightning: a plugin that converts the model before training and reverts it afterwards.

What it shows: ``Trainer(plugins=[SyncNorm()])`` instead of ``Trainer(sync_batchnorm=True)``, which does not support
               CPUs and creates new layers; the LightningModule does not change.
How to start:  python examples/lightning_layer_sync.py   # Lightning starts the second rank itself
What it prints: for each epoch the mean loss over both ranks and the difference of the running means between ranks
(large with local batch norm); the classes after training. Needs: lightning, scikit-learn for its digits.
"""

import warnings

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm
from syncnorm.integrations.lightning import SyncNorm


class Digits(L.LightningModule):
    """A small CNN with plain batch norms."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in [(1, 16), (16, 32)]
        ]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The cross-entropy of this rank's batch; its mean over the ranks is logged."""
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_epoch=True, on_step=False, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Prints what was logged, and the difference of the running means between ranks."""
        mine = self.net[1][1].running_mean
        dist.broadcast(first := mine.clone(), 0)
        dist.reduce(apart := (mine - first).abs().max(), 0, dist.ReduceOp.MAX)
        loss = self.trainer.callback_metrics["loss"]
        self.print(f"epoch {self.current_epoch}: loss {loss:.3f}, ranks apart by {apart:.1e}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of Lightning, about workers and loggers that a small run does not need
    L.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images[:400]).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels[:400]))
    model = Digits()
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    ranks = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    trainer = L.Trainer(**ranks, max_epochs=3, plugins=[SyncNorm()], **quiet)
    trainer.fit(model, DataLoader(data, batch_size=4, shuffle=True))
    if trainer.is_global_zero:
        print("after fit:", *(layer.type for layer in syncnorm.describe(model)), flush=True)
