"""How much ranks differ: the divergence of their statistics, and digests that show whether tensors are identical.

Shapes: W = ranks, C = channels.
"""

import hashlib
from collections.abc import Sequence
from math import isfinite, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

# fp64 represents integers of 48 bits exactly, so digests can be gathered in one tensor with other numbers.
_DIGEST_BYTES = 6


class RankDivergence(NamedTuple):
    """How far the statistics of single ranks are from those of the global batch; zero if all ranks agree with it.

    Attributes:
        mean: root mean square over ranks and channels of ``(mean_r - mean) / std``. At 0.3, local batch norm shifts a
            typical channel on a typical rank by 0.3 standard deviations of the global batch.
        var: root mean square over ranks and channels of ``var_r / var - 1``.
    """

    mean: float
    var: float


def rank_divergence(means_WC: Tensor, vars_WC: Tensor, counts_W: Tensor) -> RankDivergence:
    """The divergence of one layer's statistics between ranks, each rank weighted by its count.

    Args:
        means_WC: (W, C), of the values on each rank.
        vars_WC: (W, C), biased, of the same values.
        counts_W: (W), values per channel on each rank; the statistics of a rank with count 0 are ignored.

    Returns:
        Over the channels whose global variance is positive; NaN if there are none or all ranks are empty.

    Source: the variance between and within groups, as Chan, Golub, LeVeque (1979) merge them.
    """
    counts = counts_W.double()
    share_W1 = (counts / counts.sum()).unsqueeze(1)
    has_values = share_W1 > 0
    means = means_WC.double().where(has_values, torch.zeros(()).double())
    variances = vars_WC.double().where(has_values, torch.zeros(()).double())
    mean = (share_W1 * means).sum(0)
    squared_distances = (means - mean).square()
    var = (share_W1 * (variances + squared_distances)).sum(0)
    varies = var > 0
    of_mean = (share_W1 * squared_distances).sum(0) / var
    of_var = (share_W1 * (variances / var - 1).square()).sum(0)
    return RankDivergence(*(float(squares[varies].mean().sqrt()) for squares in (of_mean, of_var)))


def root_mean_square(values: Sequence[float | None]) -> float | None:
    """Of the finite values; None if there are none."""
    finite = [value for value in values if value is not None and isfinite(value)]
    return sqrt(sum(value * value for value in finite) / len(finite)) if finite else None


def bit_digest(*tensors: Tensor) -> int:
    """A 48-bit hash of the bits of ``tensors``; a GPU is synchronized with the host."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "little")
