"""The convolution block of a conformer on utterances of different lengths: padding does not enter the statistics.

What it shows: ``layer(x, mask=...)`` in DDP. The first ranks have the short utterances, the last ranks the long ones.
               Each rank pads to its own longest, so ranks differ in shape and in the number of valid frames.
How to start:  torchrun --nproc-per-node 2 examples/speech_block.py
What it prints: the first and the last loss; then the difference of rank 0's logits from those of one process with all
utterances, which is rounding with the mask and large without it. Data: synthetic spectrograms of rising or falling
tones in noise. Needs: only torch.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm


class Classifier(nn.Module):
    """Pointwise, GLU, depthwise, batch norm, SiLU, pointwise, shortcut (Gulati et al. 2020); mean over time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Conv1d(dim, 2 * dim, 1)
        self.depthwise = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = syncnorm.SyncBatchNorm1d(dim)
        self.project = nn.Conv1d(dim, dim, 1)
        self.head = nn.Linear(dim, 2)

    def forward(self, x: Tensor, lengths: Tensor, masked: bool = True) -> Tensor:
        """Spectrograms (N, dim, T) and their numbers of frames (N,) -> logits (N, 2)."""
        mask = torch.arange(x.size(2)) < lengths.unsqueeze(1)  # (N, T), True where there is speech
        y = F.glu(self.expand(x), dim=1) * mask.unsqueeze(1)  # zeros after the end, for the depthwise convolution
        y = self.norm(self.depthwise(y), mask=mask if masked else None)
        y = (x + self.project(F.silu(y))) * mask.unsqueeze(1)
        return self.head(y.sum(2) / lengths.unsqueeze(1))


def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The utterances of all ranks (8, 32, longest), their lengths, and whether the tone rises."""
    lengths = torch.cat([torch.randint(low, low + 20, (4,), generator=generator) for low in (10, 60)])
    rising = torch.randint(2, (8,), generator=generator)
    at = torch.arange(int(lengths.max())) / lengths.unsqueeze(1)
    bins = 8 + 16 * torch.where(rising.bool().unsqueeze(1), at, 1 - at)
    tone = torch.exp(-(torch.arange(32).view(1, -1, 1) - bins.unsqueeze(1)).square() / 4)
    return tone + torch.randn(tone.shape, generator=generator) / 4, lengths, rising


dist.init_process_group("gloo")
rank = dist.get_rank()
mine = torch.arange(8).tensor_split(dist.get_world_size())[rank]
torch.manual_seed(0)
model = Classifier(32)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.Adam(ddp.parameters(), lr=5e-3)
generator = torch.Generator().manual_seed(0)
for step in range(60):
    x, lengths, rising = batch(generator)
    loss = F.cross_entropy(ddp(x[mine][..., : lengths[mine].max()], lengths[mine]), rising[mine])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    if rank == 0 and step in (0, 59):
        print(f"step {step}: loss {mean / dist.get_world_size():.3f}", flush=True)

with torch.no_grad():
    with syncnorm.no_sync_stats():  # this rank computes all utterances alone
        want = model(x, lengths)[mine]
    for masked in (True, False):
        error = (model(x[mine][..., : lengths[mine].max()], lengths[mine], masked) - want).abs().max()
        if rank == 0:
            print(f"{'with' if masked else 'without'} the mask: {error:.1e} from one process", flush=True)
dist.destroy_process_group()
