"""Started by a launcher: compares a synced layer with fp64 on the whole batch, then runs steps for --seconds.

Only the layer communicates, so that a broken connection is detected in the layer.
"""

import argparse
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

import syncnorm
from syncnorm.testing import assert_close, batch_norm_oracle

parser = argparse.ArgumentParser()
parser.add_argument("--timeout", type=float, default=30)
parser.add_argument("--seconds", type=float, default=0)
args = parser.parse_args()

dist.init_process_group("gloo", timeout=timedelta(seconds=args.timeout))
rank, world_size = dist.get_rank(), dist.get_world_size()
model = syncnorm.convert(nn.ModuleDict({"stem": nn.BatchNorm2d(5)}))

torch.manual_seed(0)
xs = [torch.randn(n + 1, 5, 3, 4) * 2 + 1 for n in range(world_size)]
dys = [torch.randn_like(x) for x in xs]
x = xs[rank].clone().requires_grad_()
y = model["stem"](x)
y.backward(dys[rank])
layer, expected = model["stem"], batch_norm_oracle(xs, dys, running_mean=torch.zeros(5), running_var=torch.ones(5))
for actual, oracle in [
    (y, expected.outputs[rank]),
    (x.grad, expected.grad_inputs[rank]),
    (layer.weight.grad, expected.grad_weight[rank]),
    (layer.bias.grad, expected.grad_bias[rank]),
    (layer.running_mean, expected.running_mean),
    (layer.running_var, expected.running_var),
]:
    assert_close(actual, oracle, torch.float32)
print(f"rank {rank} of {world_size} agrees with the whole batch", flush=True)

end = time.monotonic() + args.seconds
while args.seconds:
    stop = time.monotonic() > end
    model["stem"](x).backward(dys[rank])
    if stop and rank == 0:
        break
dist.destroy_process_group()
