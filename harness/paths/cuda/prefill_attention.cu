// Causal attention of prefill rows over cached and new keys. The contract is prefill_attention.py's.
//
// A block works on successive queries of one row and one head, each warp on 16 or 32 of them, and passes over
// the row's keys tile by tile. Keys and values have one buffer each: values are copied while queries meet
// keys, the next tile's keys while weights meet values. Two blocks share a multiprocessor where they fit, so
// that one computes while the other waits.

#include <cmath>

#include "mla/search.h"
#include "mla/words.h"

namespace {

using namespace mla;

// What a block works on: successive queries of one row, and the row's keys that they see.
struct Span {
  int first_token, queries;
  int first_key, keys;
  int visible;  // keys that the first query sees; the next sees one more
};

// How a block divides heads whose queries and keys are up to kQkColumns wide, their values up to kVColumns.
template <class Element, int kQkColumns_, int kVColumns_>
struct Tile {
  using T = Element;
  static constexpr int kQkColumns = kQkColumns_, kVColumns = kVColumns_;
  static constexpr bool kIsHalf = sizeof(T) == 2;
  // Two tiles of 16 queries a warp, where registers allow it: what is loaded of K and V then serves twice.
  static constexpr int kRowTiles = kIsHalf && kQkColumns <= 192 ? 2 : 1;
  static constexpr int kWarps = kIsHalf && kRowTiles == 1 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlocks = kRowTiles == 2 ? 2 : 1;  // that share a multiprocessor
  static constexpr int kWarpQueries = 16 * kRowTiles;
  static constexpr int kQueries = kWarpQueries * kWarps;
  static constexpr int kKeys = kIsHalf ? 64 : 32;
  // Rows are a word of 16 bytes longer than they are wide, an odd number of words: eight rows at one column
  // lie in eight different groups of banks.
  static constexpr int kWord = 16 / sizeof(T);
  static constexpr int kQkStride = kQkColumns + kWord, kVStride = kVColumns + kWord;

  struct Shared {
    Span span;
    alignas(16) T query[kQueries * kQkStride];  // in the end the output
    alignas(16) T keys[kKeys * kQkStride];
    alignas(16) T values[kKeys * kVStride];
  };
  static_assert(kQkStride / kWord % 2 == 1 && kVStride / kWord % 2 == 1, "rows of an odd number of words");
  static_assert(kQkColumns % 16 == 0 && kVColumns % 16 == 0 && kKeys % 16 == 0, "whole steps of k");
  static_assert(kVColumns <= kQkColumns, "the output takes the queries' place");
};

// Heads of tokens, [tokens, heads, width], the last axis dense. Strides are in elements. `in_words`: rows can
// be read and written in words of 16 bytes.
struct Heads {
  void* elements;
  int64_t stride_token, stride_head;
  int width;
  bool in_words;

