// The language that kernels are written in: CUDA C++, and the little below that it lacks.
//
// One source, two builds. Under nvcc threadIdx, __syncthreads, __shfl_xor_sync and their like are CUDA's;
// under g++ they are fibers' (host.h). Shared memory is one struct a kernel, got by `shared_memory<S>()`.
#pragma once

#ifdef __CUDACC__
#include "mla/device.h"
#else
#include "mla/host.h"
#endif

namespace mla {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

template <class Integer>
__host__ __device__ constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Two neighbouring elements, rounded and stored at once; the address is a multiple of their size.
template <class T>
__device__ __forceinline__ void store_pair(T* target, float first, float second) {
  struct alignas(2 * sizeof(T)) Pair {
    T first, second;
  };
  *reinterpret_cast<Pair*>(target) = Pair{from_float<T>(first), from_float<T>(second)};
}

// ---- matrices --------------------------------------------------------------------------------------
//
// A product of 16 x 16 and 16 x 8, spread over a warp as mma.sync has it: with g = lane / 4 and t = lane % 4,
// element i of the accumulator is row g + 8 (i / 2), column 2 t + i % 2. All 32 lanes take part.
// `at(row, column)` is the address of an element in shared memory; the 16 bytes from a column on that is a
// multiple of 16 / sizeof(T) are contiguous and aligned.
//
// Products of bf16 and fp16 are exact and summed in fp32. fp32 is split into two tf32 parts, three of whose
// four products are summed: what is lost is some 2^-21 of a product.

template <class T>
struct FragmentA {
  uint32_t part[sizeof(T) == 2 ? 4 : 8];
};
template <class T>
struct FragmentB {
  uint32_t part[sizeof(T) == 2 ? 2 : 4];
};

// Rows of `kWidth` elements in shared memory, laid out so that eight rows at one column lie in eight different
// groups of banks: words of 16 bytes are exchanged within a row, or where they do not come in eights, rows are
// a word longer.
template <class T, int kWidth>
struct Rows {
  static constexpr int kWord = 16 / sizeof(T);
  static constexpr int kWords = kWidth / kWord;
  static constexpr bool kExchanged = kWords % 8 == 0;
  static constexpr int kStride = kExchanged ? kWidth : kWidth + kWord;
  static_assert(kWidth % kWord == 0, "rows are whole words of 16 bytes");
  static_assert(kExchanged || kWords % 2 == 0, "with a word more the number of words must be odd");

  // Where element (row, column) is, from the first.
  __host__ __device__ static constexpr int place(int row, int column) {
    if (kExchanged) {
      return row * kStride + (column / kWord ^ row % 8) * kWord + column % kWord;
    }
    return row * kStride + column;
  }
};

// A: rows row..row + 15 of a matrix, its columns column..column + 15 are k.
template <class T, class At>
__device__ __forceinline__ void load_a(FragmentA<T>& a, At at, int row, int column MLA_WHERE) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    load_matrices<4, false>(a.part, at(row + lane % 16, column + lane / 16 * 8) MLA_PASS);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // Two tiles of k8, each rows g and g + 8, k t and t + 4.
      const int k = i / 4 * 8 + lane % 4 + i % 4 / 2 * 4;
      a.part[i] = __float_as_uint(*at(row + lane / 4 + i % 2 * 8, column + k));
    }
  }
}

// B of a product with a transposed matrix: rows row..row + 7 of it are columns of B, its columns are k.
template <class T, class At>
__device__ __forceinline__ void load_b_transposed(FragmentB<T>& b, At at, int row, int column MLA_WHERE) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    load_matrices<2, false>(b.part, at(row + lane % 8, column + lane / 8 % 2 * 8) MLA_PASS);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = i / 2 * 8 + lane % 4 + i % 2 * 4;
      b.part[i] = __float_as_uint(*at(row + lane / 4, column + k));
    }
  }
}

// B as it lies: rows row..row + 15 of a matrix are k, columns column..column + 7 those of B.
template <class T, class At>
__device__ __forceinline__ void load_b(FragmentB<T>& b, At at, int row, int column MLA_WHERE) {
  const int lane = lane_id();
  if constexpr (sizeof(T) == 2) {
    load_matrices<2, true>(b.part, at(row + lane % 16, column) MLA_PASS);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = i / 2 * 8 + lane % 4 + i % 2 * 4;
      b.part[i] = __float_as_uint(*at(row + k, column + lane / 4));
    }
  }
}

// Two neighbouring fragments of B at once: columns of B from `row` on, and from `row` + 8 on.
template <class T, class At>
__device__ __forceinline__ void load_b_transposed_pair(FragmentB<T>& b, FragmentB<T>& next, At at, int row,
                                                       int column MLA_WHERE) {
  if constexpr (sizeof(T) == 2) {
    const int lane = lane_id();
    uint32_t parts[4];
    load_matrices<4, false>(parts, at(row + lane / 16 * 8 + lane % 8, column + lane / 8 % 2 * 8) MLA_PASS);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b.part[i] = parts[i];
      next.part[i] = parts[2 + i];
    }
  } else {
    load_b_transposed(b, at, row, column MLA_PASS);
    load_b_transposed(next, at, row + 8, column MLA_PASS);
  }
}

// The same of a matrix as it lies: columns from `column` on, and from `column` + 8 on.
template <class T, class At>
__device__ __forceinline__ void load_b_pair(FragmentB<T>& b, FragmentB<T>& next, At at, int row,
                                            int column MLA_WHERE) {
  if constexpr (sizeof(T) == 2) {
    const int lane = lane_id();
    uint32_t parts[4];
    load_matrices<4, true>(parts, at(row + lane % 16, column + lane / 16 * 8) MLA_PASS);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b.part[i] = parts[i];
      next.part[i] = parts[2 + i];
    }
  } else {
    load_b(b, at, row, column MLA_PASS);
    load_b(next, at, row, column + 8 MLA_PASS);
  }
}

namespace detail {

// The bits of a float that tf32 keeps, and those of the rest.
__device__ __forceinline__ void split_tf32(uint32_t bits, uint32_t& upper, uint32_t& lower) {
  upper = bits & 0xffffe000u;
  lower = __float_as_uint(__uint_as_float(bits) - __uint_as_float(upper)) & 0xffffe000u;
}

}  // namespace detail

// sum += A B. Under g++ the call may suspend the thread, as the loads above.
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const FragmentA<T>& a,
                                             const FragmentB<T>& b MLA_WHERE) {
  if constexpr (sizeof(T) == 2) {
    constexpr Matrix kType = std::is_same_v<T, bf16> ? Matrix::kBf16 : Matrix::kFp16;
    multiply<kType>(sum, a.part, b.part MLA_PASS);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a_upper[4], a_lower[4], b_upper[2], b_lower[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        detail::split_tf32(a.part[4 * half + i], a_upper[i], a_lower[i]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        detail::split_tf32(b.part[2 * half + i], b_upper[i], b_lower[i]);
      }
      multiply<Matrix::kTf32>(sum, a_lower, b_upper MLA_PASS);
      multiply<Matrix::kTf32>(sum, a_upper, b_lower MLA_PASS);
      multiply<Matrix::kTf32>(sum, a_upper, b_upper MLA_PASS);
    }
  }
}

}  // namespace mla
