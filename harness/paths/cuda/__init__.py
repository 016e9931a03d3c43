"""CUDA paths: `<operator>.cu` holds the kernels and their launchers, `<operator>.py` the path."""
