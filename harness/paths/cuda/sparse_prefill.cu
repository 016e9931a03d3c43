// Absorbed MLA attention over listed tokens of the step. The contract is sparse_prefill.py's.
//
// A block works on up to kRows heads of one token. Listed keys are gathered through two buffers in shared
// memory, one being filled while the other is used, and each is read twice there: as K for the logits, its
// first columns as V for the output.

#include <cmath>

#include "mla/attention.h"
#include "mla/launch.h"

namespace {

using namespace mla;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 2;

// Of wide tiles half of the warps multiply q K^T, 32 keys each, and the other half gathers keys meanwhile:
// with two buffers there is no room for sums to exchange.
template <int kRows>
constexpr int kFewestKeys = kRows >= 32 ? 32 : 8;

template <class Element, int kRank, int kRope, int kRows, int kKeys>
struct Tile : AttentionTile<Element, kRank, kRope, kRows, kKeys, kWarps, kFewestKeys<kRows>> {
  using Divided = AttentionTile<Element, kRank, kRope, kRows, kKeys, kWarps, kFewestKeys<kRows>>;
  // A warp gathers four keys at once, eight lanes each: runs of 128 bytes.
  static constexpr int kKeyLanes = 8, kPassKeys = 32 / kKeyLanes;
  static constexpr int kFreeWarps = kRows >= 32 ? kWarps - Divided::kRowWarps * Divided::kKeyWarps : kWarps;
  static constexpr int kGatherWarps = kKeys / kPassKeys < kFreeWarps ? kKeys / kPassKeys : kFreeWarps;
  static constexpr int kGatherKeys = kKeys / kGatherWarps;  // a warp's share
  static_assert(kKeys % kGatherWarps == 0 && kGatherKeys % kPassKeys == 0, "whole passes");
  static_assert(kRank % (kKeyLanes * Divided::Latents::kWord) == 0, "every lane copies as much of a latent");
  static_assert(Divided::kParts == 1, "no sums are exchanged");

  struct Shared {
    alignas(16) Element query[kRows * Divided::Latents::kStride];
    alignas(16) Element keys[kStages][kKeys * Divided::Latents::kStride];
    alignas(16) Element weights[kRows * Divided::Weights::kStride];
    typename Divided::PerWarp row_max, row_sum;
    int list_end[kWarps];
    bool is_key[kStages][kKeys];
  };
  static_assert(sizeof(Shared) <= (227 << 10), "a block's shared memory");
};

struct Inputs {
  const void* q;
  int64_t q_stride_token, q_stride_head;
  const void *compressed_kv, *k_pe;
  int64_t compressed_kv_stride, k_pe_stride;
  const int* indices;
  int64_t indices_stride, num_tokens;
  float softmax_scale;
  int num_heads, num_entries;
};

struct Outputs {
  void* out;
  int64_t out_stride_token, out_stride_head;
  float* lse;
};

// Starts copying the warp's keys of a tile, `first` and those behind it; lane i % kGatherKeys knows which
// token the i-th is, -1 if it is none.
template <class Tile>
__device__ __forceinline__ void gather_keys(const Inputs& in, int token_of_lane, int first,
                                            typename Tile::T* keys, bool* is_key) {
  using T = typename Tile::T;
  using Latents = typename Tile::Latents;
  constexpr int kStep = Tile::kKeyLanes * Latents::kWord;
  const int lane = lane_id(), column = lane % Tile::kKeyLanes * Latents::kWord;
#pragma unroll
  for (int pass = 0; pass < Tile::kGatherKeys; pass += Tile::kPassKeys) {
    const int key = pass + lane / Tile::kKeyLanes;
    const int token = __shfl_sync(kAllLanes, token_of_lane, key);
    // 64 bits before the product: a token may be one of many, and far from the next.
    const int64_t row = max(token, 0);
    const T* latent = static_cast<const T*>(in.compressed_kv) + row * in.compressed_kv_stride;
    const T* rope = static_cast<const T*>(in.k_pe) + row * in.k_pe_stride;
    // What is no key becomes 0 and is not merely weighted 0: 0 * NaN would reach the output.
#pragma unroll
    for (int i = column; i < Tile::kRank; i += kStep) {
      copy_async(&keys[Latents::place(first + key, i)], latent + i, token >= 0);
    }
#pragma unroll
    for (int i = column; i < Tile::kRope; i += kStep) {
      copy_async(&keys[Latents::place(first + key, Tile::kRank + i)], rope + i, token >= 0);
    }
  }
  commit_copies();
  if (lane < Tile::kGatherKeys) {
    is_key[first + lane] = token_of_lane >= 0;
  }
}

// Attention of a token's heads over its list.
//
// Grid: (tokens * ceil(heads / kRows),), head tiles fastest: those of one token read the same keys at the
// same time, once from memory and then from L2.
template <class Tile>
__global__ void __launch_bounds__(kThreads) attend_list(const Inputs in, const Outputs to) {
  using T = typename Tile::T;
  constexpr int kRowTiles = Tile::kRowTiles;
  auto& shared = shared_memory<typename Tile::Shared>();
  const int lane = lane_id(), warp = threadIdx.x / 32;
  // Neighbouring warps issue to different tensor cores: those that have keys are neighbours.
  const int row_warp = warp % Tile::kRowWarps, column_warp = warp / Tile::kRowWarps;
  const bool has_keys = column_warp < Tile::kKeyWarps;
  const int gather_warp = warp - (kWarps - Tile::kGatherWarps);  // negative: gathers none

  // 1. The block's heads, and their list.
  const int head_tiles = ceil_div(in.num_heads, Tile::kRows);
  const int64_t token = blockIdx.x / head_tiles;
  const int first_head = static_cast<int>(blockIdx.x % head_tiles) * Tile::kRows;
  const int heads = min(in.num_heads - first_head, Tile::kRows);
  const int* list = in.indices + token * in.indices_stride;

  // 2. Nothing is computed behind its last key: lists of a row's first tokens are mostly empty.
  int end = list_end<kThreads>(list, 0, in.num_entries, in.num_tokens);
  if (lane == 0) {
    shared.list_end[warp] = end;
  }
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    end = max(end, shared.list_end[w]);
  }

