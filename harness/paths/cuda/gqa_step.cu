// Attention of query heads in groups over paged keys and values, split over the keys. The contract is
// gqa_step.py's.
//
// A block works on up to kRows query rows of one batch row and KV head, numbered token by token and within a
// token head by head of the group, so that a group of any size fills it. Keys and values pass through two
// buffers in shared memory, one being filled while the other is used.

#include <cmath>

#include "mla/attention.h"
#include "mla/search.h"
#include "mla/words.h"

namespace {

using namespace mla;

constexpr int kStages = 2;
constexpr int kRowLanes = 8;  // that copy a row: runs of 128 bytes

// Keys of up to kQk columns and values of up to kV.
template <class Element, int kQk, int kV, int kRows, int kKeys, int kWarps>
struct Tile : AttentionTile<Element, kV, kQk - kV, kRows, kKeys, kWarps> {
  using Divided = AttentionTile<Element, kV, kQk - kV, kRows, kKeys, kWarps>;
  using Values = Rows<Element, kV>;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPassRows = kThreads / kRowLanes;  // that the block copies at once
  static constexpr int kPasses = kKeys / kPassRows;
  static_assert(kKeys % kPassRows == 0, "whole passes");
  static_assert(Divided::kKeyWarps == Divided::kColumnWarps, "every warp has keys");

  struct Shared {
    alignas(16) Element query[kRows * Divided::Latents::kStride];
    alignas(16) Element keys[kStages][kKeys * Divided::Latents::kStride];
    alignas(16) Element values[kStages][kKeys * Values::kStride];
    union {  // sums are taken before weights are stored
      alignas(16) Element weights[kRows * Divided::Weights::kStride];
      typename Divided::Exchanged exchanged;
    };
    typename Divided::PerWarp row_max, row_sum;
  };
  static_assert(sizeof(Shared) <= (163 << 10), "a block's shared memory, from compute capability 8.0 on");
};

// Rows of elements in memory. `in_words`: they can be read in words of 16 bytes.
struct Source {
  const void* elements;
  int width;
  bool in_words;
};

struct Inputs {
  Source query, k_cache, v_cache;
  int64_t query_stride_token, query_stride_head;
  const float* sinks;  // null: there are none
  const int* block_tables;
  int64_t block_table_stride;
  const int *seq_lens_decoder, *cu_seqlens_q, *batch_id_per_token;
  float softmax_scale;
  int num_tokens, num_rows, num_kv_heads, group_size, block_size, window, num_splits, min_split_tokens;
};

struct Outputs {
  void* out;
  int64_t out_stride_token, out_stride_head;
  bool in_pairs;  // rows of out can be written two elements at a time
  float *lse, *partial_out, *partial_max, *partial_sum;
};

// The oldest key that a token at a position sees.
__device__ __forceinline__ int oldest_key(const Inputs& in, int position) {
  if (in.window > 0) {
    return max(position - in.window + 1, 0);
  }
  return 0;
}

// Keys a split: the seen ones divided evenly, not fewer than are worth a split, in whole tiles.
__device__ __forceinline__ int split_tokens(const Inputs& in, int seen, int tile_keys) {
  const int tokens = max(ceil_div(seen, in.num_splits), in.min_split_tokens);
  return ceil_div(tokens, tile_keys) * tile_keys;
}

// A batch row: its new tokens and what it has cached. The tokens behind the last row count as one row more.
struct BatchRow {
  int first_token, new_tokens, cached;
};

__device__ __forceinline__ BatchRow batch_row(const Inputs& in, int row) {
  BatchRow found{in.cu_seqlens_q[row], 0, 0};
  if (row < in.num_rows) {
    found.new_tokens = in.cu_seqlens_q[row + 1] - found.first_token;
    found.cached = in.seq_lens_decoder[row];
  } else {
    found.new_tokens = in.num_tokens - found.first_token;
  }
  return found;
}

// What the sink makes of the sums of a row that sees a key: the logarithm of all of them, and what values are
// multiplied by.
struct Normalised {
  float log_sum, factor;
};

__device__ __forceinline__ Normalised with_sink(const Inputs& in, int head, float maximum, float total) {
  float sink = -INFINITY;
  if (in.sinks != nullptr) {
    sink = in.sinks[head];
  }
  const float largest = maximum * in.softmax_scale;
  const float origin = fmaxf(largest, sink);
  const float keep = exp2f((largest - origin) * kLog2e);
  const float whole = total * keep + exp2f((sink - origin) * kLog2e);
  return {origin + logf(whole), keep / whole};
}

// Starts copying the lane's share of a row into shared memory. What is no row, and columns behind its width,
// become 0 and are not merely weighted 0: 0 * NaN would reach the output.
template <class Layout, int kColumns, class T>
__device__ __forceinline__ void copy_row(const T* row, bool is_row, const Source& source, T* target,
                                         int place) {
  for (int column = threadIdx.x % kRowLanes * Layout::kWord; column < kColumns;
       column += kRowLanes * Layout::kWord) {
    T* to = target + Layout::place(place, column);
    if (source.in_words) {
      copy_async(to, row + column, is_row && column < source.width);
    } else {
      for (int i = 0; i < Layout::kWord; ++i) {
        to[i] = from_float<T>(0.0f);
        if (is_row && column + i < source.width) {
          to[i] = row[column + i];
        }
      }
    }
  }
}

// Starts copying the keys and values from `start` on. `blocks` are the block table's entries for the thread's
// rows, and become the next tile's: the table is read one tile ahead.
template <class Tile>
__device__ __forceinline__ void fetch_keys(const Inputs& in, const int* table, int kv_head, int start,
                                           int end, typename Tile::Shared& shared, int stage,
                                           int (&blocks)[Tile::kPasses]) {
  using T = typename Tile::T;
#pragma unroll
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    const int key = pass * Tile::kPassRows + static_cast<int>(threadIdx.x) / kRowLanes;
    const int position = start + key;
    // 64 bits before the product: block * heads * block_size * width passes 2^32 in large caches.
    const int64_t head_block = int64_t{blocks[pass]} * in.num_kv_heads + kv_head;
    const int64_t row = head_block * in.block_size + position % in.block_size;
    const T* k = static_cast<const T*>(in.k_cache.elements) + row * in.k_cache.width;
    const T* v = static_cast<const T*>(in.v_cache.elements) + row * in.v_cache.width;
    copy_row<typename Tile::Latents, Tile::kWidth>(k, position < end, in.k_cache, shared.keys[stage], key);
    copy_row<typename Tile::Values, Tile::kRank>(v, position < end, in.v_cache, shared.values[stage], key);
    blocks[pass] = 0;
    if (position + Tile::kKeys < end) {
      blocks[pass] = table[(position + Tile::kKeys) / in.block_size];
    }
  }
  commit_copies();
}

