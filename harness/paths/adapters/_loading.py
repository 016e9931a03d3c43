"""A library's kernel files, loaded as they are without the serving engine around them.

An engine's package imports the engine: models, servers, communication. Its kernel files need a few names of
it. `Library.load` runs just these files, Python or compiled, and while they are imported gives them those
names under the modules that they ask for; what they ask for beyond is not found, which makes the library's
paths unavailable and is said. Afterwards `sys.modules` is as it was. A package that is nothing but kernels is
imported as it is: `Library.imported`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

SEEN_WORKING = {
    "sglang": ("0.5.23",),
    "vllm": ("0.33.0",),
    "flag_gems": ("5.0.2",),
}
"""Versions of each library that its adapter was seen to work with. Another is tried, and said to be new."""

SEEN_ON_GPU: dict[str, tuple[str, ...]] = {
    "flash_mla": (),
    "flashinfer": ("0.7.2.post1",),
    "vllm/flashmla": ("0.25.1",),
}
"""The same of what runs on a GPU alone, which continuous integration pins no version of; `library/part`."""

UNKNOWN = "of unknown version"


@dataclass(frozen=True)
class Library:
    """A library by the name of its package.

    Attributes:
        distribution: what registries call it, empty where that is the package's name.
        part: what of it is run, if its parts were seen working in versions of their own.
    """

    name: str
    distribution: str = ""
    part: str = ""

    @property
    def seen(self) -> tuple[str, ...]:
        """Its versions that were seen working."""
        return (SEEN_WORKING | SEEN_ON_GPU)[f"{self.name}/{self.part}" if self.part else self.name]

    @property
    def folder(self) -> Path | None:
        """Where the package lies, None where it is not installed. Nothing of it is imported."""
        spec = importlib.util.find_spec(self.name)
        if spec is None or not spec.submodule_search_locations:
            return None
        return Path(spec.submodule_search_locations[0])

    @property
    def lacking(self) -> str | None:
        """None, or that it is not installed and how it is."""
        if self.folder is not None:
            return None
        pinned = "==".join([self.distribution or self.name, *self.seen[-1:]])
        return f"{self.name} is not installed: pip install --no-deps '{pinned}'"

    @property
    def versions(self) -> dict[str, str]:
        """What a verdict says of it: its version, and whether that was seen working. Empty where it lacks."""
        if self.folder is None:
            return {}
        try:
            found = version(self.distribution or self.name)
        except PackageNotFoundError:
            found = UNKNOWN
        known = ", ".join(self.seen) or "none"
        return {self.name: found if found in self.seen else f"{found}, not seen working: {known} was"}

    def load(
        self, wanted: Mapping[str, Sequence[str]], stand_ins: Mapping[str, Mapping[str, object]]
    ) -> Kernels:
        """The functions of kernel files, or why there are none here.

        Args:
            wanted: modules within the package, such as `kernels.decode`, Python or compiled, each after those
                that it imports, and the names to take of each.
            stand_ins: modules within the package that are not run, and the names that they give.
        """
        # Looked up first: below, the package's name is that of a stand-in.
        folder, known = self.folder, self.versions
        if folder is None:
            return Kernels({}, self.lacking)
        try:
            with restored_modules(self.name):
                for module, names in stand_ins.items():
                    vars(empty_module(f"{self.name}.{module}")).update(names)
                found = [_names(_run(f"{self.name}.{module}", folder), wanted[module]) for module in wanted]
        except Exception as error:
            return _not_loaded(self.name, known[self.name], error)
        return Kernels({name: value for names in found for name, value in names.items()}, None)

    def imported(self, names: Sequence[str]) -> Kernels:
        """These names of the package itself, which is imported and stays so, or why there are none here."""
        if self.folder is None:
            return Kernels({}, self.lacking)
        try:
            return Kernels(_names(importlib.import_module(self.name), names), None)
        except Exception as error:
            return _not_loaded(self.name, self.versions[self.name], error)


@dataclass(frozen=True)
class Kernels:
    """What an adapter calls, by name; empty with the reason where it is unavailable."""

    functions: Mapping[str, Any]
    unavailable: str | None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(self.unavailable or f"{name} was not loaded") from None


def _not_loaded(name: str, version_of_it: str, error: Exception) -> Kernels:
    """No function, with what the import raised."""
    why = f"{type(error).__name__}: {error}"
    return Kernels({}, f"{name} {version_of_it}: cannot be loaded: {why}")


@contextmanager
def restored_modules(package: str) -> Iterator[None]:
    """A package and all within it taken out of `sys.modules` for the block, and put back as they were."""

    def belongs(name: str) -> bool:
        return name == package or name.startswith(f"{package}.")

    before = {name: module for name, module in sys.modules.items() if belongs(name)}
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if belongs(name)]:
            del sys.modules[name]
        sys.modules.update(before)


def empty_module(name: str) -> ModuleType:
    """An empty module in `sys.modules`, as those above it are; what is not put into them is not found."""
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        empty_module(parent)
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    sys.modules[name] = module
    return module


def _run(name: str, folder: Path) -> ModuleType:
    """The module of a file of a package, Python or compiled, unchanged, in `sys.modules`."""
    stem = folder.joinpath(*name.split(".")[1:])
    files = [stem.with_name(stem.name + suffix) for suffix in (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)]
    file = next((file for file in files if file.exists()), None)
    if file is None:
        raise ImportError(f"{name} has no file {files[0].name} in this version")
    parent = name.rpartition(".")[0]
    if parent not in sys.modules:
        empty_module(parent)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be read as a module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(sys.modules[parent], name.rpartition(".")[2], module)
    spec.loader.exec_module(module)
    return module


def _names(module: ModuleType, names: Sequence[str]) -> dict[str, Any]:
    """These names of a module.

    Raises:
        ImportError: it has one not.
    """
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ImportError(f"{module.__name__} has no {missing[0]}")
    return {name: getattr(module, name) for name in names}
