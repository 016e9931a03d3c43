"""FastDeploy's installed package, with a stand-in that has its module paths and every signature it had.

`tests/data/fastdeploy_stand_in.py` computes in plain loops; nothing here says what FastDeploy's own binaries
give. Signatures are written down here as FastDeploy registered them, beside those that the adapter knows.
"""

import importlib
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cases import parse
from harness.judge import judge_case
from harness.paths.adapters import _fastdeploy_package
from harness.paths.adapters._fastdeploy_package import ENVIRONMENT, capability_of, parsed
from harness.paths.adapters._loading import restored_modules
from harness.task import Task
from harness.verdict import Kind, Status

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("fastdeploy_ops", "fastdeploy_layers")
STAND_IN = ROOT / "tests" / "data" / "fastdeploy_stand_in.py"

needs_paddle = pytest.mark.skipif(
    importlib.util.find_spec("paddle") is None, reason="paddle is not installed"
)

LENGTHS = "seq_lens_encoder seq_lens_decoder seq_lens_this_time"
ROWS = "kv_nope kv_pe kv_cache seq_lens"
SLOTS = "batch_id_per_token cu_seqlens_q block_tables"
OFFSETS = "padding_offsets cum_offsets block_tables"
TILES = "decoder_batch_ids decoder_tile_ids_per_batch"
ENCODER_TILES = "encoder_batch_ids encoder_tile_ids_per_batch"
KV_TILES = "kv_batch_ids kv_tile_ids_per_batch"
QUANTISATION = "cache_quant_type_str"
SHAPES = "encoder_block_shape_q decoder_block_shape_q group_size block_size"
OPTIONAL = (
    "attn_mask query_bias query_out_scales cache_k_quant_scales cache_v_quant_scales cache_k_dequant_scales "
    "cache_v_dequant_scales cache_k_zp cache_v_zp out_linear_shifts out_linear_smooths"
)
ATTRIBUTES = (
    "nope_size max_input_length softmax_scale quant_max_bound quant_min_bound out_linear_in_scale "
    "speculate_max_draft_token_num causal speculate_decoder"
)
READ = (
    "latent_cache block_tables new_compressed_kv new_k_pe cu_seqlens_k cu_seqlens_q kv_lora_rank "
    "qk_rope_head_dim block_size"
)

POSITIONS = "get_position_ids_and_mask_encoder_batch"
PADDING = "get_padding_offset"
PREFILL_WRITE = "prefill_mla_write_cache"
DECODE_WRITE = "decode_mla_write_cache"
PLAN = "get_block_shape_and_split_kv_block"
ATTEND = "multi_head_latent_attention"
MERGE = "merge_prefill_decode_output"
PACK = "dsk_attn_write_cache"
READS = ("fused_read_cache_and_interleave_triton", "fused_read_cache_and_interleave_naive")
EXTRACT = "extract_decoder_token_from_q"
INSERT = "insert_decoder_result_back"
MAP = "compute_slot_mapping"
LINEAR = "KVBatchLinear"

# Where the operators are; below `model_executor`.
MODULES = {
    "ops/gpu/__init__.py": (POSITIONS, PADDING, PREFILL_WRITE, DECODE_WRITE, PACK, PLAN, ATTEND, MERGE),
    "layers/attention/mla_attention_backend.py": (*READS, EXTRACT, INSERT),
    "layers/attention/dsa_attention_backend.py": (MAP,),
    "layers/linear.py": (LINEAR,),
}

