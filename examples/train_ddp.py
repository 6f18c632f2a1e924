"""Train a CNN on scikit-learn's digits with DDP and synchronised batch norm; run it again to resume.

torchrun --nproc-per-node 2 examples/train_ddp.py --epochs 3 --checkpoint digits.pt
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncnorm

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--checkpoint", type=Path, default=Path("digits.pt"))
args = parser.parse_args()

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
torch.manual_seed(0)  # the same weights and the same split on every rank

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
order = torch.randperm(len(x))
train, test = order[:1500], order[1500:]
sampler = DistributedSampler(train, seed=0)
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=4, sampler=sampler, drop_last=True)

blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32), (32, 32)]
]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).to(device)
model = syncnorm.convert(model)
ddp = DistributedDataParallel(model)
optimiser = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)

first = 0
if args.checkpoint.exists():
    saved = torch.load(args.checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    first = saved["epoch"] + 1

for epoch in range(first, args.epochs):
    sampler.set_epoch(epoch)
    ddp.train()
    for images, labels in loader:
        optimiser.zero_grad()
        F.cross_entropy(ddp(images.to(device)), labels.to(device)).backward()
        optimiser.step()
    ddp.eval()
    if dist.get_rank() == 0:  # evaluation communicates nothing, so one rank may do it alone
        accuracy = (model(x[test].to(device)).argmax(1).cpu() == y[test]).float().mean()
        print(f"epoch {epoch}: test accuracy {accuracy:.3f}", flush=True)
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch}
        torch.save(state, args.checkpoint)
dist.destroy_process_group()
