"""What the threads of a block do together: prefix sums, maxima and copies, under any order of threads."""

import numpy as np
import pytest

from harness.cuda import build

pytestmark = pytest.mark.usefixtures("cuda_on_the_processor")

SCHEDULES = {"forward": (0, 0), "reverse": (1, 0), "random": (2, 7), "another": (2, 11)}

SOURCE = """
#include "mla/copy.h"
#include "mla/reduce.h"
#include "mla/search.h"

namespace {

using namespace mla;

constexpr int kThreads = 96;  // three warps

__global__ void sum(const int* values, int* sums, int* most, int turns) {
  auto& shared = shared_memory<WarpSums<kThreads, 2>>();
  int before = 0, largest = 0;
  for (int turn = 0; turn < turns; ++turn) {
    const int value = values[turn * kThreads + threadIdx.x];
    int both[2] = {value, -value}, totals[2];
    prefix_sums(both, totals, shared);
    sums[turn * kThreads + threadIdx.x] = before + both[0];
    before -= totals[1];
    largest = max(largest, value);
  }
  largest = combine_lanes(largest, [](int a, int b) { return max(a, b); });
  if (lane_id() == 0) {
    most[threadIdx.x / 32] = largest;
  }
}

void launch_sum(TensorView values, TensorView sums, TensorView most) {
  launch(values, sum, 1, kThreads, sizeof(WarpSums<kThreads, 2>), data<int>(values), data<int>(sums),
         data<int>(most), values.size(0) / kThreads);
}

__global__ void find(const int* starts, int* slots, int num_slots) {
  slots[threadIdx.x] = slot_of(starts, num_slots, threadIdx.x);
}

void launch_find(TensorView starts, TensorView slots) {
  launch(starts, find, 1, slots.size(0), 0, data<int>(starts), data<int>(slots), starts.size(0) - 1);
}

int64_t most_words(int64_t width) { return copied_words<64>(width); }

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sum, launch_sum)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(find, launch_find)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(most_words, most_words)
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Kernels that use nothing but the headers."""
    source = tmp_path_factory.mktemp("kernels") / "blocks.cu"
    source.write_text(SOURCE)
    return build.load(source, build.HOST)


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES)
def _schedule(request):
    build.set_schedule(*request.param)
    yield
    build.set_schedule(0)


@pytest.mark.usefixtures("_schedule")
@pytest.mark.parametrize("turns", [1, 2, 5])
def test_prefix_sums_go_on_from_turn_to_turn(kernels, turns):
    values = np.random.default_rng(turns).integers(0, 1000, 96 * turns, dtype=np.int32)
    sums, most = np.zeros_like(values), np.zeros(3, np.int32)
    kernels.sum(values, sums, most)
    assert sums.tolist() == np.cumsum(values).tolist()
    assert most.tolist() == values.reshape(turns, 3, 32).max((0, 2)).tolist()


@pytest.mark.parametrize(
    "sizes", [[5], [0, 3], [3, 0], [0, 0, 1, 0, 2, 0], [1] * 40, [0] * 100 + [2], [2] + [0] * 100]
)
def test_the_slot_of_an_entry_is_the_one_that_holds_it(kernels, sizes):
    slots = np.full(sum(sizes), -1, np.int32)
    kernels.find(np.cumsum([0, *sizes], dtype=np.int32), slots)
    assert slots.tolist() == [slot for slot, size in enumerate(sizes) for _ in range(size)]


def test_rows_too_wide_to_be_counted_are_refused(kernels):
    most = (2**31 - 1) // 64 - 1024
    assert kernels.most_words(most) == most
    with pytest.raises(ValueError, match=f"^a copied row has at most {most} words, got {most + 1}$"):
        kernels.most_words(most + 1)