  template <class T>
  __device__ T* row(int64_t token, int head) const {
    return static_cast<T*>(elements) + token * stride_token + head * stride_head;
  }
};

struct Inputs {
  Heads q, k, v;
  const int *cu_seqlens_q, *cu_seqlens_k;
  float exponent_scale;  // of 2: softmax_scale * log2 e
  int num_tokens, num_rows, num_heads;
};

struct Outputs {
  Heads out;
  float* lse;
};

// Tiles of kQueries queries are numbered so that one can be found by halving: those of row r begin at number
// cu_seqlens_q[r] / kQueries + r. Some numbers have no queries. The tokens behind the last row count as one
// row more, without keys.
template <int kQueries>
__device__ __forceinline__ Span span_of_tile(const Inputs& in, int tile) {
  const auto first_tile = [&](int row) { return in.cu_seqlens_q[row] / kQueries + row; };
  const int row = last_begun(in.num_rows + 1, tile, first_tile);
  const int q_begin = in.cu_seqlens_q[row];
  int q_end = in.num_tokens;
  int k_begin = 0;
  int k_end = 0;
  if (row < in.num_rows) {
    q_end = in.cu_seqlens_q[row + 1];
    k_begin = in.cu_seqlens_k[row];
    k_end = in.cu_seqlens_k[row + 1];
  }
  const int first_query = (tile - first_tile(row)) * kQueries;
  Span span;
  span.first_token = q_begin + first_query;
  span.queries = min(q_end - span.first_token, kQueries);
  span.first_key = k_begin;
  span.keys = 0;
  span.visible = 0;
  if (k_begin < k_end) {
    span.visible = k_end - k_begin - (q_end - q_begin) + first_query + 1;
    span.keys = span.visible + span.queries - 1;
  }
  return span;
}

// Starts copying a head of kRows tokens from `token` on into shared memory. Rows from `rows` on, and columns
// behind the width, become 0 and are not merely weighted 0: 0 * NaN would reach the output.
template <class Tile, int kRows, int kColumns>
__device__ __forceinline__ void fetch(const Heads& heads, int token, int head, int rows,
                                      typename Tile::T* target) {
  using T = typename Tile::T;
  constexpr int kWord = Tile::kWord, kWords = kColumns / kWord, kStride = kColumns + kWord;
  if (heads.in_words) {
    constexpr int kLanes = kWords % 8 == 0 ? 8 : 4;  // that share a row
    constexpr int kStep = Tile::kThreads / kLanes;
    static_assert(kWords % kLanes == 0 && kRows % kStep == 0, "every thread copies as many words");
    const int first_row = threadIdx.x / kLanes, first_column = threadIdx.x % kLanes * kWord;
    const T* source = heads.row<const T>(token + first_row, head) + first_column;
    target += first_row * kStride + first_column;
#pragma unroll
    for (int i = 0; i < kRows; i += kStep) {
#pragma unroll
      for (int column = 0; column < kColumns; column += kLanes * kWord) {
        copy_async(target + i * kStride + column, source + i * heads.stride_token + column,
                   first_row + i < rows && first_column + column < heads.width);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kColumns; i += Tile::kThreads) {
    const int row = i / kColumns, column = i % kColumns;
    T value = from_float<T>(0.0f);
    if (row < rows && column < heads.width) {
      value = heads.row<const T>(token + row, head)[column];
    }
    target[row * kStride + column] = value;
  }
}

// Rows without keys: out 0, lse -inf.
template <class Tile>
__device__ __forceinline__ void store_empty(const Inputs& in, const Outputs& to, const Span& span, int head) {
  using T = typename Tile::T;
  for (int i = threadIdx.x; i < span.queries * to.out.width; i += Tile::kThreads) {
    to.out.row<T>(span.first_token + i / to.out.width, head)[i % to.out.width] = from_float<T>(0.0f);
  }
  for (int i = threadIdx.x; i < span.queries; i += Tile::kThreads) {
    to.lse[static_cast<int64_t>(span.first_token + i) * in.num_heads + head] = -INFINITY;
  }
}

// Puts two neighbouring weights of a thread into A of their product with the values: of rows 8 `lower` and on
// and of the first or `second` eight keys. They are the elements of A that are its own; in fp32 only if A's
// columns t and t + 4 stand for keys 2 t and 2 t + 1.
template <class T>
__device__ __forceinline__ void set_weights(FragmentA<T>& a, int lower, int second, float left, float right) {
  if constexpr (sizeof(T) == 2) {
    a.part[2 * second + lower] = pack<T>(left, right);
  } else {
    a.part[4 * second + lower] = __float_as_uint(left);
    a.part[4 * second + 2 + lower] = __float_as_uint(right);
  }
}

// The key that row k of B stands for in that product.
template <class T>
__device__ __forceinline__ int key_of_row(int k) {
  if constexpr (sizeof(T) == 2) {
    return k;
  } else {
    return k / 8 * 8 + k % 4 * 2 + k / 4 % 2;
  }
}

// Attention of up to kQueries successive queries of one row and head. Grid: (tiles, heads), last tiles first:
// they have the most keys.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    attend_prefill(const Inputs in, const Outputs to) {
  using T = typename Tile::T;
  constexpr int kRowTiles = Tile::kRowTiles, kKeys = Tile::kKeys, kQueries = Tile::kQueries;
  constexpr int kKeyTiles = kKeys / 8, kVTiles = Tile::kVColumns / 8;
  auto& shared = shared_memory<typename Tile::Shared>();
  const int lane = lane_id(), head = blockIdx.y;
  const int first_of_warp = threadIdx.x / 32 * Tile::kWarpQueries;

  // 1. The block's queries and keys. They stay in shared memory: registers are what the sums need.
  if (threadIdx.x == 0) {
    shared.span = span_of_tile<kQueries>(in, gridDim.x - 1 - blockIdx.x);
  }
  __syncthreads();
  const Span& span = shared.span;
  if (span.queries <= 0) {
    return;
  }
  if (span.keys == 0) {
    store_empty<Tile>(in, to, span, head);
    return;
  }

  // 2. The queries, and the first keys.
  fetch<Tile, kQueries, Tile::kQkColumns>(in.q, span.first_token, head, span.queries, shared.query);
  fetch<Tile, kKeys, Tile::kQkColumns>(in.k, span.first_key, head, span.keys, shared.keys);
  commit_copies();
  const auto query_at = [&](int r, int column) { return shared.query + r * Tile::kQkStride + column; };
  const auto key_at = [&](int r, int column) { return shared.keys + r * Tile::kQkStride + column; };
  const auto value_at = [&](int r, int column) {
    return shared.values + key_of_row<T>(r) * Tile::kVStride + column;
  };

  // 3. Online softmax over the tiles of keys, in powers of 2. Of each tile of 16 queries a thread has rows
  // lane / 4 and lane / 4 + 8, and sums only its own keys until the end.
  float accumulator[kRowTiles][kVTiles][4] = {};
  float maximum[kRowTiles][2], total[kRowTiles][2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum[m][i] = -INFINITY;
      total[m][i] = 0.0f;
    }
  }
  for (int start = 0; start < span.keys; start += kKeys) {
    // 3.1 These keys are there, and nobody reads the values before them any more.
    wait_copies<0>();
    __syncthreads();
    fetch<Tile, kKeys, Tile::kVColumns>(in.v, span.first_key + start, head, span.keys - start, shared.values);
    commit_copies();

    // 3.2 Logits, unless the warp has no queries or they see none of these keys. The compiler sees from the
    // vote that a warp is of one mind.
    const int queries = min(span.queries - first_of_warp, Tile::kWarpQueries);
    const bool is_seen =
        __all_sync(kAllLanes, queries > 0 && span.visible + first_of_warp + queries - 1 > start);
    float logits[kRowTiles][kKeyTiles][4] = {};
    if (is_seen) {
#pragma unroll
      for (int column = 0; column < Tile::kQkColumns; column += 16) {
        FragmentA<T> a[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          load_a(a[m], query_at, first_of_warp + 16 * m, column);
        }
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          FragmentB<T> b, next;
          load_b_transposed_pair(b, next, key_at, 8 * n, column);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            multiply_add(logits[m][n], a[m], b);
            multiply_add(logits[m][n + 1], a[m], next);
          }
        }
      }
    }

