"""What the pages say twice is held together here."""

import ast
import re
from pathlib import Path

import pytest

from cases import parse
from cases.contract import contract_of, operators
from cases.options import specs
from cases.rows import Kind
from harness.lanes import lanes

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def page(name):
    return (ROOT / name).read_text()


def table_names(text, header):
    rows = text.split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [re.search(r"`([^`]+)`", row)[1] for row in rows]


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name):
    named = re.findall(r"`((?:cases|harness|references|reports|tests)/[\w/.-]*)`", page(name))
    links = re.findall(r"\]\(([^)#:]+)\)", page(name))
    pictures = re.findall(r'(?:src|srcset)="([^":]+)"', page(name))
    missing = [file for file in [*named, *links, *pictures] if "<" not in file and not (ROOT / file).exists()]
    assert not missing


def test_continuous_integration_runs_the_commands_of_the_readme():
    commands = re.findall(r"^python3 -m pip install nox && .*$", page("README.md"), re.MULTILINE)
    assert len(commands) == 2
    run = (ROOT / ".ci" / "run").read_text().splitlines()
    assert all(command in run for command in commands)


def test_cases_of_the_readme_are_valid():
    texts = re.findall(r"'(\w+/[^']*)'", page("README.md"))
    assert len(texts) >= 4
    for text in texts:
        if "*" not in text:
            contract_of(parse(text), text)


def test_the_readme_lists_every_operator_lane_and_row_kind():
    text = page("README.md")
    assert table_names(text, "operator") == list(operators())
    assert sorted(table_names(text, "lane")) == sorted(lanes())
    rows = [name.split(":")[0] for name in table_names(text, "row")]
    assert rows == [kind.word for kind in Kind]


def test_the_readme_states_the_summary_of_every_operator():
    for operator in operators().values():
        assert operator.summary in page("README.md")


def test_no_tracked_page_is_empty_and_the_licence_is_apache():
    assert "Apache License" in page("LICENSE")
    assert all(len(page(name)) > 100 for name in PAGES)


def test_every_option_has_a_description():
    assert all(spec.doc for spec in specs().values())


def test_the_readme_names_every_path_that_a_file_names():
    files = (ROOT / "harness" / "paths").glob("*/[!_]*.py")
    named = {name for file in files for name in re.findall(r'name="(\w+/[\w@]+)"', file.read_text())}
    assert len(named) > 20
    assert [name for name in sorted(named) if f"`{name}`" not in page("README.md")] == []


def tensors_of(file):
    """What the docstring of a path says of its inputs and outputs, blanks apart."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return re.search(r"Inputs\n.*?(?=\n\n\S|\Z)", text, re.DOTALL)[0].split()


# What is composed for both families states its tensors once.
CUDA_FILES = sorted((ROOT / "harness/paths/cuda").glob("[!_]*.py"))
TWINS = [file for file in CUDA_FILES if "\nInputs\n" in file.read_text()]


@pytest.mark.parametrize("file", TWINS, ids=lambda file: file.stem)
def test_a_cuda_path_has_the_tensors_of_the_triton_path_that_it_stands_beside(file):
    assert tensors_of(file) == tensors_of(ROOT / "harness/paths/triton" / file.name)
