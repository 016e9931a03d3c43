// Absorbed MLA decode attention over a paged latent cache, split over the keys. The contract is mla_decode.py's.
//
// A block works on up to kRows queries that share their keys: the heads of one token, or of several tokens of
// a draft. Keys pass through two buffers in shared memory, one being filled while the other is used, and each
// is read twice there: as K for the logits, its first columns as V for the output.

#include <cmath>

#include "mla/launch.h"
#include "mla/reduce.h"

namespace {

using namespace mla;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 2;

// How a tile of kRows queries, kKeys keys and kRank + kRope columns is divided among the warps.
template <class Element, int kRank_, int kRope_, int kRows_, int kKeys_>
struct Tile {
  using T = Element;
  static constexpr int kRank = kRank_, kRope = kRope_, kRows = kRows_, kKeys = kKeys_;
  static constexpr int kWidth = kRank + kRope;
  // Warps stand in a grid over the rows and over the keys, for the output over the columns. Two tiles of 16
  // rows each, where there are two: what is loaded of K and V then serves twice.
  static constexpr int kRowTiles = kRows >= 32 ? 2 : 1;
  static constexpr int kRowWarps = kRows / 16 / kRowTiles;
  static constexpr int kColumnWarps = kWarps / kRowWarps;
  // Of a wide tile half of the warps multiply q K^T, 32 keys each: of a quarter as many every query would be
  // loaded twice as often, and shared memory is what bounds that product. The other half fetches meanwhile.
  static constexpr int kWarpKeys = kRowTiles == 2 ? 32 : (kKeys >= 8 * kColumnWarps ? kKeys / kColumnWarps : 8);
  static constexpr int kKeyTiles = kWarpKeys / 8;
  static constexpr int kKeyWarps = kKeys / kWarpKeys;  // fewer than kColumnWarps: the others have no keys
  // A warp fetches whole words of as many rows at once as make runs of 128 or 64 bytes of each.
  static constexpr int kRowLanes = kWidth * sizeof(T) % 128 == 0 ? 8 : 4;
  static constexpr int kPassRows = 32 / kRowLanes;
  static constexpr int kFreeWarps = kRowTiles == 2 ? kWarps - kRowWarps * kKeyWarps : kWarps;
  static constexpr int kFetchWarps = kKeys / kPassRows < kFreeWarps ? kKeys / kPassRows : kFreeWarps;
  static constexpr int kFetchRows = kKeys / kFetchWarps;
  static constexpr int kWarpColumns = kRank / kColumnWarps;
  // Steps of k in groups that are alike: 128 bytes of a row, within which words are exchanged. And sums over k
  // that do not wait for one another, where a warp has few tiles to keep its tensor core busy.
  static constexpr int kGroup = kWidth % 64 == 0 ? 4 : 2;
  static constexpr int kChains = kRowTiles * kKeyTiles == 1 ? kGroup : 1;