NEWEST = {
    POSITIONS: f"{LENGTHS} position_ids",
    PADDING: "input_ids seq_len draft_tokens seq_lens_encoder seq_lens_decoder cpu_token_num",
    PREFILL_WRITE: f"{ROWS} seq_lens_decoder {SLOTS} kv_signal_data cache_quant_type_str max_seq_len",
    DECODE_WRITE: f"{ROWS} seq_lens_encoder {SLOTS} cache_quant_type_str max_seq_len speculate_decoder",
    PLAN: (
        f"{LENGTHS} {TILES} decoder_num_blocks_cpu decoder_num_blocks_device decoder_chunk_size_device "
        f"max_len_tensor_cpu {ENCODER_TILES} encoder_num_blocks_x_cpu {KV_TILES} kv_num_blocks_x_cpu {SHAPES}"
    ),
    ATTEND: (
        "query key_cache value_cache seq_lens_decoder seq_lens_this_time cu_seqlens_q batch_id_per_token "
        f"block_tables {KV_TILES} kv_num_blocks {TILES} decoder_num_blocks_device decoder_chunk_size_device "
        f"max_dec_len_this_time max_len_kv {OPTIONAL} compute_dtype cache_quant_type_str {ATTRIBUTES}"
    ),
    MERGE: f"encoder_res decoder_res {LENGTHS} cu_seq_q head_num head_dim max_token",
    PACK: "kv_nope kv_pe kv_cache slot_mapping scale cache_quant_type_str",
    **dict.fromkeys(READS, READ),
    EXTRACT: "q cu_seqlens_q seq_lens_encoder seq_lens_decoder",
    INSERT: "decoder_result cu_seqlens_q seq_lens_encoder seq_lens_decoder mixed_token_num",
    MAP: "block_tables positions batch_id_per_token block_size",
    LINEAR: "NewLinear",
}
OPERATORS = {name: of for name, of in NEWEST.items() if name != LINEAR}
OLD_PLAN = f"{LENGTHS} {TILES} decoder_num_blocks_x_cpu max_len_tensor_cpu {SHAPES} decoder_step_token_num"
OLD_ATTEND = (
    f"query key_cache value_cache {LENGTHS} cu_seqlens_q batch_id_per_token block_tables {ENCODER_TILES} "
    f"encoder_num_blocks {KV_TILES} kv_num_blocks {TILES} decoder_num_blocks decoder_num_blocks_cpu "
    "decoder_chunk_size_cpu max_enc_len_this_time max_dec_len_this_time max_len_kv "
    f"{OPTIONAL} compute_type cache_quant_type {ATTRIBUTES}"
)


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """(operators to change, None for one that is not there) -> the adapter's module, with such a package.

    An operator is the names of its arguments, or what `operator` of the stand-in takes of it.
    """
    with restored_modules("fastdeploy"):
        for name in ENVIRONMENT:
            monkeypatch.setenv(name, "true")

        def install(changed=None, *, begins="", body="", attention=""):
            ops = {**NEWEST, **(changed or {})}
            folder = tmp_path / "site"
            write_package(folder, ops, begins=begins, body=body, attention=attention)
            monkeypatch.syspath_prepend(str(folder))
            return adapters_now()

        yield install
    forget()


def write_package(folder, ops, *, begins="", body="", attention=""):
    package = folder / "fastdeploy"
    shutil.rmtree(package, ignore_errors=True)
    files = {"__init__.py": f"print('an engine says hello')\n{begins}"}
    files |= {f"model_executor/{name}/__init__.py": "" for name in (".", "ops", "layers", "layers/attention")}
    for file, names in MODULES.items():
        lines = ["from fastdeploy import stand_in"]
        for name in names:
            of = ops[name]
            if name == LINEAR:
                lines.append(f"{name} = stand_in.{of}")
            elif of is not None:
                whole = (of,) if isinstance(of, str) else of
                lines.append(f"{name} = stand_in.operator({name!r}, *{tuple(whole)!r})")
        files[f"model_executor/{file}"] = "\n".join(lines) + "\n"
    files["model_executor/layers/attention/mla_attention_backend.py"] += attention
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    (package / "stand_in.py").write_text(STAND_IN.read_text() + body)


def forget():
    _fastdeploy_package.installed.cache_clear()
    for name in ADAPTERS:
        sys.modules.pop(f"harness.paths.adapters.{name}", None)


