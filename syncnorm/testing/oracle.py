"""The reference for batch norm over all ranks, fp64 ``F.batch_norm`` on the concatenated batch, and the tolerances.

Shapes: N rows of a rank, C channels, R values per channel over all ranks (rows times spatial positions).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from syncnorm.errors import InputError

__tracebackhide__ = True  # pytest shows the line of a user's test instead of this file's

TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    # eps 2e-16. Sums over a batch and a large 1/std lose a few digits; a wrong formula loses all of them.
    torch.float64: (1e-10, 1e-10),
    # eps 1.2e-7. About eighty eps, for sums over a batch and for differences of close values that 1/std amplifies.
    torch.float32: (1e-5, 1e-5),
    # eps 9.8e-4 and 7.8e-3. Statistics are merged in fp32. What remains is the rounding of the result, and of weight
    # and bias if they are in half precision too: two eps.
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
"""The only table of tolerances: dtype -> (rtol, atol), for an fp64 reference computed from the rounded inputs."""


@dataclass(frozen=True)
class BatchNormReference:
    """The fp64 tensors that :func:`batch_norm_oracle` returns; lists have one tensor per rank.

    Attributes:
        outputs: In the shapes of the inputs.
        grad_inputs: In the shapes of the inputs; this and the next two are empty without ``grad_outputs``.
        grad_weight: (C,) each: the sum of dy * xhat over the rows of this rank, before DDP reduces it.
        grad_bias: (C,) each: the sum of dy over the rows of this rank.
        running_mean: (C,), after the step, the same on every rank; None if none was given.
        running_var: (C,), likewise, from the unbiased variance of the whole batch.
    """

    outputs: list[Tensor]
    grad_inputs: list[Tensor]
    grad_weight: list[Tensor]
    grad_bias: list[Tensor]
    running_mean: Tensor | None
    running_var: Tensor | None


def batch_norm_oracle(
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNormReference:
    """Computes one training step of batch norm over the inputs of all ranks, in fp64, in this process.

    Args:
        inputs: One (N, C, *spatial) tensor per rank, 2-D to 5-D, any floating dtype. N and the spatial shape may
            differ between ranks, and N may be 0.
        grad_outputs: The gradient of each output, in its shape; None to compute the forward only.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.
        running_mean: (C,) or None. It is not changed; the result has the updated copy.
        running_var: (C,) or None.
        momentum: Weight of the batch in the running statistics; ``1 / steps`` for a cumulative average.
        eps: Added to the variance.

    Raises:
        InputError: There are no inputs, or the gradients do not match them in number and shape.

    Source: ``torch.nn.functional.batch_norm``.

    Example:
        >>> x = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
        >>> reference = batch_norm_oracle([x[:1], x[1:]], running_mean=torch.zeros(1), running_var=torch.ones(1))
        >>> reference.running_mean
        tensor([0.3000], dtype=torch.float64)
    """
    if not inputs or any(x.dim() < 2 for x in inputs):
        raise InputError(f"needs an (N, C, ...) input per rank, got shapes {[tuple(x.shape) for x in inputs]}")
    if grad_outputs is not None and [x.shape for x in inputs] != [g.shape for g in grad_outputs]:
        raise InputError("grad_outputs must have one gradient per rank, in the shape of its input")
    x_RC = torch.cat([_rows(x) for x in inputs]).requires_grad_()
    counts = [x.numel() // x.size(1) for x in inputs]
    mean, var = _copy(running_mean), _copy(running_var)
    # Without any rows the running statistics do not change, and F.batch_norm would make them NaN.
    normalize = F.batch_norm if len(x_RC) else _identity
    xhat_RC = normalize(x_RC, mean, var, training=True, momentum=momentum, eps=eps)
    w_C, b_C = (_copy(p) for p in (weight, bias))
    y_RC = xhat_RC * (1.0 if w_C is None else w_C) + (0.0 if b_C is None else b_C)
    grads: dict[str, list[Tensor]] = {"x": [], "weight": [], "bias": []}
    if grad_outputs is not None:
        dy_RC = torch.cat([_rows(g) for g in grad_outputs])
        (dx_RC,) = torch.autograd.grad(y_RC, x_RC, dy_RC)
        grads["x"] = _unrows(dx_RC, inputs)
        grads["weight"] = [part.sum(0) for part in torch.split(dy_RC * xhat_RC.detach(), counts)]
        grads["bias"] = [part.sum(0) for part in torch.split(dy_RC, counts)]
    return BatchNormReference(_unrows(y_RC.detach(), inputs), grads["x"], grads["weight"], grads["bias"], mean, var)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Check that ``actual`` equals the fp64 ``expected`` within ``TOLERANCES[dtype]``.

    Args:
        actual: The result of the code under test, any dtype.
        expected: The reference, in the same shape.
        dtype: The dtype in which the code under test computed.

    Raises:
        AssertionError: They differ in shape, or by more than the tolerance.

    Example:
        >>> assert_close(torch.ones(2), torch.ones(2, dtype=torch.float64), torch.float32)
    """
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(
        actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol, check_stride=False
    )


def _rows(x: Tensor) -> Tensor:
    """Turns (N, C, *spatial) into fp64 (N * positions, C), which can be concatenated over ranks."""
    return x.detach().double().movedim(1, -1).reshape(-1, x.size(1))


def _unrows(rows_RC: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(rows_RC, [x.numel() // x.size(1) for x in like])
    return [
        part.reshape(x.size(0), *x.shape[2:], x.size(1)).movedim(-1, 1).contiguous()
        for part, x in zip(parts, like, strict=True)
    ]


def _identity(x_RC: Tensor, *_: Any, **__: Any) -> Tensor:
    return x_RC.clone()


def _copy(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double().clone()
