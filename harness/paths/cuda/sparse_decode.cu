// Absorbed MLA attention over listed rows of the packed fp8 cache, split over the lists. The contract is
// sparse_decode.py's.
//
// A block works on up to kRows heads of one token. Packed rows of a tile of keys are copied into shared memory
// while the tile before is multiplied; each warp dequantises the rows that it copied, once for all heads. As
// dequantised, keys are read twice: as K for the logits, their first columns as V for the output.

#include <cmath>

#include "mla/attention.h"
#include "mla/e4m3.h"
#include "mla/launch.h"

namespace {

using namespace mla;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTile = 128;  // columns that share a scale

template <int kRank, int kRope, int kRows, int kKeys>
struct Tile : AttentionTile<bf16, kRank, kRope, kRows, kKeys, kWarps> {
  using Divided = AttentionTile<bf16, kRank, kRope, kRows, kKeys, kWarps>;
  // A packed row: codes, scales, rotated key; in shared memory it begins at a multiple of 16 bytes.
  static constexpr int kScales = kRank, kKeyPe = kRank + kRank / kTile * 4;
  static constexpr int kPackedBytes = kKeyPe + 2 * kRope;
  static constexpr int kPackedStride = ceil_div(kPackedBytes, 16) * 16;
  static constexpr int kCopyBytes = kPackedBytes % 16 == 0 ? 16 : 8;
  static constexpr int kCopies = kPackedBytes / kCopyBytes;
  static constexpr int kWarpRows = kKeys / kWarps;  // that a warp copies and dequantises
  static_assert(kRank % kTile == 0 && kRope % 8 == 0 && kPackedBytes % 8 == 0, "whole tiles and words");

