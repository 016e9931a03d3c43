"""The gates: `nox -l` lists them. Each installs what it needs, with the versions of constraints.txt."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.sessions = ["lint", "types", "tests", "run", "mutants"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_external_run = True

CONSTRAINTS = ("--constraint", "constraints.txt")
CHECKED_SUITES = (
    "smoke",
    "metadata",
    "prefill",
    "read",
    "merge",
    "rope",
    "edge",
    "loading",
    "logits",
    "window",
    "gqa",
    "regress",
)
"""Suites that run with every check, on a GPU and nightly."""
ALL_MUTANTS = (["--path", "triton/*"], ["--path", "cuda/*", "--lane", "host"])
"""What is broken, in a lane that needs no GPU."""
COVERED_SUITES = (
    [f"--suite={name}" for name in ("smoke", "metadata", "prefill", "read", "merge", "rope", "loading")],
    ["--append", "--suite=edge", "--suite=gqa", "--suite=window", "--mark=ci"],
    ["--append", "--suite=logits"],
)
"""What continuous integration judges besides suite clean, measured as it runs."""
ADAPTED_SUITES = ("smoke", "prefill", "edge", "merge")
"""Suites with cases that continuous integration runs on other projects' kernels."""
NOT_INSTALLED = ("vllm",)
"""Libraries whose wheels are too large to install here: their files in docs/conformance are left alone."""
TRITON_VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")


def install(session: nox.Session, *extras: str) -> None:
    """Installs the checkout with extras; what runs is the checkout itself."""
    target = f".[{','.join(extras)}]" if extras else "."
    session.install(*CONSTRAINTS, "--editable", target)


@nox.session
def run(session: nox.Session) -> None:
    """Judge suite smoke on every path of this machine; arguments go to `mla-harness run`."""
    install(session, "triton", "cuda")
    arguments = session.posargs or ["--suite", "smoke", "--report", "jsonl:out/smoke.jsonl"]
    session.run("python", "-m", "harness", "run", *arguments)


@nox.session(default=False)
def cover(session: nox.Session) -> None:
    """Judge CI's suites and write what they hit to out/coverage; every miss of a kernel needs its reason.

    Arguments go to `mla-harness cover`; without any, the kernels as a whole are held to the policy.
    """
    install(session, "triton", "cuda", "coverage", "gate")
    for arguments in [session.posargs] if session.posargs else COVERED_SUITES:
        session.run("python", "-m", "harness", "cover", *arguments)
    if not session.posargs:
        session.run("python", "-m", "harness", "gate", "--whole")


@nox.session(default=False)
def gate(session: nox.Session) -> None:
    """Hold a change to what `cover` wrote: its lines, arms and lanes, and mutants of its kernels."""
    install(session, "triton", "cuda", "gate")
    reports = ["markdown:out/gate.md", "github:out/annotations.txt", "html:out/gate.html"]
    reports.append("json:out/diff_coverage.json")
    optional = {"--verdicts": "out/smoke.jsonl", "--base-coverage": "out/base/coverage/coverage.json"}
    arguments = [word for report in reports for word in ("--report", report)]
    arguments += [word for item in optional.items() if Path(item[1]).exists() for word in item]
    session.run("python", "-m", "harness", "gate", *arguments, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Test the harness itself, without a GPU."""
    install(session, "triton", "cuda", "paddle", "dev")
    arguments = session.posargs or ["-n", "2", "--dist", "loadgroup", "-m", "not gpu and not slow"]
    session.run("python", "-m", "pytest", *arguments)


@nox.session(default=False)
def adapters(session: nox.Session) -> None:
    """Judge other projects' Triton kernels, interpreted: what comes of them must be as docs/conformance says.

    With `--write` it is written there instead. Other arguments go to `mla-harness run`; nothing is compared.
    docs/adapters.md says how libraries are judged that are not installed here.
    """
    install(session, "triton", "cuda")
    # Their kernel files alone are run, which need nothing of what an engine needs.
    session.install(*CONSTRAINTS, "--no-deps", "sglang", "flag_gems")
    known = ["--known-failures", ".ci/adapters-known-failures.txt"]
    judge_adapters(session, "python", [*known, "--lane", "interpreted", "--lane", "host"])


@nox.session(venv_backend="none", default=False)
def adapters_gpu(session: nox.Session) -> None:
    """The same, compiled on this machine's GPU, with the Python that runs nox and its libraries.

    No list says what is known to fail there: what does is a line of docs/conformance.
    """
    judge_adapters(session, "python3", ["--lane", "compiled"], codes=(0, 1))


def judge_adapters(
    session: nox.Session, python: str, arguments: list[str], codes: tuple[int, ...] = (0,)
) -> None:
    """Judges adapters, and compares what came of them with docs/conformance, or writes it there.

    `codes` are the exit codes of `mla-harness run` after which the session goes on.
    """
    command = [python, "-m", "harness", "run", "--path", "adapters/*", *arguments]
    if session.posargs not in ([], ["--write"]):
        session.run(*command, *session.posargs, external=True)
        return
    kept, found = Path("docs/conformance"), Path("out/conformance")
    shutil.rmtree(found, ignore_errors=True)
    suites = [word for name in ADAPTED_SUITES for word in ("--suite", name)]
    reports = ["--report", f"outcomes:{found}", "--report", "conformance:out/conformance.html"]
    session.run(*command, *suites, "--mark", "adapters", *reports, external=True, success_codes=codes)
    for lane in found.iterdir():
        for name in NOT_INSTALLED:
            # It may be there all the same.
            if not any(lane.glob(f"{name}-*.txt")):
                for file in (kept / lane.name).glob(f"{name}-*.txt"):
                    shutil.copy(file, lane)
        if session.posargs:
            shutil.rmtree(kept / lane.name, ignore_errors=True)
            shutil.copytree(lane, kept / lane.name)
    session.run(python, "-m", "harness", "compare", str(kept), str(found), external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and spelling."""
    session.install("ruff>=0.14", "codespell>=2.4")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "triton", "cuda", "dev")
    session.run("mypy")


