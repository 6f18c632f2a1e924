"""Distributed training around the layer: uneven inputs, precise batch norm, merged running statistics."""

from syncnorm.training.buffers import merge_buffers
from syncnorm.training.join import joinable
from syncnorm.training.recalibration import recalibrate

__all__ = ["joinable", "merge_buffers", "recalibrate"]
