"""``nn.DataParallel``, or on fewer GPUs than replicas a module that computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class EmulatedDataParallel(nn.Module):
    """What ``nn.DataParallel`` computes on several GPUs, on one device.

    Each replica normalises with the statistics of its own slice. The replicas share the parameters, so their
    gradients add up in one model. All replicas read the buffers as they were at the start of the step, and
    only replica 0's update of them is kept.

    Args:
        module: the model.
        num_replicas: slices that dimension 0 of the input is cut into, with ``torch.chunk``.

    Source: ``torch/nn/parallel/replicate.py`` (replica 0's buffers are the module's own, the others' copies)
    and ``scatter_gather.py``.
    """

    def __init__(self, module: nn.Module, num_replicas: int) -> None:
        super().__init__()
        self.module = module
        self.num_replicas = num_replicas

    def forward(self, x: Tensor) -> Any:
        """The replicas' outputs, concatenated along dimension 0; those in tuples, lists and dicts likewise."""
        slices = x.chunk(self.num_replicas)
        copies = [{name: b.clone() for name, b in self.module.named_buffers()} for _ in slices[1:]]
        outputs = [self.module(slices[0])]
        outputs += [
            functional_call(self.module, buffers, (part,)) for buffers, part in zip(copies, slices[1:], strict=True)
        ]
        return _joined(outputs)


def _joined(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        # As nn.DataParallel gathers a loss that the model returns.
        return torch.stack(list(outputs)) if first.dim() == 0 else torch.cat(list(outputs))
    if isinstance(first, Mapping):
        return type(first)((key, _joined([each[key] for each in outputs])) for key in first)  # type: ignore[call-arg]
    if isinstance(first, tuple | list):
        parts = [_joined(each) for each in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def data_parallel(model: nn.Module, num_replicas: int, device: torch.device) -> nn.Module:
    """``nn.DataParallel`` on that many GPUs where this process has them; else its emulation."""
    if device.type == "cuda" and torch.cuda.device_count() >= num_replicas:
        return nn.DataParallel(model, device_ids=list(range(num_replicas)))
    return EmulatedDataParallel(model, num_replicas)
