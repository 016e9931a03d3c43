"""What stands in for a GPU under g++: threads and their meetings, shared memory, matrices, conversions."""

import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from harness.cuda import build

pytestmark = [
    pytest.mark.skipif(build.lacking(build.HOST) is not None, reason=str(build.lacking(build.HOST))),
    pytest.mark.xdist_group("cuda-runtime"),
]

FORWARD, REVERSE, RANDOM = range(3)

# Every launcher takes a tensor to write, and most take which of several kernels to run.
KERNELS = r"""
#include "mla/e4m3.h"
#include "mla/launch.h"

namespace {

using namespace mla;

struct Words {
  float value[64];
};

// ---- what waits and what does not meet

__global__ void __launch_bounds__(64) meet(int* out, int which) {
  const int thread = threadIdx.x;
  switch (which) {
    case 0:
      if (thread < 32) {
        __syncthreads();  // half the block
      }
      break;
    case 1:
      if (thread < 16) {
        __syncthreads();  // one half
      } else {
        __syncthreads();  // other half
      }
      break;
    case 2:
      if (thread < 32 && thread != 3) {
        __syncwarp();  // all but one lane
      }
      break;
    case 3:
      if (thread == 5) {
        __syncwarp(0xffu << 8);  // left out
      }
      break;
    case 4:
      if (thread % 2 == 0) {
        out[thread] = __ballot_sync(0xffffffffu, true);  // a ballot
      } else {
        out[thread] = __shfl_sync(0xffffffffu, thread, 0);  // a shuffle
      }
      break;
    case 5:
      if (thread >= 40) {
        return;
      }
      __syncthreads();  // those that are left
      break;
    default:
      __syncthreads();
  }
  out[thread] = which;
}

void launch_meet(TensorView out, int64_t which) { launch(out, meet, 1, 64, 0, data<int>(out), which); }

// ---- launches

__global__ void number_blocks(int* out) {
  if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
    const unsigned number = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[number] = blockIdx.x + 100 * blockIdx.y + 10000 * blockIdx.z;
  }
}

void launch_number_blocks(TensorView out, int64_t x, int64_t y, int64_t z, int64_t block, int64_t block_z,
                          int64_t shared) {
  launch(out, number_blocks, dim3(x, y, z), dim3(block, 1, block_z), shared, data<int>(out));
}

__global__ void use_shared(float* out) {
  Words& words = shared_memory<Words>();  // needs 256
  out[threadIdx.x] = words.value[threadIdx.x];
  words.value[threadIdx.x] = 1;
}

void launch_use_shared(TensorView out, int64_t blocks, int64_t shared) {
  launch(out, use_shared, blocks, 64, shared, data<float>(out));
}

// ---- orders

__global__ void list_threads(int* out, int* count) {
  out[atomicAdd(count, 1)] = blockIdx.x * 96 + threadIdx.x;
}

void launch_list_threads(TensorView out, TensorView count) {
  launch(out, list_threads, 2, 96, 0, data<int>(out), data<int>(count));
}

// Every thread takes what its neighbour wrote; with a barrier between, if asked.
__global__ void pass_on(float* out, bool with_barrier) {
  Words& words = shared_memory<Words>();
  words.value[threadIdx.x] = threadIdx.x;
  if (with_barrier) {
    __syncthreads();
  }
  out[threadIdx.x] = words.value[(threadIdx.x + 1) % 64];
}

void launch_pass_on(TensorView out, bool with_barrier) {
  launch(out, pass_on, 1, 64, sizeof(Words), data<float>(out), with_barrier);
}

// ---- shuffles

__global__ void shuffle_all(float* out) {
  const int lane = lane_id();
  const float value = lane;
  out[lane] = __shfl_sync(kAllLanes, value, 5);
  out[32 + lane] = __shfl_xor_sync(kAllLanes, value, 3);
  out[64 + lane] = __shfl_up_sync(kAllLanes, value, 2);
  out[96 + lane] = __shfl_down_sync(kAllLanes, value, 2);
  out[192 + lane] = __ballot_sync(kAllLanes, lane % 3 == 0) == 0x49249249u;
  out[224 + lane] = 2 * __any_sync(kAllLanes, lane == 7) + __all_sync(kAllLanes, lane != 7);
  out[256 + lane] = 0;
  if (lane < 16) {
    // Lanes 16 and above take no part.
    out[256 + lane] = __shfl_xor_sync(0xffffu, value, lane < 8 ? 1 : 16);
  }
  // Two halves of a warp meet each for itself.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  out[288 + lane] = __shfl_sync(half, value, lane < 16 ? 3 : 19);
}

void launch_shuffle_all(TensorView out) { launch(out, shuffle_all, 1, 32, 0, data<float>(out)); }

// ---- copies: waited for, not waited for, invalid, and one group of two

struct Copies {
  float value[4][4];
};

__global__ void copy(float* out, const float* from, int which) {
  Copies& copies = shared_memory<Copies>();
  for (int i = 0; i < 8; ++i) {
    copies.value[i / 4][i % 4] = 7;
  }
  copy_async(copies.value[0], from, true);
  commit_copies();
  copy_async(copies.value[1], from + 4, which != 1);
  commit_copies();
  if (which == 2) {
    copy_async(copies.value[2], from + 1, true);  // misaligned
  }
  if (which == 3) {
    copy_async(out, from, true);  // not shared
  }
  if (which == 4) {
    wait_copies<1>();
  } else if (which != 5) {
    wait_copies<0>();
  }
  for (int i = 0; i < 8; ++i) {
    out[i] = copies.value[i / 4][i % 4];
  }
}

void launch_copy(TensorView out, TensorView from, int64_t which) {
  launch(out, copy, 1, 1, sizeof(Copies), data<float>(out), data<float>(from), which);
}

// Words of 8 and of 4 bytes, the second of each invalid; misaligned, if asked.
__global__ void copy_words(float* out, const float* from, int misaligned) {
  Copies& copies = shared_memory<Copies>();
  float* target = &copies.value[0][0];
  for (int i = 0; i < 8; ++i) {
    target[i] = 7;
  }
  copy_async<8>(target, from + 2, true);
  copy_async<8>(target + 2, from, false);
  copy_async<4>(target + 4, from + 1, true);
  copy_async<4>(target + 5, from, false);
  if (misaligned != 0) {
    copy_async<8>(target + 7, from, true);  // at 4 bytes
  }
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < 8; ++i) {
    out[i] = target[i];
  }
}

void launch_copy_words(TensorView out, TensorView from, int64_t misaligned) {
  launch(out, copy_words, 1, 1, sizeof(Copies), data<float>(out), data<float>(from), misaligned);
}

// ---- matrices

template <class T>
struct Tiles {
  alignas(16) T a[16][16], b[16][16], b_transposed[16][16];
};

// c = a b, 16 x 16 x 16, in two tiles of eight columns, and again with b got through its transpose.
template <class T>
__global__ void multiply_tiles(const T* a, const T* b, float* c) {
  Tiles<T>& tiles = shared_memory<Tiles<T>>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    tiles.a[i / 16][i % 16] = a[i];
    tiles.b[i / 16][i % 16] = b[i];
    tiles.b_transposed[i % 16][i / 16] = b[i];
  }
  __syncthreads();
  FragmentA<T> left;
  load_a<T>(left, [&](int row, int column) { return &tiles.a[row][column]; }, 0, 0);
  for (int half = 0; half < 4; ++half) {
    FragmentB<T> right;
    if (half < 2) {
      load_b<T>(right, [&](int row, int column) { return &tiles.b[row][column]; }, 0, 8 * half);
    } else {
      load_b_transposed<T>(right, [&](int row, int column) { return &tiles.b_transposed[row][column]; },
                           8 * (half - 2), 0);
    }
    float sum[4] = {0.5f, 0.5f, 0.5f, 0.5f};
    multiply_add<T>(sum, left, right);
    for (int i = 0; i < 4; ++i) {
      c[half / 2 * 256 + (lane / 4 + i / 2 * 8) * 16 + half % 2 * 8 + 2 * (lane % 4) + i % 2] = sum[i];
    }
  }
}

void launch_multiply(TensorView a, TensorView b, TensorView c) {
  with_model_dtype(a, "a", [&](auto element) {
    using T = decltype(element);
    launch(c, multiply_tiles<T>, 1, 32, sizeof(Tiles<T>), data<T>(a), data<T>(b), data<float>(c));
  });
}

// Four matrices of 8 x 8, or the first two; every lane's registers.
struct Rows {
  alignas(16) uint16_t value[32][8];
};

template <int kCount, bool kTransposed>
__device__ void load_and_store(const Rows& rows, int* out) {
  uint32_t parts[4] = {0, 0, 0, 0};
  load_matrices<kCount, kTransposed>(parts, rows.value[lane_id() % (8 * kCount)]);
  for (int i = 0; i < 4; ++i) {
    out[4 * lane_id() + i] = static_cast<int>(parts[i]);
  }
}

__global__ void load_rows(int* out) {
  Rows& rows = shared_memory<Rows>();
  for (int i = 0; i < 8; ++i) {
    rows.value[threadIdx.x][i] = static_cast<uint16_t>(8 * threadIdx.x + i);
  }
  __syncthreads();
  load_and_store<4, false>(rows, out);
  load_and_store<4, true>(rows, out + 128);
  load_and_store<2, false>(rows, out + 256);
  load_and_store<2, true>(rows, out + 384);
}

void launch_load_rows(TensorView out) { launch(out, load_rows, 1, 32, sizeof(Rows), data<int>(out)); }

// ---- conversions

template <class T>
__global__ void widen(const T* from, float* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) {
    to[i] = to_float(from[i]);
  }
}

template <class T>
__global__ void narrow(const float* from, T* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) {
    to[i] = from_float<T>(from[i]);
  }
}

void launch_widen(TensorView from, TensorView to) {
  with_model_dtype(from, "from", [&](auto element) {
    using T = decltype(element);
    launch(to, widen<T>, blocks(ceil_div<int64_t>(from.numel(), 256), "blocks"), 256, 0, data<T>(from),
           data<float>(to), from.numel());
  });
}

void launch_narrow(TensorView from, TensorView to) {
  with_model_dtype(to, "to", [&](auto element) {
    using T = decltype(element);
    launch(to, narrow<T>, blocks(ceil_div<int64_t>(from.numel(), 256), "blocks"), 256, 0, data<float>(from),
           data<T>(to), from.numel());
  });
}

__global__ void narrow_to_e4m3(const float* from, uint32_t* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) {
    to[i] = pack_e4m3(from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]);
  }
}

__global__ void widen_e4m3(const uint32_t* from, float* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < count) {
    float numbers[4];
    unpack_e4m3(from[i], numbers);
    for (int n = 0; n < 4; ++n) {
      to[4 * i + n] = numbers[n];
    }
  }
}

// Numbers in fours.
void launch_narrow_to_e4m3(TensorView from, TensorView to) {
  const int64_t count = from.numel() / 4;
  launch(to, narrow_to_e4m3, blocks(ceil_div<int64_t>(count, 256), "blocks"), 256, 0, data<float>(from),
         data<uint32_t>(to), count);
}

void launch_widen_e4m3(TensorView from, TensorView to) {
  const int64_t count = from.numel() / 4;
  launch(to, widen_e4m3, blocks(ceil_div<int64_t>(count, 256), "blocks"), 256, 0, data<uint32_t>(from),
         data<float>(to), count);
}

// ---- what a thread's stack holds

#ifndef __CUDACC__
__global__ void fill_stack(int* out, int kibibytes) {
  // The last lane alone: below its stack are those of the others.
  if (threadIdx.x == 31) {
    volatile char* frame = static_cast<volatile char*>(__builtin_alloca(kibibytes << 10));
    frame[0] = 1;
    out[0] = frame[0];
  }
}
void launch_fill_stack(TensorView out, int64_t kibibytes) {
  launch(out, fill_stack, 1, 32, 0, data<int>(out), kibibytes);
}
#endif

// ---- the rest of what both languages offer

__global__ void use_names(float* out, int* counts, uint4 words, uint2 pair, float4 four, float2 two) {
  atomicAdd(counts, 1);
  atomicMax(counts + 1, static_cast<int>(threadIdx.x));
  atomicAdd(out, 1.0f);
  const unsigned bits = __float_as_uint(out[0]) ^ static_cast<unsigned>(__float_as_int(out[0]));
  out[1] = __uint_as_float(bits) + __fmul_rn(kLog2e, kLn2) + __fdiv_rn(__fadd_rn(1.0f, 5.0f), 2.0f);
  counts[2] = __popc(words.w) + __clz(1) + min(3, 4) + max(3, 4) + static_cast<int>(blockDim.x + pair.y);
  out[2] = min(four.w, two.y) + max(1.0f, 2.0f) + static_cast<float>(max(int64_t{1}, int64_t{2}));
  out[3] = to_float(from_float<float>(fmaxf(1.0f, 2.0f)));
  __syncwarp();
}

void launch_use_names(TensorView out, TensorView counts) {
  launch(out, use_names, 1, 32, 0, data<float>(out), data<int>(counts), uint4{1, 2, 3, 7}, uint2{1, 2},
         float4{1, 2, 3, 4}, float2{1, 2});
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(meet, launch_meet)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(number_blocks, launch_number_blocks)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_shared, launch_use_shared)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(list_threads, launch_list_threads)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pass_on, launch_pass_on)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(shuffle_all, launch_shuffle_all)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy, launch_copy)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_words, launch_copy_words)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(multiply, launch_multiply)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(load_rows, launch_load_rows)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(widen, launch_widen)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(narrow, launch_narrow)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(narrow_to_e4m3, launch_narrow_to_e4m3)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(widen_e4m3, launch_widen_e4m3)
#ifndef __CUDACC__
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fill_stack, launch_fill_stack)
#endif
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_names, launch_use_names)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "kernels.cu"
    file.write_text(KERNELS)
    return file


@pytest.fixture(scope="module")
def kernels(source):
    return build.load(source, build.HOST)


@pytest.fixture
def schedule(monkeypatch):
    """(kind, seed) -> None: sets the order of threads; forward again after the test."""
    monkeypatch.setattr(build._Use, "target", build.HOST)
    yield build.set_schedule
    build.set_schedule(FORWARD)


def line_of(mark):
    (line,) = [number for number, text in enumerate(KERNELS.splitlines(), 1) if text.endswith(f"// {mark}")]
    return f"kernels.cu:{line}"


# ---- meetings ------------------------------------------------------------------------------------


def refusal(call, *arguments):
    with pytest.raises(RuntimeError) as caught:
        call(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("order", [FORWARD, REVERSE, RANDOM])
def test_threads_at_different_barriers_are_told_with_their_lines(order, kernels, schedule):
    schedule(order, 1)
    out = torch.zeros(64, dtype=torch.int32)
    said = refusal(kernels.meet, out, 1)
    assert said.startswith("deadlock in block (0, 0, 0): ")
    assert f"16 threads wait at {line_of('one half')} for the block" in said
    assert f"48 threads wait at {line_of('other half')} for the block" in said


def test_a_warp_that_lacks_a_lane_is_a_deadlock(kernels):
    said = refusal(kernels.meet, torch.zeros(64, dtype=torch.int32), 2)
    assert f"31 threads wait at {line_of('all but one lane')} for lanes of their warp" in said


@pytest.mark.parametrize(("which", "mark"), [(0, "half the block"), (5, "those that are left")])
def test_threads_that_have_ended_are_not_waited_for(which, mark, kernels):
    out = torch.full((64,), -1, dtype=torch.int32)
    kernels.meet(out, which)
    written = 40 if which == 5 else 64
    assert out.tolist() == [which] * written + [-1] * (64 - written)


def test_a_mask_that_leaves_its_lane_out_is_told(kernels):
    said = refusal(kernels.meet, torch.zeros(64, dtype=torch.int32), 3)
    what, where = "a lane calls with a mask that leaves it out", "block (0, 0, 0), thread (5, 0, 0)"
    assert said == f"{line_of('left out')}: {what}, in {where}"


def test_lanes_that_call_different_functions_at_once_are_told(kernels):
    said = refusal(kernels.meet, torch.zeros(64, dtype=torch.int32), 4)
    assert "lanes of a warp call different functions at once" in said
    assert line_of("a shuffle") in said or line_of("a ballot") in said


def test_after_a_failure_the_next_launch_is_as_new(kernels):
    out = torch.zeros(64, dtype=torch.int32)
    refusal(kernels.meet, out, 1)
    kernels.meet(out, 6)
    assert out.tolist() == [6] * 64


def test_shuffles_give_the_named_lane_s_value_and_nan_of_one_that_takes_no_part(kernels):
    out = torch.zeros(320)
    kernels.shuffle_all(out)
    lanes = list(range(32))
    assert out[:32].tolist() == [5] * 32
    assert out[32:64].tolist() == [lane ^ 3 for lane in lanes]
    assert out[64:96].tolist() == [lane - 2 if lane >= 2 else lane for lane in lanes]
    assert out[96:128].tolist() == [lane + 2 if lane < 30 else lane for lane in lanes]
    assert out[192:224].tolist() == [1] * 32
    assert out[224:256].tolist() == [2] * 32
    assert out[256:264].tolist() == [lane ^ 1 for lane in range(8)]
    assert out[264:272].isnan().all()
    assert out[288:320].tolist() == [3] * 16 + [19] * 16


# ---- launches and shared memory ------------------------------------------------------------------


def test_blocks_are_numbered_by_x_then_y_then_z(kernels):
    out = torch.full((24,), -1, dtype=torch.int32)
    kernels.number_blocks(out, 2, 3, 4, 8, 2, 0)
    expected = [x + 100 * y + 10000 * z for z in range(4) for y in range(3) for x in range(2)]
    assert out.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (1, 65536, 1, 1, 1, 0),
            "its grid is 1 x 65536 x 1 blocks, the limits are 2147483647 x 65535 x 65535",
        ),
        ((1, 1, 65536, 1, 1, 0), "its grid is 1 x 1 x 65536 blocks"),
        ((1 << 31, 1, 1, 1, 1, 0), "its grid is 2147483648 x 1 x 1 blocks"),
        ((0, 1, 1, 1, 1, 0), "its grid is empty"),
        ((1, 1, 1, 1025, 1, 0), "a block has 1025 threads, the limits are 1 to 1024"),
        ((1, 1, 1, 0, 1, 0), "a block has 0 threads"),
        ((1, 1, 1, 8, 65, 0), "a block has 520 threads"),
        ((1, 1, 1, 1, 1, 232449), "a block has 232449 bytes of shared memory, the limit is 232448"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(arguments, said, kernels):
    found = refusal(kernels.number_blocks, torch.zeros(1, dtype=torch.int32), *arguments)
    assert found.startswith(f"a GPU would refuse the launch: {said}")


@pytest.mark.parametrize(
    "arguments", [(1, 1, 65535, 1, 1, 0), (1, 1, 1, 1024, 1, 232448), (1, 1, 1, 16, 64, 0)]
)
def test_a_launch_at_the_limits_is_taken(arguments, kernels):
    kernels.number_blocks(torch.zeros(65535, dtype=torch.int32), *arguments)


def test_shared_memory_is_nan_whenever_a_block_begins(kernels):
    out = torch.zeros(64)
    kernels.use_shared(out, 2, 256)
    # The first block wrote ones there.
    assert out.isnan().all()


def test_a_launch_with_too_little_shared_memory_is_told(kernels):
    said = refusal(kernels.use_shared, torch.zeros(64), 1, 252)
    assert (
        said == f"{line_of('needs 256')}: the kernel uses 256 bytes of shared memory, and its launch has 252"
    )


@pytest.mark.parametrize("kibibytes", [4, 100])
def test_a_frame_that_fits_is_no_trouble(kibibytes, kernels):
    out = torch.zeros(1, dtype=torch.int32)
    kernels.fill_stack(out, kibibytes)
    assert out.tolist() == [1]


@pytest.mark.parametrize("kibibytes", [130, 600])
def test_a_frame_that_does_not_fit_ends_the_process_and_harms_no_other_thread(kibibytes, source):
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom harness.cuda import build\n"
        "kernels = build.load(Path(sys.argv[1]), build.HOST)\n"
        "kernels.fill_stack(torch.zeros(1, dtype=torch.int32), int(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", program, str(source), str(kibibytes)]
    done = subprocess.run(command, cwd=build.FOLDER.parent.parent, capture_output=True, check=False)
    assert done.returncode == -11


# ---- schedules -----------------------------------------------------------------------------------


def listed(kernels):
    out, count = torch.zeros(192, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    kernels.list_threads(out, count)
    return out.tolist()


def test_forward_and_reverse_are_what_they_say(kernels, schedule):
    assert listed(kernels) == list(range(192))
    schedule(REVERSE)
    assert listed(kernels) == list(reversed(range(192)))


def test_a_random_order_is_its_seed_s(kernels, schedule):
    found = {}
    for seed in (1, 2, 1):
        schedule(RANDOM, seed)
        order = listed(kernels)
        assert sorted(order) == list(range(192))
        assert found.setdefault(seed, order) == order
    assert found[1] != found[2]
    # Blocks stay whole, warps and lanes within them are mixed.
    assert {thread // 96 for thread in found[1][:96]} in ({0}, {1})
    warps = [thread // 32 for thread in found[1]]
    assert sum(a != b for a, b in pairwise(warps)) == 5
    assert found[1][:32] != sorted(found[1][:32])


def test_an_unknown_order_is_refused(schedule):
    with pytest.raises(ValueError, match="0 forward, 1 reverse, 2 random, got 3"):
        schedule(3)


@pytest.mark.parametrize("with_barrier", [True, False])
def test_a_missing_barrier_shows_in_the_order_of_threads(with_barrier, kernels, schedule):
    results = set()
    for kind, seed in ((FORWARD, 0), (REVERSE, 0), (RANDOM, 1), (RANDOM, 2)):
        schedule(kind, seed)
        out = torch.zeros(64)
        kernels.pass_on(out, with_barrier)
        results.add(out.numpy().tobytes())
    assert len(results) == (1 if with_barrier else 4)


# ---- asynchronous copies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "landed"),
    [
        pytest.param(0, [True, True], id="waited for"),
        pytest.param(4, [True, False], id="all but one waited for"),
        pytest.param(5, [False, False], id="not waited for"),
    ],
)
def test_a_copy_lands_when_it_is_waited_for_and_is_nan_before(which, landed, kernels):
    given, out = torch.arange(1.0, 13.0), torch.zeros(8)
    kernels.copy(out, given, which)
    for number, has_landed in enumerate(landed):
        part = out[4 * number : 4 * number + 4]
        assert torch.equal(part, given[4 * number : 4 * number + 4]) if has_landed else part.isnan().all()


def test_an_invalid_copy_gives_zeros(kernels):
    given, out = torch.arange(1.0, 13.0), torch.ones(8)
    kernels.copy(out, given, 1)
    assert out.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]


def test_copies_of_8_and_4_bytes_write_no_more_than_these(kernels):
    out = torch.zeros(8)
    kernels.copy_words(out, torch.arange(1.0, 13.0), 0)
    assert out.tolist() == [3, 4, 0, 0, 2, 0, 7, 7]


def test_a_copy_is_aligned_to_its_own_size(kernels):
    found = refusal(kernels.copy_words, torch.zeros(8), torch.zeros(12), 1)
    said = "cp.async needs addresses that are multiples of 8 bytes"
    assert found.startswith(f"{line_of('at 4 bytes')}: {said}")


@pytest.mark.parametrize(
    ("which", "mark", "said"),
    [
        (2, "misaligned", "cp.async needs addresses that are multiples of 16 bytes"),
        (3, "not shared", "cp.async must write into the block's shared memory"),
    ],
)
def test_a_copy_that_a_gpu_would_refuse_is_told(which, mark, said, kernels):
    found = refusal(kernels.copy, torch.zeros(8), torch.zeros(12), which)
    assert found.startswith(f"{line_of(mark)}: {said}, in block (0, 0, 0)")


# ---- matrices ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    # 16 sums in fp32: as many roundings of 2^-24. In fp32 three times as many sums, and 2^-21 of a product.
    [(torch.bfloat16, 2**-20), (torch.float16, 2**-20), (torch.float32, 3 * 2**-20 + 2**-21)],
)
@pytest.mark.parametrize("order", [FORWARD, RANDOM])
def test_a_product_is_that_of_its_matrices(dtype, allowed, order, kernels, schedule):
    schedule(order, 3)
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (1, 2))
    c = torch.full((2, 16, 16), torch.nan)
    kernels.multiply(a, b, c)
    expected = a.double() @ b.double() + 0.5
    scale = a.double().abs() @ b.double().abs() + 0.5
    assert float(((c.double() - expected).abs() / scale).max()) <= allowed


def test_every_lane_gets_its_elements_of_loaded_matrices(kernels):
    out = torch.zeros(4, 32, 4, dtype=torch.int32)
    kernels.load_rows(out)
    for number, (count, transposed) in enumerate([(4, False), (4, True), (2, False), (2, True)]):
        # Element (r, c) of matrix m is 64 m + 8 r + c.
        for lane in range(32):
            for m in range(count):
                pairs = [(lane // 4, 2 * (lane % 4) + i) for i in range(2)]
                low, high = (64 * m + (8 * c + r if transposed else 8 * r + c) for r, c in pairs)
                assert int(out[number, lane, m]) == high << 16 | low, (count, transposed, lane, m)
            assert out[number, lane, count:].tolist() == [0] * (4 - count)


# ---- conversions ---------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_widens_to_its_float_and_narrows_back(dtype, kernels):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    wide, back = torch.empty(1 << 16), torch.empty(1 << 16, dtype=dtype)
    kernels.widen(every, wide)
    expected = every.float()
    numbers = ~expected.isnan()
    assert torch.equal(wide[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    assert wide[~numbers].isnan().all()
    kernels.narrow(wide, back)
    assert torch.equal(back[numbers].view(torch.int16), every[numbers].view(torch.int16))
    assert back[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_floats_round_to_the_nearest_half_and_ties_to_even(dtype, kernels):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    numbers = every[every.isfinite()].sort().values
    ties = (numbers[1:].double() + numbers[:-1].double()) / 2
    exact = ties.float()
    assert torch.equal(exact.double(), ties)
    beside = [torch.nextafter(exact, torch.full_like(exact, end)) for end in (torch.inf, -torch.inf)]
    largest = float(numbers.max())
    edges = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 1e-40, 0.0, -0.0])
    beyond = torch.linspace(0.99, 1.01, 1001) * largest
    given = torch.cat([exact, *beside, edges, beyond, -beyond])
    got = torch.empty(len(given), dtype=dtype)
    kernels.narrow(given, got)
    expected = given.to(dtype)
    is_nan = expected.isnan()
    assert torch.equal(got[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))
    assert got[is_nan].isnan().all()


def codes_of(given, kernels):
    """What a kernel makes of float32 numbers: uint8."""
    padded = torch.cat([given, torch.zeros(-len(given) % 4)])
    got = torch.empty(len(padded), dtype=torch.uint8)
    kernels.narrow_to_e4m3(padded, got)
    return got[: len(given)]


EVERY_CODE = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


def test_every_e4m3_widens_to_its_number_and_narrows_back(kernels):
    wide = torch.empty(256)
    kernels.widen_e4m3(EVERY_CODE.view(torch.uint8), wide)
    expected = EVERY_CODE.float()
    numbers = ~expected.isnan()
    assert int(numbers.sum()) == 254
    assert torch.equal(wide[numbers].view(torch.int32), expected[numbers].view(torch.int32))
    assert wide[~numbers].isnan().all()
    assert torch.equal(codes_of(wide, kernels)[numbers], EVERY_CODE.view(torch.uint8)[numbers])


def test_floats_round_to_the_nearest_e4m3_and_ties_to_even(kernels):
    numbers = EVERY_CODE.float()[EVERY_CODE.float().isfinite()].sort().values
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (torch.inf, -torch.inf)]
    # Every upper half of a float: all exponents, subnormal numbers, both infinities.
    halves = (torch.arange(1 << 16) << 16).to(torch.int32).view(torch.float32)
    anywhere = torch.randint(-(2**31), 2**31, (1 << 17,), generator=torch.Generator().manual_seed(0))
    least = torch.tensor([1e-45, -1e-45, 448.0, 448.00003, 463.99997, 464.0, 464.00003, 480.0])
    given = torch.cat([ties, *beside, halves, anywhere.to(torch.int32).view(torch.float32), least, -least])
    given = given[~given.isnan()]
    # Torch's cast turns into NaN what a clamp keeps at 448.
    expected = given.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(codes_of(given, kernels), expected)
    # The even one of each tie's neighbours, by hand: between 1 and 1.125, and between 1.125 and 1.25.
    assert codes_of(torch.tensor([1.0625, 1.1875, -1.0625, 0.0]), kernels).tolist() == [0x38, 0x3A, 0xB8, 0]


def test_every_nan_is_one_e4m3(kernels):
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF], dtype=torch.int32)
    given = bits.view(torch.float32)
    assert given.isnan().all()
    assert codes_of(given, kernels).tolist() == [0x7F] * len(bits)


# ---- two languages -------------------------------------------------------------------------------


def test_names_mean_what_cuda_means_by_them(kernels):
    out, counts = torch.zeros(4), torch.zeros(3, dtype=torch.int32)
    kernels.use_names(out, counts)
    # popc(7) + clz(1) + 3 + 4 + 32 threads + 2.
    assert counts.tolist() == [32, 31, 3 + 31 + 7 + 34]
    assert out.tolist() == [32.0, pytest.approx(4.0), 2.0 + 2.0 + 2.0, 2.0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason=str(build.lacking(build.DEVICE)))
def test_the_same_source_compiles_for_a_gpu(source):
    assert build.built(source, build.DEVICE).exists()


def test_what_one_language_declares_the_other_does():
    def functions(file):
        text = (build.INCLUDE / "mla" / file).read_text()
        # Those of namespace mla, at the beginning of a line: definitions, and declarations of templates.
        own = text[text.rindex("namespace mla {") :]
        return set(re.findall(r"^(?:__device__ __forceinline__ |inline )?[\w&]+ (\w+)\(", own, re.MULTILINE))

    on_device = functions("device.h")
    assert {"copy_async", "load_matrices", "multiply", "shared_memory", "to_float"} <= on_device
    assert functions("host.h") == on_device
