"""Builds .cu files, once for every content, and loads what they export.

One source, three targets: `host` and `sanitized` compile for the processor with g++, the latter under
AddressSanitizer and UndefinedBehaviorSanitizer; `device` compiles for NVIDIA GPUs with nvcc. A worker uses
one target, which its lane names. What is built is kept in a cache folder, under the hash of everything it
is made from, and serves any process.

Functions are called through apache-tvm-ffi: they take tensors of torch, Paddle and NumPy as they are.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.coverage.cuda import IN_MEMORY, NOT_INLINED, CudaProbes
from harness.watchdog import CLOCK

FOLDER = Path(__file__).parent
INCLUDE = FOLDER / "include"
KERNELS = FOLDER.parent / "paths" / "cuda"
RUNTIME = FOLDER / "host" / "runtime.cc"

# Kernels read memory as words of other types, which nvcc lets them.
WARNINGS = (
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-Werror=return-type",
)

COMMON = (
    # A frame larger than the guard page below a fiber's stack must not step over it.
    "-fstack-clash-protection",
    # g++ on its own fuses products into sums where the processor can, even those that a kernel keeps apart.
    "-ffp-contract=off",
    *("-fPIC", "-shared", "-x", "c++"),
)


@dataclass(frozen=True)
class Target:
    """One way to build.

    Attributes:
        name: as in the docstring of this module.
        compiler: the program. flags: its arguments, apart from files and folders.
        lacks: what to do where the compiler is missing.
    """

    name: str
    compiler: str
    flags: tuple[str, ...]
    lacks: str


HOST = Target(
    "host",
    "g++",
    ("-std=c++17", "-O2", "-g1", *COMMON, *WARNINGS),
    "install it, on Debian: apt-get install g++",
)
SANITIZED = Target(
    "sanitized",
    "g++",
    (
        *("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", *COMMON, *WARNINGS),
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    ),
    HOST.lacks,
)
DEVICE = Target(
    "device",
    "nvcc",
    (
        *("-std=c++17", "-O3", "-lineinfo", "-shared", "-Xcompiler", "-fPIC", "--threads=0"),
        *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"),
    ),
    "install the CUDA toolkit",
)


class BuildError(RuntimeError):
    """A source does not compile; the message has the compiler's first complaint and where all of them are.

    Attributes:
        complaints: all of them.
    """

    complaints = ""


class _Use:
    """What this process builds for; None where it runs no CUDA paths."""

    target: Target | None = None
    probes: CudaProbes | None = None
    sources: dict[Path, Path] = {}  # noqa: RUF012 state of the process
    called: dict[Path, Path] = {}  # noqa: RUF012


def use(target: Target | None) -> None:
    """Names the target of this process. A lane calls it before paths are imported."""
    _Use.target = target


def measure(probes: CudaProbes) -> None:
    """Builds with probes what this process loads from now on."""
    _Use.probes = probes


@contextmanager
def substituted(source: Path, changed: Path) -> Iterator[None]:
    """Within the block, calls of what `source` exports go to what `changed` does: how a mutant is tried."""
    _Use.sources[source] = changed
    try:
        yield
    finally:
        del _Use.sources[source]


def substituted_last() -> dict[Path, Path]:
    """Sources whose functions were, at their last call, those of another: that one by each."""
    return {source: used for source, used in _Use.called.items() if used != source}


def lacking(target: Target) -> str | None:
    """None, or what is missing to build for a target, with what to do about it."""
    if shutil.which(target.compiler) is None:
        return f"{target.compiler} is not installed: {target.lacks}"
    if importlib.util.find_spec("tvm_ffi") is None:
        return "apache-tvm-ffi is not installed: pip install 'mla-harness[cuda]'"
    return None


class Module:
    """The functions that a .cu file exports, built at the first call of one.

    Attributes:
        source: the file.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._loaded: dict[Path, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            return getattr(self._library(), name)(*arguments)

        return call

    def _library(self) -> Any:
        source = _Use.sources.get(self.source, self.source)
        _Use.called[self.source] = source
        if source not in self._loaded:
            if _Use.target is None:
                raise BuildError(f"{source.name} was called in a process that runs no CUDA paths")
            try:
                self._loaded[source] = load(source, _Use.target)
            except BuildError as error:
                # What does not compile once is not tried again for every case.
                self._loaded[source] = error
        if isinstance(self._loaded[source], BuildError):
            raise self._loaded[source]
        return self._loaded[source]


def kernels_beside(module: str) -> Module:
    """The kernels of a path: the .cu file beside its module, named by `__file__`.

    Raises:
        ImportError: this process runs CUDA paths and cannot build them.
    """
    if _Use.target is not None:
        lack = lacking(_Use.target)
        if lack is not None:
            raise ImportError(lack)
    return Module(Path(module).with_suffix(".cu"))


def load(source: Path, target: Target) -> Any:
    """A built source as a module of apache-tvm-ffi.

    Raises:
        BuildError: it does not compile.
    """
    import tvm_ffi

    if _Use.probes is None or source == RUNTIME:
        return tvm_ffi.load_module(str(built(source, target)))
    text, arguments = _Use.probes.prepare(source, INCLUDE, cache_folder() / "probes")
    library = built_with_probes(text, target, tuple(arguments))
    module = tvm_ffi.load_module(str(library))
    _Use.probes.loaded(source, library, on_device=target is DEVICE)
    return module


def built_with_probes(text: Path, target: Target, arguments: tuple[str, ...]) -> Path:
    """The library of a source with probes: with flags in registers if it can be.

    Raises:
        BuildError: it does not compile either way.
    """
    try:
        return built(text, target, arguments)
    except BuildError as error:
        if not NOT_INLINED.search(error.complaints):
            raise
        return built(text, target, (*arguments, IN_MEMORY))


def set_schedule(kind: int, seed: int = 0) -> None:
    """In which order threads of later launches run: 0 forward, 1 reverse, 2 random from a seed."""
    if _Use.target is None or _Use.target is DEVICE:
        raise BuildError("threads have a schedule where kernels run on the processor")
    load(RUNTIME, _Use.target).set_schedule(kind, seed)


def require_build(source: Path) -> None:
    """Builds a source for the target of this process.

    Raises:
        BuildError: it does not compile.
    """
    if _Use.target is not None:
        built(source, _Use.target)


def built(source: Path, target: Target, arguments: tuple[str, ...] = ()) -> Path:
    """The library of a source, from the cache if it is there; `arguments` come before other folders.

    Raises:
        BuildError: it does not compile.
    """
    text = source.read_bytes()
    key = hashlib.blake2b(digest_size=16)
    runtime = None if target is DEVICE or source == RUNTIME else built(RUNTIME, target)
    for part in (
        _surroundings(target),
        source.name.encode(),
        text,
        str(runtime).encode(),
        repr(arguments).encode(),
    ):
        key.update(len(part).to_bytes(8, "little") + part)
    folder = cache_folder() / key.hexdigest()
    library = folder / f"{source.stem}.so"
    if not library.exists():
        with CLOCK.compiling(), _alone(folder):
            # Another process may have built it while this one waited.
            if not library.exists():
                _compile(source, target, runtime, library, arguments)
    return library


def cache_folder() -> Path:
    """Where libraries are kept: `mla-harness/cuda` of the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mla-harness" / "cuda"


@cache
def _surroundings(target: Target) -> bytes:
    """Everything that a library is made from, apart from its own source."""
    from importlib.metadata import version

    command = [target.compiler, "--version"]
    compiler = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = [platform.machine(), compiler, version("apache-tvm-ffi"), *target.flags]
    parts += [header.read_text(encoding="utf-8") for header in sorted(INCLUDE.rglob("*.*"))]
    return "\0".join(parts).encode()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds a lock that processes building the same library take turns by."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(
    source: Path, target: Target, runtime: Path | None, library: Path, arguments: tuple[str, ...]
) -> None:
    import tvm_ffi.libinfo

    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        made = Path(name) / library.name
        ffi = Path(tvm_ffi.libinfo.find_libtvm_ffi())
        read = library.with_suffix(".d")
        command = [target.compiler, *target.flags, "-MD", "-MF", str(read), "-o", str(made), *arguments]
        command += [f"-I{INCLUDE}", f"-I{KERNELS}"]
        command += [f"-I{tvm_ffi.libinfo.find_include_path()}", str(source)]
        if target is DEVICE:
            command += [f"-L{ffi.parent}", "-ltvm_ffi", "-Xlinker", f"-rpath={ffi.parent}"]
        else:
            libraries = [ffi] if runtime is None else [ffi, runtime]
            command += ["-x", "none", *(str(item) for item in libraries)]
            command += [f"-Wl,-rpath,{item.parent}" for item in libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            log = library.with_suffix(".log")
            log.write_text(" ".join(command) + "\n" + done.stderr, encoding="utf-8")
            first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
            error = BuildError(f"{source.name} does not compile for target {target.name}: {first} ({log})")
            error.complaints = done.stderr
            raise error
        # Whole or not at all: another process may be looking.
        made.replace(library)
