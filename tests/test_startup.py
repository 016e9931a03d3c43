"""harness/startup.py, but for what tests/test_cli.py asks of whole runs."""

import os

from harness.startup import ROOT, child_environment


def test_a_child_process_finds_this_checkout_first_and_then_what_this_process_finds(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert child_environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "elsewhere"]
    assert child_environment(PYTHONPATH="only")["PYTHONPATH"] == "only"
    monkeypatch.delenv("PYTHONPATH")
    assert child_environment(A="b")["PYTHONPATH"] == str(ROOT)
    assert child_environment(A="b")["A"] == "b"
