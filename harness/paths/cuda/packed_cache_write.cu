// Quantises new latents in tiles of 128 into the packed fp8 cache. The contract is packed_cache_write.py's.

#include <cmath>

#include "mla/e4m3.h"
#include "mla/words.h"

namespace {

using namespace mla;

constexpr int kThreads = 128;
constexpr int kLanes = 16;  // of a token: half a warp, eight numbers of a tile each
constexpr int kTokens = kThreads / kLanes;
constexpr int kTile = 128;
constexpr int kNumbers = kTile / kLanes;
constexpr int kTilesInFlight = 4;  // of a token, loaded before the first is used: all of DeepSeek's rank

constexpr float kLeastScale = 0x1p-126f;
constexpr float kLeastAmax = 1e-4f;  // where scales are powers of two
constexpr float kLargestScale = 0x1p120f;  // of finite numbers: all are below 2^128

// As many bytes in words that may stand at their addresses.
template <class Word, int kBytes>
struct Words {
  static constexpr int kCount = kBytes / static_cast<int>(sizeof(Word));
  Word word[kCount];

  __device__ __forceinline__ void load(const void* source) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      word[i] = static_cast<const Word*>(source)[i];
    }
  }
  __device__ __forceinline__ void store(void* target) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      static_cast<Word*>(target)[i] = word[i];
    }
  }
};

// Words of 16 bytes are two of 8 where a lane has only 8 bytes to store.
template <class Word>
using CodeWord = std::conditional_t<sizeof(Word) == 16, uint2, Word>;

// The scale of a tile whose largest magnitude is `amax`. Divided, not multiplied by the reciprocal: these give
// other bytes.
__device__ __forceinline__ float scale_of(float amax, bool is_ue8m0) {
  if (is_ue8m0) {
    // Up to the next power of two, which is a mantissa of zeros; infinity stays what it is.
    const float least = __fdiv_rn(max(amax, kLeastAmax), kE4m3Max);
    return __uint_as_float((__float_as_uint(least) + 0x7fffffu) & 0x7f800000u);
  }
  return max(__fdiv_rn(amax, kE4m3Max), kLeastScale);
}

// Whether `quotient` serves a scale: no remainder that matters is subnormal, and there is a reciprocal.
__device__ __forceinline__ bool is_ordinary(float scale) { return scale >= 0x1p-90f && scale <= kLargestScale; }

// number / scale, rounded once where a code is not 0, with the sign of the number where it is. For an 8-bit
// number and an ordinary scale, whose reciprocal is rounded once, one correction of the product is enough: true
// of every pair of mantissas. The remainder is negative: so zeros keep their sign.
__device__ __forceinline__ float quotient(float number, float scale, float reciprocal) {
  const float product = __fmul_rn(number, reciprocal);
  return __fmaf_rn(-__fmaf_rn(product, scale, -number), reciprocal, product);
}

// Grid: (ceil(num_tokens / kTokens),). Half a warp a token. Strides are in numbers, `rope_words` in words.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    pack_rows(const uint16_t* compressed_kv, int64_t compressed_kv_stride, const uint16_t* k_pe,
              int64_t k_pe_stride, unsigned char* packed_cache, const int64_t* slot_mapping, int64_t num_tokens,
              int64_t num_slots, int num_tiles, int rope_words, bool is_ue8m0) {
  using Numbers = Words<Word, kNumbers * 2>;
  using Codes = Words<CodeWord<Word>, kNumbers>;
  const int lane = lane_id() % kLanes;

  // 1. The token. Its slot decides what is stored and not what is loaded: loads do not wait for it. Lanes
  // without a token stay for the shuffles.
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x / kLanes;
  const bool is_token = token < num_tokens;
  int64_t slot = -1;
  Word rope{};
  const Word* rope_source = reinterpret_cast<const Word*>(k_pe + token * k_pe_stride);
  if (is_token) {
    slot = slot_mapping[token];
    if (lane < rope_words) {
      rope = rope_source[lane];
    }
  }
  const int rope_begin = num_tiles * (kTile + 4);
  const int width = rope_begin + rope_words * static_cast<int>(sizeof(Word));
  // Compare before any division: -1 / block_size is 0. 64 bits: slots * width passes 2^32 in large caches.
  unsigned char* row = nullptr;
  if (slot >= 0 && slot < num_slots) {
    row = packed_cache + slot * width;
  }

  for (int first = 0; first < num_tiles; first += kTilesInFlight) {
    // 2. The lane's eight numbers of each tile; zeros of tiles that are not.
    Numbers numbers[kTilesInFlight] = {};
#pragma unroll
    for (int i = 0; i < kTilesInFlight; ++i) {
      if (is_token && first + i < num_tiles) {
        const uint16_t* tile = compressed_kv + token * compressed_kv_stride + (first + i) * kTile;
        numbers[i].load(tile + lane * kNumbers);
      }
    }

    // 3. The largest magnitude of each tile. A comparison with NaN is false: it leaves NaN out.
    float values[kTilesInFlight][kNumbers], amax[kTilesInFlight];
#pragma unroll
    for (int i = 0; i < kTilesInFlight; ++i) {
      const auto* bits = reinterpret_cast<const uint16_t*>(&numbers[i]);
      amax[i] = 0.0f;
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) {
        values[i][n] = __uint_as_float(static_cast<uint32_t>(bits[n]) << 16);
        if (fabsf(values[i][n]) > amax[i]) {
          amax[i] = fabsf(values[i][n]);
        }
      }
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kTilesInFlight; ++i) {
        amax[i] = max(amax[i], __shfl_xor_sync(kAllLanes, amax[i], distance));
      }
    }

    // 4. Scales and codes. Each lane of the first stores the scale of its tile.
    float scale_of_lane = 0.0f;