def adapters_now():
    """The adapter's files, imported anew: they look at what is installed when they are."""
    forget()
    modules = [importlib.import_module(f"harness.paths.adapters.{name}") for name in ADAPTERS]
    return SimpleNamespace(ops=modules[0], PATHS=modules[0].PATHS + modules[1].PATHS)


def path_of(module, name):
    return next(path for path in module.PATHS if path.name == f"adapters/fastdeploy/{name}")


def verdict_of(path, lane, tmp_path, text):
    return judge_case(Task(text, parse(text).operator, path.name, lane.name), path, lane, tmp_path / "lock")


def calls():
    return sys.modules["fastdeploy.stand_in"].CALLS


PASSING = [
    ("position_ids@ops", "position_ids/decode:5,hit:63+3,idle,paused:7,prefill:4,draft:9+3,pad:2"),
    ("position_ids@ops", "position_ids/idle,paused:7"),
    ("padding_offset@ops", "padding_offset/decode:5,hit:63+3,idle,paused:7,prefill:4,draft:9+3,pad:2"),
    ("padding_offset@ops", "padding_offset/idlex3,paused:9"),
    ("step_plan@ops", "step_plan/decode:1000,decode:5000,idle,hit:64+9,prefill:4,draft:3000+3,paused:70"),
    ("step_plan@ops", "step_plan/decode:1000/block=16"),
    ("latent_cache_write@ops", "latent_cache_write/decode:5,hit:63+3,idle,paused:7,prefill:70/block=16"),
    ("latent_cache_write@ops", "latent_cache_write/draft:62+4,hit:3+2,decode:9,pad:3/dtype=fp16,strided=1"),
    ("latent_cache_write@ops", "latent_cache_write/pad:2"),
    ("mla_decode@ops", "mla_decode/decode:200,idle,hit:9+2,decode:63,paused:7,pad:2/heads=16"),
    ("mla_decode@ops", "mla_decode/draft:62+4,decode:64,prefill:3/heads=16,dtype=fp16,strided=1"),
    ("mla_decode@ops", "mla_decode/draft:30+8/heads=8"),
    ("mla_decode@ops", "mla_decode/prefill:3,idle/heads=8"),
    ("decode_rows@ops", "decode_rows/draft:30+9,hit:9+2,decode:63,idle,prefill:4,paused:7,pad:2/heads=2"),
    ("decode_rows@ops", "decode_rows/prefill:3/heads=2,dtype=fp16"),
    ("read_cache_interleave@layers", "read_cache_interleave/decode:5,hit:63+3,idle,paused:7,prefill:4"),
    ("read_cache_interleave@naive", "read_cache_interleave/hit:9+2,hit:130+1/block=16,strided=1"),
    ("packed_cache_write@ops", "packed_cache_write/decode:5,hit:63+3,idle,prefill:9,pad:2"),
    ("packed_cache_write@ops", "packed_cache_write/draft:62+4/block=16,strided=1"),
    ("decode_rows@layers", "decode_rows/decode:9,hit:9+2,decode:63,idle,prefill:4,paused:7,pad:2/heads=2"),
    ("decode_rows@layers", "decode_rows/prefill:3,idle/heads=2,strided=1"),
    ("slot_mapping@layers", "slot_mapping/decode:5,hit:63+3,idle,paused:7,draft:9+3,pad:2/block=16"),
    ("kv_b_split@layers", "kv_b_split/decode:5/heads=4,tp=2"),
    ("kv_b_split@layers", "kv_b_split/decode:5/model=minicpm3-4b,heads=2,dtype=fp16,strided=1"),
]