  struct Shared {
    alignas(16) bf16 query[kRows * Divided::Latents::kStride];
    alignas(16) bf16 keys[kKeys * Divided::Latents::kStride];
    alignas(16) bf16 weights[kRows * Divided::Weights::kStride];
    alignas(16) unsigned char packed[kKeys * kPackedStride];
    typename Divided::Exchanged exchanged;
    typename Divided::PerWarp row_max, row_sum;
    int list_end[kWarps];
    bool is_key[kKeys];
  };
  static_assert(sizeof(Shared) <= (227 << 10), "a block's shared memory");
};

struct Inputs {
  const bf16* q;
  int64_t q_stride_token, q_stride_head;
  const unsigned char* packed_cache;
  const int* indices;
  int64_t indices_stride, num_rows;
  float softmax_scale;
  int num_heads, num_entries, num_splits, min_split_entries;
};

struct Outputs {
  bf16* out;
  int64_t out_stride_token, out_stride_head;
  float *lse, *partial_out, *partial_max, *partial_sum;
};

// Entries a split: a list divided evenly, not fewer than are worth a split, in whole tiles.
__device__ __forceinline__ int split_entries(const Inputs& in, int tile_keys) {
  const int entries = max(ceil_div(in.num_entries, in.num_splits), in.min_split_entries);
  return ceil_div(entries, tile_keys) * tile_keys;
}

// The row of the cache that entry `position` of a list names, or -1.
__device__ __forceinline__ int named_row(const Inputs& in, const int* list, int position, int end) {
  return named_key(list, position, end, in.num_rows);
}

// Starts copying the warp's rows of a tile; lane i % kWarpRows knows which row the i-th is, -1 if it is none.
template <class Tile>
__device__ __forceinline__ void fetch_rows(const Inputs& in, int row_of_lane, unsigned char* target) {
  const int lane = lane_id(), first = threadIdx.x / 32 * Tile::kWarpRows;
#pragma unroll
  for (int i = lane; i < ceil_div(Tile::kWarpRows * Tile::kCopies, 32) * 32; i += 32) {
    const int number = i / Tile::kCopies % Tile::kWarpRows, byte = i % Tile::kCopies * Tile::kCopyBytes;
    const int row = __shfl_sync(kAllLanes, row_of_lane, number);
    // 64 bits before the product: offsets pass 2^32 in large caches.
    const unsigned char* source = in.packed_cache + int64_t{max(row, 0)} * Tile::kPackedBytes + byte;
    // What is no key becomes 0 and is not merely weighted 0: 0 * NaN would reach the output.
    if (i < Tile::kWarpRows * Tile::kCopies) {
      copy_async<Tile::kCopyBytes>(target + (first + number) * Tile::kPackedStride + byte, source, row >= 0);
    }
  }
  commit_copies();
}

// Widens the warp's rows: eight columns a lane at a time, rounded to bf16 once.
template <class Tile>
__device__ __forceinline__ void dequantise_rows(const unsigned char* packed, bf16* keys) {
  constexpr int kWords = Tile::kRank / 8, kRopeWords = Tile::kRope / 8;
  const int lane = lane_id(), first = threadIdx.x / 32 * Tile::kWarpRows;
#pragma unroll 4
  for (int i = lane; i < Tile::kWarpRows * kWords; i += 32) {
    const int key = first + i / kWords, word = i % kWords;
    const unsigned char* row = packed + key * Tile::kPackedStride;
    const uint2 codes = *reinterpret_cast<const uint2*>(row + word * 8);
    const float scale = *reinterpret_cast<const float*>(row + Tile::kScales + word / (kTile / 8) * 4);
    float low[4], high[4];
    unpack_e4m3(codes.x, low);
    unpack_e4m3(codes.y, high);
    *reinterpret_cast<uint4*>(&keys[Tile::Latents::place(key, word * 8)]) =
        uint4{pack<bf16>(low[0] * scale, low[1] * scale), pack<bf16>(low[2] * scale, low[3] * scale),
              pack<bf16>(high[0] * scale, high[1] * scale), pack<bf16>(high[2] * scale, high[3] * scale)};
  }
  for (int i = lane; i < Tile::kWarpRows * kRopeWords; i += 32) {
    const int key = first + i / kRopeWords, word = i % kRopeWords;
    const unsigned char* row = packed + key * Tile::kPackedStride + Tile::kKeyPe + word * 16;
    const uint2 low = *reinterpret_cast<const uint2*>(row), high = *reinterpret_cast<const uint2*>(row + 8);
    *reinterpret_cast<uint4*>(&keys[Tile::Latents::place(key, Tile::kRank + word * 8)]) =
        uint4{low.x, low.y, high.x, high.y};
  }
}

// Attention of a token's heads over one split of its list.
//
// Grid: (tokens * ceil(heads / kRows), splits), head tiles fastest: those of one token read the same keys at
// the same time, once from memory and then from L2. Writes the final result where the list has one split, else
// its share into the workspace.
template <class Tile>
__global__ void __launch_bounds__(kThreads) attend_split(const Inputs in, const Outputs to) {
  constexpr int kRowTiles = Tile::kRowTiles;
  auto& shared = shared_memory<typename Tile::Shared>();
  const int lane = lane_id(), warp = threadIdx.x / 32;
  const int row_warp = warp / Tile::kColumnWarps, column_warp = warp % Tile::kColumnWarps;
  const bool has_keys = column_warp < Tile::kKeyWarps;

  // 1. The block's heads, and its share of their list.
  const int head_tiles = ceil_div(in.num_heads, Tile::kRows);
  const int64_t token = blockIdx.x / head_tiles;
  const int first_head = static_cast<int>(blockIdx.x % head_tiles) * Tile::kRows;
  const int heads = min(in.num_heads - first_head, Tile::kRows);
  const int split = static_cast<int>(blockIdx.y);
  const int step = split_entries(in, Tile::kKeys);
  const bool is_whole_list = step >= in.num_entries;
  const int* list = in.indices + token * in.indices_stride;
  const int begin = min(split * step, in.num_entries);
  const int limit = min(begin + step, in.num_entries);

  // 2. Nothing is computed behind its last key: lists of short rows are mostly empty.
  int end = list_end<kThreads>(list, begin, limit, in.num_rows);
  if (lane == 0) {
    shared.list_end[warp] = end;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    end = max(end, shared.list_end[w]);
  }

  // 3. Queries and the first tile of keys are on their way. A lane knows one of the warp's rows of the tile
  // that is being copied, and reads the list one tile ahead.
  const int lane_key = warp * Tile::kWarpRows + lane % Tile::kWarpRows;
  int row = named_row(in, list, begin + lane_key, end);
  int next_row = named_row(in, list, begin + Tile::kKeys + lane_key, end);
  if (begin < end) {
    const bf16* q = in.q + token * in.q_stride_token + first_head * in.q_stride_head;
    fetch_queries<Tile>(q, in.q_stride_head, heads, shared.query);
    fetch_rows<Tile>(in, row, shared.packed);
  }

  // 4. Online softmax over tiles of kKeys keys.
  typename Tile::PerRow maximum, total = {};
  typename Tile::Output accumulator = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    maximum[m][0] = maximum[m][1] = -INFINITY;
  }
  const float exponent_scale = in.softmax_scale * kLog2e;
  for (int start = begin; start < end; start += Tile::kKeys) {
    // The packed rows are there, and no warp uses the keys of the tile before any more.
    wait_copies<0>();
    __syncthreads();
    dequantise_rows<Tile>(shared.packed, shared.keys);
    if (lane < Tile::kWarpRows) {
      shared.is_key[lane_key] = row >= 0;
    }
    row = next_row;
    next_row = named_row(in, list, start + 2 * Tile::kKeys + lane_key, end);
    if (start + Tile::kKeys < end) {
      // No lane of the warp reads its packed rows any more; no other warp ever does.
      __syncwarp();
      fetch_rows<Tile>(in, row, shared.packed);
    }
    __syncthreads();

    // Logits, whose sums neighbouring warps have shared.
    typename Tile::Logits logits;
    if constexpr (Tile::kParts > 1) {
      typename Tile::Sums sums;
      multiply_keys<Tile>(shared.query, shared.keys, row_warp, column_warp, sums);
      hand_sums<Tile>(sums, column_warp, logits, shared.exchanged);
      __syncthreads();
      take_sums<Tile>(logits, shared.exchanged);
    } else if (has_keys) {
      multiply_keys<Tile>(shared.query, shared.keys, row_warp, column_warp, logits);
    }

    // Of what is no key -inf; then weights relative to the new maximum.
    if (has_keys) {
      mask_logits<Tile>(shared.is_key, column_warp, logits);
      hand_maxima<Tile>(logits, row_warp, column_warp, shared.row_max);
    }
    __syncthreads();
    weigh_keys<Tile>(logits, shared.row_max, exponent_scale, row_warp, column_warp, maximum, total, accumulator,
                     shared.weights);
    __syncthreads();
    multiply_values<Tile>(shared.weights, shared.keys, row_warp, column_warp, accumulator);
  }

