"""timm: convert what ``create_model`` returns.

What it shows: ``syncnorm.convert`` keeps timm's ``BatchNormAct2d`` layers, with the activation that they contain, and
               the averaged weights of ``ModelEmaV3`` have the same statistics on all ranks.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/timm_model.py
Needs: timm, scikit-learn for its digits.
"""

import os

import timm
import torch
import torch.distributed as dist
from recipe import digits, report
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncnorm

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(0)  # the same weights on every rank

model = timm.create_model("test_efficientnet", in_chans=1, num_classes=10).to(device)
model = syncnorm.convert(model)
ema = ModelEmaV3(model, decay=0.9)
ddp = DistributedDataParallel(model)
optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01)

data = TensorDataset(*digits(64, size=32))
sampler = DistributedSampler(data, shuffle=False)
losses = []
for images, labels in DataLoader(data, batch_size=16 // dist.get_world_size(), sampler=sampler):
    loss = cross_entropy(ddp(images.to(device)), labels.to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model)
    losses.append(loss)

report(model, losses)
report(ema.module, losses)
dist.destroy_process_group()
