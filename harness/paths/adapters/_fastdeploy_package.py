"""FastDeploy's installed package: which operators its version has, and with which arguments they are called.

Importing the package imports an engine, and an operator that was built for another machine may end the
process that looks at it. So a child process is asked first, and what it says is kept as one `Capability` for
each operator. The package itself is imported where a path runs, in a worker, which is a child as well: a
crash costs one case.

Arguments are told by what there is to tell them by:

    1. names, by `inspect`: Paddle writes a Python function for every operator, with the names of its inputs
       and attributes, and FastDeploy wraps it
    2. kinds, such as (Tensor, Tensor, int), of a function without names: from pybind11's signature, in the
       docstring or in the TypeError of a call without arguments, which launches nothing. `SIGNATURES` has
       the names of known kinds; of two with the same kinds the newer one counts

All operators are called by position: what pybind11 bound without names takes no other.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import packages_distributions, version
from types import ModuleType
from typing import Any

from harness.kernel_path import Tensors
from harness.paths.adapters._fastdeploy_signatures import (
    ALIASES,
    MISNAMED,
    MODULES,
    SIGNATURES,
    kind_of,
)
from harness.paths.adapters._loading import UNKNOWN
from harness.watchdog import CLOCK

PACKAGE = "fastdeploy"
INDEX = "https://www.paddlepaddle.org.cn/packages/stable/cu126/"
INSTALL = f"pip install paddlepaddle-gpu fastdeploy-gpu -i {INDEX}"
"""As docs/get_started/installation/nvidia_gpu.md of FastDeploy says, which tells not to install from PyPI."""

ENVIRONMENT: Mapping[str, str | None] = {
    # What splits keys for these operators reads it at every call, and asks for this value literally.
    "FD_ATTENTION_BACKEND": "MLA_ATTN",
    # Decode rows would go to another library.
    "USE_FLASH_MLA": None,
    # Cache writes would signal another process.
    "FLAGS_use_pd_disaggregation": None,
    "FLAGS_use_pd_disaggregation_per_chunk": None,
    "FLAGS_fmt_write_cache_completed_signal": None,
    # The tile of a row's keys is chosen by the operator.
    "FLAGS_mla_dec_chunk_size": None,
}
"""Variables of a process that calls the operators; None removes one. A process keeps those that it has when
it imports the package: paths with another value of one run in another process."""

LOOK_SECONDS = 240.0
"""Time for the child to import an engine."""


# ---- capabilities --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Capability:
    """How a version's operator is called.

    Attributes:
        arguments: their names, in order.
        optional: those that may be None or left out, as far as the version says so.
    """

    name: str
    arguments: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Name and number of arguments: what tells versions apart, `get_padding_offset/6 (3 optional)`."""
        may_be_left_out = f" ({len(self.optional)} optional)" if self.optional else ""
        return f"{self.name}/{len(self.arguments)}{may_be_left_out}"

    def ordered(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of the values by name those that this version takes, in its order; None where nothing is given."""
        names = {name: name if name in given else ALIASES.get(name, name) for name in self.arguments}
        return {name: given.get(names[name]) for name in self.arguments}


def capability_of(name: str, told: Mapping[str, Any]) -> Capability | str:
    """How an operator is called, or one sentence why that is not known.

    Args:
        told: what the child says of it: `names`, or `kinds` where it has none, and `optional`.
    """
    known = SIGNATURES[name]
    if told["names"] is None:
        kinds = tuple(told["kinds"])
        found = [names for names in known if tuple(map(kind_of, names)) == kinds]
        if not found:
            asked = ", ".join(kinds) if kinds else "arguments that it does not tell"
            return f"{name} takes ({asked}), which is no signature that is known here"
        optional = tuple(one for one, may in zip(found[0], told["optional"], strict=True) if may)
        return Capability(name, found[0], optional)
    names = tuple(told["names"])
    optional = tuple(told["optional"])
    bindable = {one for signature in known for one in signature} | set(ALIASES)
    # What stands last and may be left out is left to the version.
    while names and names[-1] not in bindable and names[-1] in optional:
        names = names[:-1]
    unknown = [one for one in names if one not in bindable]
    if unknown:
        return f"{name} asks for {unknown[0]}, which is not known here"
    order = MISNAMED.get(names, range(len(names)))
    return Capability(name, tuple(names[place] for place in order), optional)


# ---- what the child does -------------------------------------------------------------------------


def look_at(wanted: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Imports modules and says of each function how it is called, and what fails: plain data.

    Runs in the child: nothing here is known of the package, and anything may be raised.
    """
    functions: dict[str, Any] = {}
    errors: dict[str, str] = {}
    for module, names in wanted.items():
        try:
            found = importlib.import_module(module)
        except Exception as error:
            errors |= dict.fromkeys(names, f"{module} cannot be imported: {type(error).__name__}: {error}")
            continue
        for name in names:
            function = getattr(found, name, None)
            if callable(function):
                functions[name] = _told(function)
            else:
                errors[name] = f"{module} has no {name}"
    return {"functions": functions, "errors": errors}


def _told(function: Any) -> dict[str, Any]:
    """Names of a function's arguments, or their kinds, and which may be left out."""
    import inspect

    try:
        asked = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        asked = []
    if asked and all(one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in asked):
        optional = [one.name for one in asked if one.default is not one.empty]
        return {"names": [one.name for one in asked], "optional": optional}
    return parsed(function.__doc__ or "") or parsed(_refusal(function)) or _NOTHING


_NOTHING: dict[str, Any] = {"names": None, "kinds": [], "optional": []}


def _refusal(function: Any) -> str:
    """What a function says to a call without arguments: pybind11 lists those that it takes."""
    try:
        function()
    except TypeError as error:
        return str(error)
    except Exception:
        return ""
    return ""


def parsed(text: str) -> dict[str, Any] | None:
    """A signature as pybind11 writes it, `(arg0: paddle.Tensor, arg1: int) -> None`, or None."""
    found = re.search(r"\((\w+: .*)\) -> ", text)
    if found is None:
        return None
    # Commas within brackets belong to a type.
    arguments = [one.partition(": ") for one in re.split(r", (?=\w+: )", found[1])]
    types = [of.partition(" = ")[0] for _, _, of in arguments]
    optional = [of.startswith("Optional") or " | None" in of or " = " in of for _, _, of in arguments]
    names = [name for name, _, _ in arguments]
    if not all(re.fullmatch(r"arg\d+", name) for name in names):
        left_out = [name for name, may in zip(names, optional, strict=True) if may]
        return {"names": names, "optional": left_out}
    return {"names": None, "kinds": [_kind_of_type(of) for of in types], "optional": optional}


def _kind_of_type(of: str) -> str:
    """`str`, `bool`, `float` or `int` of pybind11's name of a type, in any of its versions; else `Tensor`."""
    if "Tensor" in of:
        return "Tensor"
    return next((kind for kind in ("str", "bool", "float", "int") if kind in of.lower()), of)


# ---- the package ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """What is installed.

    Attributes:
        told: the package by its version, as verdicts state it; empty where there is none.
        capabilities: of each operator that can be called.
        reasons: of every other operator, why it cannot.
    """

    told: str
    capabilities: Mapping[str, Capability]
    reasons: Mapping[str, str]

    def unavailable(self, names: Sequence[str]) -> str | None:
        """None, or why a path that calls these operators cannot run."""
        lacking = [self.reasons[name] for name in names if name in self.reasons]
        return lacking[0] if lacking else None

    def takes(self, name: str, argument: str) -> bool:
        """Whether the version's operator has an argument."""
        return name in self.capabilities and argument in self.capabilities[name].arguments

    def described(self, names: Sequence[str]) -> str:
        """Version and, of these operators, the capabilities that it has."""
        found = " ".join(str(self.capabilities[name]) for name in names if name in self.capabilities)
        return ", ".join(part for part in (self.told, found) if part)


@cache
def installed() -> Package:
    """What a child process says of the package; asked once a process."""
    names = [name for functions in MODULES.values() for name in functions]
    for package in (PACKAGE, "paddle"):
        if importlib.util.find_spec(package) is None:
            return Package("", {}, dict.fromkeys(names, f"{package} is not installed: {INSTALL}"))
    told = f"{_version()}, not seen working: no version was"
    answer = _asked(MODULES)
    if isinstance(answer, str):
        return Package(told, {}, dict.fromkeys(names, f"{PACKAGE} {_version()}: {answer}: {INSTALL}"))
    found: dict[str, Capability] = {}
    reasons = dict(answer["errors"])
    for name, of in answer["functions"].items():
        capability = capability_of(name, of)
        if isinstance(capability, str):
            reasons[name] = capability
        else:
            found[name] = capability
    return Package(
        told, found, {name: f"{PACKAGE} {_version()}: {why}: {INSTALL}" for name, why in reasons.items()}
    )


@cache
def _version() -> str:
    names = packages_distributions().get(PACKAGE)
    return version(names[0]) if names else UNKNOWN


CHILD = """\
import json, sys
asked = json.loads(sys.stdin.readline())
sys.path[:] = asked["path"]
from harness.paths.adapters._fastdeploy_package import look_at
answer = look_at(asked["wanted"])
print("\\n" + json.dumps(answer), flush=True)
"""
"""What it prints last is the answer: an engine may print while it is imported."""


def _asked(wanted: Mapping[str, Sequence[str]]) -> dict[str, Any] | str:
    """What `look_at` gives in a process of its own, or what became of that process."""
    question = json.dumps({"path": sys.path, "wanted": {key: list(names) for key, names in wanted.items()}})
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CHILD],
            input=question + "\n",
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=LOOK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it takes more than {LOOK_SECONDS:g} s"
    if child.returncode != 0:
        said = child.stderr.strip().splitlines() or ["nothing said"]
        return f"the process that imports it ended with exit code {child.returncode}: {said[-1]}"
    answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return answer


