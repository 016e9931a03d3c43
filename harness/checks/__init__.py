"""The checks, found by listing this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from cases.discovery import discover
from harness.checks._check import CheckPlugin

__all__ = ["CheckPlugin", "checks"]


@cache
def checks() -> dict[str, CheckPlugin]:
    """Every check by name; those that launch again come last.

    Raises:
        ImportError: a check's file cannot be imported; a verdict without it would say too much.
    """
    plugins = []
    for item in discover("harness.checks", Path(__file__).parent, "CHECK"):
        if not isinstance(item.value, CheckPlugin):
            raise ImportError(f"{item.module} must end in CHECK = CheckPlugin(...): {item.reason}")
        if item.value.name != item.module.rpartition(".")[2]:
            raise ImportError(f"{item.module} must hold a check of its own name, got {item.value.name}")
        plugins.append(item.value)
    return {plugin.name: plugin for plugin in sorted(plugins, key=lambda check: check.relaunches)}
