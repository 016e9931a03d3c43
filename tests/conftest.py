"""The test process is a worker of lane `interpreted`: its environment, its repairs, its watch on pointers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.lanes import lanes

ROOT = Path(__file__).resolve().parent.parent
LANE = lanes()["interpreted"]

# Triton reads TRITON_INTERPRET when it is imported, so before any test file is.
os.environ.update({name: value for name, value in LANE.environment.items() if value is not None})
if LANE.unavailable() is None:
    LANE.start()


@pytest.fixture(scope="session")
def lane():
    """The lane this process belongs to."""
    return LANE


@pytest.fixture(scope="session")
def make_batch():
    """Text -> the batch of its first step, on the host."""
    import torch

    from cases import parse
    from cases.contract import contract_of
    from harness.batch import materialise

    def make(text):
        case = parse(text)
        return materialise(case, contract_of(case), torch.device("cpu"))

    return make


@pytest.fixture(scope="module")
def cuda_on_the_processor():
    """CUDA paths of this process are built by g++ while a module's tests last, or they are skipped."""
    from harness.cuda import build

    lack = build.lacking(build.HOST)
    if lack is not None:
        pytest.skip(lack)
    build.use(build.HOST)
    yield
    build.use(None)


@pytest.fixture(scope="session")
def launched(lane):
    """(text, path) -> a launch that has run."""
    from cases import parse
    from harness.launch import Launch

    def launch(text, path):
        prepared = Launch.prepare(parse(text), path, lane)
        prepared.run()
        return prepared

    return launch


@pytest.fixture(scope="session")
def every_result():
    """(launch) -> what every check of lane `interpreted` says of it, but for those it is exempt from."""
    from harness.checks import checks

    def results_of(launch):
        asked = [check for check in checks().values() if "interpreted" in check.lanes]
        return [result for check in asked if check.exemption(launch) is None for result in check.run(launch)]

    return results_of


@pytest.fixture(scope="session")
def make_house(tmp_path_factory):
    """(new files by name) -> a copy of the four packages with these files added."""

    def make(files):
        folder = tmp_path_factory.mktemp("house")
        for package in ("cases", "harness", "references", "reports"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        return folder

    return make


@pytest.fixture
def main_here(monkeypatch, capsys):
    """(arguments) -> what the command line comes to in this process, which has imported it already."""
    import typer

    from harness import cli

    def run(*arguments):
        # Commands are added to it by every call.
        monkeypatch.setattr(cli, "app", typer.Typer(pretty_exceptions_enable=False, add_completion=False))
        monkeypatch.setattr(sys, "argv", ["mla-harness", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def command():
    """(arguments, cwd) -> a finished `python3 -m ...`, its workers free to choose their lane."""

    def run(*arguments, cwd=ROOT, timeout=120):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=cwd,
            env={**environment, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run
