"""From a model with batch norm to one with synced batch norm, or with another norm, and back."""
