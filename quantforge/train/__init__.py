"""Recovery by training: all weights, scales and norms, on the bits that the plan chose."""
