// What CUDA gives a kernel, for g++: the part of the language that our kernels use, on fibers.
//
// A kernel is compiled for the processor from the same text. Every thread of a block is a fiber; a barrier, a
// shuffle or a matrix instruction suspends it until those it meets are there (host/runtime.cc). What a GPU
// leaves undefined is made visible instead of plausible:
//
// - shared memory holds NaN bytes when a block begins;
// - an asynchronous copy poisons its target when it is issued and lands when its thread waits for it;
// - a shuffle from a lane that takes no part gives NaN bytes;
// - threads that meet at different barriers, or wait for one that never comes, are an error with their lines;
// - a launch that a GPU would refuse is refused.
//
// Not modelled: memory order between blocks (they run one after another), warp-level timing, the rounding of
// sums within a tensor core (here: fp32, in order of k), caches, textures, clusters, wgmma, TMA.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// CUDA's overloads, and no template that nvcc would not know.
#define MLA_MIN_MAX(type)                                            \
  inline type min(type a, type b) { return b < a ? b : a; }          \
  inline type max(type a, type b) { return a < b ? b : a; }
MLA_MIN_MAX(int)
MLA_MIN_MAX(unsigned)
MLA_MIN_MAX(long)
MLA_MIN_MAX(unsigned long)
MLA_MIN_MAX(long long)
MLA_MIN_MAX(unsigned long long)
MLA_MIN_MAX(float)
#undef MLA_MIN_MAX

namespace mla {
enum class Matrix { kBf16, kFp16, kTf32 };
}

namespace mla::host {

constexpr int kWarp = 32;

// One thread of the block that runs. `index` is threadIdx.
struct Thread {
  uint3 index;
  int number;  // within the block: x, then y, then z
};

struct Position {
  uint3 block;
  dim3 grid, threads;
};

extern Thread* current;    // set whenever a fiber goes on
extern Position position;  // of the block that runs

// Suspend the calling thread until the others are there.
void barrier(const char* file, int line);
void warp_barrier(unsigned mask, const char* file, int line);
unsigned ballot(unsigned mask, bool predicate, const char* file, int line);
// Copies `size` bytes from the value of lane `source`; NaN bytes where that lane takes no part.
void shuffle(unsigned mask, void* value, size_t size, int source, const char* file, int line);

// D += A B of one warp: the fragments of mma.sync.m16n8k16 (kTf32: m16n8k8), of PTX's documentation.
void multiply(Matrix type, float* d, const uint32_t* a, const uint32_t* b, const char* file, int line);
// ldmatrix: `count` 8 x 8 matrices of 16-bit elements, rows given by the lanes.
void load_matrices(int count, bool transposed, uint32_t* out, const void* row, const char* file, int line);

// cp.async of 16, 8 or 4 bytes (or zeros), its groups, and the wait for all groups but the newest `pending`.
void copy_async(void* target, const void* source, size_t size, bool valid, const char* file, int line);
void commit_copies();
void wait_copies(int pending);

// The dynamic shared memory of the block that runs; at least `size` bytes, or the launch is an error.
void* shared_memory(size_t size, const char* file, int line);

using Body = void (*)(const void* arguments);
// Runs `body` once for every thread of every block. Throws std::runtime_error on what a GPU would refuse,
// or on a deadlock.
void run(dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* arguments);

}  // namespace mla::host

#define threadIdx (::mla::host::current->index)
#define blockIdx (::mla::host::position.block)
#define blockDim (::mla::host::position.threads)
#define gridDim (::mla::host::position.grid)

// Functions that may suspend a thread take their caller's place along, for the report of a deadlock.
#define MLA_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define MLA_WHERE , MLA_HERE
#define MLA_PASS , file, line

inline void __syncthreads(MLA_HERE) { ::mla::host::barrier(file, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, MLA_HERE) { ::mla::host::warp_barrier(mask, file, line); }
inline unsigned __ballot_sync(unsigned mask, bool predicate, MLA_HERE) {
  return ::mla::host::ballot(mask, predicate, file, line);
}
inline bool __any_sync(unsigned mask, bool predicate, MLA_HERE) {
  return ::mla::host::ballot(mask, predicate, file, line) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, MLA_HERE) {
  return ::mla::host::ballot(mask, predicate, file, line) == mask;
}

namespace mla::host {
inline int lane() { return current->number % kWarp; }

template <class T>
T shuffled(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  shuffle(mask, &value, sizeof(T), source, file, line);
  return value;
}
}  // namespace mla::host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, MLA_HERE) {
  return ::mla::host::shuffled(mask, value, source % 32, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, MLA_HERE) {
  return ::mla::host::shuffled(mask, value, ::mla::host::lane() ^ bits, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance, MLA_HERE) {
  const int lane = ::mla::host::lane();
  return ::mla::host::shuffled(mask, value, lane < distance ? lane : lane - distance, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance, MLA_HERE) {
  const int lane = ::mla::host::lane();
  return ::mla::host::shuffled(mask, value, lane + distance > 31 ? lane : lane + distance, file, line);
}

template <class T>
T atomicAdd(T* address, T value) {
  T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  T before = *address;
  *address = max(before, value);
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) {
  int bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(__float_as_int(value)); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __fmul_rn(float left, float right) { return left * right; }
inline float __fadd_rn(float left, float right) { return left + right; }
inline float __fmaf_rn(float left, float right, float added) { return std::fma(left, right, added); }
inline float __fdiv_rn(float left, float right) { return left / right; }

namespace mla {

// Storage of the 16-bit types; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }
float to_float(fp16 value);

template <class T>
T from_float(float value);  // rounds to nearest, ties to even
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline bf16 from_float<bf16>(float value) {
  const unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
fp16 from_float<fp16>(float value);

// ---- what device.h has too: see there ----

template <class T>
uint32_t pack(float low, float high) {
  const uint32_t upper = from_float<T>(high).bits;
  return upper << 16 | from_float<T>(low).bits;
}

inline float exp2_fast(float x) {
  const float power = std::exp2(x);
  return power < 0x1p-126f ? 0.0f : power;
}

inline int lane_id() { return host::lane(); }

template <class S>
S& shared_memory(MLA_HERE) {
  return *static_cast<S*>(host::shared_memory(sizeof(S), file, line));
}

template <int kBytes = 16>
void copy_async(void* target, const void* source, bool valid MLA_WHERE) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4, "16, 8 or 4 bytes");
  host::copy_async(target, source, kBytes, valid, file, line);
}
inline void commit_copies() { host::commit_copies(); }
template <int kPending>
void wait_copies() {
  host::wait_copies(kPending);
}

template <int kCount, bool kTransposed>
void load_matrices(uint32_t* out, const void* row MLA_WHERE) {
  host::load_matrices(kCount, kTransposed, out, row, file, line);
}
template <Matrix kType>
void multiply(float* d, const uint32_t* a, const uint32_t* b MLA_WHERE) {
  host::multiply(kType, d, a, b, file, line);
}

}  // namespace mla