def _environment() -> dict[str, str]:
    """This process's variables with those of `ENVIRONMENT`."""
    changed = {**os.environ, **{name: value for name, value in ENVIRONMENT.items() if value is not None}}
    return {name: value for name, value in changed.items() if ENVIRONMENT.get(name, "") is not None}


def bridge() -> ModuleType:
    """`harness/paths/paddle/_bridge.py`, which imports Paddle: not where the package is missing."""
    return importlib.import_module("harness.paths.paddle._bridge")


def imported(module: str, environment: Mapping[str, str | None] = ENVIRONMENT) -> ModuleType:
    """A module of the package, imported in this process, whose variables become these with the package.

    Raises:
        RuntimeError: the package was imported in this process with others.
    """
    for name, value in environment.items():
        if PACKAGE in sys.modules and os.environ.get(name) != value:
            raise RuntimeError(
                f"{PACKAGE} must be imported with {name}={value or ''}, but was in this process with "
                f"{name}={os.environ.get(name, '')}: another value takes another process"
            )
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # An engine is as long in coming as a compiler.
    with CLOCK.compiling(), bridge().process_unchanged():
        return importlib.import_module(module)


# ---- a call --------------------------------------------------------------------------------------


Apply = Callable[[Any, Tensors, Tensors], Any]
"""(what was found, its arguments, what it gets beside them) -> what comes of it, tensors as Paddle's."""


