"""Kernels for GPUs in Triton: NVIDIA and AMD from one source.

Importing this package, and repacking a weight, need torch only; Triton is imported with the first
kernel.
"""