#pragma unroll
    for (int i = 0; i < kTilesInFlight; ++i) {
      const float scale = scale_of(amax[i], is_ue8m0);
      if (lane == i) {
        scale_of_lane = scale;
      }
      float* value = values[i];
      if (is_ordinary(scale)) {
        const float reciprocal = __fdiv_rn(1.0f, scale);
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) {
          value[n] = quotient(value[n], scale, reciprocal);
        }
      } else {
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) {
          value[n] = __fdiv_rn(value[n], scale);
        }
      }
      const uint2 packed{pack_e4m3(value[0], value[1], value[2], value[3]),
                         pack_e4m3(value[4], value[5], value[6], value[7])};
      Codes codes;
      codes.load(&packed);
      if (row != nullptr && first + i < num_tiles) {
        codes.store(row + (first + i) * kTile + lane * kNumbers);
      }
    }
    if (row != nullptr && lane < min(kTilesInFlight, num_tiles - first)) {
      reinterpret_cast<float*>(row + num_tiles * kTile)[first + lane] = scale_of_lane;
    }
  }

  // 5. The rotated key part, as bits.
  if (row != nullptr) {
    Word* target = reinterpret_cast<Word*>(row + rope_begin);
    if (lane < rope_words) {
      target[lane] = rope;
    }
    for (int word = lane + kLanes; word < rope_words; word += kLanes) {
      target[word] = rope_source[word];
    }
  }
}

void packed_cache_write(TensorView compressed_kv, TensorView k_pe, TensorView packed_cache, TensorView slot_mapping,
                        bool is_ue8m0) {
  const int64_t num_tokens = compressed_kv.size(0), rank = compressed_kv.size(1), rope = k_pe.size(1);
  if (rank % kTile != 0 || rope % 2 != 0) {
    TVM_FFI_THROW(ValueError) << "compressed_kv must have a multiple of " << kTile << " columns and k_pe an even "
                              << "number, got " << rank << " and " << rope;
  }
  const int64_t width = rank + rank / kTile * 4 + 2 * rope;
  MLA_CHECK(compressed_kv, {num_tokens, rank}, kBfloat16);
  MLA_CHECK(k_pe, {num_tokens, rope}, kBfloat16);
  MLA_CHECK(packed_cache, {-1, 1, -1, width}, kUint8, true);
  MLA_CHECK(slot_mapping, {num_tokens}, kInt64);
  require_aligned(packed_cache, "packed_cache", 4);
  if (width > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "a row of packed_cache has at most 2147483647 bytes, got " << width;
  }
  if (num_tokens == 0) {
    return;
  }
  Alignment alignment;
  alignment.with(compressed_kv).with(k_pe).with(packed_cache).with(width).with(width - 2 * rope);
  with_word(alignment, [&](auto word) {
    using Word = decltype(word);
    launch(packed_cache, pack_rows<Word>, blocks(ceil_div<int64_t>(num_tokens, kTokens), "blocks of tokens"), kThreads, 0,
           data<uint16_t>(compressed_kv), compressed_kv.stride(0), data<uint16_t>(k_pe), k_pe.stride(0),
           data<unsigned char>(packed_cache), data<int64_t>(slot_mapping), num_tokens,
           packed_cache.size(0) * packed_cache.size(2), rank / kTile, 2 * rope / static_cast<int64_t>(sizeof(Word)), is_ue8m0);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_cache_write, packed_cache_write)
