"""torchvision beside a torch that its compiled part does not fit: torch's CPU build and torchvision's CUDA wheel.

Its Python part needs two names of that compiled part to be imported at all. Declared here, without an implementation,
they let timm, transformers and segmentation-models-pytorch import what they use of it, none of which calls them.
"""

import sys
from importlib.util import find_spec

import torch

_DECLARED: list[torch.library.Library] = []  # an operator lives as long as its library


def make_torchvision_importable() -> None:
    """Imports torchvision, if there is one: as it is, or else with its two operators declared."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:  # torch's for a fake of an operator that does not exist
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401, so that it is there for whoever imports it next
