// Whose an entry of a joined axis is: a token's slot, a key's row, a tile's row.
#pragma once

#include <cstdint>

#include "mla/kernel.cuh"

namespace mla {

// The last of `count` things in a row that begins at or before place `index`: `begin` says where each does,
// in ascending order, and the first does so.
template <class Begin>
__device__ __forceinline__ int last_begun(int count, int64_t index, Begin begin) {
  // Invariant: begin(low) <= index < begin(high).
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (begin(middle) <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The slot that holds entry `index` of an axis on which slots follow one another: `starts` are the exclusive
// prefix sums of their sizes, starts[0] = 0 <= index < starts[num_slots].
//
// It is the last slot that begins at or before the entry: of slots that begin together only the last holds
// anything.
__device__ __forceinline__ int slot_of(const int* starts, int num_slots, int64_t index) {
  return last_begun(num_slots, index, [&](int slot) { return starts[slot]; });
}

}  // namespace mla