@needs_paddle
@pytest.mark.parametrize(("name", "text"), PASSING)
def test_a_stand_in_of_fastdeploy_gives_what_the_contract_says(name, text, adapter, lane, tmp_path):
    path = path_of(adapter(), name)
    assert path.unavailable is None
    verdict = verdict_of(path, lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason


# ---- versions ------------------------------------------------------------------------------------

NO_PADDING = "decode:5,hit:63+3,prefill:4,draft:9+3"
DECODE = "mla_decode/draft:62+4,decode:300,idle,hit:9+2,pad:1/heads=16"

VERSIONS = {
    "a mask": (
        "position_ids@ops",
        {POSITIONS: f"{LENGTHS} position_ids mask_encoder_batch"},
        "decode:9,prefill:4",
    ),
    "no cached lengths": (
        "padding_offset@ops",
        {PADDING: "input_ids seq_len draft_tokens seq_lens_encoder cpu_token_num"},
        "decode:5,idle,hit:63+3,pad:2",
    ),
    "a number of tokens": ("padding_offset@ops", {PADDING: "input_ids token_num seq_len"}, NO_PADDING),
    "offsets, registered in another order": (
        "padding_offset@ops",
        {PADDING: ("input_ids token_num cum_offsets seq_len", "input_ids cum_offsets token_num seq_len")},
        NO_PADDING,
    ),
    "slots": (
        "latent_cache_write@ops",
        {
            PREFILL_WRITE: f"{ROWS} seq_lens_decoder {SLOTS} slot_mapping kv_signal_data {QUANTISATION}",
            DECODE_WRITE: f"{ROWS} seq_lens_encoder {SLOTS} {QUANTISATION} speculate_decoder",
        },
        f"{NO_PADDING},idle,pad:2",
    ),
    "no signal": (
        "latent_cache_write@ops",
        {PREFILL_WRITE: f"{ROWS} seq_lens_decoder {SLOTS} cache_quant_type_str max_seq_len"},
        f"{NO_PADDING},idle,pad:2",
    ),
    "padding offsets": (
        "latent_cache_write@ops",
        {
            PREFILL_WRITE: f"{ROWS} seq_lens_decoder {OFFSETS} cache_quant_type_str max_seq_len",
            DECODE_WRITE: f"{ROWS} seq_lens_encoder {OFFSETS} {QUANTISATION} max_seq_len speculate_decoder",
        },
        f"idle,{NO_PADDING}",
    ),
    "a packed write of prefill or decode": (
        "packed_cache_write@ops",
        {
            PACK: (
                f"kv_nope kv_pe kv_cache slot_mapping seq_lens seq_lens_decoder {SLOTS} kv_signal_data scale "
                f"{QUANTISATION} max_seq_len is_prefill"
            )
        },
        "decode:5,hit:63+3,pad:1",
    ),
    "lists returned": ("step_plan@ops", {PLAN: OLD_PLAN}, "decode:1000,decode:5000,hit:64+9"),
    "lists returned, for attention": ("mla_decode@ops", {PLAN: OLD_PLAN, ATTEND: OLD_ATTEND}, DECODE),
}

TELLING = ("names", "kinds", "refusal")


@needs_paddle
@pytest.mark.parametrize(
    ("version", "told"),
    # Without names the last cannot be told from newer ones of the same kinds.
    [(one, told) for one in VERSIONS for told in TELLING if one != "padding offsets" or told == "names"],
)
def test_every_signature_is_found_and_called_rightly(version, told, adapter, lane, tmp_path):
    name, changed, rows = VERSIONS[version]
    whole = {key: of if isinstance(of, tuple) else (of, None) for key, of in changed.items()}
    path = path_of(adapter({key: (*of, told) for key, of in whole.items()}), name)
    assert path.unavailable is None
    text = rows if "/" in rows else f"{path.operator}/{rows}"
    verdict = verdict_of(path, lane, tmp_path, text)
    assert verdict.status is Status.PASSED, verdict.reason
    assert set(changed) <= set(calls())


@needs_paddle
@pytest.mark.parametrize("told", ["kinds", "refusal"])
def test_the_newest_operators_are_known_without_names_too(told, adapter, lane, tmp_path):
    module = adapter({name: (of, None, told) for name, of in OPERATORS.items()})
    assert [path.unavailable for path in module.PATHS] == [None] * 12
    first = {name: text for name, text in reversed(PASSING) if name.endswith("@ops")}
    assert len(first) == 7
    for name, text in first.items():
        assert verdict_of(path_of(module, name), lane, tmp_path, text).status is Status.PASSED


@needs_paddle
@pytest.mark.parametrize("kind", ["MiddleLinear", "OldLinear"])
def test_every_version_of_the_layer_of_kv_b_proj_loads(kind, adapter, lane, tmp_path):
    path = path_of(adapter({LINEAR: kind}), "kv_b_split@layers")
    assert path.unavailable is None
    omitted = ("k_b_proj_weight_torch", "v_b_proj_weight_torch") if kind == "OldLinear" else ()
    assert path.omits == omitted
    verdict = verdict_of(path, lane, tmp_path, "kv_b_split/decode:5/heads=4,tp=2")
    assert verdict.status is Status.PASSED, verdict.reason
    assert calls() == [LINEAR] * (2 if kind == "OldLinear" else 4)


@needs_paddle
def test_a_version_that_is_told_no_cached_lengths_is_asked_for_no_prefix_sum_of_keys(adapter):
    old = {PADDING: "input_ids seq_len draft_tokens seq_lens_encoder cpu_token_num"}
    assert path_of(adapter(), "padding_offset@ops").omits == ("cu_seqlens_k_prefill",)
    assert path_of(adapter(old), "padding_offset@ops").omits == ("cu_seqlens_k", "cu_seqlens_k_prefill")


@needs_paddle
def test_the_version_with_a_mask_counts_prefix_hits_from_zero_which_is_noticed(adapter, lane, tmp_path):
    path = path_of(adapter({POSITIONS: f"{LENGTHS} position_ids mask_encoder_batch"}), "position_ids@ops")
    verdict = verdict_of(path, lane, tmp_path, "position_ids/hit:64+4,decode:9")
    assert (verdict.status, verdict.kind) == (Status.FAILED, Kind.WRONG)


@needs_paddle
def test_a_verdict_states_the_operators_by_the_number_of_their_arguments(adapter, lane, tmp_path):
    path = path_of(adapter({PADDING: (NEWEST[PADDING], None, "kinds")}), "padding_offset@ops")
    verdict = verdict_of(path, lane, tmp_path, "padding_offset/decode:5")
    told = "of unknown version, not seen working: no version was, get_padding_offset/6 (1 optional)"
    assert verdict.environment["fastdeploy"] == told
    path = path_of(adapter(), "mla_decode@ops")
    assert path.libraries["fastdeploy"].endswith(f", {PLAN}/19 {ATTEND}/39")


def test_what_stands_last_and_may_be_left_out_is_left_to_the_version():
    names = [*NEWEST[POSITIONS].split(), "stream"]
    found = capability_of(POSITIONS, {"names": names, "optional": ["stream"]})
    assert found.arguments == tuple(NEWEST[POSITIONS].split())
    reason = capability_of(POSITIONS, {"names": names, "optional": []})
    assert reason == f"{POSITIONS} asks for stream, which is not known here"


def test_kinds_of_no_known_version_are_said():
    reason = capability_of(POSITIONS, {"names": None, "kinds": ["Tensor", "int"], "optional": [False, False]})
    assert reason == f"{POSITIONS} takes (Tensor, int), which is no signature that is known here"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        (
            "f(arg0: paddle.Tensor, arg1: Optional[paddle.Tensor], arg2: str) -> None",
            ["Tensor", "Tensor", "str"],
        ),
        ("f(arg0: Union[int, List[int]], arg1: bool) -> list[paddle.Tensor]", ["int", "bool"]),
        ("f(arg0: typing.SupportsInt | typing.SupportsIndex, arg1: float) -> None", ["int", "float"]),
    ],
)
def test_kinds_are_read_as_pybind11_writes_them(text, kinds):
    assert parsed(text)["kinds"] == kinds
    assert parsed("a function without a signature") is None


