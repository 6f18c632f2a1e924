"""Train a CNN on scikit-learn's digits with DDP and synchronized batch norm; run it again to resume.

torchrun --nproc-per-node 2 examples/train_ddp.py --epochs 3 --checkpoint digits.pt

The global batch does not depend on the number of ranks. With synced norms, neither does the result, except for
rounding, even if an elastic job continues with fewer ranks. All machines need access to the folder of the checkpoint.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import syncnorm

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--checkpoint", type=Path, default="digits.pt")
parser.add_argument("--global-batch", type=int, default=48)
parser.add_argument("--lr", type=float, default=0.05)
args = parser.parse_args()
ranks = int(os.environ.get("WORLD_SIZE", 1))
if args.global_batch % ranks:
    parser.error(f"--global-batch {args.global_batch} does not divide among {ranks} ranks")
if not args.checkpoint.absolute().parent.is_dir():
    parser.error(f"--checkpoint {args.checkpoint}: there is no such folder")

cuda = torch.cuda.is_available()
if not dist.is_initialized():  # Ray Train has already initialized it
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
torch.manual_seed(0)  # the same weights and the same split on every rank

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = torch.randperm(len(x)).tensor_split([1500])
sampler = DistributedSampler(train, seed=0)
data = TensorDataset(x[train], y[train])
loader = DataLoader(data, batch_size=args.global_batch // ranks, sampler=sampler, drop_last=True)
blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32), (32, 32)]
]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).to(device)
ddp = DistributedDataParallel(syncnorm.convert(model))
optimizer = torch.optim.SGD(ddp.parameters(), lr=args.lr, momentum=0.9)
first = 0
if args.checkpoint.exists():
    saved = torch.load(args.checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    first = saved["epoch"] + 1
    if dist.get_rank() == 0:
        print(f"{args.checkpoint} has {first} of {args.epochs} epochs", flush=True)

for epoch in range(first, args.epochs):
    sampler.set_epoch(epoch)
    ddp.train()
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(images.to(device)), labels.to(device)).backward()
        optimizer.step()
    ddp.eval()
    if dist.get_rank() == 0:  # evaluation communicates nothing, so one rank may do it alone
        with torch.no_grad():
            output = model(x[test].to(device)).cpu()
        loss, accuracy = nn.functional.cross_entropy(output, y[test]), (output.argmax(1) == y[test]).float().mean()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
        torch.save(state, unfinished := args.checkpoint.with_suffix(".unfinished"))
        unfinished.replace(
            args.checkpoint
        )  # atomic: if this process is killed, the previous checkpoint stays complete
        print(f"epoch {epoch}, {ranks} ranks: test loss {loss:.6f}, accuracy {accuracy:.3f}", flush=True)
dist.destroy_process_group()
