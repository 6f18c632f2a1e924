"""MONAI: a name for the synchronized layer that every network of MONAI accepts as its ``norm``.

What it shows: ``Norm.add_factory_callable`` adds "syncnorm" to MONAI's norm types, next to "batch" and "instance"; a
               3-D UNet built with it trains on one volume per rank, where local batch statistics are poorest.
How to start:  torchrun --nproc-per-node 2 examples/frameworks/monai_net.py
Needs: monai.
"""

import os

import numpy as np
import torch
import torch.distributed as dist
from monai.data import DataLoader, Dataset, create_test_image_3d, partition_dataset
from monai.losses import DiceLoss
from monai.networks.layers import Norm
from monai.networks.nets import UNet
from recipe import report
from torch.nn.parallel import DistributedDataParallel

import syncnorm

LAYERS = (syncnorm.SyncBatchNorm1d, syncnorm.SyncBatchNorm2d, syncnorm.SyncBatchNorm3d)
Norm.add_factory_callable("syncnorm", lambda dim: LAYERS[dim - 1], "syncnorm's layers, as batch norm for all ranks")

cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
torch.manual_seed(0)  # the same weights on every rank

unet = UNet(spatial_dims=3, in_channels=1, out_channels=1, channels=(8, 16), strides=(2,), norm="syncnorm")
ddp = DistributedDataParallel(unet.to(device))
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.5)

random = np.random.RandomState(0)
volumes = [create_test_image_3d(16, 16, 16, rad_max=5, rad_min=3, random_state=random) for _ in range(8)]
pairs = [{"image": image[None], "label": (label[None] > 0).astype("float32")} for image, label in volumes]
part = partition_dataset(pairs, num_partitions=dist.get_world_size())[dist.get_rank()]
dice = DiceLoss(sigmoid=True)
losses = []
for batch in DataLoader(Dataset(part), batch_size=2 // dist.get_world_size()):
    loss = dice(ddp(batch["image"].to(device)), batch["label"].to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss)

report(unet, losses)
dist.destroy_process_group()
