"""What training on many ranks needs around the layer."""

__all__: list[str] = []