  using Latents = Rows<T, kWidth>;
  using Weights = Rows<T, kKeys>;
  struct Shared {
    alignas(16) T query[kRows * Latents::kStride];
    alignas(16) T keys[kStages][kKeys * Latents::kStride];
    alignas(16) T weights[kRows * Weights::kStride];
    float row_max[kKeyWarps][kRows];
    float row_sum[kKeyWarps][kRows];
  };
  static_assert(kRows % (16 * kRowTiles) == 0 && kRank % (16 * kColumnWarps) == 0, "whole tiles");
  static_assert(kKeys % 16 == 0, "whole steps of k");
  static_assert(kKeys % kFetchWarps == 0 && kFetchRows % kPassRows == 0, "whole passes");
  static_assert(kWidth % (16 * kGroup) == 0 && kGroup % kChains == 0, "chains of one length");
};

struct Inputs {
  const void* q;
  int64_t q_stride_token, q_stride_head;
  const void* latent_cache;
  const int* block_tables;
  int64_t table_stride;
  const int *batch_id_per_token, *seq_lens_encoder, *seq_lens_decoder, *cu_seqlens_q;
  float softmax_scale;
  int num_heads, block_size, num_splits, min_split_tokens, group_tokens;
};

struct Outputs {
  void* out;
  int64_t out_stride_token, out_stride_head;
  float *lse, *partial_out, *partial_max, *partial_sum;
};

// What a token attends to. A token of padding or of a prefill row has no keys here.
struct TokenKeys {
  int slot, first_token, new_tokens, cached;
  __device__ int all() const { return cached + new_tokens; }
};

__device__ __forceinline__ TokenKeys keys_of(const Inputs& in, int64_t token) {
  TokenKeys keys{in.batch_id_per_token[token], 0, 0, 0};
  if (keys.slot >= 0 && in.seq_lens_encoder[keys.slot] == 0) {
    keys.first_token = in.cu_seqlens_q[keys.slot];
    keys.new_tokens = in.cu_seqlens_q[keys.slot + 1] - keys.first_token;
    keys.cached = in.seq_lens_decoder[keys.slot];
  }
  return keys;
}

// Keys a split: a row's keys divided evenly, not fewer than are worth a split, in whole tiles.
__device__ __forceinline__ int split_tokens(const Inputs& in, int keys, int tile_keys) {
  const int tokens = max(ceil_div(keys, in.num_splits), in.min_split_tokens);
  return ceil_div(tokens, tile_keys) * tile_keys;
}

// Starts copying the rows from `first` on of a tile of keys into shared memory: kFetchRows, a warp's share.
// `block` is the block table's entry for the lane's row, and becomes the next tile's: the table is read one
// tile ahead.
template <class Tile>
__device__ __forceinline__ void fetch_keys(const Inputs& in, const int* table, int start, int first, int end,
                                           typename Tile::T* target, int& block) {
  using T = typename Tile::T;
  using Latents = typename Tile::Latents;
  constexpr int kRowLanes = Tile::kRowLanes, kStep = kRowLanes * Latents::kWord;
  // 64 bits before the product: block * block_size * width passes 2^32 in large caches.
  const int position = start + first + lane_id() % Tile::kFetchRows;
  const int64_t row = static_cast<int64_t>(block) * in.block_size + position % in.block_size;
  const T* source = static_cast<const T*>(in.latent_cache) + row * Tile::kWidth;
  const int next = position + Tile::kKeys;
  block = 0;
  if (next < end) {
    block = table[next / in.block_size];
  }
  const auto address = reinterpret_cast<unsigned long long>(source);
  const int column = lane_id() % kRowLanes * Latents::kWord;
#pragma unroll
  for (int pass = 0; pass < Tile::kFetchRows; pass += Tile::kPassRows) {
    const int row_of_warp = pass + lane_id() / kRowLanes;
    const auto from = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, row_of_warp)) + column;
    // Rows behind the last key become 0 and are not merely weighted 0: 0 * NaN would reach the output.
    const int key = first + row_of_warp;
    T* to = target + Latents::place(key, column);
#pragma unroll
    for (int offset = 0; offset < Tile::kWidth; offset += kStep) {
      copy_async(to + offset, from + offset, start + key < end);
    }
  }
  commit_copies();
}

// q K^T of the warp's rows and keys, in units of one: not scaled yet.
template <class Tile>
__device__ __forceinline__ void multiply_keys(const typename Tile::Shared& shared, int stage, int row_warp,
                                              int column_warp,
                                              float (&logits)[Tile::kRowTiles][Tile::kKeyTiles][4]) {
  using T = typename Tile::T;
  constexpr int kRowTiles = Tile::kRowTiles, kKeyTiles = Tile::kKeyTiles, kChains = Tile::kChains;
  float sums[kChains][kRowTiles][kKeyTiles][4] = {};
  // What the next step multiplies is loaded before this one's products: few warps, so no other hides the wait.
  FragmentA<T> a[2][kRowTiles];
  FragmentB<T> b[2][ceil_div(kKeyTiles, 2) * 2];
  // Columns from `first` on, where a group of steps begins: from there rows exchange their words as from 0 on.
  const auto load = [&](int first, int step, int buffer) {
    const auto query = [&](int row, int column) { return shared.query + first + Tile::Latents::place(row, column); };
    const auto key = [&](int row, int column) {
      return shared.keys[stage] + first + Tile::Latents::place(row, column);
    };
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_a(a[buffer][m], query, (row_warp * kRowTiles + m) * 16, step * 16);
    }
    if constexpr (kKeyTiles == 1) {
      load_b_transposed(b[buffer][0], key, column_warp * 8, step * 16);
    } else {
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        load_b_transposed_pair(b[buffer][n], b[buffer][n + 1], key, column_warp * Tile::kWarpKeys + n * 8, step * 16);
      }
    }
  };
  load(0, 0, 0);
