"""Training with synchronised batch norm, then an ONNX file with plain batch norm: ``revert`` before the export.

What it shows: the way out of training. A synced layer exchanges statistics with other ranks, which no ONNX operator
               does; after ``revert`` the model holds the classes of before, with the trained statistics.
How to start:  torchrun --nproc-per-node 2 examples/export_onnx.py --file digits.onnx
What it prints: the operators of the file that normalise, and how far its output is from that of the synced model, by
ONNX's own reference evaluator. Needs: onnx, onnxscript, scikit-learn for its digits.
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
# ReLU before the norm: else the exporter folds batch norm into the convolution
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
optimiser = torch.optim.SGD(ddp.parameters(), lr=0.1)
for rows in torch.arange(320).split(8):
    mine = rows[dist.get_rank() :: dist.get_world_size()]
    optimiser.zero_grad()
    F.cross_entropy(ddp(x[mine]), y[mine]).backward()
    optimiser.step()
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
