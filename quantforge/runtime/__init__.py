"""A checkpoint becomes a network that runs packed."""
