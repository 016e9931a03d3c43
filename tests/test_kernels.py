"""The Triton kernels under the interpreter: every check, what they refuse, and how they are written."""

import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from cases import parse
from harness.paths import _splits as splits
from harness.paths.triton import latent_cache_write, mla_decode
from harness.verdict import Status

SOURCES = sorted(Path(mla_decode.__file__).parent.glob("*.py"))
PATHS = {path.operator: path for module in (mla_decode, latent_cache_write) for path in module.PATHS}
SMALL = "model=minicpm3-4b,heads=2"
ZOO = "draft:30+3,hit:17+4,prefill:5,decode:40,idle,paused:7,pad:2"

CASES = [
    f"mla_decode/{ZOO}/{SMALL},block=16",
    f"mla_decode/{ZOO}/{SMALL},block=16,splits=2",
    f"mla_decode/decode:300,draft:127+2/{SMALL},splits=3",
    f"mla_decode/decode:9,draft:5+3,pad:1/{SMALL},block=1,dtype=fp16",
    f"mla_decode/decode:33,idle,decode:64/{SMALL},block=2,dtype=fp32,splits=2",
    "mla_decode/decode:5,draft:14+3/model=mistral-small-4,heads=5,block=16,strided=0",
    "mla_decode/decode:20/model=dots3-note-sliding,heads=1,data=deep",
    "latent_cache_write/" + ZOO + "/model=minicpm3-4b,block=16",
    "latent_cache_write/hit:63+2,decode:64,idle,draft:30+9,pad:9/model=mistral-small-4,block=3,dtype=fp16",
    "latent_cache_write/prefill:20/model=dots3-note-sliding,dtype=fp32,strided=0,block=1",
]


@pytest.mark.parametrize("text", CASES)
def test_kernels_pass_every_check(text, launched, every_result):
    launch = launched(text, PATHS[parse(text).operator])
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []
    assert {"values", "guard", "inputs", "bounds", "repeat", "pages"} <= {
        result.name for result in results if result.status is Status.PASSED
    }


@pytest.mark.parametrize("rows", ["", "idlex3", "paused:5", "pad:3", "idle,pad:9", "prefill:3,hit:5+2"])
@pytest.mark.parametrize("operator", PATHS)
def test_steps_without_a_decode_row_are_no_trouble(operator, rows, launched, every_result):
    launch = launched(f"{operator}/{rows}/model=minicpm3-4b", PATHS[operator])
    results = every_result(launch)
    assert [result for result in results if result.status is Status.FAILED] == []


def test_rows_do_not_depend_on_their_place_in_the_batch(launched):
    row = f"decode:40/{SMALL},splits=2"
    alone = launched(f"mla_decode/{row}", PATHS["mla_decode"]).token_rows("out", 0)[0]
    among = launched(
        f"mla_decode/draft:30+3,idle,decode:40.k0/{SMALL},splits=2", PATHS["mla_decode"]
    ).token_rows("out", 0)[3]
    assert torch.equal(alone, among)


# ---- what they refuse ----------------------------------------------------------------------------


def with_dimensions(text, **dimensions):
    """A stand-in for a case whose model has other dimensions than any published one."""
    (layer,) = parse(text).layers
    return SimpleNamespace(layers=(replace(layer, model=replace(layer.model, **dimensions)),))


@pytest.mark.parametrize("operator", PATHS)
@pytest.mark.parametrize(
    ("dimension", "value"),
    [
        ("kv_lora_rank", 320),
        ("kv_lora_rank", 384),
        ("kv_lora_rank", 1536),
        ("qk_rope_head_dim", 96),
        ("qk_rope_head_dim", 48),
    ],
)
def test_widths_that_are_no_power_of_two_are_refused_with_the_reason(operator, dimension, value):
    case = with_dimensions(f"{operator}/decode:5", **{dimension: value})
    reason = PATHS[operator].supports(case)
    assert reason is not None
    assert dimension in reason
    assert str(value) in reason


@pytest.mark.parametrize("block", [3, 48, 65, 96])
def test_decode_refuses_blocks_that_are_no_power_of_two_with_the_reason(block):
    reason = PATHS["mla_decode"].supports(parse(f"mla_decode/decode:5/block={block}"))
    assert reason is not None
    assert "block_size" in reason
    assert str(block) in reason


