"""Check `memory`: what a CUDA kernel must not touch is noticed, named and placed; what it may is not."""

import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from harness.checks import checks
from harness.cuda import build, sanitized
from harness.paths.cuda import latent_cache_write, position_ids
from harness.verdict import Kind, Status

pytestmark = [
    pytest.mark.skipif(sanitized.lacking() is not None, reason=str(sanitized.lacking())),
    pytest.mark.xdist_group("memory"),
]

POSITION_IDS = Path(position_ids.__file__).with_suffix(".cu")
CACHE_WRITE = Path(latent_cache_write.__file__).with_suffix(".cu")

FAULTS = """
#include "mla/launch.h"

namespace {

using namespace mla;

struct Scratch {
  alignas(16) int front[4];
  int back[4];
};

[[gnu::noinline]] int deep(int depth, volatile int* kept) {  // 8
  volatile int here[256];
  here[depth % 256] = depth;
  return depth == 0 ? *kept : deep(depth - 1, here) + here[depth % 256];
}

[[gnu::noinline]] const int* gone() {
  int here = 5;
  const int* volatile address = &here;
  return address;
}

// What is done wrong depends on the number of tokens.
__global__ void place_tokens(const int* seq_lens_decoder, const int* batch_id_per_token, int* position_ids,
                             int num_tokens) {
  Scratch& scratch = shared_memory<Scratch>();
  int* all = scratch.front;
  asm("" : "+r"(all));
  switch (num_tokens) {
    case 1:
      position_ids[0] = seq_lens_decoder[1];  // 1
      break;
    case 2:
      position_ids[-1] = 0;  // 2
      break;
    case 3:
      position_ids[0] = reinterpret_cast<const uint4*>(batch_id_per_token + 1)->x;  // 3
      break;
    case 4:
      position_ids[0] = seq_lens_decoder[0] + 0x7fffffff;  // 4
      break;
    case 5:
      all[threadIdx.x + 8] = 1;  // 5
      break;
    case 6:
      position_ids[num_tokens + (1 << 26)] = 0;  // 6
      break;
    case 7:
      const_cast<int*>(seq_lens_decoder)[0] = 0;  // 7
      break;
    case 8:
      position_ids[0] = deep(4000, position_ids);
      break;
    case 9:
      position_ids[0] = *gone();  // 9
      break;
    case 10:
      copy_async(scratch.front, seq_lens_decoder + 8, true);  // 10
      commit_copies();
      wait_copies<0>();
      break;
    case 11:
      scratch.front[threadIdx.x + 4] = 1;  // 11
      break;
    case 12:
      position_ids[0] = 1 << (num_tokens + 20);  // 12
      break;
    default:
      __syncthreads();
      position_ids[0] = scratch.front[0];
  }
}

void launch_place_tokens(TensorView seq_lens_decoder, TensorView cu_seqlens_q, TensorView batch_id_per_token,
                         TensorView position_ids) {
  launch(position_ids, place_tokens, 1, 1, sizeof(Scratch), data<int>(seq_lens_decoder),
         data<int>(batch_id_per_token), data<int>(position_ids), position_ids.numel());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(place_tokens, launch_place_tokens)
"""


@pytest.fixture(scope="module")
def process():
    """The sanitized process of this module's tests."""
    kept = sanitized.SanitizedProcess()
    yield kept
    kept.close()


@pytest.fixture(scope="module")
def faulty(process, tmp_path_factory):
    """(number of tokens) -> what is said of the fault of that number, in a kernel of position_ids."""
    changed = tmp_path_factory.mktemp("faults") / "position_ids.cu"
    changed.write_text(FAULTS)

    def launch(tokens):
        case = f"position_ids/decode:{tokens}x{tokens}"
        return process.launch(case, "cuda/position_ids", {POSITION_IDS: changed})

    return launch


