// Prefix sums, totals and maxima over the threads of a block.
#pragma once

#include "mla/kernel.cuh"

namespace mla {

// What a warp's lanes make of their values, the same in every lane. `combine` is associative and commutative.
template <class T, class Combine>
__device__ __forceinline__ T combine_lanes(T value, Combine combine MLA_WHERE) {
  for (int bits = 16; bits > 0; bits /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, bits MLA_PASS));
  }
  return value;
}

// Shared memory of `prefix_sums`: what each warp adds up to.
template <int kThreads, int kSums>
struct WarpSums {
  static_assert(kThreads % 32 == 0, "a block of whole warps");
  int of[kSums][kThreads / 32];
};

// Sums kSums values of every thread separately. values[i] becomes the sum of the thread's own and those of
// all threads before it, totals[i] the sum of the whole block's. All kThreads threads of the block, which is
// one-dimensional, take part; the memory may be used again at once.
template <int kThreads, int kSums>
__device__ __forceinline__ void prefix_sums(int (&values)[kSums], int (&totals)[kSums],
                                            WarpSums<kThreads, kSums>& sums MLA_WHERE) {
  const int lane = lane_id(), warp = threadIdx.x / 32;

  // 1. Within each warp, over twice as many lanes with every step.
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, values[i], distance MLA_PASS);
      if (lane >= distance) {
        values[i] += before;
      }
    }
    if (lane == 31) {
      sums.of[i][warp] = values[i];
    }
  }
  __syncthreads();

  // 2. What the warps before add up to, and all of them.
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    totals[i] = 0;
    for (int other = 0; other < kThreads / 32; ++other) {
      if (other == warp) {
        values[i] += totals[i];
      }
      totals[i] += sums.of[i][other];
    }
  }
  // Nobody writes the next sums before all have read these.
  __syncthreads();
}

}  // namespace mla
