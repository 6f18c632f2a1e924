"""Converts the batch norms of a model to synced batch norms or to other norms, and back."""
