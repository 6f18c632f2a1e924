"""Monitors the batch norms of a running training job."""

from syncnorm.monitor.training_monitor import Monitor, monitor

__all__ = ["Monitor", "monitor"]
