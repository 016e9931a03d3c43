"""Adapters of other projects' kernels: how they are loaded, what they say without them, what they give."""

import importlib.util
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch

from cases import parse
from harness import worker
from harness.judge import judge_case
from harness.kernel_path import ENTRY_POINTS, path_named, to_scale
from harness.known_failures import read_known_failures
from harness.mutation.mutant import path_file
from harness.paths.adapters import _loading, _rows, _states, torch_sdpa
from harness.paths.adapters._loading import Library, restored_modules
from harness.paths.triton import mla_decode
from harness.plan import asked_cases, is_chosen, make_plan
from harness.task import PathInfo, Task
from harness.verdict import CheckResult, Kind, Smallest, Status, Verdict
from reports.conformance import ConformanceReport, kinds_of
from reports.outcomes import OutcomesReport, differences, outcome_of

CASE = "mla_decode/decode:20,idle,draft:30+2,pad:1/heads=2"
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "harness" / "paths" / "adapters"
KERNEL = """\
from otherlib.engine.utils import is_gpu
from otherlib.ops.helper import twice

IS_GPU = is_gpu()

def attend(x):
    return twice(x), IS_GPU, __file__
"""


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A library whose package cannot be imported, as one whose engine's dependencies are not there."""
    package = tmp_path / "otherlib"
    for folder in (package, package / "ops", package / "engine"):
        folder.mkdir()
        (folder / "__init__.py").write_text("raise RuntimeError('the engine was imported')\n")
    (package / "engine" / "utils.py").write_text("raise RuntimeError('the engine was imported')\n")
    (package / "ops" / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (package / "ops" / "kernel.py").write_text(KERNEL)
    about = tmp_path / "otherlib-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: otherlib\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(_loading.SEEN_WORKING, "otherlib", ("1.1", "1.2"))
    return Library("otherlib")


WANTED = {"ops.helper": (), "ops.kernel": ("attend",)}
STAND_INS = {"engine.utils": {"is_gpu": lambda: "asked"}}


def test_kernel_files_run_with_the_names_that_are_given_and_without_their_package(other, tmp_path):
    kernels = other.load(WANTED, STAND_INS)
    assert kernels.unavailable is None
    assert kernels.attend(3) == (6, "asked", str(tmp_path / "otherlib" / "ops" / "kernel.py"))
    assert not [name for name in sys.modules if name.startswith("otherlib")]


def test_what_was_imported_of_a_library_before_is_there_afterwards(other, monkeypatch):
    before = object()
    monkeypatch.setitem(sys.modules, "otherlib.ops", before)
    assert other.load(WANTED, STAND_INS).unavailable is None
    assert sys.modules["otherlib.ops"] is before
    assert "otherlib.ops.kernel" not in sys.modules


@pytest.mark.parametrize(
    ("wanted", "stand_ins", "said"),
    [
        (WANTED, {}, "No module named 'otherlib.engine'"),
        (WANTED, {"engine.utils": {}}, "cannot import name 'is_gpu'"),
        ({"ops.kernel": ("attend",)}, STAND_INS, "No module named 'otherlib.ops.helper'"),
        ({"ops.moved": ("attend",)}, STAND_INS, "otherlib.ops.moved has no file moved.py in this version"),
        ({**WANTED, "ops.helper": ("thrice",)}, STAND_INS, "otherlib.ops.helper has no thrice"),
    ],
)
def test_what_a_version_does_not_have_makes_it_unavailable_and_is_said(other, wanted, stand_ins, said):
    kernels = other.load(wanted, stand_ins)
    assert kernels.unavailable.startswith("otherlib 1.2: cannot be loaded: ")
    assert said in kernels.unavailable
    assert not [name for name in sys.modules if name.startswith("otherlib")]
    with pytest.raises(AttributeError, match="cannot be loaded"):
        kernels.attend(3)


def test_a_compiled_module_of_a_package_is_loaded_without_the_package(other, tmp_path):
    found = (importlib.util.find_spec(name) for name in ("_heapq", "_bisect", "_random", "_struct"))
    spec = next((spec for spec in found if (spec.origin or "").endswith(".so")), None)
    if spec is None:
        pytest.skip("this Python has none of its modules compiled on its own")
    compiled = Path(spec.origin)
    shutil.copy(compiled, tmp_path / "otherlib" / compiled.name)
    text = f"import otherlib.{spec.name}\n\nFILE = otherlib.{spec.name}.__file__\n"
    (tmp_path / "otherlib" / "ops" / "asks.py").write_text(text)
    kernels = other.load({spec.name: (), "ops.asks": ("FILE",)}, {})
    assert kernels.unavailable is None
    assert Path(kernels.FILE) == tmp_path / "otherlib" / compiled.name


def test_a_package_that_is_nothing_but_kernels_is_imported_as_it_is(other, tmp_path):
    with restored_modules("otherlib"):
        assert "RuntimeError: the engine was imported" in other.imported(["attend"]).unavailable
        (tmp_path / "otherlib" / "__init__.py").write_text("def attend(x):\n    return x\n")
        kernels = other.imported(["attend"])
        assert (kernels.unavailable, kernels.attend(3)) == (None, 3)
        assert other.imported(["gone"]).unavailable.endswith("otherlib has no gone")


def test_a_part_of_a_library_has_versions_of_its_own(other, monkeypatch):
    monkeypatch.setitem(_loading.SEEN_ON_GPU, "otherlib/part", ())
    assert Library("otherlib", part="part").versions == {"otherlib": "1.2, not seen working: none was"}
    monkeypatch.setitem(_loading.SEEN_ON_GPU, "otherlib/part", ("1.2",))
    assert Library("otherlib", part="part").versions == {"otherlib": "1.2"}


def test_a_library_that_is_not_installed_says_how_it_is(monkeypatch):
    monkeypatch.setitem(_loading.SEEN_WORKING, "no_such_library", ("0.1", "0.2"))
    library = Library("no_such_library")
    said = "no_such_library is not installed: pip install --no-deps 'no_such_library==0.2'"
    assert library.load(WANTED, STAND_INS).unavailable == said
    assert library.versions == {}


def test_a_version_that_was_not_seen_working_is_told(other, tmp_path, monkeypatch):
    assert other.versions == {"otherlib": "1.2"}
    monkeypatch.setitem(_loading.SEEN_WORKING, "otherlib", ("1.1", "1.3"))
    assert other.versions == {"otherlib": "1.2, not seen working: 1.1, 1.3 was"}
    assert other.load(WANTED, STAND_INS).unavailable is None
    (tmp_path / "otherlib-1.2.dist-info" / "METADATA").unlink()
    (tmp_path / "otherlib-1.2.dist-info").rmdir()
    assert other.versions["otherlib"].startswith("of unknown version, not seen working")


@pytest.mark.parametrize("name", ["sglang", "flag_gems"])
def test_paths_of_a_library_that_is_not_installed_are_there_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(Library, "folder", None)
    spec = importlib.util.spec_from_file_location(f"absent_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {path.operator for path in module.PATHS} >= {"mla_decode", "mla_step"}
    for path in module.PATHS:
        assert path.name.startswith(f"adapters/{name}/{path.operator}")
        assert path.unavailable.startswith(f"{name} is not installed: pip install")


def test_a_path_of_an_adapter_is_found_by_its_name():
    assert path_named("adapters/torch_sdpa/prefill_attention@math") is torch_sdpa.PATHS[0]
    assert path_file("adapters/torch_sdpa/prefill_attention@math") == "harness/paths/adapters/torch_sdpa.py"
    with pytest.raises(ImportError, match="has no path adapters/torch_sdpa/mla_decode"):
        path_named("adapters/torch_sdpa/mla_decode")


# ---- paths of other packages ---------------------------------------------------------------------

MINE = """\
from harness.kernel_path import KernelPath

def path(name):
    return KernelPath(name, "position_ids", ("interpreted",), lambda case: None, lambda *tensors: None)

PATHS = (path("mine/position_ids"),)
TAKEN = (path("taken/position_ids"),)
NO_PATHS = ["mine/position_ids"]
"""


@pytest.fixture
def found_with(tmp_path, monkeypatch, lane):
    """(lines of entry points) -> what a worker finds, by name."""

    def find(lines):
        (tmp_path / "mine_paths.py").write_text(MINE)
        about = tmp_path / "mine-1.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
        (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{lines}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        state = {"paths": {}, "found": [], "unavailable": None, "lane": lane}
        for name, value in state.items():
            monkeypatch.setattr(worker._Worker, name, value, raising=False)
        worker._find_paths()
        monkeypatch.delitem(sys.modules, "mine_paths", raising=False)
        return {info.name: info for info in worker.describe()}

    return find


def test_paths_that_a_package_registers_stand_beside_ours(found_with):
    found = found_with("any = mine_paths:PATHS")
    assert found["mine/position_ids"].operator == "position_ids"
    assert found["mine/position_ids"].unavailable is None
    assert found["triton/position_ids"].unavailable is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bad = no_such_module:PATHS", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("bad = mine_paths:NO_PATHS", "PATHS of bad must be a tuple of KernelPath"),
        ("a = mine_paths:PATHS\nbad = mine_paths:PATHS", "there is a path mine/position_ids already"),
    ],
)
def test_what_a_package_registers_wrongly_costs_only_itself(found_with, line, said):
    found = found_with(line)
    assert said in found["bad"].unavailable
    assert found["triton/position_ids"].unavailable is None


def test_adapters_are_judged_where_a_glob_names_them():
    named = {glob: is_chosen("adapters/lib/mla_decode", glob) for glob in ("", "*", "adapters/*", "triton/*")}
    assert named == {"": False, "*": True, "adapters/*": True, "triton/*": False}
    assert is_chosen("triton/mla_decode", "")
    asked = asked_cases([CASE], [], "*", ())
    infos = [PathInfo(name, "mla_decode", ("interpreted",)) for name in ("triton/a", "adapters/lib/b")]
    settings = {"extra_checks": (), "timeout": 1.0, "workers": 1}
    ours = make_plan(asked, infos, "interpreted", path_glob="", **settings)
    assert [task.path for task in ours.tasks] == ["triton/a"]
    both = make_plan(asked, infos, "interpreted", path_glob="*", **settings)
    assert [task.path for task in both.tasks] == ["triton/a", "adapters/lib/b"]


# ---- what a library does otherwise ---------------------------------------------------------------

OURS = mla_decode.PATHS[0]


def verdict_of(path, lane, tmp_path, text=CASE):
    task = Task(text, parse(text).operator, path.name, lane.name)
    return judge_case(task, path, lane, tmp_path / "lock")


def test_an_output_that_a_library_does_not_give_is_told_and_nothing_is_said_of_it(lane, tmp_path):
    def run(inputs, outputs, workspace):
        assert "lse" not in outputs
        unasked = torch.empty(outputs["out"].shape[:2])
        OURS.run(inputs, {**outputs, "lse": unasked}, workspace)

    verdict = verdict_of(replace(OURS, run=run, omits=("lse",)), lane, tmp_path)
    assert verdict.status is Status.PASSED
    told = CheckResult("values", Status.SKIPPED, "lse", reason="the library does not give it")
    assert told in verdict.checks
    assert {check.tensor for check in verdict.checks if check.status is Status.PASSED} >= {"out"}
    assert not [check for check in verdict.checks if check.name == "lse"]


def test_a_plan_is_made_of_the_metadata_and_handed_to_the_launch(lane, tmp_path):
    def run(inputs, outputs, workspace):
        assert workspace["longest"] == 32
        OURS.run(inputs, outputs, workspace)

    def plan(inputs):
        kinds = inputs["seq_lens_decoder"] + inputs["seq_lens_this_time"]
        return {"longest": int(kinds.max())}

    assert verdict_of(replace(OURS, run=run, plan=plan), lane, tmp_path).status is Status.PASSED


def test_a_library_with_a_scale_of_its_own_is_judged_by_the_queries_that_it_gets(lane, tmp_path):
    scale = 1 / 24

    def run(inputs, outputs, workspace):
        query = to_scale(inputs["q"], inputs["softmax_scale"] / scale)
        OURS.run({**inputs, "q": query, "softmax_scale": scale}, outputs, workspace)

    def forgets(inputs, outputs, workspace):
        OURS.run({**inputs, "softmax_scale": scale}, outputs, workspace)

    path = replace(OURS, run=run, scale=lambda _: scale)
    assert verdict_of(path, lane, tmp_path).status is Status.PASSED
    # The rounding is one more than the contract's LSE allows: without `scale` the same numbers fail.
    assert verdict_of(replace(path, scale=None), lane, tmp_path).status is Status.FAILED
    assert verdict_of(replace(path, run=forgets), lane, tmp_path).status is Status.FAILED


def test_a_verdict_states_the_versions_of_the_libraries(lane, tmp_path):
    verdict = verdict_of(replace(OURS, libraries={"otherlib": "1.2"}), lane, tmp_path)
    assert verdict.environment["otherlib"] == "1.2"


# ---- rows as libraries want them -----------------------------------------------------------------


def test_decode_tokens_their_lengths_and_their_cache_rows(make_batch):
    batch = make_batch("mla_decode/decode:3,idle,hit:5+2,draft:4+2,paused:7,pad:2/heads=1,block=4")
    inputs = batch.layers[0].tensors
    tokens, lengths = _rows.decode_tokens(inputs)
    assert tokens.tolist() == [0, 3, 4]
    assert lengths.tolist() == [4, 5, 6]
    assert _rows.decode_slots(inputs).tolist() == [0, 3]
    assert _rows.prefix_sum(lengths).tolist() == [0, 4, 9, 15]
    assert _rows.spans(torch.tensor([7, 2]), torch.tensor([3, 2])).tolist() == [7, 8, 9, 2, 3]
    table = inputs["block_tables"].tolist()
    expected = [table[0][0] * 4 + i for i in range(4)] + [table[3][i // 4] * 4 + i % 4 for i in range(6)]
    slots, counts = torch.tensor([0, 3]), torch.tensor([4, 6])
    assert _rows.cache_rows(inputs, slots, counts).tolist() == expected


@pytest.mark.parametrize("rows", ["", "/idlex3", "/pad:3"])
def test_no_rows_are_no_tokens(make_batch, rows):
    inputs = make_batch(f"mla_decode{rows or '/'}/heads=1").layers[0].tensors
    assert [len(found) for found in _rows.decode_tokens(inputs)] == [0, 0]
    assert len(_rows.decode_slots(inputs)) == 0


@pytest.mark.parametrize("lacking", [[], [1], [0, 1, 2]])
def test_tokens_that_a_library_is_not_given_get_what_the_contract_says(lacking):
    tokens = torch.tensor([token for token in range(3) if token not in lacking])
    values = torch.arange(6.0).view(3, 2, 1)
    outputs = {"out": torch.full((3, 2, 4), torch.nan), "lse": torch.full((3, 2), torch.nan)}

    def attend(out, lse):
        out[:] = _rows.rows_at(values, tokens)
        lse[:] = 1

    _rows.attend_at(tokens, outputs, attend)
    for token in range(3):
        expected = torch.zeros(2, 1) if token in lacking else values[token]
        assert torch.equal(outputs["out"][token], expected.expand(2, 4))
        assert outputs["lse"][token].tolist() == [-torch.inf if token in lacking else 1] * 2


# ---- attention states as libraries want them -----------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "gaps", "heads first"])
def test_states_are_dense_and_zero_where_they_have_seen_no_key(make_batch, layout):
    text = f"merge_states/hit:9+6,prefill:2,pad:1/heads=4,strided={int(layout == 'gaps')}"
    inputs = make_batch(text).layers[0].tensors
    if layout == "heads first":
        inputs = {
            name: tensor.transpose(0, 1).contiguous().transpose(0, 1) for name, tensor in inputs.items()
        }
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    planned = _states.plan_states(inputs)
    assert list(planned) == ["prefix_out", "prefix_lse", "suffix_out", "suffix_lse"]
    for part in ("prefix", "suffix"):
        out, lse = planned[f"{part}_out"], planned[f"{part}_lse"]
        empty = lse.isinf()
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert 0 < empty.sum() < empty.numel()
        assert torch.equal(lse, before[f"{part}_lse"])
        assert torch.equal(out[~empty], before[f"{part}_out"][~empty])
        assert not out[empty].any()
    for name, tensor in inputs.items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())


# ---- PyTorch's own -------------------------------------------------------------------------------


def test_equal_rows_that_follow_one_another_are_one_call():
    inputs = {
        "cu_seqlens_q": torch.tensor([0, 5, 10, 11, 16, 33, 50]),
        "cu_seqlens_k_prefill": torch.tensor([0, 5, 10, 10, 15, 96, 177]),
    }
    groups = [(0, 0, 2, 5, 5), (11, 10, 1, 5, 5), (16, 15, 2, 17, 81)]
    assert torch_sdpa.plan(inputs)["groups"] == groups


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_torch_attends_as_the_contract_says(lane, tmp_path, dtype):
    rows = "prefill:5x3,hit:64+17x2,decode:5,hit:9+1,idle,prefill:5,pad:2"
    text = f"prefill_attention/{rows}/heads=2,dtype={dtype}"
    assert verdict_of(torch_sdpa.PATHS[0], lane, tmp_path, text).status is Status.PASSED


def test_a_mask_that_is_aligned_to_the_top_left_is_noticed(lane, tmp_path, monkeypatch):
    def attend(backend, query, key, value, scale):
        return torch_sdpa.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)

    monkeypatch.setattr(torch_sdpa, "attend", attend)
    path = torch_sdpa.PATHS[0]
    assert verdict_of(path, lane, tmp_path, "prefill_attention/prefill:9/heads=1").status is Status.PASSED
    assert verdict_of(path, lane, tmp_path, "prefill_attention/hit:9+4/heads=1").status is Status.FAILED


# ---- the libraries themselves --------------------------------------------------------------------


def installed(name):
    path = path_named(name)
    if path.unavailable is not None:
        pytest.skip(path.unavailable)
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sglang/mla_decode", "mla_decode/decode:20,draft:62+4,idle,hit:9+2,decode:100,pad:2/heads=4"),
        ("sglang/mla_decode@extend", "mla_decode/decode:20,draft:62+4,idle,hit:9+2,decode:100,pad:2/heads=4"),
        ("sglang/prefill_attention", "prefill_attention/decode:5,hit:64+17,prefill:5,pad:2/heads=2"),
        ("sglang/prefill_attention@dense", "prefill_attention/decode:5,hit:64+17,prefill:5,pad:2/heads=2"),
        ("sglang/merge_states@with_keys", "merge_states/draft:30+9,hit:9+2,prefill:3,idle,pad:1/heads=4"),
        ("sglang/merge_states@with_keys", "merge_states/hit:6+4,decode:9/heads=2,dtype=fp32,strided=0"),
        ("sglang/merge_states", "merge_states/prefill:1/heads=4"),
        ("sglang/mla_step", "mla_step/draft:30+3,hit:17+4,prefill:5,decode:40,idle,pad:2/heads=2"),
        ("flag_gems/mla_decode", "mla_decode/decode:20,idle,hit:9+2,decode:100,pad:2/heads=4"),
        ("flag_gems/latent_cache_write", "latent_cache_write/decode:5,hit:63+3,paused:4,pad:3/block=4"),
        ("flag_gems/mla_step", "mla_step/hit:17+4,prefill:5,decode:40,idle,pad:2/heads=2"),
    ],
)
def test_a_library_attends_as_the_contract_says(name, text, lane, tmp_path):
    assert verdict_of(installed(f"adapters/{name}"), lane, tmp_path, text).status is Status.PASSED


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("flag_gems/mla_decode", "mla_decode/draft:1+2/heads=1", Kind.WRONG),
        ("flag_gems/mla_decode", "mla_decode/decode:1/heads=1,pool=58256,pages=reversed", Kind.BOUNDS),
        ("sglang/mla_decode", "mla_decode/decode:1/heads=1", Kind.WRONG),
        ("sglang/merge_states", "merge_states/decode:7/heads=2", Kind.WRONG),
    ],
)
def test_what_is_written_up_fails(name, text, kind, lane, tmp_path):
    assert verdict_of(installed(f"adapters/{name}"), lane, tmp_path, text).kind is kind