    // 3.3 These values are there, and nobody reads the keys any more.
    wait_copies<0>();
    __syncthreads();
    const int next_start = start + kKeys;
    if (next_start < span.keys) {
      fetch<Tile, kKeys, Tile::kQkColumns>(in.k, span.first_key + next_start, head, span.keys - next_start,
                                           shared.keys);
      commit_copies();
    }
    if (!is_seen) {
      continue;
    }

    // 3.4 Keys that not every query of the warp sees.
    const int visible = span.visible + first_of_warp - start;
    if (visible < kKeys) {
      const int first_unseen = visible + lane / 4 - lane % 4 * 2;  // counted from the thread's keys
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (8 * n + i % 2 >= first_unseen + 16 * m + i / 2 * 8) {
              logits[m][n][i] = -INFINITY;
            }
          }
        }
      }
    }

    // 3.5 Weights. Key 0 is in the first tile and visible to every query: the maximum is a number. Its scaled
    // value is rounded once and the same for all weights and the LSE; the difference to it is rounded after
    // the subtraction.
    FragmentA<T> weights[kRowTiles][kKeyTiles / 2];
    float keep[kRowTiles][2];
    bool is_larger = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float largest = logits[m][0][2 * i];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(logits[m][n][2 * i], logits[m][n][2 * i + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        const float larger = fmaxf(maximum[m][i], largest * in.exponent_scale);
        is_larger = is_larger || larger > maximum[m][i];
        keep[m][i] = exp2_fast(maximum[m][i] - larger);
        maximum[m][i] = larger;
        total[m][i] *= keep[m][i];
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
          const float left = exp2_fast(fmaf(logits[m][n][2 * i], in.exponent_scale, -larger));
          const float right = exp2_fast(fmaf(logits[m][n][2 * i + 1], in.exponent_scale, -larger));
          total[m][i] += left + right;
          set_weights(weights[m][n / 2], i, n % 2, left, right);
        }
      }
    }

    // 3.6 What is summed so far, in powers of the new maxima. After a few tiles they seldom grow.
    if (__any_sync(kAllLanes, is_larger)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kVTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            accumulator[m][n][i] *= keep[m][i / 2];
          }
        }
      }
    }

    // 3.7 Weighted values.
