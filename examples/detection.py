"""Detection with two images per rank: a feature pyramid and a head, both with batch norm.

What it shows: too few images per rank for local statistics. The levels of the pyramid share the convolutions of the
               head, but not its batch norms.
How to start:  torchrun --nproc-per-node 2 examples/detection.py
What it prints: for each level, in how many of 100 new images the cell with the highest score is at most one cell from
the center of the digit, and the size at most 25 % wrong; the difference of the running statistics between ranks.
Data: synthetic, a small and a large digit of scikit-learn at random places on noise. Needs: scikit-learn.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm

DIGITS = torch.tensor(load_digits().images).float().unsqueeze(1) / 16


def conv(a: int, b: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(a, b, 3, stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


class Detector(nn.Module):
    """(N, 1, 64, 64) -> (N, 2, 16, 16), (N, 2, 8, 8): a logit for "a center is here", and log(size in cells)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Sequential(conv(1, 16, 2), conv(16, width, 2)), conv(width, width, 2)
        self.head, self.last = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Conv2d(width, 2, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))  # the statistics of the levels differ

    def forward(self, x: Tensor) -> list[Tensor]:
        """The head on the fine and on the coarse level of the pyramid."""
        coarse = self.coarse(fine := self.fine(x))
        levels = zip(self.norms, (fine + F.interpolate(coarse, scale_factor=2), coarse), strict=True)
        return [self.last(F.relu(norm(self.head(x)))) for norm, x in levels]


def step(count: int) -> tuple[Tensor, list[int]]:
    """Runs the model on images with a small and a large digit each; returns the loss and the numbers found."""
    canvas, places, loss, found = torch.rand(count, 1, 64, 64) / 4, torch.randint(32, (count, 2, 2)), 0, []
    sizes = torch.tensor([10, 24]) + torch.randint(9, (count, 2))
    for image, corners, both in zip(canvas, places.tolist(), sizes.tolist(), strict=True):
        for (y, x), size in zip(corners, both, strict=True):
            image[:, y : y + size, x : x + size] += F.interpolate(DIGITS[torch.randint(len(DIGITS), (1,))], size)[0]
    for level, out in enumerate(ddp(canvas) if model.training else model(canvas)):
        n, width, size = torch.arange(count), out.size(-1), sizes[:, level] * out.size(-1) / 64  # in cells
        row, column = (places[:, level] * width / 64 + size.unsqueeze(1) / 2).long().T
        (logits, logs), cell = out.flatten(2).unbind(1), row * width + column
        loss = loss + F.cross_entropy(logits, cell) + (logs[n, cell] - size.log()).abs().mean()
        best = logits.argmax(1)
        off = torch.maximum((best // width - row).abs(), (best % width - column).abs())
        found.append(int(((off <= 1) & ((logs[n, best].exp() / size - 1).abs() < 0.25)).sum()))
    return loss, found


dist.init_process_group("gloo")
torch.manual_seed(0)
model = syncnorm.convert(Detector())
ddp = DistributedDataParallel(model, forward_sync_buffers=False)  # DDP does not broadcast the running statistics
optimizer = torch.optim.Adam(ddp.parameters(), lr=5e-3)
torch.manual_seed(1 + dist.get_rank())
for _ in range(250):
    optimizer.zero_grad()
    step(2)[0].backward()
    optimizer.step()
mine = torch.cat([value for name, value in model.named_buffers() if "running" in name])
dist.broadcast(first := mine.clone(), 0)
dist.reduce(apart := (mine - first).abs().max(), 0, dist.ReduceOp.MAX)
if dist.get_rank() == 0:
    model.eval()
    small, large = step(100)[1]
    print(f"found {small} small and {large} large of 100; ranks apart by {apart:.1e}", flush=True)
dist.destroy_process_group()