# ---- what is told and kept -----------------------------------------------------------------------


def verdict(case, status, path="adapters/otherlib/mla_decode", **changed):
    parts = {} if status is Status.PASSED else {"kind": Kind.WRONG, "reason": "out is <b>off</b>"}
    about = {"otherlib": "1.2, not seen working: 1.1 was", "torch": "2.13.0+cpu", "triton": "3.9.0"}
    parts = {"environment": about, **parts, **changed}
    return Verdict(case, "mla_decode", path, "interpreted", status, **parts)


VERDICTS = [
    verdict("mla_decode/decode:9,idle", Status.PASSED),
    verdict("mla_decode/draft:9+2,decode:9", Status.FAILED),
    verdict("mla_decode/draft:9+2", Status.XFAILED, reason="out is off (known: finding 7)"),
    verdict("mla_decode/pad:3", Status.SKIPPED, kind=Kind.UNSUPPORTED, reason="not for padding"),
    verdict("mla_decode/decode:9", Status.PASSED, path="triton/mla_decode"),
    verdict("mla_decode/decode:9", Status.SKIPPED, kind=Kind.UNAVAILABLE, reason="no lib", environment={}),
]


def test_known_failures_are_failures_and_limits_are_not():
    outcomes = [outcome_of(item) for item in VERDICTS]
    assert outcomes == ["passed", "failed", "failed", "not claimed", "passed", "unavailable"]
    assert outcome_of(verdict("mla_decode/decode:9", Status.XPASSED)) == "passed"


