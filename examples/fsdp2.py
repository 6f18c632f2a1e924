"""FSDP2 (``fully_shard``) over the device mesh whose ranks share statistics.

What it shows: shard first, then convert: ``fully_shard`` replaces the class of a sharded module by a subclass of it,
               so only a conversion after that can be reverted.
How to start:  torchrun --nproc-per-node 2 examples/fsdp2.py
What it prints: which layers are synced over which ranks; the difference of the trained weights from those of one
process with plain batch norm and the whole batch; the layers after ``revert``. Needs: scikit-learn for its digits.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import syncnorm

cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if cuda else "gloo")
mesh = init_device_mesh("cuda" if cuda else "cpu", (dist.get_world_size(),))
rank, ranks = mesh.get_local_rank(), mesh.size()

torch.manual_seed(0)  # the same weights on every rank
blocks = [
    nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    for a, b in [(1, 16), (16, 32)]
]
model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).to(mesh.device_type)
whole = copy.deepcopy(model)  # trained without sharding on the whole batch, for comparison

for block in model[:2]:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
model = syncnorm.convert(model, process_group=mesh)
if rank == 0:
    print(syncnorm.describe(model), flush=True)

images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, device=mesh.device_type).float().view(-1, 1, 8, 8) / 16
y = torch.tensor(labels, device=mesh.device_type)
for net, part in ((model, slice(rank, None, ranks)), (whole, slice(None))):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for step in range(20):
        batch = slice(8 * step, 8 * step + 8)
        loss = F.cross_entropy(net(x[batch][part]), y[batch][part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

pairs = zip(model.parameters(), whole.parameters(), strict=True)
errors = [((p.full_tensor() - q).abs().max() / q.abs().max()).item() for p, q in pairs]
model = syncnorm.revert(model)
if rank == 0:
    print(f"weights: {max(errors):.1e} from one process", flush=True)
    print(syncnorm.describe(model), flush=True)
dist.destroy_process_group()