  // 5. Each row's sum over all lanes and warps that have keys.
  if (has_keys) {
    hand_totals<Tile>(total, row_warp, column_warp, shared.row_sum);
  }
  __syncthreads();

  // 6. Normalise and store: straight to the outputs where this split is the whole list. Without a key the
  // maximum is -inf and the sum 0: out 0, lse -inf; of a split nothing but these two is read then.
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row_of_tile = place_of_row<Tile>(row_warp, m, i);
      if (row_of_tile >= heads) {
        continue;
      }
      const int head = first_head + row_of_tile;
      const float sum = sum_of_row<Tile>(shared.row_sum, row_of_tile);
      float inverse = 1.0f;
      if (sum > 0.0f) {
        inverse = 1.0f / sum;
      }
      const int64_t row_of_lse = token * in.num_heads + head;
      const int64_t partial = row_of_lse * in.num_splits + split;
      const int column = column_warp * Tile::kWarpColumns + lane % 4 * 2;
      if (is_whole_list) {
        if (split > 0) {
          continue;
        }
        bf16* out = to.out + token * to.out_stride_token + head * to.out_stride_head + column;
        store_row<Tile>(accumulator, m, i, inverse, out);
      } else if (sum > 0.0f) {
        store_row<Tile>(accumulator, m, i, inverse, to.partial_out + partial * Tile::kRank + column);
      }
      if (column_warp == 0 && lane % 4 == 0) {
        if (is_whole_list) {
          to.lse[row_of_lse] = maximum[m][i] * in.softmax_scale + logf(sum);
        } else {
          // Not their LSE: of logits near -6e4 its ulp is 4e-3, and so would be the error of a weight.
          to.partial_max[partial] = maximum[m][i];
          to.partial_sum[partial] = sum;
        }
      }
    }
  }
}