def line_of(mark):
    (line,) = [n for n, text in enumerate(FAULTS.splitlines(), 1) if text.endswith(f"// {mark}")]
    return f"position_ids.cu:{line}"


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (1, " reads 4 bytes, right behind seq_lens_decoder"),
        (2, " writes 4 bytes, 4 bytes before position_ids begins"),
        (3, ": member access within misaligned address .* requires 16 byte alignment"),
        (5, " writes 4 bytes, outside the block's shared memory"),
        pytest.param(
            4, ": signed integer overflow: 4 \\+ 2147483647 cannot be represented in type 'int'", marks=SLOW
        ),
        pytest.param(6, " writes, 268,435,456 bytes behind position_ids", marks=SLOW),
        pytest.param(7, " writes, in seq_lens_decoder, which is an input", marks=SLOW),
        pytest.param(8, ": the thread's stack overflows", marks=SLOW),
        pytest.param(9, " reads 4 bytes, in a local variable that is no more", marks=SLOW),
        # Of a copy that the compiler left to memcpy, AddressSanitizer names the first byte that is wrong.
        pytest.param(10, " reads 16 bytes, (the last 8 bytes|right) behind seq_lens_decoder", marks=SLOW),
        pytest.param(11, ": index 4 out of bounds for type 'int \\[4\\]'", marks=SLOW),
        pytest.param(12, ": shift exponent 32 is too large for 32-bit type 'int'", marks=SLOW),
    ],
)
def test_a_fault_is_named_with_its_line(fault, said, faulty):
    # Each ends the process: that the next is answered shows that it is started again.
    found = faulty(fault)
    assert re.fullmatch(re.escape(line_of(fault)) + said, found), found


def test_kernels_without_a_fault_pass_and_keep_their_process(process):
    case = "latent_cache_write/hit:30+3,decode:15,idle,prefill:5,paused:9,pad:6/model=minicpm3-4b,block=16"
    assert process.launch(case, "cuda/latent_cache_write", {}) is None
    (first,) = children_of(os.getpid())
    assert process.launch("position_ids/", "cuda/position_ids", {}) is None
    assert process.launch(f"{case},strided=0", "cuda/latent_cache_write", {}) is None
    assert children_of(os.getpid()) == [first]


@pytest.mark.slow
def test_a_read_from_the_gap_between_rows_is_caught(process, tmp_path):
    changed = tmp_path / "latent_cache_write.cu"
    text = CACHE_WRITE.read_text().replace(
        "compressed_kv_stride + word;", "compressed_kv_stride + word + rank_words;"
    )
    assert text != CACHE_WRITE.read_text()
    changed.write_text(text)
    case = "latent_cache_write/prefill:2/model=minicpm3-4b"
    found = process.launch(case, "cuda/latent_cache_write", {CACHE_WRITE: changed})
    assert found.endswith(
        " reads 16 bytes, 512 bytes from where compressed_kv begins, in a gap between its rows"
    )
    assert process.launch(f"{case},strided=0", "cuda/latent_cache_write", {CACHE_WRITE: changed})


def test_a_launch_that_raises_is_told_as_it_was(process, tmp_path):
    changed = tmp_path / "position_ids.cu"
    changed.write_text("no kernel")
    found = process.launch("position_ids/decode:5", "cuda/position_ids", {POSITION_IDS: changed})
    assert "position_ids.cu does not compile for target sanitized" in found


def test_a_case_that_cannot_be_launched_is_no_finding(process):
    with pytest.raises(sanitized.SanitizerFailure, match="failed: CaseError"):
        process.launch("nothing/decode:5", "cuda/position_ids", {})
    assert process.launch("position_ids/", "cuda/position_ids", {}) is None


def test_an_end_without_a_report_is_no_finding(process):
    process.launch("position_ids/", "cuda/position_ids", {})
    (child,) = children_of(os.getpid())
    os.kill(child, signal.SIGTERM)
    with pytest.raises(sanitized.SanitizerFailure, match="ended with code -15"):
        process.launch("position_ids/", "cuda/position_ids", {})


