"""How one call is computed: moments, merging, normalizing, and their derivatives."""
