"""``nn.DataParallel``, or a module that computes the same where there are fewer GPUs than replicas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class EmulatedDataParallel(nn.Module):
    """Computes on one device what ``nn.DataParallel`` computes on several GPUs.

    Each replica normalizes with the statistics of its own slice. The replicas share the parameters, so their
    gradients are accumulated in one model. All replicas read the buffers as they were at the start of the step, and
    only replica 0's update of them is kept.

    Args:
        module: the model.
        num_replicas: number of slices into which ``torch.chunk`` splits dimension 0 of the input.

    Source: ``torch/nn/parallel/replicate.py`` (replica 0 has the module's own buffers, the other replicas have
    copies) and ``scatter_gather.py``.
    """

    def __init__(self, module: nn.Module, num_replicas: int) -> None:
        super().__init__()
        self.module = module
        self.num_replicas = num_replicas

    def forward(self, x: Tensor) -> Any:
        """The replicas' outputs concatenated along dimension 0, also inside of tuples, lists and dicts."""
        slices = x.chunk(self.num_replicas)
        copies = [{name: b.clone() for name, b in self.module.named_buffers()} for _ in slices[1:]]
        outputs = [self.module(slices[0])]
        outputs += [
            functional_call(self.module, buffers, (part,)) for buffers, part in zip(copies, slices[1:], strict=True)
        ]
        return _gather(outputs)


def _gather(outputs: Sequence[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        # nn.DataParallel gathers scalars, such as a loss that the model returns, into a vector.
        return torch.stack(list(outputs)) if first.dim() == 0 else torch.cat(list(outputs))
    if isinstance(first, Mapping):
        return type(first)((key, _gather([each[key] for each in outputs])) for key in first)  # type: ignore[call-arg]  # any mapping class
    if isinstance(first, tuple | list):
        parts = [_gather(each) for each in zip(*outputs, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def data_parallel(model: nn.Module, num_replicas: int, device: torch.device) -> nn.Module:
    """``nn.DataParallel`` if this process has ``num_replicas`` GPUs, otherwise its emulation."""
    if device.type == "cuda" and torch.cuda.device_count() >= num_replicas:
        return nn.DataParallel(model, device_ids=list(range(num_replicas)))
    return EmulatedDataParallel(model, num_replicas)
