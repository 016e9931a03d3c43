"""What is right: slow, readable float64 oracles, from named tensors to named tensors."""
