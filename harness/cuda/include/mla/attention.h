// Attention on tiles in shared memory: the two products, the softmax between them, how they are divided among
// warps, and lists of keys.
#pragma once

#include <cmath>

#include "mla/reduce.h"

namespace mla {

// How a tile of kRows queries, kKeys keys and kRank + kRope columns is divided among kWarps warps.
//
// Warps stand in a grid over the rows and over the keys, for the output over the columns. Two tiles of 16 rows
// each, where there are two: what is loaded of K and V then serves twice. Where a warp has 16 keys, two
// neighbours share 32 and each sums half of the columns: of queries and keys together a third less is loaded.
// As much is saved, and no sums are exchanged, where kFewestKeys is 32: then half of the warps have no keys.
template <class Element, int kRank_, int kRope_, int kRows_, int kKeys_, int kWarps_, int kFewestKeys = 8>
struct AttentionTile {
  using T = Element;
  static constexpr int kRank = kRank_, kRope = kRope_, kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr int kWidth = kRank + kRope;
  static constexpr int kRowTiles = kRows >= 32 ? 2 : 1;
  static constexpr int kRowWarps = kRows / 16 / kRowTiles;
  static constexpr int kColumnWarps = kWarps / kRowWarps;
  static constexpr int kWarpKeys = kKeys / kColumnWarps >= kFewestKeys ? kKeys / kColumnWarps : kFewestKeys;
  static constexpr int kKeyTiles = kWarpKeys / 8;
  static constexpr int kKeyWarps = kKeys / kWarpKeys;  // fewer than kColumnWarps: the others have no keys
  static constexpr int kWarpColumns = kRank / kColumnWarps;
  static constexpr int kColumnTiles = kWarpColumns / 8;
  static constexpr bool kShared = kKeyTiles >= 2 && kKeyWarps == kColumnWarps && kKeyWarps % 2 == 0;
  static constexpr int kParts = kShared ? 2 : 1;         // of the columns, in q K^T
  static constexpr int kPartTiles = kKeyTiles * kParts;  // of keys, then
  static constexpr int kSteps = kWidth / 16 / kParts;
  // Sums over k that do not wait for one another, where a warp has few tiles to keep its tensor core busy.
  static constexpr int kWantedChains = kRowTiles * kPartTiles >= 4 ? 1 : 4 / (kRowTiles * kPartTiles);
  static constexpr int kChains = kSteps % kWantedChains == 0 ? kWantedChains : kSteps % 3 == 0 ? 3 : 1;

  using Latents = Rows<T, kWidth>;
  using Values = Latents;  // the first columns of K, unless a kernel's tile has others
  using Weights = Rows<T, kKeys>;
  using Sums = float[kRowTiles][kPartTiles][4];
  using Logits = float[kRowTiles][kKeyTiles][4];
  using Output = float[kRowTiles][kColumnTiles][4];
  using PerRow = float[kRowTiles][2];       // a number of each of a thread's rows: place_of_row says which
  using PerWarp = float[kKeyWarps][kRows];  // in shared memory: a number of each row, by each warp with keys

