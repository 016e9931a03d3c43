"""What of kernels and host code was run: one model of sites, and what fills it."""