ELSEWHERE = {
    "interpreted": {
        "adapters/otherlib/merge_states": ["host", "compiled"],
        "adapters/nolib/mla_decode": ["compiled"],
    }
}


def write_outcomes(folder, verdicts, elsewhere=ELSEWHERE):
    """The files that the report writes, by their place in the folder."""
    report = OutcomesReport(folder)
    report.begin({"elsewhere": elsewhere})
    for item in verdicts:
        report.verdict(item)
    report.end(None)
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.txt")}


def test_outcomes_are_a_sorted_line_each_in_a_file_of_the_lane_library_and_version(tmp_path):
    written = write_outcomes(tmp_path, VERDICTS)
    assert list(written) == ["interpreted/otherlib-1.2.txt"]
    path = "adapters/otherlib/mla_decode interpreted"
    assert written["interpreted/otherlib-1.2.txt"].splitlines() == [
        "# otherlib 1.2, lane interpreted, torch 2.13.0, triton 3.9.0",
        "# adapters/otherlib/merge_states: in lane host and compiled alone",
        f"{path} mla_decode/decode:9 unavailable",
        f"{path} mla_decode/decode:9,idle passed",
        f"{path} mla_decode/draft:9+2 failed as wrong",
        f"{path} mla_decode/draft:9+2,decode:9 failed as wrong",
        f"{path} mla_decode/pad:3 not claimed: not for padding",
    ]