def test_names_that_pybind11_knows_are_read():
    found = parsed("f(position_ids: paddle.Tensor, max_seq_len: int = -1) -> None")
    assert found == {"names": ["position_ids", "max_seq_len"], "optional": ["max_seq_len"]}


# ---- what is wrong is noticed --------------------------------------------------------------------

KV_B = "kv_b_split/decode:5/heads=2"
FAULTS = {
    "position_ids@ops": ("first = decoder if", "first = 0 if", "position_ids/hit:64+4,decode:9"),
    "padding_offset@ops": ("length + cached[b]", "length", "padding_offset/hit:64+4,decode:9"),
    "step_plan@ops": ("rest == max(left)", "rest == min(left)", "step_plan/decode:1000,decode:5000"),
    "latent_cache_write@ops": (
        "decoder[b] + i) for b, token, i in tokens_of(given) if encoder",
        "i) for b, token, i in tokens_of(given) if encoder",
        "latent_cache_write/hit:64+4,decode:9",
    ),
    "mla_decode@ops": ("decoder[b] + i + 1]", "decoder[b] + i]", "mla_decode/decode:64/heads=8"),
    "decode_rows@ops": ("min(new, most)", "min(new, 1)", "decode_rows/draft:9+3/heads=1"),
    "read_cache_interleave@naive": (
        "latents[t], rope[t]",
        "latents[t], rope[0]",
        "read_cache_interleave/hit:9+2",
    ),
    "packed_cache_write@ops": ("largest / 448", "largest * (1 / 448)", "packed_cache_write/prefill:20"),
    "decode_rows@layers": ("lengths[b] = cached + 1", "lengths[b] = cached", "decode_rows/decode:9/heads=1"),
    "slot_mapping@layers": ("if b >= 0 and position", "if position", "slot_mapping/decode:5,pad:2"),
    "kv_b_split@layers": ("[:, :, self.qk_nope_head_dim :]", "[:, :, : self.v_head_dim]", KV_B),
}