#pragma unroll
    for (int n = 0; n < kKeyTiles; n += 2) {
#pragma unroll
      for (int c = 0; c < kVTiles; c += 2) {
        FragmentB<T> b, next;
        load_b_pair(b, next, value_at, 8 * n, 8 * c);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          multiply_add(accumulator[m][c], weights[m][n / 2], b);
          multiply_add(accumulator[m][c + 1], weights[m][n / 2], next);
        }
      }
    }
  }
  const int queries = min(span.queries - first_of_warp, Tile::kWarpQueries);
  if (queries <= 0) {
    return;
  }

  // 4. Normalise. The warp's output takes the place of its queries, which nobody else reads.
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[m][i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      const int query = 16 * m + 8 * i + lane / 4;
      const float inverse = 1.0f / sum;
#pragma unroll
      for (int n = 0; n < kVTiles; ++n) {
        store_pair(query_at(first_of_warp + query, 8 * n + lane % 4 * 2), accumulator[m][n][2 * i] * inverse,
                   accumulator[m][n][2 * i + 1] * inverse);
      }
      if (lane % 4 == 0 && query < queries) {
        const int64_t token = span.first_token + first_of_warp + query;
        to.lse[token * in.num_heads + head] = maximum[m][i] * kLn2 + logf(sum);
      }
    }
  }
  __syncwarp();

  // 5. Store, successive lanes successive words.
  constexpr int kWord = Tile::kWord, kWords = Tile::kVColumns / kWord;
  for (int i = lane; i < queries * kWords; i += 32) {
    const int query = first_of_warp + i / kWords, column = i % kWords * kWord;
    const T* from = query_at(query, column);
    T* out = to.out.row<T>(span.first_token + query, head) + column;
    if (to.out.in_words && column < to.out.width) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int element = 0; element < min(to.out.width - column, kWord); ++element) {
        out[element] = from[element];
      }
    }
  }
}

// Calls `use` with the narrowest tile that heads of these widths fit in.
template <class T, class Use>
void with_tile(int64_t qk_width, int64_t v_width, Use use) {
  if (qk_width > 256 || v_width > 256) {
    TVM_FFI_THROW(ValueError) << "heads must be at most 256 wide, got " << qk_width << " of q and " << v_width
                              << " of v";
  }
  if constexpr (sizeof(T) == 2) {
    if (qk_width <= 96 && v_width <= 64) {
      return use(Tile<T, 96, 64>{});
    }
  }
  if (qk_width <= 128 && v_width <= 128) {
    return use(Tile<T, 128, 128>{});
  }
  if (qk_width <= 192 && v_width <= 128) {
    return use(Tile<T, 192, 128>{});
  }
  if constexpr (sizeof(T) == 2) {
    if (v_width <= 128) {
      return use(Tile<T, 256, 128>{});
    }
  }
  return use(Tile<T, 256, 256>{});
}

Heads heads_of(const TensorView& tensor) {
  Alignment alignment;
  alignment.with(tensor).with(tensor.size(2) * Alignment::element_bytes(tensor));
  return {data<char>(tensor), tensor.stride(0), tensor.stride(1), static_cast<int>(tensor.size(2)),
          alignment.bits % 16 == 0};
}

void prefill_attention(TensorView q, TensorView k, TensorView v, TensorView cu_seqlens_q,
                       TensorView cu_seqlens_k, TensorView out, TensorView lse, double softmax_scale) {
  const int64_t num_tokens = q.size(0), num_heads = q.size(1), width = q.size(2), v_width = v.size(2);
  const int64_t num_rows = cu_seqlens_q.numel() - 1;
  const DLDataType dtype = model_dtype(q, "q");
  MLA_CHECK(q, {num_tokens, num_heads, width}, dtype);
  MLA_CHECK(k, {-1, num_heads, width}, dtype);
  MLA_CHECK(v, {k.size(0), num_heads, v_width}, dtype);
  MLA_CHECK(cu_seqlens_q, {num_rows + 1}, kInt32);
  MLA_CHECK(cu_seqlens_k, {num_rows + 1}, kInt32);
  MLA_CHECK(out, {num_tokens, num_heads, v_width}, dtype);
  MLA_CHECK(lse, {num_tokens, num_heads}, kFloat32, true);
  if (num_heads > 65535) {
    TVM_FFI_THROW(ValueError) << "a launch takes at most 65535 heads, got " << num_heads;
  }
  if (num_tokens == 0 || num_heads == 0) {
    return;
  }
  with_model_dtype(q, "q", [&](auto element) {
    with_tile<decltype(element)>(width, v_width, [&](auto tile) {
      using Tile = decltype(tile);
      // Every row may end in a tile that is not full, and padding in one more.
      const int64_t num_tiles = num_tokens / Tile::kQueries + num_rows + 1;
      const Inputs in{heads_of(q),
                      heads_of(k),
                      heads_of(v),
                      data<int>(cu_seqlens_q),
                      data<int>(cu_seqlens_k),
                      static_cast<float>(softmax_scale) * kLog2e,
                      static_cast<int>(blocks(num_tokens, "tokens")),
                      static_cast<int>(blocks(num_rows, "rows")),
                      static_cast<int>(num_heads)};
      launch(q, attend_prefill<Tile>, dim3(blocks(num_tiles, "tiles of queries"), num_heads), Tile::kThreads,
             sizeof(typename Tile::Shared), in, Outputs{heads_of(out), data<float>(lse)});
    });
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prefill_attention, prefill_attention)
