"""The arrows of DESIGN.md, read from the imports; and what the parent process must not import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from harness.lanes import lanes

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"cases", "references", "harness", "reports"}
ALLOWED = {
    "cases": {"cases"},
    "references": {"references", "cases"},
    "harness": {"harness", "references", "cases"},
    "reports": {"reports", "harness", "cases"},
}
JOINS_ALL = {"harness/cli.py", "harness/pytest_plugin.py"}
FILES = sorted(str(file.relative_to(ROOT)) for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def imported(file):
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            yield node.module


@pytest.mark.parametrize("file", FILES)
def test_imports_follow_the_arrows(file):
    room = file.split("/")[0]
    names = [name for name in imported(file) if name.split(".")[0] in ROOMS]
    if file not in JOINS_ALL and not file.startswith("harness/commands/"):
        assert {name.split(".")[0] for name in names} <= ALLOWED[room]
    if file.startswith("harness/paths/"):
        assert not [name for name in names if name.startswith("references")]
    if room == "references":
        others = {name for name in names if name.startswith("references.")}
        if file.startswith("references/faults/"):
            # Helpers of the folder's own, which no oracle may know.
            others = {name for name in others if not name.startswith("references.faults._")}
        helpers = {name for name in others if name.startswith("references._")}
        assert others - helpers <= {"references.oracle"}
    if room == "reports":
        assert not [name for name in names if name.startswith("harness.paths")]


def test_a_definition_and_its_derivation_share_no_helper():
    helpers = {"definition": set(), "derivation": set()}
    for file in sorted((ROOT / "references").glob("[a-z]*.py")):
        used = {name for name in imported(str(file.relative_to(ROOT))) if name.startswith("references._")}
        for role, files in helpers.items():
            if f'role="{role}"' in file.read_text():
                files |= used
    assert all(helpers.values())
    assert not helpers["definition"] & helpers["derivation"]


def test_the_parent_process_imports_neither_torch_nor_triton():
    code = "import sys, harness.cli; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_lanes_of_the_processor_see_no_gpu():
    # Mutants are tried in forked processes, where CUDA raises: every one of them would count as caught.
    for lane in lanes().values():
        assert (lane.environment.get("CUDA_VISIBLE_DEVICES") == "") == (lane.device == "cpu"), lane.name


@pytest.mark.parametrize("file", FILES)
def test_every_module_has_a_docstring(file):
    assert ast.get_docstring(ast.parse((ROOT / file).read_text()))
