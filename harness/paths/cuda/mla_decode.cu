// Absorbed MLA decode attention over a paged latent cache, split over the keys. The contract is mla_decode.py's.
//
// A block works on up to kRows queries that share their keys: the heads of one token, or of several tokens of
// a draft. Keys pass through two buffers in shared memory, one being filled while the other is used, and each
// is read twice there: as K for the logits, its first columns as V for the output.

#include <cmath>

#include "mla/launch.h"

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
  static constexpr int kWarpKeys = kKeys / kColumnWarps >= 8 ? kKeys / kColumnWarps : 8;
  static constexpr int kKeyTiles = kWarpKeys / 8;
  static constexpr int kKeyWarps = kKeys / kWarpKeys;  // fewer than kColumnWarps: the others have no keys
  static constexpr int kWarpColumns = kRank / kColumnWarps;
  // Sums over k that do not wait for one another, where a warp has few tiles to keep its tensor core busy.
  static constexpr int kSteps = kWidth / 16;
  static constexpr int kWantedChains = kRowTiles * kKeyTiles >= 4 ? 1 : 4 / (kRowTiles * kKeyTiles);
  static constexpr int kChains = kSteps % kWantedChains == 0 ? kWantedChains : 3;

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
  static_assert(kWidth % 16 == 0 && kKeys % 16 == 0, "whole steps of k");
  static_assert(kSteps % kChains == 0, "chains of one length");
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