def on_gpu(architecture, **changed):
    """A verdict of lane compiled."""
    about = {"otherlib": "1.2", "torch": "2.11.0+cu128", "triton": "3.6.0", "architecture": architecture}
    item = verdict("mla_decode/decode:9", Status.PASSED)
    return replace(item, **{"lane": "compiled", "environment": about, **changed})


def test_outcomes_of_one_lane_or_architecture_leave_those_of_others_as_they_are(tmp_path):
    before = write_outcomes(tmp_path, VERDICTS)
    write_outcomes(tmp_path, [on_gpu("sm_90")])
    written = write_outcomes(tmp_path, [on_gpu("sm_80")])
    places = ["compiled-sm_80", "compiled-sm_90", "interpreted"]
    assert sorted(written) == [f"{place}/otherlib-1.2.txt" for place in places]
    assert before.items() <= written.items()
    assert written["compiled-sm_90/otherlib-1.2.txt"].splitlines() == [
        "# otherlib 1.2, lane compiled on sm_90, torch 2.11.0, triton 3.6.0",
        "adapters/otherlib/mla_decode compiled mla_decode/decode:9 passed",
    ]


def test_a_case_that_ends_its_worker_has_an_outcome_all_the_same(tmp_path):
    crash = {"status": Status.ERROR, "kind": Kind.CRASH, "reason": "signal 9", "environment": {}}
    ended = on_gpu("sm_90", case="mla_decode/decode:8", **crash)
    text = write_outcomes(tmp_path, [ended, on_gpu("sm_90")])["compiled-sm_90/otherlib-1.2.txt"]
    assert "compiled mla_decode/decode:8 failed as crash\n" in text


