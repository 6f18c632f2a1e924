"""Run by every Python that starts with this folder on its path, launched ranks included."""

from torchvision_operators import make_torchvision_importable

make_torchvision_importable()
