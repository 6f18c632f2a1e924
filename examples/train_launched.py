"""Train a CNN on scikit-learn's digits with accelerate and synchronized batch norm.

ACCELERATE_USE_CPU=true accelerate launch --config_file launch/accelerate/cpu.yaml examples/train_launched.py

Needs: accelerate and scikit-learn (the extra ``compare``).
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--global-batch", type=int, default=48)
args = parser.parse_args()

# split_batches: a batch of the loader is split among the ranks. With a sampler whose order does not depend on their
# number, any number of ranks makes the same steps, except for rounding.
# cpu: without it, accelerate does not connect ranks that have no GPU, and each trains alone.
loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=loading)
set_seed(0)

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
order = torch.randperm(len(x))
train, test = (TensorDataset(x[part], y[part]) for part in (order[:1500], order[1500:]))

blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32), (32, 32)]
]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
model = syncnorm.convert(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
model, optimizer, loader, test_loader = accelerator.prepare(
    model,
    optimizer,
    DataLoader(train, batch_size=args.global_batch, shuffle=True, drop_last=True),
    DataLoader(test, batch_size=args.global_batch),
)
kind = accelerator.distributed_type.value
accelerator.print(f"{accelerator.num_processes} ranks, {kind}, {accelerator.device.type}")

for epoch in range(args.epochs):
    model.train()
    for images, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
    model.eval()
    losses, right = [], []
    with torch.no_grad():
        for images, labels in test_loader:
            output, labels = accelerator.gather_for_metrics((model(images), labels))
            losses.append(F.cross_entropy(output, labels, reduction="none"))
            right.append(output.argmax(1) == labels)
    loss, accuracy = torch.cat(losses).mean(), torch.cat(right).float().mean()
    accelerator.print(f"epoch {epoch}: test loss {loss:.6f}, accuracy {accuracy:.3f}", flush=True)
accelerator.end_training()
