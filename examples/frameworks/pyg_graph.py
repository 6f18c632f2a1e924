"""PyTorch Geometric: graphs of different sizes, so that each rank has another number of nodes.

What it shows: ``syncnorm.convert`` finds the ``nn.BatchNorm1d`` within PyG's ``BatchNorm``; its statistics are those
               of all nodes of all ranks, each node counting once.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/pyg_graph.py
Needs: torch-geometric.
"""

import warnings

import torch
import torch.distributed as dist
from recipe import report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import BatchNorm, GINConv, global_mean_pool
from torch_geometric.utils import erdos_renyi_graph

import syncnorm


class Net(nn.Module):
    """Graph isomorphism network that classifies graphs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(GINConv(nn.Linear(a, width)) for a in (4, width))
        self.norms = nn.ModuleList(BatchNorm(width) for _ in self.convs)
        self.head = nn.Linear(width, 2)

    def forward(self, graphs: Batch) -> Tensor:
        """(graphs, 2) scores; the norms see (nodes, width), another number of nodes on each rank."""
        x = graphs.x
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x, graphs.edge_index)).relu()
        return self.head(global_mean_pool(x, graphs.batch))


def random_graph() -> Data:
    """A graph of 5 to 40 nodes, dense (class 1) or sparse (class 0)."""
    nodes, dense = int(torch.randint(5, 41, ())), int(torch.randint(2, ()))
    edges = erdos_renyi_graph(nodes, 0.4 if dense else 0.1)
    return Data(x=torch.randn(nodes, 4), edge_index=edges, y=dense)


dist.init_process_group("gloo")
torch.manual_seed(0)  # the same weights and graphs on every rank
graphs = [random_graph() for _ in range(32)]
# convert warns of PyG's own branch for a single node, which only allow_single_element=True would take.
warnings.filterwarnings("ignore", "syncnorm.convert found 2 layer")
model = syncnorm.convert(Net(16))
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

sampler = DistributedSampler(graphs, shuffle=False)
losses, nodes = [], []
for batch in DataLoader(graphs, batch_size=8 // dist.get_world_size(), sampler=sampler):
    loss = cross_entropy(ddp(batch), batch.y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss)
    nodes.append(batch.num_nodes)

print(f"rank {dist.get_rank()}: nodes per step {nodes}", flush=True)
report(model, losses)
dist.destroy_process_group()
