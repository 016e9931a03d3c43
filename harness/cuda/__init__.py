"""CUDA sources built and loaded: by nvcc for a GPU, by g++ for any machine.

`include/mla/` is the language that kernels are written in, `host/` what stands in for a GPU under g++, and
`build.py` makes libraries of them. The kernels are in `harness/paths/cuda/`.
"""