  // 3. Queries and the first tile of keys are on their way. A lane knows one of its warp's keys of the next
  // tile: the list is read one tile ahead.
  const int first_key = gather_warp * Tile::kGatherKeys;
  const int place = first_key + lane % Tile::kGatherKeys;  // of the lane's key in a tile
  const auto key_at = [&](int position) { return named_key(list, position, end, in.num_tokens); };
  int next_key = -1;
  if (end > 0) {
    const T* q = static_cast<const T*>(in.q) + token * in.q_stride_token + first_head * in.q_stride_head;
    fetch_queries<Tile>(q, in.q_stride_head, heads, shared.query);
    commit_copies();
    if (gather_warp >= 0) {
      next_key = key_at(Tile::kKeys + place);
      gather_keys<Tile>(in, key_at(place), first_key, shared.keys[0], shared.is_key[0]);
    }
  }

  // 4. Online softmax over tiles of kKeys keys.
  typename Tile::PerRow maximum, total = {};
  typename Tile::Output accumulator = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    maximum[m][0] = maximum[m][1] = -INFINITY;
  }
  const float exponent_scale = in.softmax_scale * kLog2e;
  int stage = 0;
  for (int start = 0; start < end; start += Tile::kKeys) {
    // The tile is there, and no warp uses the other buffer any more.
    wait_copies<0>();
    __syncthreads();
    if (gather_warp >= 0 && start + Tile::kKeys < end) {
      gather_keys<Tile>(in, next_key, first_key, shared.keys[1 - stage], shared.is_key[1 - stage]);
      next_key = key_at(start + 2 * Tile::kKeys + place);
    }

    // Logits, of what is no key -inf; then weights relative to the new maximum.
    typename Tile::Logits logits;
    if (has_keys) {
      multiply_keys<Tile>(shared.query, shared.keys[stage], row_warp, column_warp, logits);
      mask_logits<Tile>(shared.is_key[stage], column_warp, logits);
      hand_maxima<Tile>(logits, row_warp, column_warp, shared.row_max);
    }
    __syncthreads();
    weigh_keys<Tile>(logits, shared.row_max, exponent_scale, row_warp, column_warp, maximum, total, accumulator,
                     shared.weights);
    __syncthreads();
    multiply_values<Tile>(shared.weights, shared.keys[stage], row_warp, column_warp, accumulator);
    stage = 1 - stage;
  }

  // 5. Each row's sum over all lanes and warps that have keys.
  if (has_keys) {
    hand_totals<Tile>(total, row_warp, column_warp, shared.row_sum);
  }
  __syncthreads();

  // 6. Normalise and store. Without a key the maximum is -inf and the sum 0: out 0, lse -inf.
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = place_of_row<Tile>(row_warp, m, i);
      if (row >= heads) {
        continue;
      }
      const int head = first_head + row;
      const float sum = sum_of_row<Tile>(shared.row_sum, row);
      float inverse = 1.0f;
      if (sum > 0.0f) {
        inverse = 1.0f / sum;
      }
      T* out = static_cast<T*>(to.out) + token * to.out_stride_token + head * to.out_stride_head;
      store_row<Tile>(accumulator, m, i, inverse, out + column_warp * Tile::kWarpColumns + lane % 4 * 2);
      if (column_warp == 0 && lane % 4 == 0) {
        to.lse[token * in.num_heads + head] = maximum[m][i] * in.softmax_scale + logf(sum);
      }
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class Tile>
void attend(const TensorView& q, const Inputs& in, const Outputs& to) {
  const int64_t head_tiles = ceil_div<int64_t>(q.size(1), Tile::kRows);
  const unsigned grid = blocks(q.size(0) * head_tiles, "tiles of heads");
  launch(q, attend_list<Tile>, grid, kThreads, sizeof(typename Tile::Shared), in, to);
}

