// Rotation of pairs of columns by angles of a table, in words of several pairs.
#pragma once

#include "mla/launch.h"

namespace mla {

constexpr int kPackBytes = 16;  // where addresses and widths allow; else an element at a time

// Elements that are loaded and stored at once, kPackBytes at most.
template <class T, int kCount>
constexpr int kAlignment = kCount * sizeof(T) < kPackBytes ? kCount * sizeof(T) : kPackBytes;
template <class T, int kCount>
struct alignas(kAlignment<T, kCount>) Pack {
  T element[kCount];
};

// A product in fp32, or rounded to T. Never fused with the sum behind it, which would round once less
// wherever a compiler likes.
template <class T>
__device__ __forceinline__ float product(float value, float angle, bool rounds_products) {
  const float exact = __fmul_rn(value, angle);
  if (rounds_products) {
    return to_float(from_float<T>(exact));
  }
  return exact;
}

// Rotates the pairs of two packs by their angles. Pair i is element i of each or, interleaved, elements 2 i and
// 2 i + 1 of both, one behind the other.
template <bool kIsNeox, class T, class Angle, int kPairs>
__device__ __forceinline__ void rotate_packs(Pack<T, kPairs> (&values)[2], const Pack<Angle, kPairs>& cosines,
                                             const Pack<Angle, kPairs>& sines, bool rounds_products) {
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    constexpr int kStep = 2 - kIsNeox, kReach = 1 + (kPairs - 1) * kIsNeox;
    T& low = values[i * kStep / kPairs].element[i * kStep % kPairs];
    T& high = values[(i * kStep + kReach) / kPairs].element[(i * kStep + kReach) % kPairs];
    const float x = to_float(low), y = to_float(high);
    const float cosine = to_float(cosines.element[i]), sine = to_float(sines.element[i]);
    const float x_cos = product<T>(x, cosine, rounds_products);
    const float x_sin = product<T>(x, sine, rounds_products);
    const float y_cos = product<T>(y, cosine, rounds_products);
    const float y_sin = product<T>(y, sine, rounds_products);
    low = from_float<T>(__fadd_rn(x_cos, -y_sin));
    high = from_float<T>(__fadd_rn(y_cos, x_sin));
  }
}

// ValueError unless the table, where there is one, is [positions, width] in `dtype` or fp32.
inline void check_table(const Optional<TensorView>& cos_sin_cache, int64_t width, DLDataType dtype) {
  if (cos_sin_cache.has_value()) {
    const TensorView table = *cos_sin_cache;
    if (!same(table.dtype(), dtype) && !same(table.dtype(), kFloat32) && !same(dtype, kFloat32)) {
      TVM_FFI_THROW(ValueError) << "cos_sin_cache must be " << told(dtype) << " or float32, got "
                                << told(table.dtype());
    }
    DLDataType table_dtype = kFloat32;
    if (same(table.dtype(), dtype)) {
      table_dtype = dtype;
    }
    Argument{table, "cos_sin_cache"}.check({-1, width}, table_dtype);
  }
}

// Calls `use` with a value of the type that the table is in, or of T where there is none.
template <class T, class Use>
void with_angle(const Optional<TensorView>& cos_sin_cache, DLDataType dtype, Use use) {
  if (!cos_sin_cache.has_value() || same((*cos_sin_cache).dtype(), dtype)) {
    return use(T{});
  }
  return use(float{});
}

}  // namespace mla
