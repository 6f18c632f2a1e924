"""MMCV: a name for the synchronized layer that every model with a ``norm_cfg`` accepts.

What it shows: ``MODELS.register_module`` makes ``norm_cfg=dict(type="SyncNorm")`` build syncnorm's layer, in MMCV's
               ``ConvModule`` and so in the models of MMDetection, MMSegmentation and MMPretrain.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/mmcv_norm_cfg.py
Needs: mmcv or mmcv-lite, scikit-learn for its digits.
"""

import torch
import torch.distributed as dist
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from recipe import digits, report
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncnorm

MODELS.register_module("SyncNorm", module=syncnorm.SyncBatchNorm2d)

dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights on every rank
norm_cfg = {"type": "SyncNorm", "eps": 1e-3, "momentum": 0.03}
blocks = [ConvModule(a, b, 3, padding=1, norm_cfg=norm_cfg) for a, b in [(1, 16), (16, 32)]]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)

x, y = digits(64)
losses = []
for batch in torch.arange(len(x)).split(16):
    part = batch[rank::ranks]
    loss = cross_entropy(ddp(x[part]), y[part])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss)

report(model, losses)
dist.destroy_process_group()