  // What neighbours hand each other of their sums.
  struct Exchanged {
    float4 of[kWarps][kRowTiles * kKeyTiles][32];
  };
  static_assert(kRows % (16 * kRowTiles) == 0 && kRank % (16 * kColumnWarps) == 0, "whole tiles");
  static_assert(kWidth % (16 * kParts) == 0 && kKeys % 16 == 0, "whole steps of k");
};

// ---- lists of keys -----------------------------------------------------------------------------------

// The key, of `count` that there are, that entry `position` of a list names before its end, or -1: no address
// is made of any other number.
__device__ __forceinline__ int named_key(const int* list, int position, int end, int64_t count) {
  int key = -1;
  if (position < end) {
    key = list[position];
  }
  if (key < 0 || key >= count) {
    key = -1;
  }
  return key;
}

// Where the keys end that the threads of the calling warp find in a list from `begin` to `limit`: behind the
// last, or at `begin` if they find none. Each of the block's threads looks at every kThreads-th entry.
template <int kThreads>
__device__ __forceinline__ int list_end(const int* list, int begin, int limit, int64_t count MLA_WHERE) {
  int end = begin;
  for (int i = begin + static_cast<int>(threadIdx.x); i < limit; i += kThreads) {
    if (named_key(list, i, limit, count) >= 0) {
      end = i + 1;
    }
  }
  return combine_lanes(end, [](int a, int b) { return max(a, b); } MLA_PASS);
}

// ---- the products ------------------------------------------------------------------------------------

// Starts copying `heads` rows of queries; the tile's other rows become 0.
template <class Tile>
__device__ __forceinline__ void fetch_queries(const typename Tile::T* q, int64_t stride_head, int heads,
                                              typename Tile::T* queries MLA_WHERE) {
  using Latents = typename Tile::Latents;
  for (int i = threadIdx.x; i < Tile::kRows * Latents::kWords; i += 32 * Tile::kWarps) {
    const int head = i / Latents::kWords, column = i % Latents::kWords * Latents::kWord;
    const typename Tile::T* source = q + min(head, heads - 1) * stride_head + column;
    copy_async(&queries[Latents::place(head, column)], source, head < heads MLA_PASS);
  }
}

// q K^T of the warp's rows, of its keys and its neighbour's, over its part of the columns: not scaled yet.
template <class Tile>
__device__ __forceinline__ void multiply_keys(const typename Tile::T* queries, const typename Tile::T* keys,
                                              int row_warp, int column_warp,
                                              typename Tile::Sums& sums MLA_WHERE) {
  using T = typename Tile::T;
  constexpr int kRowTiles = Tile::kRowTiles, kPartTiles = Tile::kPartTiles, kChains = Tile::kChains;
  const auto query = [&](int row, int column) { return &queries[Tile::Latents::place(row, column)]; };
  const auto key = [&](int row, int column) { return &keys[Tile::Latents::place(row, column)]; };
  const int first_key = column_warp / Tile::kParts * kPartTiles * 8;
  const int begin = column_warp % Tile::kParts * Tile::kSteps * 16;
  float chains[kChains][kRowTiles][kPartTiles][4] = {};
#pragma unroll 3
  for (int k = begin; k < begin + Tile::kSteps * 16; k += 16 * kChains) {
#pragma unroll
    for (int c = 0; c < kChains; ++c) {
      FragmentA<T> a[kRowTiles];
      FragmentB<T> b[ceil_div(kPartTiles, 2) * 2];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        load_a(a[m], query, (row_warp * kRowTiles + m) * 16, k + c * 16 MLA_PASS);
      }
      if constexpr (kPartTiles == 1) {
        load_b_transposed(b[0], key, first_key, k + c * 16 MLA_PASS);
      } else {
#pragma unroll
        for (int n = 0; n < kPartTiles; n += 2) {
          load_b_transposed_pair(b[n], b[n + 1], key, first_key + n * 8, k + c * 16 MLA_PASS);
        }
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kPartTiles; ++n) {
          multiply_add(chains[c][m][n], a[m], b[n] MLA_PASS);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kPartTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[m][n][i] = chains[0][m][n][i];
#pragma unroll
        for (int c = 1; c < kChains; ++c) {
          sums[m][n][i] += chains[c][m][n][i];
        }
      }
    }
  }
}

// Keeps the sums of the warp's own keys and hands its neighbour those of the other's. The block meets before
// they are taken.
template <class Tile>
__device__ __forceinline__ void hand_sums(const typename Tile::Sums& sums, int column_warp,
                                          typename Tile::Logits& logits, typename Tile::Exchanged& exchanged) {
  const int warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kKeyTiles; ++n) {
      // Registers have no addresses: both are named, and one is chosen.
      const float(&lower)[4] = sums[m][n];
      const float(&upper)[4] = sums[m][Tile::kKeyTiles + n];
      float other[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        logits[m][n][i] = lower[i];
        other[i] = upper[i];
        if (column_warp % 2 == 1) {
          logits[m][n][i] = upper[i];
          other[i] = lower[i];
        }
      }
      exchanged.of[warp][m * Tile::kKeyTiles + n][lane_id()] = float4{other[0], other[1], other[2], other[3]};
    }
  }
}

// Adds what the neighbour has handed over.
template <class Tile>
__device__ __forceinline__ void take_sums(typename Tile::Logits& logits, const typename Tile::Exchanged& exchanged) {
  const int neighbour = threadIdx.x / 32 ^ 1;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kKeyTiles; ++n) {
      const float4 other = exchanged.of[neighbour][m * Tile::kKeyTiles + n][lane_id()];
      logits[m][n][0] += other.x;
      logits[m][n][1] += other.y;
      logits[m][n][2] += other.z;
      logits[m][n][3] += other.w;
    }
  }
}

// output += P V of the warp's rows and columns.
template <class Tile>
__device__ __forceinline__ void multiply_values(const typename Tile::T* weights, const typename Tile::T* values,
                                                int row_warp, int column_warp,
                                                typename Tile::Output& output MLA_WHERE) {
  using T = typename Tile::T;
  const auto weight = [&](int row, int column) { return &weights[Tile::Weights::place(row, column)]; };
  const auto value = [&](int row, int column) { return &values[Tile::Values::place(row, column)]; };
#pragma unroll
  for (int k = 0; k < Tile::kKeys; k += 16) {
    FragmentA<T> a[Tile::kRowTiles];
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      load_a(a[m], weight, (row_warp * Tile::kRowTiles + m) * 16, k MLA_PASS);
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; n += 2) {
      FragmentB<T> b[2];
      load_b_pair(b[0], b[1], value, k, column_warp * Tile::kWarpColumns + n * 8 MLA_PASS);
#pragma unroll
      for (int m = 0; m < Tile::kRowTiles; ++m) {
        multiply_add(output[m][n], a[m], b[0] MLA_PASS);
        multiply_add(output[m][n + 1], a[m], b[1] MLA_PASS);
      }
    }
  }
}