// -inf for the logits of keys, from `start` on, that a row does not see.
template <class Tile>
__device__ __forceinline__ void mask_unseen(const Inputs& in, int start,
                                            const int (&newest)[Tile::kRowTiles][2], int column_warp,
                                            typename Tile::Logits& logits) {
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int oldest = oldest_key(in, newest[m][i]);
#pragma unroll
      for (int n = 0; n < Tile::kKeyTiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int position = start + column_warp * Tile::kWarpKeys + n * 8 + lane_id() % 4 * 2 + j;
          if (position < oldest || position > newest[m][i]) {
            logits[m][n][2 * i + j] = -INFINITY;
          }
        }
      }
    }
  }
}

// Stores the thread's elements of a row, scaled, from the warp's first column on.
template <class Tile, class To>
__device__ __forceinline__ void store_columns(const typename Tile::Output& output, int m, int i, float scale,
                                              To* row, int first_column, int width, bool in_pairs) {
#pragma unroll
  for (int n = 0; n < Tile::kColumnTiles; ++n) {
    const int column = first_column + n * 8 + lane_id() % 4 * 2;
    const float first = output[m][n][2 * i] * scale, second = output[m][n][2 * i + 1] * scale;
    if (in_pairs) {
      if (column < width) {
        store_pair(row + column, first, second);
      }
    } else {
      if (column < width) {
        row[column] = from_float<To>(first);
      }
      if (column + 1 < width) {
        row[column + 1] = from_float<To>(second);
      }
    }
  }
}

