"""Convolutional networks: the same compiler on graphs instead of chains of blocks."""