// Tiles that fit into 227 KiB of shared memory: wide rows and fp32 leave room for fewer heads and keys.
template <class T, int kRank, int kRope>
void with_rows(const TensorView& q, const Inputs& in, const Outputs& to) {
  if constexpr (sizeof(T) == 4) {
    attend<Tile<T, kRank, kRope, 16, 16>>(q, in, to);
  } else if constexpr (kRank > 512) {
    attend<Tile<T, kRank, kRope, 16, 32>>(q, in, to);
  } else if (in.num_heads <= 16) {
    attend<Tile<T, kRank, kRope, 16, 64>>(q, in, to);
  } else {
    attend<Tile<T, kRank, kRope, 64, 64>>(q, in, to);
  }
}

void sparse_prefill(TensorView q, TensorView compressed_kv, TensorView k_pe, TensorView indices, TensorView out,
                    TensorView lse, double softmax_scale) {
  const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2), rank = out.size(2);
  const DLDataType dtype = model_dtype(q, "q");
  MLA_CHECK(q, {tokens, heads, width}, dtype);
  MLA_CHECK(compressed_kv, {tokens, rank}, dtype);
  MLA_CHECK(k_pe, {tokens, width - rank}, dtype);
  MLA_CHECK(indices, {tokens, 1, -1}, kInt32);
  MLA_CHECK(out, {tokens, heads, rank}, dtype);
  MLA_CHECK(lse, {tokens, heads}, kFloat32, true);
  const int64_t entries = indices.size(2);
  if (entries > (1 << 30)) {
    TVM_FFI_THROW(ValueError) << "indices must have at most 1073741824 entries a token, got " << entries;
  }
  require_aligned(q, "q", 16);
  require_aligned(compressed_kv, "compressed_kv", 16);
  require_aligned(k_pe, "k_pe", 16);
  require_aligned(out, "out", 8);
  if (tokens == 0) {
    return;
  }
  const Inputs in{
      data<void>(q),
      q.stride(0),
      q.stride(1),
      data<void>(compressed_kv),
      data<void>(k_pe),
      compressed_kv.stride(0),
      k_pe.stride(0),
      data<int>(indices),
      indices.stride(0),
      tokens,
      static_cast<float>(softmax_scale),
      static_cast<int>(heads),
      static_cast<int>(entries),
  };
  const Outputs to{data<void>(out), out.stride(0), out.stride(1), data<float>(lse)};
  with_model_dtype(q, "q", [&](auto element) {
    using T = decltype(element);
    if (rank == 512 && width == 576) {
      with_rows<T, 512, 64>(q, in, to);
    } else if (rank == 256 && width == 320) {
      with_rows<T, 256, 64>(q, in, to);
    } else if (rank == 256 && width == 288) {
      with_rows<T, 256, 32>(q, in, to);
    } else if (rank == 1024 && width == 1088) {
      with_rows<T, 1024, 64>(q, in, to);
    } else {
      TVM_FFI_THROW(ValueError) << "kv_lora_rank and width must be 512 of 576, 256 of 320, 256 of 288 or 1024 of "
                                << "1088, got " << rank << " of " << width;
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_prefill, sparse_prefill)
