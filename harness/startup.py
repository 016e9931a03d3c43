"""What is checked before anything runs: the four packages come from one place.

Their names are generic, and another distribution may own one of them.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SIBLINGS = ("cases", "references", "reports")
CUDA_DRIVER = "libcuda.so.1"


def shadowed_package() -> str | None:
    """None, or one sentence about a sibling package that is not ours."""
    root = Path(__file__).resolve().parent.parent
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        origin = None if spec is None or spec.origin is None else Path(spec.origin).resolve()
        if origin is None or origin.parent.parent != root:
            return (
                f"the package {name!r} must be the one in {root}, but Python finds {origin}: another "
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
