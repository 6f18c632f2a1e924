"""MMEngine: a hook that converts the runner's model before training and reverts it afterwards.

What it shows: ``before_train`` comes after the runner has wrapped the model in MMDistributedDataParallel, which is
               not too late: the layers change in place. ``cfg.sync_bn`` stays unset: it builds other layers.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/mmengine_runner.py
Needs: mmengine, scikit-learn for its digits.
"""

import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from recipe import digits, report
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import syncnorm


@HOOKS.register_module()
class SyncNorm(Hook):
    """``custom_hooks=[dict(type="SyncNorm")]`` in a configuration."""

    def before_train(self, runner: Runner) -> None:
        """Converts in place: the parameters stay those of the optimizer."""
        syncnorm.convert(runner.model)

    def after_train(self, runner: Runner) -> None:
        """Reverts."""
        syncnorm.revert(runner.model)


class Report(Hook):
    """Prints the figures of the training while the layers are synced."""

    priority = "HIGHEST"  # its after_train comes before that of SyncNorm

    def before_train(self, runner: Runner) -> None:
        """Starts an empty list."""
        self.losses = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: object, outputs: dict) -> None:
        """Keeps the loss."""
        self.losses.append(outputs["loss"])

    def after_train(self, runner: Runner) -> None:
        """Prints."""
        report(runner.model, self.losses)


class Digits(BaseModel):
    """A small CNN with plain batch norms."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in [(1, 16), (16, 32)]
        ]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Tensor | dict[str, Tensor]:
        """Scores, or their loss if the runner asks for it."""
        scores = self.net(images)
        return {"loss": nn.functional.cross_entropy(scores, labels)} if mode == "loss" else scores


torch.manual_seed(0)  # the same weights on every rank
# Before the runner does it: MMEngine selects a GPU for each rank first.
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
# MMEngine gives DDP device_ids=[LOCAL_RANK], which DDP refuses on CPUs.
wrapper = {} if torch.cuda.is_available() else {"device_ids": None}
runner = Runner(
    Digits(),
    work_dir="work",
    train_dataloader={
        "dataset": TensorDataset(*digits(64)),
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "default_collate"},
        "batch_size": 16 // dist.get_world_size(),
    },
    train_cfg={"by_epoch": True, "max_epochs": 1},
    optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.05}},
    custom_hooks=[{"type": "SyncNorm"}, Report()],
    launcher="pytorch",
    log_level="WARNING",
    cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "broadcast_buffers": False, **wrapper}},
)
runner.train()
dist.destroy_process_group()
