"""Doing it: materialise a batch, run a path in a worker, check it, and give a verdict."""
