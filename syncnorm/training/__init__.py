"""Training around the layer: uneven inputs, precise batch norm, merged running statistics, micro-batches."""

from syncnorm.training.buffers import merge_buffers
from syncnorm.training.join import joinable
from syncnorm.training.recalibration import recalibrate
from syncnorm.training.whole_batch import run_in_step, whole_batch

__all__ = ["joinable", "merge_buffers", "recalibrate", "run_in_step", "whole_batch"]
