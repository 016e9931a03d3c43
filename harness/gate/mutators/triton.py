"""Mutants of Triton files."""

from harness.gate.mutators import Mutator
from harness.mutation.generate import generate

MUTATOR = Mutator("triton", ("interpreted", "compiled"), generate)