@needs_paddle
@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_operator_fails(name, adapter, lane, tmp_path, monkeypatch):
    right, wrong, text = FAULTS[name]
    source = STAND_IN.read_text()
    assert right in source
    broken = tmp_path / "broken.py"
    broken.write_text(source.replace(right, wrong))
    assert verdict_of(path_of(adapter(), name), lane, tmp_path, text).status is Status.PASSED
    for module in [one for one in sys.modules if one.partition(".")[0] == "fastdeploy"]:
        del sys.modules[module]
    monkeypatch.setitem(globals(), "STAND_IN", broken)
    verdict = verdict_of(path_of(adapter(), name), lane, tmp_path, text)
    assert verdict.status is Status.FAILED
    # What is written where nothing may be is noticed by the guard first.
    assert verdict.kind in {Kind.WRONG, Kind.GUARD}


MOVED = """

def get_position_ids_and_mask_encoder_batch(given):
    import paddle

    moved = paddle.zeros(given["position_ids"].shape, "int32")
    given["position_ids"].get_tensor()._share_data_with(moved.get_tensor())
"""


@needs_paddle
def test_an_operator_that_puts_its_argument_elsewhere_is_an_error(adapter, lane, tmp_path):
    path = path_of(adapter(body=MOVED), "position_ids@ops")
    verdict = verdict_of(path, lane, tmp_path, "position_ids/decode:5")
    assert verdict.status is Status.ERROR
    assert "must leave position_ids where it is" in verdict.reason


@needs_paddle
def test_variables_that_would_change_an_operator_are_set_before_it_is_called(adapter, lane, tmp_path):
    path = path_of(adapter(), "step_plan@ops")
    assert os.environ["FD_ATTENTION_BACKEND"] == "true"
    assert verdict_of(path, lane, tmp_path, "step_plan/decode:5,idle").status is Status.PASSED
    assert os.environ["FD_ATTENTION_BACKEND"] == "MLA_ATTN"
    assert not [name for name in os.environ if name.startswith("FLAGS_") and name in ENVIRONMENT]


# ---- what there is not ---------------------------------------------------------------------------

