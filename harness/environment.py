"""What a verdict was reached with: versions and device, enough to reach it again."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from harness.lanes import Lane

PACKAGES = ("torch", "triton", "numpy")


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment(lane: Lane) -> dict[str, str]:
    """Versions, the name of the device that the lane runs on, and the architecture of a GPU, as `sm_90`."""
    if lane.device != "cuda":
        return {**_versions(), "device": platform.machine()}
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {**_versions(), "device": torch.cuda.get_device_name(), "architecture": f"sm_{major}{minor}"}
