"""Batch norm on one device with micro-batches: four ways to train on 48 digits per step, 6 at a time.

python examples/accumulate.py

The first way has memory for all 48 at once. It prints how far each of the others is from it after the first step, and
the accuracies at the end.
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import syncnorm
from syncnorm.training import whole_batch

BATCH, MICRO_BATCHES, STEPS = 48, 8, 150
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, test = torch.randperm(len(x)).tensor_split([1200])
batches = [train[torch.randint(len(train), (BATCH,))] for _ in range(STEPS)]
blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32), (32, 32)]
]
plain = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def undivided(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The gradient of the batch in one piece."""
    F.cross_entropy(model(x), y).backward()


def accumulated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The sum of the gradients of micro-batches."""
    for part, target in zip(x.chunk(MICRO_BATCHES), y.chunk(MICRO_BATCHES), strict=True):
        (F.cross_entropy(model(part), target) / MICRO_BATCHES).backward()


def in_step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """The gradient of the batch, by micro-batches in step."""
    with whole_batch(model, MICRO_BATCHES):
        output = model(x)
    F.cross_entropy(output, y).backward()


ways = {
    "whole batch": (copy.deepcopy(plain), undivided),
    "plain accumulation": (copy.deepcopy(plain), accumulated),
    "convert(accumulate=8)": (syncnorm.convert(copy.deepcopy(plain), accumulate=MICRO_BATCHES), accumulated),
    "whole_batch(model, 8)": (syncnorm.convert(copy.deepcopy(plain)), in_step),
}
after_first_step: dict[str, Tensor] = {}
for name, (model, step) in ways.items():
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        step(model, x[batch], y[batch])
        optimizer.step()
        if i == 0:
            after_first_step[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    with torch.no_grad():
        accuracy = (model.eval()(x[test]).argmax(1) == y[test]).float().mean()
    distance = (after_first_step[name] - after_first_step["whole batch"]).abs().max()
    print(f"{name:22} first step {distance:.0e} from that of the whole batch, test accuracy {accuracy:.1%}")