// Starts copying a tile of keys into shared memory: eight rows a warp. `block` is the block table's entry for
// the lane's row, and becomes the next tile's: the table is read one tile ahead.
template <class Tile>
__device__ __forceinline__ void fetch_keys(const Inputs& in, const int* table, int start, int end,
                                           typename Tile::T* target, int& block) {
  using T = typename Tile::T;
  constexpr int kWords = Tile::Latents::kWords, kWord = Tile::Latents::kWord;
  constexpr int kWarpRows = Tile::kKeys / kWarps;
  const int lane = lane_id(), first = threadIdx.x / 32 * kWarpRows;
  // 64 bits before the product: block * block_size * width passes 2^32 in large caches.
  const int position = start + first + lane % kWarpRows;
  const int64_t row = static_cast<int64_t>(block) * in.block_size + position % in.block_size;
  const T* source = static_cast<const T*>(in.latent_cache) + row * Tile::kWidth;
  const int next = position + Tile::kKeys;
  block = 0;
  if (next < end) {
    block = table[next / in.block_size];
  }
#pragma unroll
  for (int i = lane; i < ceil_div(kWarpRows * kWords, 32) * 32; i += 32) {
    const int row_of_warp = i / kWords % kWarpRows, column = i % kWords * kWord;
    const auto address = reinterpret_cast<unsigned long long>(source);
    const auto from = reinterpret_cast<const T*>(__shfl_sync(kAllLanes, address, row_of_warp));
    // Rows behind the last key become 0 and are not merely weighted 0: 0 * NaN would reach the output.
    const int key = first + row_of_warp;
    if (i < kWarpRows * kWords) {
      copy_async(target + Tile::Latents::place(key, column), from + column, start + key < end);
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
  const auto query = [&](int row, int column) { return &shared.query[Tile::Latents::place(row, column)]; };
  const auto key = [&](int row, int column) { return &shared.keys[stage][Tile::Latents::place(row, column)]; };
  float sums[kChains][kRowTiles][kKeyTiles][4] = {};
#pragma unroll 2
  for (int k = 0; k < Tile::kWidth; k += 16 * kChains) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      FragmentA<T> a[kRowTiles];
      FragmentB<T> b[ceil_div(kKeyTiles, 2) * 2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_a(a[m], query, (row_warp * kRowTiles + m) * 16, k + c * 16);
      }
      if constexpr (kKeyTiles == 1) {
        load_b_transposed(b[0], key, column_warp * 8, k + c * 16);
      } else {
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          load_b_transposed_pair(b[n], b[n + 1], key, column_warp * Tile::kWarpKeys + n * 8, k + c * 16);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          multiply_add(sums[c][m][n], a[m], b[n]);
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
  const auto value = [&](int row, int column) { return &shared.keys[stage][Tile::Latents::place(row, column)]; };
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
      load_b_pair(b[0], b[1], value, k, column_warp * Tile::kWarpColumns + n * 8);
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
  const int row_warp = warp / Tile::kColumnWarps, column_warp = warp % Tile::kColumnWarps;
  const bool has_keys = column_warp < Tile::kKeyWarps;

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

  // 3. Of each of the thread's rows: its token, its head, and how many keys it sees; -1 where it is no query.
  int row_token[kRowTiles][2], row_head[kRowTiles][2], row_keys[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (row_warp * kRowTiles + m) * 16 + i * 8 + lane / 4;
      row_token[m][i] = row / heads;
      row_head[m][i] = first_head + row % heads;
      row_keys[m][i] = -1;
      if (row < tokens * heads) {
        row_keys[m][i] = keys.cached + place + row_token[m][i] + 1;
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
    constexpr int kWarpRows = Tile::kKeys / kWarps;
    const int position = begin + warp * kWarpRows + lane % kWarpRows;
    if (position < end) {
      block = table[position / in.block_size];
    }
    fetch_keys<Tile>(in, table, begin, end, shared.keys[0], block);
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
    if (start + Tile::kKeys < end) {
      fetch_keys<Tile>(in, table, start + Tile::kKeys, end, shared.keys[1 - stage], block);
    }

    // Logits, those of keys that a row does not see -inf, and their maximum over the warp's keys.
    float logits[kRowTiles][kKeyTiles][4];
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
              if (position >= row_keys[m][i]) {
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
        const float keep = exp2f((maximum[m][i] - origin) * exponent_scale);
        maximum[m][i] = larger;
        total[m][i] *= keep;
        if (has_keys) {
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n) {
            const float first = exp2f((logits[m][n][2 * i] - origin) * exponent_scale);
            const float second = exp2f((logits[m][n][2 * i + 1] - origin) * exponent_scale);
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
      const int64_t row_of_out = token + row_token[m][i];
      const int64_t row_of_lse = row_of_out * in.num_heads + row_head[m][i];
      const int64_t partial = row_of_lse * in.num_splits + split;
      const int column = column_warp * Tile::kWarpColumns + lane % 4 * 2;
      if (is_whole_row) {
        T* out = static_cast<T*>(to.out) + row_of_out * to.out_stride_token +
                 row_head[m][i] * to.out_stride_head + column;
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

constexpr int kCombineThreads = 128;

// Merges the splits of one (token, head). Grid: (tokens * heads,).
//
// Over the splits s of the row, with the maximum m of their partial_max:
//
//     w_s = partial_sum[s] * e^(softmax_scale * (partial_max[s] - m))
//     out = sum_s w_s partial_out[s] / sum_s w_s,    lse = softmax_scale * m + ln sum_s w_s
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
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

  // 2. The largest maximum: the first split has keys that every token sees, so it is a number.
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
      const float weight =
          to.partial_sum[first + split] * exp2f((to.partial_max[first + split] - maximum) * exponent_scale);
      const float4 part = *reinterpret_cast<const float4*>(to.partial_out + (first + split) * rank + column);
      sums.x += weight * part.x;
      sums.y += weight * part.y;
      sums.z += weight * part.z;
      sums.w += weight * part.w;
      total += weight;
    }
    const float inverse = 1.0f / total;
    T* out = static_cast<T*>(to.out) + token * to.out_stride_token + head * to.out_stride_head + column;
    store_pair(out, sums.x * inverse, sums.y * inverse);
    store_pair(out + 2, sums.z * inverse, sums.w * inverse);
    if (column == 0) {
      to.lse[row] = maximum * in.softmax_scale + logf(total);
    }
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
    launch(q, combine_splits<typename Tile::T>, blocks(tokens * heads, "heads of tokens"), kCombineThreads, 0, in, to,
           Tile::kRank, Tile::kKeys);
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
