"""Kernels of other projects, each file a library: its own calls, mapped to our operators."""