def test_where_a_library_is_not_installed_there_is_no_file(tmp_path):
    assert write_outcomes(tmp_path, [item for item in VERDICTS if not item.environment]) == {}


def kept_and_found(tmp_path, found):
    """The lines by which verdicts differ from `VERDICTS`."""
    before, after = tmp_path / "before", tmp_path / "after"
    write_outcomes(before, [*VERDICTS, on_gpu("sm_90")])
    write_outcomes(after, found)
    lines = differences(before, after)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def test_outcomes_are_as_before_whatever_torch_there_is_and_whichever_lane_did_not_run(tmp_path):
    newer = [replace(item, environment={**item.environment, "torch": "3.0"}) for item in VERDICTS]
    assert kept_and_found(tmp_path, newer) == []


def test_a_new_release_is_compared_with_the_last_one_line_by_line(tmp_path):
    released = [replace(item, environment={**item.environment, "otherlib": "1.3"}) for item in VERDICTS]
    released[0] = replace(released[0], status=Status.FAILED, kind=Kind.WRONG, reason="out is off")
    path = "adapters/otherlib/mla_decode interpreted"
    assert kept_and_found(tmp_path, released) == [
        "-# otherlib 1.2, lane interpreted, torch 2.13.0, triton 3.9.0",
        "+# otherlib 1.3, lane interpreted, torch 2.13.0, triton 3.9.0",
        f"-{path} mla_decode/decode:9,idle passed",
        f"+{path} mla_decode/decode:9,idle failed as wrong",
    ]