#pragma unroll
  for (int first = 0; first < Tile::kWidth; first += 16 * Tile::kGroup) {
#pragma unroll
    for (int step = 0; step < Tile::kGroup; ++step) {
      const int next = step + 1, group = first + next / Tile::kGroup * 16 * Tile::kGroup;
      if (group < Tile::kWidth) {
        load(group, next % Tile::kGroup, next % 2);
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          multiply_add(sums[step % kChains][m][n], a[step % 2][m], b[step % 2][n]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float sum = sums[0][m][n][i];
#pragma unroll
        for (int c = 1; c < kChains; ++c) {
          sum += sums[c][m][n][i];
        }
        logits[m][n][i] = sum;
      }
    }
  }
}

// accumulator += P V of the warp's rows and columns. V is the first columns of K.
template <class Tile>
__device__ __forceinline__ void multiply_values(
    const typename Tile::Shared& shared, int stage, int row_warp, int column_warp,
    float (&accumulator)[Tile::kRowTiles][Tile::kWarpColumns / 8][4]) {
  using T = typename Tile::T;
  constexpr int kRowTiles = Tile::kRowTiles, kColumnTiles = Tile::kWarpColumns / 8;
  const auto weight = [&](int row, int column) { return &shared.weights[Tile::Weights::place(row, column)]; };
  // Rows exchange words within 128 bytes: where the warps' columns begin at multiples, addresses differ by them.
  constexpr bool kWhole = Tile::kWarpColumns * sizeof(T) % 128 == 0;
  const int first_column = column_warp * Tile::kWarpColumns;
  const auto value = [&](int row, int column) {
    if constexpr (kWhole) {
      return shared.keys[stage] + first_column + Tile::Latents::place(row, column);
    } else {
      return shared.keys[stage] + Tile::Latents::place(row, first_column + column);
    }
  };
#pragma unroll
  for (int k = 0; k < Tile::kKeys; k += 16) {
    FragmentA<T> a[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_a(a[m], weight, (row_warp * kRowTiles + m) * 16, k);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      FragmentB<T> b[2];
      load_b_pair(b[0], b[1], value, k, n * 8);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        multiply_add(accumulator[m][n], a[m], b[0]);
        multiply_add(accumulator[m][n + 1], a[m], b[1]);
      }
    }
  }
}