constexpr int kCombineThreads = 128;

// Merges the splits of one (token, head). Grid: (tokens * heads,).
//
// Over the splits s that have a key, with the maximum m of their partial_max:
//
//     w_s = partial_sum[s] * e^(softmax_scale * (partial_max[s] - m))
//     out = sum_s w_s partial_out[s] / sum_s w_s,    lse = softmax_scale * m + ln sum_s w_s
//
// and where none has, out 0, lse -inf.
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits(const Inputs in, const Outputs to, int rank, int tile_keys) {
  // 1. How many splits have entries; with one, it already wrote the outputs.
  const int64_t row = blockIdx.x;
  const int64_t token = row / in.num_heads;
  const int head = static_cast<int>(row % in.num_heads);
  const int step = split_entries(in, tile_keys);
  if (step >= in.num_entries) {
    return;
  }
  const int splits = ceil_div(in.num_entries, step);
  const int64_t first = row * in.num_splits;

  // 2. The largest maximum.
  float maximum = -INFINITY;
  for (int split = 0; split < splits; ++split) {
    maximum = fmaxf(maximum, to.partial_max[first + split]);
  }

  // 3. The weighted sum, four columns a thread at a time.
  const float exponent_scale = in.softmax_scale * kLog2e;
  for (int column = threadIdx.x * 4; column < rank; column += kCombineThreads * 4) {
    float4 sums{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      const float sum = to.partial_sum[first + split];
      // A split without a key has written no output.
      if (sum > 0.0f) {
        const float weight = sum * exp2f((to.partial_max[first + split] - maximum) * exponent_scale);
        const float4 part = *reinterpret_cast<const float4*>(to.partial_out + (first + split) * rank + column);
        sums.x += weight * part.x;
        sums.y += weight * part.y;
        sums.z += weight * part.z;
        sums.w += weight * part.w;
        total += weight;
      }
    }
    float inverse = 1.0f;
    if (total > 0.0f) {
      inverse = 1.0f / total;
    }
    bf16* out = to.out + token * to.out_stride_token + head * to.out_stride_head + column;
    store_pair(out, sums.x * inverse, sums.y * inverse);
    store_pair(out + 2, sums.z * inverse, sums.w * inverse);
    if (column == 0) {
      to.lse[row] = maximum * in.softmax_scale + logf(total);
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class Tile>
void attend_and_combine(const TensorView& q, const Inputs& in, const Outputs& to) {
  const int64_t tokens = q.size(0), heads = q.size(1);
  const int64_t head_tiles = ceil_div<int64_t>(heads, Tile::kRows);
  const dim3 grid(blocks(tokens * head_tiles, "tiles of heads"), in.num_splits);
  launch(q, attend_split<Tile>, grid, kThreads, sizeof(typename Tile::Shared), in, to);
  if (in.num_splits > 1) {
    launch(q, combine_splits, blocks(tokens * heads, "heads of tokens"), kCombineThreads, 0, in, to, Tile::kRank,
           Tile::kKeys);
  }
}

// Tiles that fit into 227 KiB of shared memory: wide rows leave room for fewer heads and keys.
template <int kRank, int kRope>
void with_rows(const TensorView& q, const Inputs& in, const Outputs& to, int64_t rows) {
  if constexpr (kRank > 512) {
    attend_and_combine<Tile<kRank, kRope, 16, 32>>(q, in, to);
  } else if (rows <= 16) {
    attend_and_combine<Tile<kRank, kRope, 16, 64>>(q, in, to);
  } else {
    attend_and_combine<Tile<kRank, kRope, 64, 64>>(q, in, to);
  }
}

void sparse_decode(TensorView q, TensorView packed_cache, TensorView indices, TensorView out, TensorView lse,
                   Optional<TensorView> partial_out, Optional<TensorView> partial_max,
                   Optional<TensorView> partial_sum, double softmax_scale, int64_t num_splits,
                   int64_t min_split_entries, int64_t rows) {
  const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2), rank = out.size(2);
  const int64_t packed_width = rank + rank / kTile * 4 + 2 * (width - rank);
  MLA_CHECK(q, {tokens, heads, width}, kBfloat16);
  MLA_CHECK(packed_cache, {-1, 1, -1, packed_width}, kUint8, true);
  MLA_CHECK(indices, {tokens, 1, -1}, kInt32);
  MLA_CHECK(out, {tokens, heads, rank}, kBfloat16);
  MLA_CHECK(lse, {tokens, heads}, kFloat32, true);
  const int64_t entries = indices.size(2);
  if (entries < 1 || entries > (1 << 30)) {
    TVM_FFI_THROW(ValueError) << "indices must have 1 to 1073741824 entries a token, got " << entries;
  }
  if (num_splits < 1 || num_splits > 65535) {
    TVM_FFI_THROW(ValueError) << "num_splits must be from 1 to 65535, got " << num_splits;
  }
  if (num_splits > 1) {
    if (!partial_out.has_value() || !partial_max.has_value() || !partial_sum.has_value()) {
      TVM_FFI_THROW(ValueError) << "num_splits " << num_splits << " needs partial_out, partial_max and partial_sum";
    }
    Argument{*partial_out, "partial_out"}.check({tokens, heads, num_splits, rank}, kFloat32, true);
    Argument{*partial_max, "partial_max"}.check({tokens, heads, num_splits}, kFloat32, true);
    Argument{*partial_sum, "partial_sum"}.check({tokens, heads, num_splits}, kFloat32, true);
  }
  require_aligned(q, "q", 16);
  if (reinterpret_cast<uintptr_t>(data<char>(packed_cache)) % 16 != 0) {
    TVM_FFI_THROW(ValueError) << "packed_cache must begin at a multiple of 16 bytes";
  }
  require_aligned(out, "out", 8);
  if (tokens == 0) {
    return;
  }
  const auto pointer = [](const Optional<TensorView>& tensor) -> float* {
    if (tensor.has_value()) {
      return data<float>(*tensor);
    }
    return nullptr;
  };
  const Inputs in{
      data<bf16>(q),
      q.stride(0),
      q.stride(1),
      data<unsigned char>(packed_cache),
      data<int>(indices),
      indices.stride(0),
      packed_cache.size(0) * packed_cache.size(2),
      static_cast<float>(softmax_scale),
      static_cast<int>(heads),
      static_cast<int>(entries),
      static_cast<int>(num_splits),
      static_cast<int>(min_split_entries),
  };
  const Outputs to{data<bf16>(out),      out.stride(0),        out.stride(1),       data<float>(lse),
                   pointer(partial_out), pointer(partial_max), pointer(partial_sum)};
  if (rank == 512 && width == 576) {
    with_rows<512, 64>(q, in, to, rows);
  } else if (rank == 256 && width == 320) {
    with_rows<256, 64>(q, in, to, rows);
  } else if (rank == 256 && width == 288) {
    with_rows<256, 32>(q, in, to, rows);
  } else if (rank == 1024 && width == 1088) {
    with_rows<1024, 64>(q, in, to, rows);
  } else {
    TVM_FFI_THROW(ValueError) << "kv_lora_rank and width must be 512 of 576, 256 of 320, 256 of 288 or 1024 of "
                              << "1088, got " << rank << " of " << width;
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_decode, sparse_decode)