def test_a_library_that_is_gone_differs_in_every_line(tmp_path):
    other = verdict("mla_decode/decode:9", Status.PASSED, path="adapters/nolib/mla_decode")
    lines = kept_and_found(tmp_path, [replace(other, environment={"nolib": "7"})])
    assert len([line for line in lines if line.startswith("-adapters/otherlib/")]) == 5
    assert "+adapters/nolib/mla_decode interpreted mla_decode/decode:9 passed" in lines


def test_the_command_compares_folders_of_outcomes(main_here, tmp_path):
    before, after, empty = (tmp_path / name for name in ("before", "after", "empty"))
    write_outcomes(before, VERDICTS)
    write_outcomes(after, VERDICTS[1:])
    empty.mkdir()
    assert main_here("compare", str(before), str(before)).returncode == 0
    changed = main_here("compare", str(before), str(after))
    assert changed.returncode == 1
    assert "-adapters/otherlib/mla_decode interpreted mla_decode/decode:9,idle passed" in changed.stdout
    nothing = main_here("compare", str(before), str(empty))
    assert nothing.returncode == 2
    assert "has no folder of a lane" in nothing.stderr


def test_a_case_counts_under_each_kind_of_row_that_it_has():
    assert kinds_of("mla_decode/pad:3") == ["pad"]
    assert kinds_of("mla_step/prefill:5,idle..decode:5,hit:4+1") == ["prefill", "hit", "decode", "idle"]
    assert kinds_of("mla_decode//heads=4") == kinds_of("nonsense") == ["no row"]


