"""What training on many ranks needs around the layer."""

from syncnorm.training.buffers import merge_buffers
from syncnorm.training.join import joinable
from syncnorm.training.recalibration import recalibrate

__all__ = ["joinable", "merge_buffers", "recalibrate"]
