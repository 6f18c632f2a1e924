"""Trains a critic with a gradient penalty, as in WGAN-GP, in DDP with synchronized batch norm.

torchrun --nproc-per-node 2 examples/gradient_penalty.py

The penalty contains the gradient of the critic with respect to its input, so its own gradient needs the double
backward of each layer, through the statistics that all ranks share.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm


def main() -> None:
    """Trains for a hundred steps."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    critic = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.SiLU(),
        nn.Conv2d(16, 1, 8),
    )
    critic = DistributedDataParallel(syncnorm.convert(critic))
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.005)

    torch.manual_seed(dist.get_rank())  # from now on each rank draws other images
    for step in range(100):
        x = torch.randn(8, 1, 8, 8, requires_grad=True)
        score = critic(x).flatten()
        (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        norm = gradient.flatten(1).norm(dim=1)
        loss = score.mean() + 10 * (norm - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step in (0, 99):
            print(f"step {step}: mean norm of the gradient at the input {norm.mean():.3f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    # In a function, so that graphs and groups are freed before the interpreter shuts down, which the threads of
    # autograd and gloo do not always survive.
    main()
