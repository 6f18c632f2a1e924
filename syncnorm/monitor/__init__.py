"""Monitors the batch norms of a running training job."""

from syncnorm.monitor.scalars import WriteScalar, scalars_of
from syncnorm.monitor.training_monitor import Monitor, monitor

__all__ = ["Monitor", "WriteScalar", "monitor", "scalars_of"]
