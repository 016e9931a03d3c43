"""`cover`, then `gate`, on a change that a developer could make: nothing between them is made up."""

import json
import subprocess

import pytest

pytest.importorskip("triton")
pytest.importorskip("coverage")
pytest.importorskip("tree_sitter_cuda")
pytest.importorskip("unidiff")

from harness.lanes import lanes

LACK = lanes()["host"].unavailable()
pytestmark = pytest.mark.skipif(LACK is not None, reason=str(LACK))

TRITON = "harness/paths/triton/slot_mapping.py"
CUDA = "harness/paths/cuda/slot_mapping.cu"
NEW = "harness/paths/cuda/extra.cu"
FEW, MANY = "slot_mapping/prefill:3,decode:5,idle,pad:1", "slot_mapping/prefill:30,decode:5"

IN_TRITON = """\
    if num_tokens > 20:
        rows = rows + 0
    late = tl.load(position_ids + tokens, mask=in_step & (tokens > 20), other=0)
    rows = rows + 0 * late
"""
IN_CUDA = """\
  if (num_tokens > 20) {
    row = -1;
  }
"""
POLICY = '[tool.mla-harness.gate]\nexemptions = "exemptions.toml"\n'
EXPIRED = f"""
[[exemption]]
file = "{TRITON}"
kind = "any"
text = "if num_tokens > 20"
reason = "long steps are not tried yet"
owner = "kernels"
expires = 2020-01-31
"""


def behind(text, line, new):
    """The text with new lines behind one, and the number of the first of them."""
    number = text.split("\n").index(line) + 1
    return text.replace(f"{line}\n", f"{line}\n{new}", 1), number + 1


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *arguments]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def house(make_house):
    """A repository of ours with the change in its working tree, and where the change is in each file."""
    folder = make_house(
        {".gitignore": "out/\n__pycache__/\n", "pyproject.toml": POLICY, "exemptions.toml": ""}
    )
    git(folder, "init", "--quiet", "--initial-branch", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "--message", "before")
    row = "    rows = entries.to(tl.int64) * block_size + positions % block_size"
    triton, first = behind((folder / TRITON).read_text(), row, IN_TRITON)
    cuda, second = behind((folder / CUDA).read_text(), "  int64_t row = -1;", IN_CUDA)
    (folder / TRITON).write_text(triton)
    (folder / CUDA).write_text(cuda)
    return folder, first, second


@pytest.fixture
def gate(house, command, tmp_path):
    """() -> exit code and what is missing, as (file, line, kind, text)."""
    folder, _, _ = house

    def run():
        report = tmp_path / "gate.json"
        arguments = ("--base", "HEAD", "--no-mutants", "--report", f"json:{report}")
        done = command("harness", "gate", *arguments, cwd=folder)
        found = json.loads(report.read_text())["gate"]
        missing = {(item["file"], item["first"], item["kind"], item["text"]) for item in found["findings"]}
        return done.returncode, missing, done.stdout

    return run


@pytest.fixture
def cover(house, command):
    """(cases) -> judges them on both paths and writes what they hit."""
    folder, _, _ = house

    def run(*cases):
        sources = [word for glob in ("harness/paths/*/slot_mapping.*", NEW) for word in ("--source", glob)]
        lanes = ("--lane", "interpreted", "--lane", "host", "--workers", "1")
        chosen = sources if (folder / NEW).exists() else sources[:2]
        done = command("harness", "cover", *cases, *lanes, *chosen, "--path", "*/slot_mapping", cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_a_planted_change_is_named_and_passes_once_a_case_hits_it(house, cover, gate):
    folder, first, second = house
    (folder / NEW).write_text("__global__ void extra(int* out) { out[0] = 1; }\n")
    (folder / "exemptions.toml").write_text(EXPIRED)
    cover(FEW)
    missed = {
        (TRITON, first, "arm", "the condition was never true"),
        (TRITON, first + 1, "line", "no case runs this line"),
        (TRITON, first + 2, "lane", "no lane of this mask was ever on"),
        (CUDA, second, "arm", "the condition was never true"),
        (CUDA, second + 1, "line", "no case runs this line"),
    }
    unbuilt = (NEW, 1, "unmeasured", "no lane that ran built it with probes")
    code, missing, said = gate()
    assert (code, missing) == (10, missed | {unbuilt})
    assert (
        f"exemption 1 ({TRITON}, any if num_tokens > 20; kernels: long steps are not tried yet) expired"
        in said
    )

    (folder / NEW).unlink()
    (folder / "exemptions.toml").write_text("")
    assert gate()[:2] == (9, missed)

    cover(FEW, MANY)
    assert gate()[:2] == (0, set())
