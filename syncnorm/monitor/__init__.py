"""What goes on in the norm layers of a running job, and whether this machine gets them right."""

from syncnorm.monitor.watching import Monitor, monitor

__all__ = ["Monitor", "monitor"]