// Attention of up to kRows query rows of one batch row and KV head over one split of their keys.
//
// Grid: (tiles of query rows * KV heads, splits), KV heads fastest: those of one tile have queries side by
// side. Tiles are numbered so that one can be found by halving: those of batch row r begin at number
// cu_seqlens_q[r] * group_size / kRows + r, and some numbers have no queries. Last tiles first: they have the
// most keys. Writes the outputs where one split has all keys, else its share into the workspace.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) attend_rows(const Inputs in, const Outputs to) {
  using T = typename Tile::T;
  constexpr int kRows = Tile::kRows, kRowTiles = Tile::kRowTiles;
  auto& shared = shared_memory<typename Tile::Shared>();
  const int lane = lane_id(), warp = threadIdx.x / 32;
  const int row_warp = warp / Tile::kColumnWarps, column_warp = warp % Tile::kColumnWarps;

  // 1. The batch row and its query rows: 64 bits, for tokens times heads of a group may pass 2^31.
  const int kv_head = static_cast<int>(blockIdx.x % in.num_kv_heads);
  const int64_t tile = gridDim.x / in.num_kv_heads - 1 - blockIdx.x / in.num_kv_heads;
  const auto first_tile = [&](int row) {
    return int64_t{in.cu_seqlens_q[row]} * in.group_size / kRows + row;
  };
  const int row = last_begun(in.num_rows + 1, tile, first_tile);
  const BatchRow tokens = batch_row(in, row);
  const int64_t first_query = (tile - first_tile(row)) * kRows;
  const int64_t all_queries = int64_t{tokens.new_tokens} * in.group_size;
  if (first_query >= all_queries) {
    return;
  }
  const int queries = static_cast<int>(min(all_queries - first_query, int64_t{kRows}));
  const bool is_batch_row = row < in.num_rows;
  const auto place_of = [&](int query) { return static_cast<int>((first_query + query) / in.group_size); };
  const auto head_of = [&](int query) {
    return kv_head * in.group_size + static_cast<int>((first_query + query) % in.group_size);
  };

  // 2. The keys that some query row sees, and this split's share. Padding has none. Longer chunks are not
  // divided: they have blocks enough.
  const int first_place = place_of(0), last_place = place_of(queries - 1);
  const int first_key = oldest_key(in, tokens.cached + first_place);
  int seen = 0;
  if (is_batch_row) {
    seen = tokens.cached + last_place + 1 - first_key;
  }
  int step = seen;
  if (all_queries <= kRows) {
    step = split_tokens(in, seen, Tile::kKeys);
  }
  const bool is_whole_row = step >= seen;
  const int split = static_cast<int>(blockIdx.y);
  if (split > 0 && int64_t{split} * step >= seen) {
    return;
  }
  const int begin = first_key + split * step;
  const int end = min(begin + step, first_key + seen);

  // 3. The newest key that each of the thread's rows sees; rows that are no query see what the last does.
  int newest[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      newest[m][i] = tokens.cached + place_of(min(place_of_row<Tile>(row_warp, m, i), queries - 1));
    }
  }

  // 4. Queries and the first tile of keys are on their way.
  const int* table = in.block_tables + row * in.block_table_stride;
  int blocks[Tile::kPasses];
  if (begin < end) {
    const int lane_row = static_cast<int>(threadIdx.x) / kRowLanes;
    for (int query = lane_row; query < kRows; query += Tile::kPassRows) {
      const int known = min(query, queries - 1);
      const T* source = static_cast<const T*>(in.query.elements) +
                        (int64_t{tokens.first_token} + place_of(known)) * in.query_stride_token +
                        head_of(known) * in.query_stride_head;
      copy_row<typename Tile::Latents, Tile::kWidth>(source, query < queries, in.query, shared.query, query);
    }
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      const int position = begin + pass * Tile::kPassRows + lane_row;
      blocks[pass] = 0;
      if (position < end) {
        blocks[pass] = table[position / in.block_size];
      }
    }
    fetch_keys<Tile>(in, table, kv_head, begin, end, shared, 0, blocks);
  }

  // 5. Online softmax over tiles of kKeys keys.
  typename Tile::PerRow maximum, total = {};
  typename Tile::Output accumulator = {};
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    maximum[m][0] = maximum[m][1] = -INFINITY;
  }
  const float exponent_scale = in.softmax_scale * kLog2e;
  // All query rows see the keys from the oldest of the last token's up to the newest of the first's.
  const int oldest_of_last = oldest_key(in, tokens.cached + last_place);
  const int end_of_first = tokens.cached + first_place + 1;
  int stage = 0;
  for (int start = begin; start < end; start += Tile::kKeys) {
    // The tile is there, and no warp uses the other buffer any more.
    wait_copies<0>();
    __syncthreads();
    if (start + Tile::kKeys < end) {
      fetch_keys<Tile>(in, table, kv_head, start + Tile::kKeys, end, shared, 1 - stage, blocks);
    }

    // Logits, whose sums neighbouring warps may have shared.
    typename Tile::Logits logits;
    if constexpr (Tile::kParts > 1) {
      typename Tile::Sums sums;
      multiply_keys<Tile>(shared.query, shared.keys[stage], row_warp, column_warp, sums);
      hand_sums<Tile>(sums, column_warp, logits, shared.exchanged);
      __syncthreads();
      take_sums<Tile>(logits, shared.exchanged);
    } else {
      multiply_keys<Tile>(shared.query, shared.keys[stage], row_warp, column_warp, logits);
    }

    // Of what a row does not see -inf; then weights relative to the new maximum.
    if (start < oldest_of_last || start + Tile::kKeys > end_of_first) {
      mask_unseen<Tile>(in, start, newest, column_warp, logits);
    }
    hand_maxima<Tile>(logits, row_warp, column_warp, shared.row_max);
    __syncthreads();
    weigh_keys<Tile>(logits, shared.row_max, exponent_scale, row_warp, column_warp, maximum, total,
                     accumulator, shared.weights);
    __syncthreads();
    multiply_values<Tile>(shared.weights, shared.values[stage], row_warp, column_warp, accumulator);
    stage = 1 - stage;
  }

  // 6. Each row's sum over all lanes and warps.
  hand_totals<Tile>(total, row_warp, column_warp, shared.row_sum);
  __syncthreads();

  // 7. Normalise and store: straight to the outputs where this split has all keys. Padding: out 0, lse -inf,
  // whatever its heads' sinks.
  const int width = in.v_cache.width, first_column = column_warp * Tile::kWarpColumns;
  const bool is_first = column_warp == 0 && lane % 4 == 0;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = place_of_row<Tile>(row_warp, m, i);
      if (query >= queries) {
        continue;
      }
      const float sum = sum_of_row<Tile>(shared.row_sum, query);
      if (is_whole_row) {
        const int head = head_of(query);
        const int64_t token = int64_t{tokens.first_token} + place_of(query);
        Normalised row_of_out{-INFINITY, 0.0f};
        if (is_batch_row) {
          row_of_out = with_sink(in, head, maximum[m][i], sum);
        }
        T* out = static_cast<T*>(to.out) + token * to.out_stride_token + head * to.out_stride_head;
        store_columns<Tile>(accumulator, m, i, row_of_out.factor, out, first_column, width, to.in_pairs);
        if (is_first) {
          to.lse[token * in.num_kv_heads * in.group_size + head] = row_of_out.log_sum;
        }
      } else {
        const int64_t share = (int64_t{row} * in.num_kv_heads + kv_head) * in.num_splits + split;
        const int64_t partial = share * kRows + query;
        store_columns<Tile>(accumulator, m, i, 1.0f, to.partial_out + partial * width, first_column, width,
                            width % 2 == 0);
        if (is_first) {
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
//     w_s = e^(softmax_scale * (partial_max[s] - m))
//     out = sum_s w_s partial_out[s] / sum_s w_s partial_sum[s], and the sink's weight in the second sum
template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_splits(const Inputs in, const Outputs to, int tile_rows, int tile_keys) {
  // 1. How many splits wrote something; with one, it already wrote the outputs.
  const int num_heads = in.num_kv_heads * in.group_size;
  const int64_t token = blockIdx.x / num_heads;
  const int head = static_cast<int>(blockIdx.x % num_heads);
  const int row = in.batch_id_per_token[token];
  if (row < 0) {
    return;
  }
  const BatchRow tokens = batch_row(in, row);
  if (int64_t{tokens.new_tokens} * in.group_size > tile_rows) {
    return;
  }
  const int seen = tokens.cached + tokens.new_tokens - oldest_key(in, tokens.cached);
  const int step = split_tokens(in, seen, tile_keys);
  if (step >= seen) {
    return;
  }
  const int splits = ceil_div(seen, step);
  const int place = static_cast<int>(token - tokens.first_token) * in.group_size + head % in.group_size;
  const int64_t share = (int64_t{row} * in.num_kv_heads + head / in.group_size) * in.num_splits;
  const auto partial = [&](int split) { return (share + split) * tile_rows + place; };

  // 2. The largest maximum. A token sees its own key: some split's is a number.
  float maximum = -INFINITY;
  for (int split = 0; split < splits; ++split) {
    maximum = fmaxf(maximum, to.partial_max[partial(split)]);
  }

  // 3. The weighted sums, a column a thread at a time.
  const float exponent_scale = in.softmax_scale * kLog2e;
  const int width = in.v_cache.width;
  for (int column = threadIdx.x; column < width; column += kCombineThreads) {
    float output = 0.0f, total = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) {
      const float weight = exp2f((to.partial_max[partial(split)] - maximum) * exponent_scale);
      output += weight * to.partial_out[partial(split) * width + column];
      total += weight * to.partial_sum[partial(split)];
    }
    const Normalised row_of_out = with_sink(in, head, maximum, total);
    T* out = static_cast<T*>(to.out) + token * to.out_stride_token + head * to.out_stride_head;
    out[column] = from_float<T>(output * row_of_out.factor);
    if (column == 0) {
      to.lse[static_cast<int64_t>(blockIdx.x)] = row_of_out.log_sum;
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

template <class Tile>
void attend_and_combine(const TensorView& query, const Inputs& in, const Outputs& to) {
  // Every batch row may end in a tile that is not full, and padding in one more.
  const int64_t rows = query.size(0) * in.group_size, tiles = rows / Tile::kRows + in.num_rows + 1;
  const dim3 grid(blocks(tiles * in.num_kv_heads, "tiles of query rows"), in.num_splits);
  launch(query, attend_rows<Tile>, grid, Tile::kThreads, sizeof(typename Tile::Shared), in, to);
  if (in.num_splits > 1) {
    launch(query, combine_splits<typename Tile::T>, blocks(query.size(0) * query.size(1), "heads of tokens"),
           kCombineThreads, 0, in, to, Tile::kRows, Tile::kKeys);
  }
}

// Tiles that fit into 163 KiB of shared memory: wide heads and fp32 leave room for fewer rows and keys.
template <class T, int kQk, int kV>
void with_rows(const TensorView& query, const Inputs& in, const Outputs& to, int64_t rows) {
  if constexpr (sizeof(T) == 4) {
    attend_and_combine<Tile<T, kQk, kV, 16, 32, 4>>(query, in, to);
  } else if (rows <= 16) {
    attend_and_combine<Tile<T, kQk, kV, 16, 64, 4>>(query, in, to);
  } else if constexpr (kV > 128) {
    attend_and_combine<Tile<T, kQk, kV, 64, 32, 8>>(query, in, to);
  } else {
    attend_and_combine<Tile<T, kQk, kV, 64, 64, 8>>(query, in, to);
  }
}

Source source_of(const TensorView& tensor) {
  const int64_t width = tensor.size(tensor.ndim() - 1);
  Alignment alignment;
  alignment.with(tensor).with(width * Alignment::element_bytes(tensor));
  return {data<void>(tensor), static_cast<int>(width), alignment.bits % 16 == 0};
}

void gqa_step(TensorView query, TensorView k_cache, TensorView v_cache, Optional<TensorView> sinks,
              TensorView block_tables, TensorView seq_lens_decoder, TensorView cu_seqlens_q,
              TensorView batch_id_per_token, TensorView out, TensorView lse, Optional<TensorView> partial_out,
              Optional<TensorView> partial_max, Optional<TensorView> partial_sum, double softmax_scale,
              int64_t window, int64_t num_splits, int64_t min_split_tokens, int64_t rows) {
  const DLDataType dtype = model_dtype(query, "query");
  MLA_CHECK(query, {-1, -1, -1}, dtype);
  const int64_t tokens = query.size(0), heads = query.size(1), width = query.size(2);
  MLA_CHECK(k_cache, {-1, -1, -1, width}, dtype, true);
  const int64_t kv_heads = k_cache.size(1), block_size = k_cache.size(2), slots = seq_lens_decoder.numel();
  MLA_CHECK(v_cache, {k_cache.size(0), kv_heads, block_size, -1}, dtype, true);
  const int64_t v_width = v_cache.size(3);
  MLA_CHECK(block_tables, {slots, -1}, kInt32);
  MLA_CHECK(seq_lens_decoder, {slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_token, {tokens}, kInt32);
  MLA_CHECK(out, {tokens, heads, v_width}, dtype);
  MLA_CHECK(lse, {tokens, heads}, kFloat32, true);
  if (kv_heads < 1 || heads % kv_heads != 0) {
    TVM_FFI_THROW(ValueError) << "query must have a multiple of the " << kv_heads << " KV heads, got "
                              << heads;
  }
  if (window < 0 || window > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "window must be 0 to 2147483647, got " << window;
  }
  if (num_splits < 1 || num_splits > 65535) {
    TVM_FFI_THROW(ValueError) << "num_splits must be from 1 to 65535, got " << num_splits;
  }
  if (rows != 16 && (rows != 64 || same(dtype, kFloat32))) {
    TVM_FFI_THROW(ValueError) << "rows must be 16 or, but in fp32, 64, got " << rows;
  }
  if (num_splits > 1) {
    if (!partial_out.has_value() || !partial_max.has_value() || !partial_sum.has_value()) {
      TVM_FFI_THROW(ValueError) << "num_splits " << num_splits
                                << " needs partial_out, partial_max and partial_sum";
    }
    Argument{*partial_out, "partial_out"}.check({slots, kv_heads, num_splits, rows, v_width}, kFloat32, true);
    Argument{*partial_max, "partial_max"}.check({slots, kv_heads, num_splits, rows}, kFloat32, true);
    Argument{*partial_sum, "partial_sum"}.check({slots, kv_heads, num_splits, rows}, kFloat32, true);
  }
  const auto pointer = [](const Optional<TensorView>& tensor) -> float* {
    if (tensor.has_value()) {
      return data<float>(*tensor);
    }
    return nullptr;
  };
  if (sinks.has_value()) {
    Argument{*sinks, "sinks"}.check({heads}, kFloat32);
  }
  if (tokens == 0) {
    return;
  }
  const Inputs in{source_of(query),
                  source_of(k_cache),
                  source_of(v_cache),
                  query.stride(0),
                  query.stride(1),
                  pointer(sinks),
                  data<int>(block_tables),
                  block_tables.stride(0),
                  data<int>(seq_lens_decoder),
                  data<int>(cu_seqlens_q),
                  data<int>(batch_id_per_token),
                  static_cast<float>(softmax_scale),
                  static_cast<int>(blocks(tokens, "tokens")),
                  static_cast<int>(blocks(slots, "rows")),
                  static_cast<int>(kv_heads),
                  static_cast<int>(heads / kv_heads),
                  static_cast<int>(block_size),
                  static_cast<int>(window),
                  static_cast<int>(num_splits),
                  static_cast<int>(min_split_tokens)};
  const int64_t pair_bytes = 2 * Alignment::element_bytes(out);
  Alignment alignment;
  alignment.with(out).with(v_width * Alignment::element_bytes(out));
  const bool in_pairs = alignment.bits % pair_bytes == 0;
  const Outputs to{data<void>(out),  out.stride(0),        out.stride(1),        in_pairs,
                   data<float>(lse), pointer(partial_out), pointer(partial_max), pointer(partial_sum)};
  with_model_dtype(query, "query", [&](auto element) {
    using T = decltype(element);
    if (width <= 128 && v_width <= 128) {
      with_rows<T, 128, 128>(query, in, to, rows);
    } else if (width <= 192 && v_width <= 128) {
      with_rows<T, 192, 128>(query, in, to, rows);
    } else if (width <= 256 && v_width <= 256) {
      with_rows<T, 256, 256>(query, in, to, rows);
    } else {
      TVM_FFI_THROW(ValueError) << "heads must be at most 256 wide, got keys of " << width
                                << " and values of " << v_width;
    }
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gqa_step, gqa_step)
