"""A GAN with two optimizers and four images per rank: a step that calls backward and the optimizers itself.

What it shows: ``step(model, batch, optimizers)`` on a dict of networks, each of which gets a DDP of its own; a metric
               of the whole test set, here the sliced Wasserstein distance between generated and real images.
How to start:  syncnorm compare examples/jobs/gan.toml --html gan.html
Data: scikit-learn's digits. Needs: scikit-learn.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

LATENT = 16


def data() -> tuple[Any, Any]:
    """Images (1, 8, 8) in [-1, 1], each with noise (LATENT,), so that all arms generate from the same."""
    images = torch.tensor(load_digits().images).float().unsqueeze(1) / 8 - 1
    items = list(zip(images, torch.randn(len(images), LATENT), strict=True))
    return items[:1397], items[1397:]


def model() -> nn.ModuleDict:
    """Generator: noise (N, LATENT) -> images. Discriminator: images -> logits (N, 1)."""
    first = nn.Linear(LATENT, 128), nn.Unflatten(1, (32, 2, 2))
    up = nn.ConvTranspose2d(32, 32, 4, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    generator = nn.Sequential(*first, *up, nn.ConvTranspose2d(32, 1, 4, 2, padding=1), nn.Tanh())
    down = nn.Conv2d(16, 32, 4, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)
    last = nn.Flatten(), nn.Linear(128, 1)
    discriminator = nn.Sequential(nn.Conv2d(1, 16, 4, 2, padding=1), nn.LeakyReLU(0.2), *down, *last)
    return nn.ModuleDict({"generator": generator, "discriminator": discriminator})


def optimizers(model: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    """One for each network, under the same names."""
    return {name: torch.optim.Adam(each.parameters(), lr=2e-3, betas=(0.5, 0.9)) for name, each in model.items()}


def step(model: nn.ModuleDict, batch: Any, optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """One update of each network; returns the losses to record."""
    (generator, discriminator), (real, noise) = model.values(), batch
    fake = generator(noise)
    judged = F.softplus(-discriminator(real)).mean() + F.softplus(discriminator(fake.detach())).mean()
    optimizers["discriminator"].zero_grad()
    judged.backward()
    optimizers["discriminator"].step()
    deceived = F.softplus(-discriminator(fake)).mean()
    optimizers["generator"].zero_grad()
    deceived.backward()
    optimizers["generator"].step()
    return {"discriminator": judged, "generator": deceived}


class Distance:
    """Sliced Wasserstein distance: the mean distance of sorted projections of real and generated images."""

    higher_is_better, name = False, "Wasserstein distance"

    def __init__(self) -> None:
        self.real, self.fake = [], []
        self.directions = F.normalize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), dim=0)

    def update(self, model: nn.ModuleDict, batch: tuple[Tensor, Tensor]) -> None:
        """Generates as many images as there are real ones."""
        self.real.append(batch[0].flatten(1).cpu())
        self.fake.append(model["generator"](batch[1]).flatten(1).cpu())

    def compute(self) -> Tensor:
        """Between all images so far."""
        real, fake = ((torch.cat(each) @ self.directions).sort(0).values for each in (self.real, self.fake))
        return (real - fake).abs().mean()