def page_of(file, verdicts, elsewhere=ELSEWHERE):
    report = ConformanceReport(file)
    report.begin({"elsewhere": elsewhere})
    for item in verdicts:
        report.verdict(item)
    report.end(None)
    return file.read_text()


def test_the_page_counts_by_kinds_of_rows_and_lists_every_failure_and_limit(tmp_path):
    page = page_of(tmp_path / "page.html", VERDICTS)
    rows = re.findall(r"<tr>(<td>.*?)</tr>", page)
    cells = [[re.sub("<.*?>", " ", cell).split() for cell in row.split("<td>")[1:]] for row in rows]
    # The case without an environment stands in the row of its path's version.
    assert [row[0][0] for row in cells] == ["otherlib", "ours"]
    named = dict(
        zip(["prefill", "hit", "decode", "draft", "idle", "paused", "pad"], cells[0][4:], strict=False)
    )
    assert named["decode"] == ["1", "passed", "1", "failed", "1", "unavailable"]
    assert named["draft"] == ["2", "failed"]
    assert named["pad"] == ["1", "not", "claimed"]
    assert named["prefill"] == []
    assert "Failures: 2" in page
    assert "(known: finding 7)" in page
    assert "python3 -m harness repro &#x27;mla_decode/draft:9+2&#x27;" in page
    assert "1 x not claimed, adapters/otherlib/mla_decode: not for padding" in page
    assert "out is &lt;b&gt;off&lt;/b&gt;" in page
    assert page.index("mla_decode/draft:9+2</code>") < page.index("mla_decode/draft:9+2,decode:9</code>")
    assert "adapters/nolib/mla_decode: in lane compiled alone" in page
    elsewhere = {**ELSEWHERE, "compiled": {}}
    assert "in lane compiled alone" not in page_of(tmp_path / "page.html", VERDICTS, elsewhere)


def test_the_page_shows_failures_below_their_smallest_case_or_says_how_to_get_it(tmp_path):
    smallest = Smallest("mla_decode/draft:1+2/heads=1", is_complete=False)
    reduced = [replace(item, smallest=smallest) for item in VERDICTS[1:3]]
    page = page_of(tmp_path / "page.html", reduced)
    line = "python3 -m harness repro &#x27;mla_decode/draft:1+2/heads=1&#x27; --path adapters/otherlib/"
    assert page.count(line) == 1
    assert "2 of its cases" in page
    assert "as far as time allowed" in page
    assert "run --reduce" not in page
    assert page.index(line) < page.index("mla_decode/draft:9+2</code>")
    assert "run --reduce 30" in page_of(tmp_path / "page.html", VERDICTS)


def test_the_page_links_the_finding_of_a_known_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = VERDICTS[1].expected_to_fail("docs/findings/some-finding.md: mla_decode/draft:1+2/heads=1")
    page = page_of(Path("out/deep/page.html"), [known])
    assert "<a href='../../docs/findings/some-finding.md'>docs/findings/some-finding.md</a>: mla_d" in page


