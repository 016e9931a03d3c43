"""Telling it: one file a writer, from finished verdicts. Nothing is re-run or re-computed here."""