// Attention of a block's queries over one split of their keys.
//
// Grid: (tokens * ceil(heads / kRows), splits), head tiles fastest: those of one token read the same keys at
// the same time, once from memory and then from L2. Writes the final result where the row has one split, else
// its share into the workspace.
template <class Tile>
__global__ void __launch_bounds__(kThreads) attend_split(const Inputs in, const Outputs to) {
  using T = typename Tile::T;
  using Latents = typename Tile::Latents;
  constexpr int kRowTiles = Tile::kRowTiles, kKeyTiles = Tile::kKeyTiles;
  constexpr int kColumnTiles = Tile::kWarpColumns / 8;
  auto& shared = shared_memory<typename Tile::Shared>();
  const int lane = lane_id(), warp = threadIdx.x / 32;
  // Neighbouring warps issue to different tensor cores: those that have keys are neighbours.
  const int row_warp = warp % Tile::kRowWarps, column_warp = warp / Tile::kRowWarps;
  const bool has_keys = column_warp < Tile::kKeyWarps;
  const int fetch_row = (warp - (kWarps - Tile::kFetchWarps)) * Tile::kFetchRows;  // negative: fetches none

  // 1. The block's queries: heads of one token, or all heads of a group of successive tokens of a draft,
  // which the group's first token answers for.
  const int head_tiles = ceil_div(in.num_heads, Tile::kRows);
  const int64_t token = blockIdx.x / head_tiles;
  const int first_head = static_cast<int>(blockIdx.x % head_tiles) * Tile::kRows;
  const int split = static_cast<int>(blockIdx.y);
  const TokenKeys keys = keys_of(in, token);
  const int place = static_cast<int>(token) - keys.first_token;
  int tokens = 1;
  if (keys.new_tokens > 0) {
    if (place % in.group_tokens != 0) {
      return;
    }
    tokens = min(in.group_tokens, keys.new_tokens - place);
  }
  const int heads = min(in.num_heads - first_head, Tile::kRows);

  // 2. This split's share of the keys; none where the row has none. Splits are of the row, so that all of its
  // tokens have the same, though only the last token sees every key.
  const int step = split_tokens(in, keys.all(), Tile::kKeys);
  const bool is_whole_row = step >= keys.all();
  const int begin = split * step;
  if (begin >= keys.all() && split > 0) {
    return;
  }
  int end = 0;
  if (keys.new_tokens > 0) {
    end = min(begin + step, keys.cached + place + tokens);
  }

  // 3. How many keys each of the thread's rows sees; -1 where it is no query.
  int row_keys[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (row_warp * kRowTiles + m) * 16 + i * 8 + lane / 4;
      row_keys[m][i] = -1;
      if (row < tokens * heads) {
        row_keys[m][i] = keys.cached + place + row / heads + 1;
      }
    }
  }

  // 4. Queries and the first tile of keys are on their way.
  const int* table = in.block_tables + keys.slot * in.table_stride;
  int block = 0;
  if (begin < end) {
    const T* q = static_cast<const T*>(in.q) + token * in.q_stride_token + first_head * in.q_stride_head;
    for (int i = threadIdx.x; i < Tile::kRows * Latents::kWords; i += kThreads) {
      const int row = i / Latents::kWords, column = i % Latents::kWords * Latents::kWord;
      const T* source = q + row / heads * in.q_stride_token + row % heads * in.q_stride_head + column;
      copy_async(&shared.query[Latents::place(row, column)], source, row < tokens * heads);
    }
    commit_copies();
    if (fetch_row >= 0) {
      const int position = begin + fetch_row + lane % Tile::kFetchRows;
      if (position < end) {
        block = table[position / in.block_size];
      }
      fetch_keys<Tile>(in, table, begin, fetch_row, end, shared.keys[0], block);
    }
  }

  // 5. Online softmax over tiles of kKeys keys.
  float maximum[kRowTiles][2], total[kRowTiles][2] = {};
  float accumulator[kRowTiles][kColumnTiles][4] = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    maximum[m][0] = maximum[m][1] = -INFINITY;
  }
  const float exponent_scale = in.softmax_scale * kLog2e;
  int stage = 0;
  for (int start = begin; start < end; start += Tile::kKeys) {
    // The tile is there, and no warp uses the other buffer any more.
    wait_copies<0>();
    __syncthreads();
    if (fetch_row >= 0 && start + Tile::kKeys < end) {
      fetch_keys<Tile>(in, table, start + Tile::kKeys, fetch_row, end, shared.keys[1 - stage], block);
    }

    // Logits, those of keys that a row does not see -inf, and their maximum over the warp's keys.
    float logits[kRowTiles][kKeyTiles][4];
    const bool all_seen = start + Tile::kKeys <= keys.cached + place + 1;
    if (has_keys) {
      multiply_keys<Tile>(shared, stage, row_warp, column_warp, logits);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float largest = -INFINITY;
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int position = start + column_warp * Tile::kWarpKeys + n * 8 + lane % 4 * 2 + j;
              float& logit = logits[m][n][2 * i + j];
              if (!all_seen && position >= row_keys[m][i]) {
                logit = -INFINITY;
              }
              largest = fmaxf(largest, logit);
            }
          }
          largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
          largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
          if (lane % 4 == 0) {
            shared.row_max[column_warp][(row_warp * kRowTiles + m) * 16 + i * 8 + lane / 4] = largest;
          }
        }
      }
    }
    __syncthreads();

    // Weights relative to the new maximum. Subtract before scaling: the difference of two large logits is
    // exact, their scaled values are not. A row that has seen no key yet has maximum -inf and weights 0.
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = (row_warp * kRowTiles + m) * 16 + i * 8 + lane / 4;
        float larger = maximum[m][i];
