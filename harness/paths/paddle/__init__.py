"""The Triton kernels on Paddle tensors, as an engine built on Paddle calls them."""
