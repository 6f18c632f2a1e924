"""An Accelerate training script with synchronized batch norm: two lines more than without it.

What it shows: ``convert`` before ``prepare``, ``revert`` before saving; the losses are those of one process.
How to start:  accelerate launch --multi_gpu --num_processes 2 examples/train_accelerate.py  # without GPUs too
               torchrun --nproc-per-node 2 examples/train_accelerate.py                     # the same
               python examples/train_accelerate.py                                          # one process, to compare
What it prints: the loss over the global batch every 10 steps, alike for any number of processes; then the classes
of the norm layers that were saved. Needs: accelerate, and scikit-learn for its digits (the extra ``compare``).

The diff::

     from accelerate import Accelerator
    +import syncnorm
     ...
    +model = syncnorm.convert(model)
     model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
     ...
    -accelerator.save(accelerator.unwrap_model(model).state_dict(), "model.pt")
    +model = syncnorm.revert(accelerator.unwrap_model(model))
    +accelerator.save(model.state_dict(), "model.pt")
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncnorm

# The batch of 8 below is the global batch, and the order does not depend on the number of ranks.
loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=loading)  # cpu=True: gloo
set_seed(0)

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images[:400]).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels[:400])
loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)

blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32)]
]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
model = syncnorm.convert(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for step, (images, labels) in enumerate(loader, start=1):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    accelerator.backward(loss)
    optimizer.step()
    if step % 10 == 0:
        accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean'):.5f}")

model = syncnorm.revert(accelerator.unwrap_model(model))
accelerator.save(model.state_dict(), "model.pt")
accelerator.print("saved with", *sorted({type(m).__name__ for m in model.modules() if "Norm" in type(m).__name__}))
accelerator.end_training()
