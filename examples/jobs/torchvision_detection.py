"""torchvision's FCOS on the data of detection.py, judged by COCO's mean average precision.

What it shows: a detector as it comes, with a backbone of ours, and ``metric = "map"``.
How to start:  syncnorm compare examples/jobs/torchvision_detection.toml --html detection.html
Data: a digit of scikit-learn on noise. Needs: scikit-learn, torchvision, and pip install "syncnorm[metrics]".
"""

from detection import SIZE, STRIDE, backbone
from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator


def model() -> nn.Module:
    """All images are scaled to one size: with padding to the largest image of each rank, ranks would differ in it."""
    body = backbone()
    body.out_channels = 32
    anchors = AnchorGenerator(((STRIDE,),), ((1.0,),))
    return FCOS(body, 2, anchor_generator=anchors, fixed_size=(SIZE, SIZE), image_mean=[0.5], image_std=[0.5])
