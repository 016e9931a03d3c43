"""Mutants of .cu files: each is compiled, for 2 to 9 seconds, before a case can run on it."""

from harness.gate.mutators import Mutator
from harness.mutation.generate_cuda import generate_cuda

MUTATOR = Mutator("cuda", ("host",), generate_cuda, cost=4)
