"""FastDeploy's attention backends, with stand-ins that have their modules and signatures.

What `tests/data/fastdeploy_stand_in.py` computes is ours: nothing here says what FastDeploy's own gives.
"""

import importlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from cases import parse
from harness.judge import judge_case
from harness.paths.adapters import _fastdeploy_package
from harness.paths.adapters._fastdeploy_package import ENVIRONMENT
from harness.paths.adapters._fastdeploy_signatures import SIGNATURES
from harness.paths.adapters._loading import restored_modules
from harness.task import Task
from harness.verdict import Kind, Status

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = ROOT / "tests" / "data" / "fastdeploy_stand_in.py"
FILES = ("fastdeploy_ops", "fastdeploy_layers", "fastdeploy_backends")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("paddle") is None, reason="paddle is not installed")

MERGE = "merge_prefill_decode_output"
PLAN = "get_block_shape_and_split_kv_block"
READ = "fused_read_cache_and_interleave_triton"
EXTRACT = "extract_decoder_token_from_q"
INSERT = "insert_decoder_result_back"
MLA, TRITON = "MLAAttentionBackend", "TritonMLAAttentionBackend"

# Where they are, below `model_executor`.
MODULES = {
    "ops/gpu/__init__.py": (MERGE,),
    "layers/attention/mla_attention_backend.py": (READ, EXTRACT, INSERT, MLA),
    "layers/attention/triton_mla_attention_backend.py": (TRITON,),
}
NEWEST = {
    **{name: " ".join(SIGNATURES[name][0]) for name in (MERGE, READ, EXTRACT, INSERT)},
    MLA: MLA,
    TRITON: TRITON,
}


def write_package(folder, changed=None, *, begins="", flash_mla=True, edits=()):
    """The stand-in as a package; an operator is its arguments, a backend its class, None what is missing."""
    package = folder / "fastdeploy"
    shutil.rmtree(package, ignore_errors=True)
    files = {"__init__.py": begins}
    files |= {f"model_executor/{name}/__init__.py": "" for name in (".", "ops", "layers", "layers/attention")}
    for file, names in MODULES.items():
        lines = ["from fastdeploy import stand_in"]
        for name in names:
            of = {**NEWEST, **(changed or {})}[name]
            if name in (MLA, TRITON) and of is not None:
                lines.append(f"{name} = type({name!r}, (stand_in.{of},), {{}})")
            elif of is not None:
                lines.append(f"{name} = stand_in.operator({name!r}, {of!r})")
        files[f"model_executor/{file}"] = "\n".join(lines) + "\n"
    if changed and TRITON in changed and changed[TRITON] is None:
        del files["model_executor/layers/attention/triton_mla_attention_backend.py"]
    source = STAND_IN.read_text()
    for right, wrong in edits:
        assert source.count(right) == 1
        source = source.replace(right, wrong)
    for name, text in (files | {"stand_in.py": source}).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    if flash_mla:
        (folder / "flash_mla.py").write_text("")


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """(what to change of the package) -> the adapter's paths by their variants, with such a package."""
    with restored_modules("fastdeploy"), restored_modules("flash_mla"):
        for name in ENVIRONMENT:
            monkeypatch.setenv(name, "true")

        def install(changed=None, **more):
            forget()
            for module in [one for one in sys.modules if one.partition(".")[0] == "fastdeploy"]:
                del sys.modules[module]
            folder = tmp_path / "site"
            write_package(folder, changed, **more)
            monkeypatch.syspath_prepend(str(folder))
            modules = [importlib.import_module(f"harness.paths.adapters.{name}") for name in FILES]
            return {path.name.partition("@")[2]: path for path in modules[-1].PATHS}

        yield install
    forget()


def forget():
    _fastdeploy_package.installed.cache_clear()
    for name in FILES:
        sys.modules.pop(f"harness.paths.adapters.{name}", None)


