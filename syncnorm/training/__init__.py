"""What training on many ranks needs around the layer."""

from syncnorm.training.join import joinable

__all__ = ["joinable"]
