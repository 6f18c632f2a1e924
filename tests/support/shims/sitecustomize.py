"""Run by every Python process that starts with this folder on its path, including launched ranks."""

from torchvision_operators import make_torchvision_importable

make_torchvision_importable()
