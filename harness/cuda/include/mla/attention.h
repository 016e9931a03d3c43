// Absorbed attention on tiles in shared memory: the two products, and how they are divided among warps.
#pragma once

#include "mla/kernel.cuh"

namespace mla {

// How a tile of kRows queries, kKeys keys and kRank + kRope columns is divided among kWarps warps.
//
// Warps stand in a grid over the rows and over the keys, for the output over the columns. Two tiles of 16 rows
// each, where there are two: what is loaded of K and V then serves twice. Where a warp has 16 keys, two
// neighbours share 32 and each sums half of the columns: of queries and keys together a third less is loaded.
template <class Element, int kRank_, int kRope_, int kRows_, int kKeys_, int kWarps_>
struct AttentionTile {
  using T = Element;
  static constexpr int kRank = kRank_, kRope = kRope_, kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr int kWidth = kRank + kRope;
  static constexpr int kRowTiles = kRows >= 32 ? 2 : 1;
  static constexpr int kRowWarps = kRows / 16 / kRowTiles;
  static constexpr int kColumnWarps = kWarps / kRowWarps;
  static constexpr int kWarpKeys = kKeys / kColumnWarps >= 8 ? kKeys / kColumnWarps : 8;
  static constexpr int kKeyTiles = kWarpKeys / 8;
  static constexpr int kKeyWarps = kKeys / kWarpKeys;  // fewer than kColumnWarps: the others have no keys
  static constexpr int kWarpColumns = kRank / kColumnWarps;
  static constexpr int kColumnTiles = kWarpColumns / 8;
  static constexpr int kParts = kKeyTiles >= 2 && kKeyWarps % 2 == 0 ? 2 : 1;  // of the columns, in q K^T
  static constexpr int kPartTiles = kKeyTiles * kParts;                       // of keys, then
  static constexpr int kSteps = kWidth / 16 / kParts;
  // Sums over k that do not wait for one another, where a warp has few tiles to keep its tensor core busy.
  static constexpr int kWantedChains = kRowTiles * kPartTiles >= 4 ? 1 : 4 / (kRowTiles * kPartTiles);
  static constexpr int kChains = kSteps % kWantedChains == 0 ? kWantedChains : kSteps % 3 == 0 ? 3 : 1;

  using Latents = Rows<T, kWidth>;
  using Weights = Rows<T, kKeys>;
  using Sums = float[kRowTiles][kPartTiles][4];
  using Logits = float[kRowTiles][kKeyTiles][4];
  using Output = float[kRowTiles][kColumnTiles][4];

  // What neighbours hand each other of their sums.
  struct Exchanged {
    float4 of[kWarps][kRowTiles * kKeyTiles][32];
  };
  static_assert(kRows % (16 * kRowTiles) == 0 && kRank % (16 * kColumnWarps) == 0, "whole tiles");
  static_assert(kWidth % (16 * kParts) == 0 && kKeys % 16 == 0, "whole steps of k");
};

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

// output += P V of the warp's rows and columns. V is the first columns of K.
template <class Tile>
__device__ __forceinline__ void multiply_values(const typename Tile::T* weights, const typename Tile::T* keys,
                                                int row_warp, int column_warp,
                                                typename Tile::Output& output MLA_WHERE) {
  using T = typename Tile::T;
  const auto weight = [&](int row, int column) { return &weights[Tile::Weights::place(row, column)]; };
  const auto value = [&](int row, int column) { return &keys[Tile::Latents::place(row, column)]; };
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

}  // namespace mla
