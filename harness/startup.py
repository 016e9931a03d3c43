"""What is checked before anything runs: the four packages come from one place.

Their names are generic, and another distribution may own one of them.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SIBLINGS = ("cases", "references", "reports")
CUDA_DRIVER = "libcuda.so.1"
ROOT = Path(__file__).resolve().parent.parent
"""Where the four packages are."""


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a process that is to find these packages and what this one finds, and `more`."""
    found = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found), **more}


def shadowed_package() -> str | None:
    """None, or one sentence about a sibling package that is not ours."""
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != ROOT:
            return (
                f"the package {name!r} must be the one in {ROOT}, but Python finds {origin}: another "
                "distribution shadows it; uninstall that one or put this checkout first on PYTHONPATH"
            )
    return None


def harness_version() -> str:
    """The installed version, or `checkout` where nothing is installed."""
    try:
        return version("mla-harness")
    except PackageNotFoundError:
        return "checkout"


def cuda_answers() -> bool:
    """Whether a CUDA device answers. Asks the driver, without importing torch."""
    import ctypes

    try:
        driver = ctypes.CDLL(CUDA_DRIVER)
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
