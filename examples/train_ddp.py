"""Train a CNN on scikit-learn's digits with DDP and synchronised batch norm; run it again to resume.

torchrun --nproc-per-node 2 examples/train_ddp.py --epochs 3 --checkpoint digits.pt

The global batch is the same on any number of ranks, and so, with synced norms, is what the model learns: an elastic
job that goes on with fewer ranks takes the steps that it would have taken. On several machines, --checkpoint must be
a file that all of them see.
"""

import argparse
import os
from datetime import timedelta
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
parser.add_argument("--global-batch", type=int, default=8)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--timeout", type=float, default=300, help="seconds that a rank waits for the others")
args = parser.parse_args()

cuda = torch.cuda.is_available()
if not dist.is_initialized():  # Ray Train has made the group already
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=args.timeout))
per_rank, left_over = divmod(args.global_batch, dist.get_world_size())
if left_over or not per_rank:
    raise SystemExit(f"--global-batch {args.global_batch} does not divide among {dist.get_world_size()} ranks")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
torch.manual_seed(0)  # the same weights and the same split on every rank

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
order = torch.randperm(len(x))
train, test = order[:1500], order[1500:]
sampler = DistributedSampler(train, seed=0)
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=per_rank, sampler=sampler, drop_last=True)

blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32), (32, 32)]
]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).to(device)
model = syncnorm.convert(model)
ddp = DistributedDataParallel(model)
optimiser = torch.optim.SGD(ddp.parameters(), lr=args.lr, momentum=0.9)

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
        with torch.no_grad():
            output = model(x[test].to(device)).cpu()
        loss, accuracy = F.cross_entropy(output, y[test]), (output.argmax(1) == y[test]).float().mean()
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch}
        unfinished = args.checkpoint.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(args.checkpoint)  # at once: whoever is killed meanwhile leaves the last one whole
        ranks = f"{dist.get_world_size()} ranks"
        print(f"epoch {epoch}, {ranks}: test loss {loss:.6f}, accuracy {accuracy:.3f}", flush=True)
dist.destroy_process_group()
