"""Trains a GAN with a gradient penalty (WGAN-GP), on several ranks with the same result as in one process.

What it shows: a generator and a critic that train alternately in DDP, both with synchronized batch norm; a forward
               without gradient that still syncs; a penalty differentiated through the shared statistics.
How to start:  torchrun --nproc-per-node 2 examples/wgan_gp.py
What it prints: the mean norm of the gradient, which the penalty pulls to 1, over the first and last 5 of 40 steps;
the difference of all weights and running statistics from those of one process with the whole batch, in fp64.
Needs: scikit-learn for its digits.
"""

import copy

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm

torch.set_default_dtype(torch.float64)  # Adam amplifies the rounding of fp32
DIGITS = torch.tensor(load_digits().images).unsqueeze(1) / 8 - 1  # (1797, 1, 8, 8), in [-1, 1]


def train(generator: nn.Module, critic: nn.Module, rows: slice) -> list[Tensor]:
    """Makes 40 steps on these rows of each batch of 16; returns the mean norm of the critic's input gradient."""
    torch.manual_seed(1)  # every rank draws the whole batch and uses its own rows
    of_generator, of_critic = (
        torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.9)) for net in (generator, critic)
    )
    norms = []
    for step in range(40):
        real, z = DIGITS[torch.randint(len(DIGITS), (16,))][rows], torch.randn(16, 16)[rows]
        with torch.no_grad():
            fake = generator(z)
        mixed = torch.lerp(real, fake, torch.rand(16, 1, 1, 1)[rows]).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
        norm = gradient.flatten(1).norm(dim=1)
        of_critic.zero_grad()
        score = critic(torch.cat([fake, real])).view(2, -1).mean(1)
        (score[0] - score[1] + 10 * (norm - 1).square().mean()).backward()
        of_critic.step()
        norms.append(norm.detach().mean())
        if step % 2:
            of_generator.zero_grad()
            bare = getattr(critic, "module", critic)  # without DDP: the critic is not trained here
            (-bare(generator(z)).mean()).backward()
            of_generator.step()
    return norms


dist.init_process_group("gloo")
torch.manual_seed(0)
generator = nn.Sequential(
    nn.Linear(16, 512),
    nn.Unflatten(1, (32, 4, 4)),
    *(nn.BatchNorm2d(32), nn.ReLU(), nn.Upsample(scale_factor=2)),
    *(nn.Conv2d(32, 1, 3, padding=1), nn.Tanh()),
)
critic = nn.Sequential(
    nn.Conv2d(1, 16, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 1, 4)
)
nets = [generator, critic]
whole = copy.deepcopy(nets)
ranks = [DistributedDataParallel(syncnorm.convert(net)) for net in nets]
norms = train(*ranks, slice(dist.get_rank(), None, dist.get_world_size()))
train(*whole, slice(None))

state, want = ([v for net in some for v in net.state_dict().values()] for some in (nets, whole))
apart = max((ours - theirs).abs().max() for ours, theirs in zip(state, want, strict=True))
if dist.get_rank() == 0:
    print(f"norm {sum(norms[:5]) / 5:.2f} to {sum(norms[-5:]) / 5:.2f}; {apart:.1e} from one process", flush=True)
dist.destroy_process_group()