// ---- online softmax ----------------------------------------------------------------------------------
//
// Warps that have keys hand the largest logits of their rows, the block meets, and all warps weigh: each
// rescales its columns of the output, and those that have keys store weights. The block meets again before
// values are multiplied by them.

// Where row `i`, 0 or 1, that a thread has of its warp's tile `m` of 16 rows is among the block's.
template <class Tile>
__device__ __forceinline__ int place_of_row(int row_warp, int m, int i) {
  return (row_warp * Tile::kRowTiles + m) * 16 + i * 8 + lane_id() / 4;
}

// -inf for the logits of what is no key.
template <class Tile>
__device__ __forceinline__ void mask_logits(const bool* is_key, int column_warp,
                                            typename Tile::Logits& logits) {
#pragma unroll
  for (int n = 0; n < Tile::kKeyTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!is_key[column_warp * Tile::kWarpKeys + n * 8 + lane_id() % 4 * 2 + j]) {
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; ++m) {
          logits[m][n][j] = logits[m][n][2 + j] = -INFINITY;
        }
      }
    }
  }
}

// Hands the largest logit of each of the warp's rows over its keys.
template <class Tile>
__device__ __forceinline__ void hand_maxima(const typename Tile::Logits& logits, int row_warp, int column_warp,
                                            typename Tile::PerWarp& row_max MLA_WHERE) {
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < Tile::kKeyTiles; ++n) {
        largest = fmaxf(largest, fmaxf(logits[m][n][2 * i], logits[m][n][2 * i + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1 MLA_PASS));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2 MLA_PASS));
      if (lane_id() % 4 == 0) {
        row_max[column_warp][place_of_row<Tile>(row_warp, m, i)] = largest;
      }
    }
  }
}

// Weights relative to the new maximum. Subtract before scaling: the difference of two large logits is exact,
// their scaled values are not. Before the first key the maximum is -inf and weights are 0.
template <class Tile>
__device__ __forceinline__ void weigh_keys(const typename Tile::Logits& logits,
                                           const typename Tile::PerWarp& row_max, float exponent_scale,
                                           int row_warp, int column_warp, typename Tile::PerRow& maximum,
                                           typename Tile::PerRow& total, typename Tile::Output& output,
                                           typename Tile::T* weights) {
  const bool has_keys = column_warp < Tile::kKeyWarps;
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = place_of_row<Tile>(row_warp, m, i);
      float larger = maximum[m][i];
#pragma unroll
      for (int w = 0; w < Tile::kKeyWarps; ++w) {
        larger = fmaxf(larger, row_max[w][row]);
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
        for (int n = 0; n < Tile::kKeyTiles; ++n) {
          const float first = exp2f((logits[m][n][2 * i] - origin) * exponent_scale);
          const float second = exp2f((logits[m][n][2 * i + 1] - origin) * exponent_scale);
          total[m][i] += first + second;
          const int column = column_warp * Tile::kWarpKeys + n * 8 + lane_id() % 4 * 2;
          store_pair(&weights[Tile::Weights::place(row, column)], first, second);
        }
      }
      // Most tiles raise no maximum.
      if (keep != 1.0f) {
#pragma unroll
        for (int n = 0; n < Tile::kColumnTiles; ++n) {
          output[m][n][2 * i] *= keep;
          output[m][n][2 * i + 1] *= keep;
        }
      }
    }
  }
}

// Hands the sum of each of the warp's rows over its keys' weights.
template <class Tile>
__device__ __forceinline__ void hand_totals(const typename Tile::PerRow& total, int row_warp, int column_warp,
                                            typename Tile::PerWarp& row_sum MLA_WHERE) {
#pragma unroll
  for (int m = 0; m < Tile::kRowTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[m][i];
      sum += __shfl_xor_sync(kAllLanes, sum, 1 MLA_PASS);
      sum += __shfl_xor_sync(kAllLanes, sum, 2 MLA_PASS);
      if (lane_id() % 4 == 0) {
        row_sum[column_warp][place_of_row<Tile>(row_warp, m, i)] = sum;
      }
    }
  }
}

// What the warps that have keys have handed of a row, added up.
template <class Tile>
__device__ __forceinline__ float sum_of_row(const typename Tile::PerWarp& row_sum, int row) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Tile::kKeyWarps; ++w) {
    sum += row_sum[w][row];
  }
  return sum;
}

// Stores the thread's elements of a row, scaled; `row` is the address of its first in the output.
template <class Tile, class To>
__device__ __forceinline__ void store_row(const typename Tile::Output& output, int m, int i, float scale,
                                          To* row) {
#pragma unroll
  for (int n = 0; n < Tile::kColumnTiles; ++n) {
    store_pair(row + n * 8, output[m][n][2 * i] * scale, output[m][n][2 * i + 1] * scale);
  }
}

}  // namespace mla
