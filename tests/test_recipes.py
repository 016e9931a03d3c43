"""The recipes of CONTRIBUTING.md, each followed in a copy of the house: new files, no edit."""

import json
from functools import partial

import pytest

PATH = """
from dataclasses import replace

from harness.paths.triton.mla_decode import PATHS as TRITON

PATHS = (replace(TRITON[0], name="mine/mla_decode"),)
"""

CONTRACT = """
from cases.contract import Fill, Judge, Operator, TensorSpec

OPERATOR = Operator(
    name="position_sum",
    summary="sum of each token's latent row",
    source="made up",
    inputs=(
        TensorSpec("compressed_kv", ("tokens", "kv_lora_rank"), "model", "rows", fill=Fill.LATENT),
        TensorSpec("batch_id_per_token", ("tokens",), "int32", "slots", fill=Fill.METADATA),
    ),
    outputs=(
        TensorSpec("out", ("tokens", "one", "kv_lora_rank"), "model", "rows", judge=Judge.ATTENTION),
    ),
    attributes=(),
    options=("model", "dtype", "seed", "data"),
    checks=("inputs", "guard", "values"),
)
"""

ORACLE = """
import torch

from references.oracle import Oracle, tensor


def run(inputs, precision=None):
    rows, real = tensor(inputs, "compressed_kv"), tensor(inputs, "batch_id_per_token") >= 0
    out = torch.where(real[:, None], rows.double(), 0.0).unsqueeze(1)
    return {{"out": out}}


ORACLE = Oracle("{name}", "position_sum", "{role}", "made up", run)
"""

OPERATOR_PATH = """
from harness.kernel_path import KernelPath


def run(inputs, outputs, workspace):
    real = (inputs["batch_id_per_token"] >= 0)[:, None]
    outputs["out"].copy_(inputs["compressed_kv"].where(real, 0.0).unsqueeze(1))


PATHS = (
    KernelPath(
        name="mine/position_sum",
        operator="position_sum",
        lanes=("interpreted", "compiled"),
        supports=lambda case: None,
        run=run,
    ),
)
"""

SUITE = """
summary = "mine"

[[entry]]
why = "to try a new model"
cases = ["mla_decode/decode:5/model=toy,heads=2"]
"""

MODEL = """
hidden_size = 64
num_attention_heads = 4
kv_lora_rank = 64
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 16
num_hidden_layers = 1
rope = "none"
rope_theta = 10000.0
softmax_scale = 0.1767767
"""

REPORT = """
from reports.writer import Writer


class Names:
    def __init__(self, file):
        self.file, self.names = file, []

    def begin(self, run):
        pass

    def verdict(self, verdict):
        self.names.append(verdict.case)

    def end(self, summary):
        self.file.write_text("\\n".join(self.names))


WRITER = Writer("names", "case texts", Names)
"""

CHECK = """
from harness.checks._check import CheckPlugin
from harness.verdict import CheckResult, Status


def run(launch):
    yield CheckResult("always", Status.PASSED)


CHECK = CheckPlugin("always", "passes", run)
"""

LANE = """
from harness.lanes._lane import Lane

LANE = Lane(name="nowhere", device="cpu", unavailable=lambda: "it is nowhere")
"""

ONE = ("--lane", "interpreted", "--workers", "1")

LISTINGS = """
import json, sys

from harness.listing import LISTINGS

if __name__ == "__main__":
    print(json.dumps({what: [row["name"] for row in LISTINGS[what]("smoke")] for what in sys.argv[1:]}))
"""

FILES = {
    # What `list` prints of each, without a process for each.
    "listings.py": LISTINGS,
    "harness/paths/mine/__init__.py": "",
    "harness/paths/mine/mla_decode.py": PATH,
    "harness/paths/mine/position_sum.py": OPERATOR_PATH,
    "cases/operators/position_sum.py": CONTRACT,
    "references/position_sum.py": ORACLE.format(name="position_sum", role="definition"),
    "references/position_sum_again.py": ORACLE.format(name="position_sum_again", role="derivation"),
    "cases/suites/mine.toml": SUITE,
    "cases/models/toy.toml": MODEL,
    "reports/names.py": REPORT,
    "harness/checks/always.py": CHECK,
    "harness/lanes/nowhere.py": LANE,
}


@pytest.fixture(scope="module")
def house(make_house):
    """A copy of the packages with one new file of each kind."""
    return make_house(FILES)


@pytest.fixture(scope="module")
def harness(command, house):
    """(arguments) -> a finished `python3 -m harness` in that copy."""
    return partial(command, "harness", cwd=house)


def test_new_files_are_listed_with_no_edit_elsewhere(command, house):
    asked = ("paths", "operators", "oracles", "suites", "models", "checks")
    names = json.loads(command("listings", *asked, cwd=house, timeout=300).stdout)
    assert {"mine/mla_decode", "mine/position_sum"} <= set(names["paths"])
    assert "position_sum" in names["operators"]
    assert {"position_sum", "position_sum_again"} <= set(names["oracles"])
    assert "mine" in names["suites"]
    assert "toy" in names["models"]
    assert "always" in names["checks"]


def test_a_new_path_model_suite_check_and_report_work_together(harness, house):
    report = house / "out" / "names.txt"
    report.parent.mkdir(exist_ok=True)
    arguments = ["--path", "mine/*", "--check", "always", *ONE]
    result = harness("run", "--suite", "mine", *arguments, "--report", f"names:{report}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert report.read_text() == "mla_decode/decode:5/model=toy,heads=2"


def test_a_new_operator_of_three_files_is_judged(harness):
    case = "position_sum/decode:5,prefill:3,pad:2"
    result = harness("run", case, *ONE)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_new_lane_is_known_by_its_name_and_without_paths_judges_nothing(harness):
    result = harness("run", "mla_decode/decode:5/heads=2", "--lane", "nowhere", "--workers", "1")
    assert result.returncode == 4, result.stdout + result.stderr
    assert "lane nowhere" in result.stdout
