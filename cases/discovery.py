"""Finding plug-in files: every module of a folder ends in one constant, and listing the folder finds it.

A module that cannot be imported costs only itself; the reason is kept and shown.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Found:
    """One plug-in module: `value` is its constant, or `reason` says why there is none.

    `module` is the module's name, or of what another package registered the entry point's.
    """

    module: str
    value: object | None
    reason: str | None


def discover(package: str, folder: Path, constant: str) -> Iterator[Found]:
    """Every module of `folder` and its subfolders, in name order, with its constant.

    Modules whose name begins with `_`, and packages' `__init__`, hold helpers and are passed over.
    A failure of any kind while importing is the module's own and becomes its `reason`.
    """
    for file in sorted(folder.rglob("*.py")):
        if file.name.startswith("_"):
            continue
        module = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
        try:
            value = getattr(importlib.import_module(module), constant)
        except Exception as error:
            yield Found(module, None, f"{type(error).__name__}: {error}")
        else:
            yield Found(module, value, None)


def registered(group: str) -> Iterator[Found]:
    """What installed packages name in a group of entry points, in order of their names."""
    for entry in sorted(importlib.metadata.entry_points(group=group), key=lambda entry: entry.name):
        try:
            value = entry.load()
        except Exception as error:
            yield Found(entry.name, None, f"{entry.value}: {type(error).__name__}: {error}")
        else:
            yield Found(entry.name, value, None)
