"""Training around the layer: uneven inputs, precise batch norm, merged statistics, gradient accumulation."""

from syncnorm.layer.window import end_window
from syncnorm.training.buffers import merge_buffers
from syncnorm.training.join import joinable
from syncnorm.training.large_batch import run_in_step, whole_batch
from syncnorm.training.recalibration import recalibrate

__all__ = ["end_window", "joinable", "merge_buffers", "recalibrate", "run_in_step", "whole_batch"]
