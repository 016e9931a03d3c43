// Copies move words: the widest of 16, 8, 4 or 2 bytes that all addresses and sizes are multiples of.
#pragma once

#include <cstdint>

#include "mla/launch.h"

namespace mla {

// What a copy's addresses and sizes, in bytes, have in common.
struct Alignment {
  uint64_t bits = 16;

  Alignment& with(int64_t bytes) {
    bits |= static_cast<uint64_t>(bytes);
    return *this;
  }
  // The first element, and the strides of all axes but the last.
  Alignment& with(const TensorView& tensor) {
    with(static_cast<int64_t>(reinterpret_cast<uintptr_t>(data<char>(tensor))));
    for (int axis = 0; axis + 1 < tensor.ndim(); ++axis) with(tensor.stride(axis) * element_bytes(tensor));
    return *this;
  }
  static int64_t element_bytes(const TensorView& tensor) { return tensor.dtype().bits / 8; }
};

// Calls `use` with a value of the word's type.
template <class Use>
void with_word(Alignment alignment, Use use) {
  const uint64_t common = alignment.bits & (~alignment.bits + 1);
  if (common >= 16) return use(uint4{});
  if (common == 8) return use(uint2{});
  if (common == 4) return use(uint32_t{});
  return use(uint16_t{});
}

}  // namespace mla
