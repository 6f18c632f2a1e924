"""Records to read: on a terminal, as JSON. Knows the records only, and nothing of how they were made."""