@nox.session(venv_backend="none", default=False)
def gpu(session: nox.Session) -> None:
    """Judge every suite on this machine's GPU, with the Python that runs nox."""
    for suite in (*CHECKED_SUITES, "grid"):
        checks = [] if suite == "grid" else ["--check", "*"]
        report = f"jsonl:out/gpu-{suite}.jsonl"
        command = ["-m", "harness", "run", "--lane", "compiled", "--suite", suite, *checks]
        session.run("python3", *command, "--report", report, external=True)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the kernels by bugs that engines shipped: the suites must notice every one.

    Arguments go to `mla-harness mutants`; without any, Triton's kernels are broken and then CUDA's.
    """
    install(session, "triton", "cuda")
    for arguments in [session.posargs] if session.posargs else ALL_MUTANTS:
        session.run("python", "-m", "harness", "mutants", *arguments)


@nox.session(default=False)
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it alone in a fresh environment and judge a case from another folder."""
    session.install("build>=1.2")
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--wheel", "--outdir", str(folder / "dist"))
    built = max((folder / "dist").glob("*.whl"), key=lambda file: file.stat().st_mtime)
    constraints = str(Path("constraints.txt").resolve())
    session.run("python", "-m", "venv", str(folder / "fresh"))
    python = str(folder / "fresh" / "bin" / "python")
    command = [python, "-m", "pip", "install", "--constraint", constraints]
    session.run(*command, "--force-reinstall", "--no-deps", str(built), external=True)
    session.run(*command, f"{built}[triton]", external=True)
    with session.chdir(folder):
        executable = str(folder / "fresh" / "bin" / "mla-harness")
        session.run(executable, "run", "mla_decode/decode:5,idle,pad:2/heads=2", external=True)


@nox.session(default=False)
@nox.parametrize("triton", TRITON_VERSIONS)
def nightly(session: nox.Session, triton: str) -> None:
    """Run all tests and suites with every check under each supported Triton; mutants, budgets under one."""
    install(session, "cuda", "paddle", "dev")
    session.install(f"triton=={triton}")
    session.run("python", "-m", "pytest", "-n", "2", "-m", "not gpu")
    for suite in CHECKED_SUITES:
        session.run("python", "-m", "harness", "run", "--suite", suite, "--check", "*")
    if triton == TRITON_VERSIONS[-1]:
        for arguments in ALL_MUTANTS:
            session.run("python", "-m", "harness", "mutants", *arguments)
        session.run("python", "-m", "harness", "budgets", "--seeds", "3")
        for operator in ("latent_cache_write", "mla_decode", "packed_cache_write", "swa_indices"):
            session.run("python", "-m", "harness", "mutants", "--generated", "--path", f"triton/{operator}")
