"""Training with synchronized batch norm, then export to ONNX with plain batch norm: ``revert`` before the export.

What it shows: how to deploy a trained model. A synced layer exchanges statistics with other ranks, for which ONNX has
               no operator; after ``revert`` the model has its original classes, with the trained statistics.
How to start:  torchrun --nproc-per-node 2 examples/export_onnx.py --file digits.onnx
What it prints: the normalization operators in the file, and the difference of its output from that of the synced
model, computed by ONNX's reference evaluator. Needs: onnx, onnxscript, scikit-learn for its digits.
"""

import argparse

import onnx
import torch
import torch.distributed as dist
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncnorm

parser = argparse.ArgumentParser()
parser.add_argument("--file", default="digits.onnx")
args = parser.parse_args()

dist.init_process_group("gloo")
torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(labels)
# ReLU before the norm: otherwise the exporter folds the batch norm into the convolution.
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.BatchNorm2d(16),
    nn.AdaptiveAvgPool2d(2),
    nn.Flatten(),
    nn.Linear(64, 10),
)
model = syncnorm.convert(model)
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
for rows in torch.arange(320).split(8):
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    optimizer.zero_grad()
    F.cross_entropy(ddp(x[mine]), y[mine]).backward()
    optimizer.step()
dist.barrier()

if dist.get_rank() == 0:
    model.eval()
    with torch.no_grad():
        want = model(x[-32:])
    model = syncnorm.revert(model)
    any_batch = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (x[-32:],), args.file, verbose=False, dynamic_shapes=any_batch, external_data=False)
    file = onnx.load(args.file)
    (got,) = ReferenceEvaluator(file).run(None, {file.graph.input[0].name: x[-32:].numpy()})
    norms = [node.op_type for node in file.graph.node if "Norm" in node.op_type]
    error = (torch.from_numpy(got) - want).abs().max() / want.abs().max()
    print(f"{', '.join(norms)}; {error:.1e} from the synced model", flush=True)
dist.destroy_process_group()
