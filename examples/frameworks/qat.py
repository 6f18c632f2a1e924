"""Quantization-aware training: fuse and prepare first, then convert; revert before the quantized model is made.

What it shows: fusing refuses synced layers, and ``prepare_qat`` builds new, plain ones in their place. The batch norm
               within a prepared ``ConvBnReLU2d`` is an ordinary layer, which ``syncnorm.convert`` finds.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/qat.py
Needs: scikit-learn for its digits. ``torch.ao.quantization`` is deprecated in favor of torchao, which has no
quantization-aware training of batch norms as modules.
"""

import warnings

import torch
import torch.distributed as dist
from recipe import digits, report
from torch import nn
from torch.ao import quantization
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncnorm

warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated|Please use quant_min")
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # the same weights on every rank

blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32)]
]
head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
model = nn.Sequential(quantization.QuantStub(), *blocks, *head, quantization.DeQuantStub())
model.qconfig = quantization.get_default_qat_qconfig("x86")
quantization.fuse_modules_qat(model, [["1.0", "1.1", "1.2"], ["2.0", "2.1", "2.2"]], inplace=True)
quantization.prepare_qat(model, inplace=True)
model = syncnorm.convert(model)

ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
x, y = digits(1024)
losses = []
for epoch in range(5):
    if epoch == 4:  # the last epoch normalizes with the running statistics, as the quantized model will
        report(model, losses)
        model.apply(freeze_bn_stats)
        optimizer.param_groups[0]["lr"] = 0.005
    for batch in torch.arange(len(x)).split(32):
        part = batch[rank::ranks]
        loss = cross_entropy(ddp(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(loss)

int8 = quantization.convert(syncnorm.revert(model).eval())
if rank == 0:
    correct = (int8(x).argmax(1) == y).float().mean()
    print(f"{type(int8[1][0]).__name__}: accuracy {correct:.3f}", flush=True)
dist.destroy_process_group()