def by_position(function: Any, arguments: Tensors, _beside: Tensors) -> Any:
    """A function's result."""
    return function(*arguments.values())


def call(
    name: str,
    apply: Apply = by_position,
    beside: Tensors | None = None,
    environment: Mapping[str, str | None] = ENVIRONMENT,
    /,
    **given: object,
) -> list[Any]:
    """An operator's results as torch tensors; of what is given it gets, as Paddle's views, what it takes.

    The host waits until Paddle is done: what an operator launches, and on which stream, is its own affair.
    `environment` holds the variables of a process that calls it.

    Raises:
        RuntimeError: a view is a copy, or the operator has put an argument elsewhere.
    """
    paddle = bridge().paddle
    module = next(module for module, names in MODULES.items() if name in names)
    found = getattr(imported(module, environment), name)
    results: list[Any] = []

    def launch(arguments: Tensors, more: Tensors, _workspace: Tensors) -> None:
        before = _addresses({**more, **arguments})
        given_back = apply(found, arguments, more)
        if paddle.is_compiled_with_cuda():
            paddle.device.synchronize()
        after = _addresses({**more, **arguments})
        moved = [key for key in before if after[key] != before[key]]
        if moved:
            raise RuntimeError(
                f"{name} must leave {moved[0]} where it is, at {before[moved[0]]:#x}, but after the call it "
                f"is at {after[moved[0]]:#x}: what was written is lost"
            )
        several = isinstance(given_back, list | tuple)
        results.extend(given_back if several else () if given_back is None else (given_back,))

    bridge().from_torch(launch)(installed().capabilities[name].ordered(given), beside or {}, {})
    return [bridge().as_torch(one) if isinstance(one, paddle.Tensor) else one for one in results]


def _addresses(arguments: Tensors) -> dict[str, int]:
    """Where the arguments are that are tensors with elements."""
    return {
        name: value.data_ptr()
        for name, value in arguments.items()
        if hasattr(value, "data_ptr") and value.size > 0
    }


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    """Paddle's default dtype is this one meanwhile: layers keep their weights in what it is when made."""
    paddle = bridge().paddle
    before = paddle.get_default_dtype()
    paddle.set_default_dtype(name)
    try:
        yield
    finally:
        paddle.set_default_dtype(before)


# ---- what paths have in common -------------------------------------------------------------------


def lanes() -> tuple[str, ...]:
    """Where the installed Paddle holds tensors: a build without CUDA has a stand-in's operators at most."""
    if not installed().capabilities:
        return ("compiled",)
    return ("compiled",) if bridge().paddle.is_compiled_with_cuda() else ("host",)


def about(*names: str, environment: Mapping[str, str | None] = ENVIRONMENT) -> dict[str, Any]:
    """Lanes and process of a path that calls these operators, whether it can, and how they are called."""
    told = installed().described(names)
    return {
        "lanes": lanes(),
        "libraries": {PACKAGE: told} if told else {},
        "unavailable": installed().unavailable(names),
        "environment": environment,
    }
