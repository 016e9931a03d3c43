"""`KernelPath`: one production implementation of an operator, as the harness sees it.

A file of `harness/paths/` holds the paths of one kernel and ends in `PATHS = (KernelPath(...), ...)`.
`family/operator` lies in `<family>/<operator>.py`, `family/operator@variant` there too or in
`<family>/<operator>_<variant>.py`; all of `adapters/library/...` in `adapters/<library>.py`. Other packages
name theirs in the entry-point group `mla_harness.paths`. Only workers import these files.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cases import Case

ENTRY_POINTS = "mla_harness.paths"
"""Group of entry points; each names a tuple of paths, such as `mypackage.paths:PATHS`."""

Workspace = Mapping[str, tuple[tuple[int, ...], str]]
"""Scratch tensors by name: shape, and dtype as torch names it (`float32`)."""

Tensors = Mapping[str, Any]
"""Tensors and scalars by name. What a tensor is (torch, Paddle, NumPy) is between path and lane."""


TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What a workspace calls the dtypes of option `dtype`."""


def no_workspace(case: Case) -> Workspace:
    """For paths that need no scratch memory."""
    return {}


def no_plan(inputs: Tensors) -> Tensors:
    """For paths that launch from the step's metadata as it is."""
    return {}


@dataclass(frozen=True)
class KernelPath:
    """One path.

    Attributes:
        name: `family/operator`, optionally `@variant`, e.g. `triton/mla_decode`.
        operator: name of the contract it fulfils.
        lanes: where it runs.
        supports: None, or one sentence why it does not take a case.
        run: (inputs, outputs, workspace) -> None. Launches on the current stream and returns; writes
            every element of the outputs; never waits for the device, never allocates.
        workspace: the scratch tensors of a case. Allocated and poisoned by the harness.
        plan: what a library's engine makes of a step's metadata once for all layers, outside any graph; it
            may wait and allocate. `run` gets it with the workspace, and `bench` leaves it out of the time.
        batch_invariant: whether a row's bits do not depend on the other rows of the batch.
        allocates: the library allocates its own outputs, so the guard checks on them are skipped.
        omits: outputs of the contract that the library does not give: nothing is said of them.
        scale: the softmax scale that a library without an argument for it takes for a case; the path brings
            its queries to it, rounded once to the model dtype. The oracles then attend to queries so rounded.
        libraries: version of each library that it calls, as every verdict states it.
        unavailable: None, or why it cannot run although its file can be imported: the library is missing.
        environment: variables of the process that runs it, set before anything is imported there; None
            removes one. Paths with other variables, or none, run in other processes.
        rounds_products: of a rotation, whether products are rounded to the model dtype before they are
            added, as FastDeploy does; its budget then counts these roundings too.
        rounds_keys: of attention over a packed cache, whether what is dequantised is rounded to bf16 before
            it is multiplied, as FlashMLA does; the oracles then attend to keys so rounded.
    """

    name: str
    operator: str
    lanes: tuple[str, ...]
    supports: Callable[[Case], str | None]
    run: Callable[[Tensors, Tensors, Tensors], None]
    workspace: Callable[[Case], Workspace] = no_workspace
    plan: Callable[[Tensors], Tensors] = no_plan
    batch_invariant: bool = False
    allocates: bool = False
    omits: tuple[str, ...] = ()
    scale: Callable[[Case], float] | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)
    unavailable: str | None = None
    environment: Mapping[str, str | None] = field(default_factory=dict)
    rounds_products: bool = False
    rounds_keys: bool = False

    @property
    def is_cuda(self) -> bool:
        """Whether its kernels are CUDA sources of ours, which lane `host` runs on fibers."""
        return self.name.startswith("cuda/")


def to_scale(query: Any, ratio: float) -> Any:
    """A query for a softmax scale so many times smaller: multiplied in float32, rounded once to its dtype."""
    return (query.float() * ratio).to(query.dtype)


def path_named(name: str) -> KernelPath:
    """The path of a name, imported from where the convention above puts it.

    Raises:
        ImportError: there is no such module, or it has no such path.
    """
    base, _, variant = name.partition("@")
    if base.startswith("adapters/"):
        base = base.rpartition("/")[0]
    module = f"harness.paths.{base.replace('/', '.')}"
    if variant and importlib.util.find_spec(f"{module}_{variant}") is not None:
        module = f"{module}_{variant}"
    paths: tuple[KernelPath, ...] = importlib.import_module(module).PATHS
    found = next((path for path in paths if path.name == name), None)
    if found is None:
        raise ImportError(f"{module} has no path {name}")
    return found