INSTALL = (
    "pip install paddlepaddle-gpu fastdeploy-gpu -i https://www.paddlepaddle.org.cn/packages/stable/cu126/"
)


def test_without_the_package_every_path_says_what_to_install():
    if importlib.util.find_spec("fastdeploy") is not None:
        pytest.skip("fastdeploy is installed")
    paths = adapters_now().PATHS
    assert {path.unavailable for path in paths} == {f"fastdeploy is not installed: {INSTALL}"}
    assert all(path.libraries == {} and path.lanes == ("compiled",) for path in paths)


@needs_paddle
def test_a_missing_operator_costs_its_own_paths_and_says_what_to_install(adapter):
    module = adapter({ATTEND: None, READS[0]: None})
    reasons = {path.name.rpartition("/")[2]: path.unavailable for path in module.PATHS}
    lacking = "fastdeploy of unknown version: fastdeploy.model_executor.{} has no {}: " + INSTALL
    assert reasons.pop("mla_decode@ops") == lacking.format("ops.gpu", ATTEND)
    read = lacking.format("layers.attention.mla_attention_backend", READS[0])
    assert reasons.pop("read_cache_interleave@layers") == read
    assert set(reasons.values()) == {None}


@needs_paddle
def test_an_argument_that_is_not_known_costs_the_operators_own_paths(adapter):
    module = adapter({MERGE: NEWEST[MERGE].replace("max_token", "max_token sinks")})
    reasons = {path.name.rpartition("/")[2]: path.unavailable for path in module.PATHS}
    for name in ("decode_rows@ops", "decode_rows@layers"):
        assert f"{MERGE} asks for sinks, which is not known here: {INSTALL}" in reasons.pop(name)
    assert set(reasons.values()) == {None}


@needs_paddle
def test_a_module_that_cannot_be_imported_costs_its_own_paths(adapter):
    module = adapter(attention="import flash_mla_of_another_build\n")
    reasons = {path.name.rpartition("/")[2]: path.unavailable for path in module.PATHS}
    for name in ("read_cache_interleave@layers", "read_cache_interleave@naive", "decode_rows@layers"):
        assert "No module named 'flash_mla_of_another_build'" in reasons.pop(name)
    assert set(reasons.values()) == {None}


@needs_paddle
@pytest.mark.parametrize(
    ("begins", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with exit code -9: nothing said"),
        ("import sys; sys.exit('no such GPU')", "ended with exit code 1: no such GPU"),
    ],
)
def test_a_package_that_ends_its_process_ends_a_child_alone(begins, said, adapter):
    module = adapter(begins=begins)
    assert all(said in path.unavailable and path.unavailable.endswith(INSTALL) for path in module.PATHS)


@needs_paddle
def test_looking_at_the_package_does_not_import_it_here(adapter):
    module = adapter()
    assert path_of(module, "mla_decode@ops").unavailable is None
    assert "fastdeploy" not in sys.modules


# ---- what is not claimed -------------------------------------------------------------------------

NOT_TAKEN = [
    ("position_ids@ops", "position_ids/pad:3", "an engine's step has a slot, got none"),
    ("position_ids@ops", "position_ids/idlex1025", "a thread for each of at most 1,024 slots, got 1,025"),
    ("padding_offset@ops", "padding_offset/", "an engine's step has a slot, got none"),
    ("step_plan@ops", "step_plan/prefill:5", "in which no slot has cached tokens"),
    ("latent_cache_write@ops", "latent_cache_write/decode:5/dtype=fp32", "takes bf16 and fp16, got fp32"),
    ("mla_decode@ops", "mla_decode/decode:5/heads=4", "takes 8, 16 or 64 heads, got 4"),
    ("mla_decode@ops", "mla_decode/decode:5/heads=8,block=32", "takes blocks of 64 tokens, got 32"),
    ("mla_decode@ops", "mla_decode/draft:5+5/heads=16", "takes 4 new tokens a row at 16 heads, got 5"),
    ("mla_decode@ops", "mla_decode/draft:5+2/heads=64", "takes 1 new tokens a row at 64 heads, got 2"),
    (
        "mla_decode@ops",
        "mla_decode/decode:5/heads=8,model=minicpm3-4b",
        "takes rows of 512 + 64, got 256 + 32",
    ),
    ("mla_decode@ops", "mla_decode/decode:5/heads=8,dtype=fp32", "takes bf16 and fp16, got fp32"),
    ("decode_rows@ops", "decode_rows/decode:5/heads=2,model=minicpm3-4b", "128, 192 or 256 columns, got 64"),
    ("decode_rows@layers", "decode_rows/draft:5+2/heads=2", "has one token a slot, got drafts"),
    ("packed_cache_write@ops", "packed_cache_write/decode:5/scale_fmt=ue8m0", "got scale_fmt=ue8m0"),
]