def verdict_of(path, lane, tmp_path, rows):
    text = f"mla_step/{rows}"
    return judge_case(Task(text, parse(text).operator, path.name, lane.name), path, lane, tmp_path / "lock")


def calls():
    return sys.modules["fastdeploy.stand_in"].CALLS


# ---- what a backend claims -----------------------------------------------------------------------

STEPS = {
    "prefill": "prefill:70,prefill:1/heads=8",
    "prefix hits": "hit:64+3,prefill:5,hit:9+70/heads=8",
    "decode": "decode:1,decode:63,decode:64,decode:200/heads=8",
    "both": "decode:64,hit:9+2,decode:5,prefill:4,hit:63+1/heads=8",
    "idle": "idle,decode:9,idle,prefill:3,idle/heads=8",
    "nobody": "idle,idle,pad:2/heads=8",
    "no token": "idle,paused:9/heads=8",
    "padding, prefill": "hit:5+2,prefill:3,pad:3/heads=8",
    "padding, decode": "decode:70,decode:9,pad:2/heads=8",
    "padding, both": "decode:70,prefill:3,pad:2/heads=8",
    "views": "decode:70,hit:9+2/heads=8,strided=1,dtype=fp16",
    "two layers": "decode:70,hit:9+2/heads=8,layers=2",
    "steps": "prefill:60,idle..decode:60,prefill:5..decode:61,decode:5/heads=8",
}
VARIANTS = {"mla_attn": MLA, "flash_mla": MLA, "triton_mla_attn": TRITON}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", STEPS)
def test_a_stand_in_of_a_backend_gives_what_the_contract_says(variant, kind, paths, lane, tmp_path):
    path = paths()[variant]
    assert path.unavailable is None
    verdict = verdict_of(path, lane, tmp_path, STEPS[kind])
    assert verdict.status is Status.PASSED, verdict.reason
    if kind not in {"nobody", "no token"}:
        assert VARIANTS[variant] in calls()


@pytest.mark.parametrize(
    "rows", ["draft:62+4,decode:64/heads=16", "draft:30+3,hit:9+2,decode:64,idle/heads=16"]
)
def test_the_compiled_operators_take_drafts(rows, paths, lane, tmp_path):
    verdict = verdict_of(paths()["mla_attn"], lane, tmp_path, rows)
    assert verdict.status is Status.PASSED, verdict.reason


@pytest.mark.parametrize("model", ["minicpm3-4b", "glm-4.7-flash"])
def test_the_scale_of_a_backend_is_the_models(model, paths, lane, tmp_path):
    # The first has no factor of YaRN's, and every case before this one has DeepSeek's.
    verdict = verdict_of(
        paths()["triton_mla_attn"], lane, tmp_path, f"decode:9,decode:70/heads=4,model={model}"
    )
    assert verdict.status is Status.PASSED, verdict.reason


NOT_TAKEN = [
    ("mla_attn", "decode:5/heads=4", "takes 8, 16 or 64 heads, got 4"),
    ("mla_attn", "decode:5/heads=8,block=32", "takes blocks of 64 tokens, got 32"),
    ("mla_attn", "draft:5+5/heads=16", "takes 4 new tokens a row at 16 heads, got 5"),
    ("flash_mla", "draft:5+2/heads=8", "has one query here, got drafts"),
    ("flash_mla", "decode:5/heads=8,block=32", "FlashMLA takes blocks of 64 tokens, got 32"),
    ("triton_mla_attn", "draft:5+2/heads=8", "has one query here, got drafts"),
    ("triton_mla_attn", "decode:5/heads=8,cache=packed", "got cache=packed"),
    ("triton_mla_attn", "decode:5/heads=8,dtype=fp32", "takes bf16 and fp16, got fp32"),
    ("triton_mla_attn", "decode:5,prefill:3/heads=8,model=minicpm3-4b", "256 columns, got 64"),
]


