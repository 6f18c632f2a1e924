"""How far the statistics of each rank's batch lie from those of the whole: the number that syncing is about.

Shapes: W = ranks, C = channels. Pure tensor maths.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Between ranks, in units of the whole batch; zero where every rank has the statistics of the whole.

    Attributes:
        mean: root mean square over ranks and channels of ``(mean_r - mean) / std``. 0.3 says that on a typical rank
            a local batch norm shifts a typical channel by 0.3 standard deviations.
        var: root mean square over ranks and channels of ``var_r / var - 1``.
    """

    mean: float
    var: float


def spread(means_WC: Tensor, vars_WC: Tensor, counts_W: Tensor) -> Spread:
    """The spread of one layer's statistics between ranks, each rank weighed by its count.

    Args:
        means_WC: (W, C), of each rank's values.
        vars_WC: (W, C), biased, likewise.
        counts_W: (W), values a channel on each rank; what an empty rank says is left out.

    Returns:
        Over the channels that vary at all; NaN where none does, or all ranks are empty.

    Source: the variance between and within groups, as Chan, Golub, LeVeque (1979) merge them.
    """
    counts = counts_W.double()
    share_W1 = (counts / counts.sum()).unsqueeze(1)
    here = share_W1 > 0
    means = means_WC.double().where(here, torch.zeros(()).double())
    variances = vars_WC.double().where(here, torch.zeros(()).double())
    mean = (share_W1 * means).sum(0)
    apart = (means - mean).square()
    var = (share_W1 * (variances + apart)).sum(0)
    varies = var > 0
    of_mean = (share_W1 * apart).sum(0) / var
    of_var = (share_W1 * (variances / var - 1).square()).sum(0)
    return Spread(*(float(squares[varies].mean().sqrt()) for squares in (of_mean, of_var)))