@needs_paddle
@pytest.mark.parametrize(("name", "text", "said"), NOT_TAKEN)
def test_what_an_operator_is_not_for_is_skipped_and_it_is_not_called(
    name, text, said, adapter, lane, tmp_path
):
    path = path_of(adapter(), name)
    verdict = verdict_of(path, lane, tmp_path, text)
    assert (verdict.status, verdict.kind) == (Status.SKIPPED, Kind.UNSUPPORTED)
    assert said in verdict.reason
    assert "fastdeploy" not in sys.modules


@needs_paddle
def test_versions_without_room_for_padding_are_not_given_any(adapter, lane, tmp_path):
    old = f"{ROWS} seq_lens_decoder {OFFSETS} cache_quant_type_str max_seq_len"
    module = adapter({PADDING: "input_ids token_num seq_len", PREFILL_WRITE: old})
    for name in ("padding_offset@ops", "latent_cache_write@ops"):
        path = path_of(module, name)
        verdict = verdict_of(path, lane, tmp_path, f"{path.operator}/decode:5,pad:2")
        assert verdict.kind is Kind.UNSUPPORTED
        assert verdict.reason.endswith(("got padding", "got padding tokens"))
    assert "fastdeploy" not in sys.modules


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_operators_are_asked_on_the_compute_capabilities_that_they_are_for(capability, monkeypatch):
    module = adapters_now().ops
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda: capability)
    told = f"this device has {capability[0]}.{capability[1]}"
    reason = module.supports_decode(parse("mla_decode/decode:5/heads=16"))
    assert reason == (None if capability == (9, 0) else f"{ATTEND} is for compute capability 9.0, {told}")
    reason = module.supports_packing(parse("packed_cache_write/decode:5"))
    old = f"{PACK} converts to fp8 from compute capability 8.9 on, {told}"
    assert reason == (old if capability == (8, 0) else None)


def test_a_plan_for_other_devices_is_not_compared(monkeypatch):
    module = adapters_now().ops
    monkeypatch.setattr(module, "multiprocessors", lambda: 78)
    reason = module.supports_plan(parse("step_plan/decode:5"))
    assert reason == f"{PLAN} plans for this device's 78 multiprocessors, the contract for 132"


# ---- workers -------------------------------------------------------------------------------------

LEAVES = """

def get_position_ids_and_mask_encoder_batch(given):
    import signal

    if len(given["seq_lens_encoder"]) == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    view(given["position_ids"])[0] = 5
"""


@needs_paddle
def test_an_operator_that_ends_its_process_costs_one_case(make_house, command, tmp_path):
    from harness.cuda import build

    if build.lacking(build.HOST) is not None:
        pytest.skip(build.lacking(build.HOST))
    house = make_house({})
    write_package(house, NEWEST, body=LEAVES)
    cases = ["position_ids/decode:5,idle", "position_ids/decode:5"]
    path = "adapters/fastdeploy/position_ids@ops"
    arguments = ["run", *cases, "--path", path, "--lane", "host", "--workers", "1"]
    result = command("harness", *arguments, cwd=house, timeout=300)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "signal 11 (SIGSEGV)" in result.stdout
    assert "1 passed" in result.stdout
