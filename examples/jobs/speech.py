"""Utterances of different lengths, three per rank: padded batches, whose padding does not enter the statistics.

What it shows: ``collate`` and a model of two inputs. The norm gets the valid frames alone, as rows (frames,
               channels), so that every arm, with local and with synced statistics, ignores the padding.
How to start:  syncnorm compare examples/jobs/speech.toml --html speech.html
Data: synthetic spectrograms of rising or falling tones in noise. Needs: only torch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

BINS = 32
Batch = dict[str, Tensor]


def utterance() -> tuple[Tensor, int]:
    """A spectrogram (T, BINS) of 10 to 80 frames, and whether the tone rises."""
    frames, rising = int(torch.randint(10, 81, ())), int(torch.randint(2, ()))
    at = torch.linspace(0, 1, frames) if rising else torch.linspace(1, 0, frames)
    loudness, low = torch.rand(2).tolist()
    tone = torch.exp(-(torch.arange(BINS) - (4 + 8 * low + 12 * at).unsqueeze(1)).square() / 4)
    return (0.1 + 2 * loudness) * tone + torch.randn(frames, BINS) / 2, rising


def data() -> tuple[list[tuple[Tensor, int]], list[tuple[Tensor, int]]]:
    """Training and test utterances; the generators are seeded before the call."""
    return [utterance() for _ in range(900)], [utterance() for _ in range(300)]


def collate(items: list[tuple[Tensor, int]]) -> Batch:
    """Pads to the longest: x (N, BINS, T), lengths (N,), rising (N,)."""
    x = pad_sequence([frames for frames, _ in items], batch_first=True).mT
    lengths = torch.tensor([len(frames) for frames, _ in items])
    return {"x": x, "lengths": lengths, "rising": torch.tensor([rising for _, rising in items])}


class Block(nn.Module):
    """The convolution module of a conformer (Gulati et al. 2020) for padded batches (N, dim, T)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv1d(dim, 2 * dim, 1), nn.Conv1d(dim, dim, 1)
        self.depthwise, self.norm = nn.Conv1d(dim, dim, 7, padding=3, groups=dim, bias=False), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor, mask_NT: Tensor) -> Tensor:
        """``mask_NT`` is True where there is speech; the output is zero elsewhere."""
        y = self.depthwise(F.glu(self.expand(x), dim=1) * mask_NT.unsqueeze(1)).mT
        y = torch.zeros_like(y).masked_scatter(mask_NT.unsqueeze(2), self.norm(y[mask_NT])).mT
        return (x + self.project(F.silu(y))) * mask_NT.unsqueeze(1)


class Classifier(nn.Module):
    """Spectrograms (N, BINS, T) and their numbers of frames (N,) -> logits (N, 2)."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(BINS) for _ in range(num_blocks)), nn.Linear(BINS, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """The mean over the valid frames, then a linear layer."""
        mask_NT = torch.arange(x.size(2), device=x.device) < lengths.unsqueeze(1)
        for block in self.blocks:
            x = block(x, mask_NT)
        return self.head(x.sum(2) / lengths.unsqueeze(1))


def step(model: nn.Module, batch: Batch) -> Tensor:
    """The loss."""
    return F.cross_entropy(model(batch["x"], batch["lengths"]), batch["rising"])


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """1 for each utterance that is classified correctly."""
    return (model(batch["x"], batch["lengths"]).argmax(1) == batch["rising"]).float()


accuracy.higher_is_better = accuracy.share = True