def children_of(parent):
    """The ids of a process's children that run this program."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and b"harness.cuda.alone" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            # It has ended meanwhile.
            continue
    return found


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_the_process_does_not_outlive_who_asks(tmp_path):
    asker = os.fork()
    if asker == 0:
        try:
            sanitized.SanitizedProcess().launch("position_ids/", "cuda/position_ids", {})
            (tmp_path / "answered").touch()
            time.sleep(60)
        finally:
            os._exit(1)
    started = None
    try:
        assert wait_until((tmp_path / "answered").exists)
        (started,) = children_of(asker)
        # Stopped it does not see its input end: launching, it would not either.
        os.kill(started, signal.SIGSTOP)
        os.kill(asker, signal.SIGKILL)
        assert wait_until(lambda: not is_running(started))
    finally:
        with suppress(ProcessLookupError):
            os.kill(asker, signal.SIGKILL)
        os.waitpid(asker, 0)
        if started is not None and is_running(started):
            os.kill(started, signal.SIGKILL)


def is_running(process):
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds):
    """What `holds` returns once it is true, or after a minute and a half."""
    end = time.monotonic() + 90
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


# ---- the check -----------------------------------------------------------------------------------


@pytest.fixture
def on_host(monkeypatch):
    """Makes this process one that runs CUDA paths on the processor."""
    monkeypatch.setattr(build._Use, "target", build.HOST)
    monkeypatch.setattr(build._Use, "called", {})


def results(launch):
    return list(checks()["memory"].run(launch))


def test_a_finding_fails_the_check_as_out_of_bounds(on_host, launched, monkeypatch):
    monkeypatch.setattr(
        sanitized.SanitizedProcess, "launch", lambda *_: "x.cu:3 reads 4 bytes, right behind q"
    )
    (found,) = results(launched("position_ids/decode:5", position_ids.PATHS[0]))
    assert (found.status, found.kind) == (Status.FAILED, Kind.BOUNDS)
    assert found.reason == "x.cu:3 reads 4 bytes, right behind q"


def test_the_changed_kernel_of_the_last_launch_is_the_one_launched_again(
    on_host, launched, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(sanitized.SanitizedProcess, "launch", lambda _, *request: asked.append(request))
    changed = tmp_path / "position_ids.cu"
    changed.write_text(POSITION_IDS.read_text())
    path = position_ids.PATHS[0]
    with build.substituted(POSITION_IDS, changed):
        launch = launched("position_ids/decode:5", path)
    results(launch)
    results(launched("position_ids/decode:6", path))
    assert asked == [
        ("position_ids/decode:5", "cuda/position_ids", {POSITION_IDS: changed}),
        ("position_ids/decode:6", "cuda/position_ids", {}),
    ]


def test_where_a_library_is_missing_the_check_is_skipped_with_what_to_do(on_host, launched, monkeypatch):
    monkeypatch.setattr(sanitized, "_library", lambda _: None)
    sanitized.lacking.cache_clear()
    (found,) = results(launched("position_ids/decode:5", position_ids.PATHS[0]))
    sanitized.lacking.cache_clear()
    assert found.status is Status.SKIPPED
    assert "libasan" in found.reason
    assert "install" in found.reason


# ---- guarded memory ------------------------------------------------------------------------------


def test_dense_parts_are_the_bytes_of_a_view_and_no_others():
    import torch

    from harness.cuda.guarded import _dense_parts, extent_of

    whole = torch.zeros(5, 4, 12, dtype=torch.int16)
    for view in (
        whole,
        whole[:, 1:3, :7],
        whole[:3, :, 2:9],
        whole[::2, 0],
        whole[1, 2],
        whole[:, :, :1],
        whole[:0],
    ):
        marked = torch.zeros(extent_of(view), dtype=torch.bool)
        for offset, length in _dense_parts(view):
            assert not marked[offset : offset + length].any()
            marked[offset : offset + length] = True
        own = torch.zeros_like(whole)
        own.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(1)
        expected = own.flatten()[view.storage_offset() :].repeat_interleave(2)[: len(marked)].bool()
        assert torch.equal(marked, expected)
