// Numbers of 8 bits: e4m3fn has a sign, four bits of exponent, three of mantissa, no infinity and one NaN.
#pragma once

#include <cstdint>

#include "mla/kernel.cuh"

namespace mla {

constexpr float kE4m3Max = 448.0f;

namespace detail {

// The e4m3fn nearest to a number, ties to even; +-448 beyond 448, 0x7f for every NaN.
__device__ __forceinline__ uint32_t e4m3_bits(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    return 0x7fu;
  }
  magnitude = min(magnitude, __float_as_uint(kE4m3Max));
  if (magnitude < 0x3c800000u) {
    // Below 2^-6 codes count 512ths, and so do the last bits of a float from 2^14 to 2^15: the sum rounds.
    constexpr float kOrigin = 16384.0f;
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), kOrigin)) - __float_as_uint(kOrigin));
  }
  // Twenty bits of mantissa are dropped, and 120 is the difference of the exponents' biases.
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return sign | ((rounded >> 20) - (120u << 3));
}

// The number of a code: its exponent and mantissa stand three bits below a float's, whose bias is 120 higher.
__device__ __forceinline__ float e4m3_number(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu, sign = (code & 0x80u) << 24;
  if (magnitude == 0x7fu) {
    return __uint_as_float(sign | 0x7fc00000u);
  }
  return __fmul_rn(__uint_as_float(sign | magnitude << 20), 0x1p120f);
}

}  // namespace detail

// Four numbers as e4m3fn, the first in the lowest byte. Each is rounded to nearest, ties to even; what is beyond
// 448 becomes 448 with its sign, NaN of either sign 0x7f. The same bytes with and without an instruction for it.
__device__ __forceinline__ uint32_t pack_e4m3(float first, float second, float third, float fourth) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(second), "f"(first));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(fourth), "f"(third));
  return static_cast<uint32_t>(high) << 16 | low;
#else
  return detail::e4m3_bits(first) | detail::e4m3_bits(second) << 8 | detail::e4m3_bits(third) << 16 |
         detail::e4m3_bits(fourth) << 24;
#endif
}

// The other way: four numbers of e4m3fn, the lowest byte's first, all exact; NaN is NaN.
__device__ __forceinline__ void unpack_e4m3(uint32_t codes, float (&numbers)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint32_t pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes >> 16 * i)));
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    numbers[2 * i] = both.x;
    numbers[2 * i + 1] = both.y;
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    numbers[i] = detail::e4m3_number(codes >> 8 * i & 0xffu);
  }
#endif
}

}  // namespace mla
