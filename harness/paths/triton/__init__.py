"""Triton kernels: run compiled on a GPU and interpreted anywhere."""