#pragma unroll
        for (int w = 0; w < Tile::kKeyWarps; ++w) {
          larger = fmaxf(larger, shared.row_max[w][row]);
        }
        float origin = larger;
        if (larger == -INFINITY) {
          origin = 0.0f;
        }
        const float keep = exp2_fast((maximum[m][i] - origin) * exponent_scale);
        maximum[m][i] = larger;
        total[m][i] *= keep;
        if (has_keys) {
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            const float first = exp2_fast((logits[m][n][2 * i] - origin) * exponent_scale);
            const float second = exp2_fast((logits[m][n][2 * i + 1] - origin) * exponent_scale);
            total[m][i] += first + second;
            const int column = column_warp * Tile::kWarpKeys + n * 8 + lane % 4 * 2;
            store_pair(&shared.weights[Tile::Weights::place(row, column)], first, second);
          }
        }
        // Most tiles raise no maximum.
        if (keep != 1.0f) {
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
            accumulator[m][n][2 * i] *= keep;
            accumulator[m][n][2 * i + 1] *= keep;
          }
        }
      }
    }
    __syncthreads();
    multiply_values<Tile>(shared, stage, row_warp, column_warp, accumulator);
    stage = 1 - stage;
  }

  // 6. Each row's sum over all lanes and warps that have keys.
  if (has_keys) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = total[m][i];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (lane % 4 == 0) {
          shared.row_sum[column_warp][(row_warp * kRowTiles + m) * 16 + i * 8 + lane / 4] = sum;
        }
      }
    }
  }
  __syncthreads();

  // 7. Normalise and store: straight to the outputs where this split is the whole row. Without a key the
  // maximum is -inf and the sum 0: out 0, lse -inf.
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row_keys[m][i] < 0) {
        continue;
      }
      const int row = (row_warp * kRowTiles + m) * 16 + i * 8 + lane / 4;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < Tile::kKeyWarps; ++w) {
        sum += shared.row_sum[w][row];
      }
      float inverse = 1.0f;
      if (sum > 0.0f) {
        inverse = 1.0f / sum;
      }
      const int64_t row_of_out = token + row / heads;
      const int head = first_head + row % heads;
      const int64_t row_of_lse = row_of_out * in.num_heads + head;
      const int64_t partial = row_of_lse * in.num_splits + split;
      const int column = column_warp * Tile::kWarpColumns + lane % 4 * 2;
      if (is_whole_row) {
        T* out = static_cast<T*>(to.out) + row_of_out * to.out_stride_token +
                 head * to.out_stride_head + column;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          store_pair(out + n * 8, accumulator[m][n][2 * i] * inverse, accumulator[m][n][2 * i + 1] * inverse);
        }
      } else {
        float* out = to.partial_out + partial * Tile::kRank + column;
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          store_pair(out + n * 8, accumulator[m][n][2 * i] * inverse, accumulator[m][n][2 * i + 1] * inverse);
        }
      }
      if (column_warp == 0 && lane % 4 == 0) {
        if (is_whole_row) {
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

constexpr int kCombineThreads = 128;  // of a part: four columns each
constexpr int kMaxParts = 4;
constexpr int kPartSplits = 8;  // as many as a part is worth having for

struct CombineShared {
  float4 sums[kMaxParts][kCombineThreads];
  float totals[kMaxParts];
};

// Merges the splits of one (token, head). Grid: (tokens * heads,); blocks of up to kMaxParts times
// kCombineThreads, which share the splits.
//
// Over the splits s of the row, with the maximum m of their partial_max:
//
//     w_s = partial_sum[s] * e^(softmax_scale * (partial_max[s] - m))
//     out = sum_s w_s partial_out[s] / sum_s w_s,    lse = softmax_scale * m + ln sum_s w_s
template <class T>
__global__ void __launch_bounds__(kMaxParts * kCombineThreads)
    combine_splits(const Inputs in, const Outputs to, int rank, int tile_keys) {
  // 1. How many splits wrote something; with one, it already wrote the outputs.
  const int64_t row = blockIdx.x;
  const int64_t token = row / in.num_heads;
  const int head = static_cast<int>(row % in.num_heads);
  const int keys = keys_of(in, token).all();
  const int step = split_tokens(in, keys, tile_keys);
  if (step >= keys) {
    return;
  }
  const int splits = ceil_div(keys, step);
  const int64_t first = row * in.num_splits;
  auto& shared = shared_memory<CombineShared>();
  const int part = threadIdx.x / kCombineThreads, place = threadIdx.x % kCombineThreads;
  const int parts = blockDim.x / kCombineThreads;

  // 2. The largest maximum: the first split has keys that every token sees, so it is a number.
  float maximum = -INFINITY;
  for (int split = lane_id(); split < splits; split += 32) {
    maximum = fmaxf(maximum, to.partial_max[first + split]);
  }
  maximum = combine_lanes(maximum, [](float a, float b) { return fmaxf(a, b); });

  const float exponent_scale = in.softmax_scale * kLog2e;
  for (int start = 0; start < rank; start += 4 * kCombineThreads) {
    // 3. Each part's weighted sum, four columns a thread.
    const int column = start + 4 * place;
    float4 sums{0.0f, 0.0f, 0.0f, 0.0f};
    float total = 0.0f;
    if (column < rank) {
#pragma unroll 8
      for (int split = part; split < splits; split += parts) {
        const float weight =
            to.partial_sum[first + split] * exp2f((to.partial_max[first + split] - maximum) * exponent_scale);
        const float4 share = *reinterpret_cast<const float4*>(to.partial_out + (first + split) * rank + column);
        sums.x += weight * share.x;
        sums.y += weight * share.y;
        sums.z += weight * share.z;
        sums.w += weight * share.w;
        total += weight;
      }
    }
    shared.sums[part][place] = sums;
    if (place == 0) {
      shared.totals[part] = total;
    }
    __syncthreads();

    // 4. The first part adds up what the others have.
    if (part == 0 && column < rank) {
      for (int other = 1; other < parts; ++other) {
        sums.x += shared.sums[other][place].x;
        sums.y += shared.sums[other][place].y;
        sums.z += shared.sums[other][place].z;
        sums.w += shared.sums[other][place].w;
        total += shared.totals[other];
      }
      const float inverse = 1.0f / total;
      T* out = static_cast<T*>(to.out) + token * to.out_stride_token + head * to.out_stride_head + column;
      store_pair(out, sums.x * inverse, sums.y * inverse);
      store_pair(out + 2, sums.z * inverse, sums.w * inverse);
      if (column == 0) {
        to.lse[row] = maximum * in.softmax_scale + logf(total);
      }
    }
    // Nobody writes the next columns' sums before these are read.
    __syncthreads();
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class Tile>
void attend_and_combine(const TensorView& q, Inputs in, const Outputs& to) {
  in.group_tokens = max(1, Tile::kRows / in.num_heads);
  const int64_t tokens = q.size(0), heads = q.size(1);
  const int64_t head_tiles = ceil_div<int64_t>(heads, Tile::kRows);
  const dim3 grid(blocks(tokens * head_tiles, "tiles of heads"), in.num_splits);
  launch(q, attend_split<Tile>, grid, kThreads, sizeof(typename Tile::Shared), in, to);
  if (in.num_splits > 1) {
    const int parts = min(kMaxParts, ceil_div(in.num_splits, kPartSplits));
    launch(q, combine_splits<typename Tile::T>, blocks(tokens * heads, "heads of tokens"), parts * kCombineThreads,
           sizeof(CombineShared), in, to, Tile::kRank, Tile::kKeys);
  }
}

// Tiles that fit into 227 KiB of shared memory: wide rows and fp32 leave room for fewer of them.
template <class T, int kRank, int kRope>
void with_rows(const TensorView& q, const Inputs& in, const Outputs& to, int64_t rows) {
  if constexpr (sizeof(T) == 4) {
    attend_and_combine<Tile<T, kRank, kRope, 16, 16>>(q, in, to);
  } else if constexpr (kRank > 512) {
    attend_and_combine<Tile<T, kRank, kRope, 16, 32>>(q, in, to);
  } else if (rows <= 16) {
    attend_and_combine<Tile<T, kRank, kRope, 16, 64>>(q, in, to);
  } else {
    attend_and_combine<Tile<T, kRank, kRope, 64, 64>>(q, in, to);
  }
}

void mla_decode(TensorView q, TensorView latent_cache, TensorView block_tables, TensorView seq_lens_encoder,
                TensorView seq_lens_decoder, TensorView cu_seqlens_q, TensorView batch_id_per_token, TensorView out,
                TensorView lse, Optional<TensorView> partial_out, Optional<TensorView> partial_max,
                Optional<TensorView> partial_sum, double softmax_scale, int64_t num_splits,
                int64_t min_split_tokens, int64_t rows) {
  const int64_t tokens = q.size(0), heads = q.size(1), width = q.size(2), rank = out.size(2);
  const int64_t slots = seq_lens_decoder.numel();
  const DLDataType dtype = model_dtype(q, "q");
  MLA_CHECK(q, {tokens, heads, width}, dtype);
  MLA_CHECK(latent_cache, {-1, 1, -1, width}, dtype, true);
  MLA_CHECK(block_tables, {slots, -1}, kInt32);
  MLA_CHECK(seq_lens_encoder, {slots}, kInt32);
  MLA_CHECK(seq_lens_decoder, {slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_token, {tokens}, kInt32);
  MLA_CHECK(out, {tokens, heads, rank}, dtype);
  MLA_CHECK(lse, {tokens, heads}, kFloat32, true);
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
  require_aligned(latent_cache, "latent_cache", 16);
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
      data<void>(q),
      q.stride(0),
      q.stride(1),
      data<void>(latent_cache),
      data<int>(block_tables),
      block_tables.stride(0),
      data<int>(batch_id_per_token),
      data<int>(seq_lens_encoder),
      data<int>(seq_lens_decoder),
      data<int>(cu_seqlens_q),
      static_cast<float>(softmax_scale),
      static_cast<int>(heads),
      static_cast<int>(latent_cache.size(2)),
      static_cast<int>(num_splits),
      static_cast<int>(min_split_tokens),
      1,
  };
  const Outputs to{data<void>(out),      out.stride(0),         out.stride(1),        data<float>(lse),
                   pointer(partial_out), pointer(partial_max), pointer(partial_sum)};
  with_model_dtype(q, "q", [&](auto element) {
    using T = decltype(element);
    if (rank == 512 && width == 576) {
      with_rows<T, 512, 64>(q, in, to, rows);
    } else if (rank == 256 && width == 320) {
      with_rows<T, 256, 64>(q, in, to, rows);
    } else if (rank == 256 && width == 288) {
      with_rows<T, 256, 32>(q, in, to, rows);
    } else if (rank == 1024 && width == 1088) {
      with_rows<T, 1024, 64>(q, in, to, rows);
    } else {
      TVM_FFI_THROW(ValueError) << "kv_lora_rank and width must be 512 of 576, 256 of 320, 256 of 288 or 1024 of "
                                << "1088, got " << rank << " of " << width;
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(mla_decode, mla_decode)