def test_a_layer_that_is_refused_refuses_the_case():
    assert PATHS["mla_decode"].supports(parse("mla_decode/decode:5/layers=2,block=64+3")) is not None


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
@pytest.mark.parametrize("operator", PATHS)
def test_every_power_of_two_is_taken(operator, block):
    for model in ("minicpm3-4b", "mistral-small-4", "deepseek-v3", "dots3-note-sliding"):
        case = parse(f"{operator}/decode:5/model={model},block={block}")
        assert PATHS[operator].supports(case) is None


# ---- the split plan ------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 7, 200, 4096])
@pytest.mark.parametrize("keys", [0, 1, 64, 4096, 10**6])
@pytest.mark.parametrize("queries", [16, 64])
@pytest.mark.parametrize("processors", [8, 78, 132])
def test_planned_splits_are_within_their_limits(blocks, queries, keys, processors):
    planned = splits.plan(blocks, queries, keys, processors)
    assert 1 <= planned <= splits.MAX_SPLITS
    # All but the last split have keys enough to be worth it.
    assert planned == 1 or (planned - 1) * splits.MIN_TOKENS < keys


def test_a_long_row_alone_is_split():
    assert splits.plan(1, 16, 10**6, processors=132) > 16


def test_a_row_alone_has_a_split_for_every_multiprocessor_until_they_are_too_short():
    assert splits.plan(1, 16, 10**6, processors=78) == 78
    assert splits.plan(1, 16, 10 * splits.MIN_TOKENS, processors=78) == 10


def test_rows_that_fill_the_device_are_split_where_they_are_long_and_the_less_the_more_queries_share_them():
    assert splits.plan(128, 16, 2048, processors=132) == 1
    assert splits.plan(128, 16, 8192, processors=132) == 4
    assert splits.plan(128, 64, 8192, processors=132) == 2


def test_the_workspace_holds_a_part_for_each_token_head_and_split():
    case = parse("mla_decode/draft:30+3,idle,decode:5,pad:2/heads=5,splits=4")
    # 3 + 1 + 2 tokens.
    assert PATHS["mla_decode"].workspace(case) == {
        "partial_out": ((6, 5, 4, 512), "float32"),
        "partial_max": ((6, 5, 4), "float32"),
        "partial_sum": ((6, 5, 4), "float32"),
    }
    assert PATHS["mla_decode"].workspace(parse("mla_decode/decode:5/splits=1")) == {}


# ---- how they are written ------------------------------------------------------------------------


def is_jit(decorator):
    """Whether a decorator is `triton.jit`, called or not."""
    decorator = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(decorator) == "triton.jit"


def kernels_in(source):
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if any(is_jit(decorator) for decorator in node.decorator_list)]


def flaws_of(kernel):
    """What coverage of the kernel and the interpreter would trip on, and dots that choose their precision."""
    for node in ast.walk(kernel):
        if isinstance(node, ast.IfExp):
            yield f"line {node.lineno}: a ternary"
        if isinstance(node, ast.If | ast.For | ast.While) and node.body[0].lineno == node.lineno:
            yield f"line {node.lineno}: a body on the line of its condition"
        is_dot = isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.dot"
        if is_dot and "input_precision" not in {keyword.arg for keyword in node.keywords}:
            yield f"line {node.lineno}: tl.dot without input_precision"
    docstring = ast.get_docstring(kernel) or ""
    if any(line.lstrip().startswith("def ") for line in docstring.splitlines()):
        yield f"line {kernel.lineno}: a docstring line that begins like a function"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_are_written_for_coverage_and_interpreter(source):
    text = source.read_text(encoding="utf-8")
    assert [flaw for kernel in kernels_in(text) for flaw in flaws_of(kernel)] == []
    # Production code: nothing in it asks where it runs.
    assert "environ" not in text
    assert "TRITON_INTERPRET" not in text


def test_the_lint_finds_what_it_is_for():
    flawed = '''
@triton.jit
def first(x):
    """Doubles.

    def of x
    """
    if x: return
    y = 1 if x else 2

@triton.jit(do_not_specialize=["x"])
def second(x):
    for i in range(x): x += i
    x = tl.dot(x, x)

def host(x):
    return 1 if x else 2
'''
    kernels = kernels_in(flawed)
    assert [kernel.name for kernel in kernels] == ["first", "second"]
    assert [len(list(flaws_of(kernel))) for kernel in kernels] == [3, 2]


def test_the_lint_sees_the_kernels():
    found = {source.stem: len(kernels_in(source.read_text(encoding="utf-8"))) for source in SOURCES}
    assert found["mla_decode"] >= 2
    assert found["latent_cache_write"] >= 1
