"""A model and a plan become quantized layers, one block at a time."""
