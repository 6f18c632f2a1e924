"""Makes torchvision's CUDA wheel importable with torch's CPU build, which its compiled part does not fit.

To be imported, its Python part needs two operators of the compiled part. They are declared here without an
implementation; timm, transformers and segmentation-models-pytorch import torchvision but do not call them.
"""

import sys
from importlib.util import find_spec

import torch

_DECLARED: list[torch.library.Library] = []  # an operator exists as long as its library object


def make_torchvision_importable() -> None:
    """Imports torchvision if it is installed, with its two operators declared if the import fails otherwise."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision
    except RuntimeError as error:  # raised when a fake kernel is registered for a missing operator
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        import torchvision  # noqa: F401, so that it is there for whoever imports it next
