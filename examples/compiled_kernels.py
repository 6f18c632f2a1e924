"""Prints the kernels that torch.compile generates for a convolution, a synced batch norm, a shortcut and a ReLU.

torchrun --nproc-per-node 2 examples/compiled_kernels.py

Forward: one kernel for the local statistics, ``syncnorm::gather_moments``, one kernel that merges the statistics and
updates the running statistics, and one for everything after that. Backward: one kernel for both sums,
``syncnorm::reduce_sums``, and one for dx; both include the backward of the ReLU. The remaining kernels, first and
last, belong to the convolution and the shortcut.
"""

import re

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import syncnorm


class Block(nn.Module):
    """``relu(norm(conv(x)) + x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 64, H, W) -> the same."""
        return torch.relu(self.norm(self.conv(x)) + x)


def step() -> None:
    """Runs a forward and a backward."""
    block(x).square().sum().backward()


dist.init_process_group("gloo")
block = torch.compile(syncnorm.convert(Block()), fullgraph=True)
x = torch.randn(4, 64, 16, 16, requires_grad=True)
_, codes = run_and_get_code(step)
if dist.get_rank() == 0:
    for direction, code in zip(("forward", "backward"), codes, strict=True):
        calls = code[code.index("def call(") :]
        names = re.findall(r"(?:cpp_(?=fused)|ops\.syncnorm\.|ops\.aten\.)(\w+)(?:\.default)?\(", calls)
        print(f"{direction}: {', '.join(names)}")
    normalize = re.findall(r"cpp_fused_\w*relu\w* = .*?'''\n(.*?)'''", codes[0], re.DOTALL)[0]
    print(normalize)
dist.destroy_process_group()
