"""torchvision: models take the class of their norm layers as ``norm_layer``.

What it shows: ``norm_layer=functools.partial(syncnorm.SyncBatchNorm2d, ...)`` builds a ResNet with synced layers.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/torchvision_norm_layer.py
Needs: torchvision, scikit-learn for its digits.
"""

import functools
import os

import torch
import torch.distributed as dist
from recipe import digits, report
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from torchvision.models import resnet18

import syncnorm

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(0)  # the same weights on every rank

norm_layer = functools.partial(syncnorm.SyncBatchNorm2d, momentum=0.05)
model = resnet18(num_classes=10, norm_layer=norm_layer).to(device)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.002, momentum=0.9)

x, y = digits(64, size=64)
data = TensorDataset(x.repeat(1, 3, 1, 1), y)
sampler = DistributedSampler(data, shuffle=False)
losses = []
for images, labels in DataLoader(data, batch_size=16 // dist.get_world_size(), sampler=sampler):
    loss = cross_entropy(ddp(images.to(device)), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss)

report(model, losses)
syncnorm.revert(model)  # the nn.BatchNorm2d of torchvision's own model, for export
dist.destroy_process_group()