KEPT = [
    (
        file.parent.name,
        file.name,
        [line for line in file.read_text().splitlines() if not line.startswith("#")],
    )
    for file in sorted((ROOT / "docs" / "conformance").rglob("*.txt"))
]
"""Outcomes that are kept: folder of a lane, file of a library and version, lines below its head."""


def test_what_is_kept_is_of_the_versions_that_are_pinned_and_seen_working():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name, seen in _loading.SEEN_WORKING.items():
        assert pinned[name] in seen
    libraries = {f"{name}-{pinned[name]}.txt" for name in _loading.SEEN_WORKING}
    assert {name for place, name, _ in KEPT if place == "interpreted"} == libraries
    assert {name for place, name, _ in KEPT if place == "host"} == {f"torch_sdpa-{pinned['torch']}.txt"}
    on_gpu = tuple(f"{version}.txt" for seen in _loading.SEEN_ON_GPU.values() for version in seen)
    for place, name, _ in KEPT:
        # A GPU has a torch of its own, and libraries that run nowhere else.
        is_of_gpu = place.startswith("compiled") and name.endswith(on_gpu)
        assert name in libraries or is_of_gpu or (name.startswith("torch_sdpa-") and place != "interpreted")


def test_what_is_kept_of_a_lane_is_of_that_lane_and_says_with_what_it_was_judged():
    for place, name, lines in KEPT:
        lane, _, architecture = place.partition("-")
        assert {line.split()[1] for line in lines} == {lane}
        head = (ROOT / "docs" / "conformance" / place / name).read_text().splitlines()[0]
        library, _, version = name.removesuffix(".txt").rpartition("-")
        version = version.replace("_", " ")
        where = f"lane {lane} on {architecture}" if architecture else f"lane {lane}"
        assert re.fullmatch(rf"# {library} {version}, {where}, torch \S+, triton \S+", head)


def test_every_failure_that_is_kept_interpreted_is_known():
    known = read_known_failures(ROOT / ".ci" / "adapters-known-failures.txt")
    failed = [
        Verdict(
            words[2], words[2].partition("/")[0], words[0], words[1], Status.FAILED, Kind(words[-1]), "off"
        )
        for place, _, lines in KEPT
        for words in map(str.split, lines)
        if not place.startswith("compiled") and words[3] == "failed"
    ]
    assert failed
    for item in failed:
        assert [line.kind for line in known if line.matches(item)] == [item.kind.value], item.case


def test_every_known_failure_is_written_up():
    for line in read_known_failures(ROOT / ".ci" / "adapters-known-failures.txt"):
        finding, _, smallest = line.why.partition(": ")
        assert f"'{smallest}'" in (ROOT / finding).read_text(), line
        parse(smallest)


# ---- processes -----------------------------------------------------------------------------------

WITH_VARIABLES = """
import os
from harness.kernel_path import KernelPath
from harness.paths.triton.position_ids import PATHS as OURS

SET = {{"a": {{"LIBRARY_READS": "a"}}, "b": {{"LIBRARY_READS": "b", "HOME": None}}, "": {{}}}}

def running(inputs, outputs, workspace):
    with open({record!r}, "a") as file:
        told = os.environ.get("LIBRARY_READS", "-"), os.environ.get("HOME") is not None
        file.write(f"{{os.getpid()}} {{told}}\\n")
    OURS[0].run(inputs, outputs, workspace)

PATHS = tuple(
    KernelPath(
        name=f"tiny/position_ids@{{name or 'none'}}",
        operator="position_ids",
        lanes=("interpreted",),
        supports=lambda case: None,
        run=running,
        environment=variables,
    )
    for name, variables in SET.items()
)
"""


def test_paths_with_different_variables_never_share_a_process(make_house, command, tmp_path):
    record = tmp_path / "record"
    paths = WITH_VARIABLES.format(record=str(record))
    house = make_house({"harness/paths/tiny/__init__.py": "", "harness/paths/tiny/position_ids.py": paths})
    cases = [f"position_ids/decode:{n}" for n in range(5, 9)]
    chosen = ("--path", "tiny/*", "--lane", "interpreted", "--workers", "2")
    result = command("harness", "run", *cases, *chosen, cwd=house, timeout=300)
    assert "12 passed" in result.stdout, result.stdout + result.stderr
    told = {}
    for line in record.read_text().splitlines():
        pid, _, variables = line.partition(" ")
        told.setdefault(pid, set()).add(variables)
    assert all(len(found) == 1 for found in told.values())
    assert set().union(*told.values()) == {"('a', True)", "('b', False)", "('-', True)"}
