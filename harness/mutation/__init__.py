"""Kernels broken on purpose, to show that the suites notice: records, a generator, trials."""
