"""Quantized layers become a checkpoint that stock tools load."""