@pytest.mark.parametrize(("variant", "rows", "said"), NOT_TAKEN)
def test_what_a_backend_is_not_for_is_skipped_and_it_is_not_called(
    variant, rows, said, paths, lane, tmp_path
):
    verdict = verdict_of(paths()[variant], lane, tmp_path, rows)
    assert (verdict.status, verdict.kind) == (Status.SKIPPED, Kind.UNSUPPORTED)
    assert said in verdict.reason
    assert "fastdeploy" not in sys.modules


# ---- versions ------------------------------------------------------------------------------------

BEFORE_7727 = {READ: None, MLA: "MiddleMLAAttentionBackend"}
VERSIONS = {
    "tiles returned": ("mla_attn", {READ: None, MLA: "OldMLAAttentionBackend"}),
    "before #7727": ("mla_attn", BEFORE_7727),
    "before #7727, slots taken out by the backend": ("flash_mla", BEFORE_7727),
    "#7852, tokens": ("triton_mla_attn", {TRITON: "FirstTritonMLAAttentionBackend"}),
    "after #8060": ("mla_attn", {MLA: "WindowMLAAttentionBackend"}),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_of_a_backend_is_called_rightly(version, paths, lane, tmp_path):
    variant, changed = VERSIONS[version]
    path = paths(changed)[variant]
    assert path.unavailable is None
    rows = "decode:64,prefill:9,idle,decode:5,prefill:4,pad:2/heads=8"
    verdict = verdict_of(path, lane, tmp_path, rows)
    assert verdict.status is Status.PASSED, verdict.reason
    verdict = verdict_of(path, lane, tmp_path, "hit:64+3,decode:9/heads=8")
    if READ in changed:
        assert verdict.kind is Kind.UNSUPPORTED
        assert "has no fused read" in verdict.reason
    else:
        assert verdict.status is Status.PASSED, verdict.reason


def test_a_backend_lives_as_long_as_steps_are_of_its_kind(paths, lane, tmp_path):
    path = paths()["mla_attn"]
    for rows in ("decode:9,prefill:3/heads=8", "decode:70,idle/heads=8", "decode:9,idle/heads=16"):
        verdict_of(path, lane, tmp_path, rows)
    # Tables of two blocks take another backend than those of one.
    assert calls().count(MLA) == 3


# ---- what is wrong is noticed --------------------------------------------------------------------

FAULTS = {
    "a key too few": ("mla_attn", ("count - (end - t) + 1, longest_keys", "count - (end - t), longest_keys")),
    "no square": ("triton_mla_attn", ("math.log(factor) + 1.0) ** 2", "math.log(factor) + 1.0)")),
    "another slot's query": (
        "triton_mla_attn",
        ("self.attended(q[b], cache, tables[b], keys)", "self.attended(q[b - 1], cache, tables[b], keys)"),
    ),
    "the step's own lengths alone": ("flash_mla", ("lengths[b] = cached + 1", "lengths[b] = cached")),
    "prefill written as new": (
        "mla_attn",
        (
            "decoder[b] + i) for b, token, i in tokens_of(given) if encoder",
            "i) for b, token, i in tokens_of(given) if encoder",
        ),
    ),
    "latents and rope exchanged": (
        "triton_mla_attn",
        (
            "row[: self.rank], row[self.rank :] = latents[token], rope[token].flatten()",
            "row[: self.rope], row[self.rope :] = rope[token].flatten(), latents[token]",
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_fails(fault, paths, lane, tmp_path):
    variant, edit = FAULTS[fault]
    rows = "decode:64,hit:64+3,decode:9/heads=8"
    assert verdict_of(paths()[variant], lane, tmp_path, rows).status is Status.PASSED
    verdict = verdict_of(paths(edits=(edit,))[variant], lane, tmp_path, rows)
    assert verdict.status is Status.FAILED
    assert verdict.kind in {Kind.WRONG, Kind.GUARD}


def test_a_backend_that_asks_for_another_cache_is_an_error(paths, lane, tmp_path):
    edit = ("return [max_num_blocks, 1, self.block_size,", "return [max_num_blocks, self.block_size, 1,")
    verdict = verdict_of(paths(edits=(edit,))["mla_attn"], lane, tmp_path, "decode:9/heads=8")
    assert verdict.status is Status.ERROR
    assert "must keep its cache in [" in verdict.reason


# ---- what there is not ---------------------------------------------------------------------------


def test_a_missing_module_costs_its_own_path(paths):
    reasons = {name: path.unavailable for name, path in paths({TRITON: None}).items()}
    assert "No module named 'fastdeploy.model_executor.layers.attention.triton" in reasons["triton_mla_attn"]
    assert (reasons["mla_attn"], reasons["flash_mla"]) == (None, None)


def test_without_flash_mla_its_own_path_says_so(paths):
    if importlib.util.find_spec("flash_mla") is not None:
        pytest.skip("flash_mla is installed")
    reasons = {name: path.unavailable for name, path in paths(flash_mla=False).items()}
    assert reasons == {"mla_attn": None, "flash_mla": "flash_mla is not installed", "triton_mla_attn": None}


def test_a_verdict_states_the_backend_and_what_is_called_around_it(paths):
    told = paths()["triton_mla_attn"].libraries["fastdeploy"]
    assert told.endswith(f", {TRITON}/6 (2 optional) {MERGE}/9 {READ}/9 {EXTRACT}/4 {INSERT}/5")


# ---- one process a value -------------------------------------------------------------------------


def test_every_path_names_the_variables_of_its_process(paths):
    named = {
        name: (path.environment["FD_ATTENTION_BACKEND"], path.environment["USE_FLASH_MLA"])
        for name, path in paths().items()
    }
    assert named == {
        "mla_attn": ("MLA_ATTN", None),
        "flash_mla": ("MLA_ATTN", "1"),
        "triton_mla_attn": ("TRITON_MLA_ATTN", None),
    }


def test_another_value_in_a_process_that_has_imported_the_package_is_an_error(paths, lane, tmp_path):
    found = paths()
    assert verdict_of(found["mla_attn"], lane, tmp_path, "decode:9/heads=8").status is Status.PASSED
    verdict = verdict_of(found["triton_mla_attn"], lane, tmp_path, "decode:9/heads=8")
    assert verdict.status is Status.ERROR
    said = "must be imported with FD_ATTENTION_BACKEND=TRITON_MLA_ATTN, but was in this process with"
    assert said in verdict.reason


RECORDS = """
import os
with open({file!r}, "a") as file:
    file.write(" ".join([str(os.getpid()), *(os.environ.get(n, "-") for n in {names!r})]) + "\\n")
"""


def test_backends_of_different_values_never_share_a_process(make_house, command, tmp_path):
    from harness.cuda import build

    if build.lacking(build.HOST) is not None:
        pytest.skip(build.lacking(build.HOST))
    house, record = make_house({}), tmp_path / "record"
    names = ("FD_ATTENTION_BACKEND", "USE_FLASH_MLA")
    write_package(house, begins=RECORDS.format(file=str(record), names=names))
    cases = [f"mla_step/decode:{n},prefill:3/heads=8" for n in (5, 6, 7)]
    arguments = [
        "run",
        *cases,
        "--path",
        "adapters/fastdeploy/mla_step@*",
        "--lane",
        "host",
        "--workers",
        "2",
    ]
    result = command("harness", *arguments, cwd=house, timeout=400)
    assert "9 passed" in result.stdout, result.stdout + result.stderr
    lines = [line.split() for line in record.read_text().splitlines()]
    values = {}
    for pid, *value in lines:
        values.setdefault(pid, set()).add(tuple(value))
    assert all(len(found) == 1 for found in values.values())
    assert set().union(*values.values()) == {("MLA_ATTN", "-"), ("MLA_ATTN", "1"), ("TRITON_MLA_ATTN", "-")}
