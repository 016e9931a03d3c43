"""What is asked: the language of batches, and everything a case's text refers to.

    >>> from cases import parse
    >>> str(parse("mla_decode/decode:63,decode:63,idle/seed=0,heads=16"))
    'mla_decode/decode:63x2,idle/heads=16'

This room imports nothing of the other four.
"""

from cases.case import Case
from cases.errors import CaseError, RuleError
from cases.options import Options
from cases.parser import parse
from cases.rows import Kind, Row

__all__ = ["Case", "CaseError", "Kind", "Options", "Row", "RuleError", "parse"]
