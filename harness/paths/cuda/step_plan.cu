// Maxima of a step's lengths, and the tiles of its decode rows' keys. The contract is step_plan.py's.

#include "mla/launch.h"
#include "mla/reduce.h"
#include "mla/search.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLoneChunk = 64;   // tokens a tile where the step has one slot
constexpr int kCandidates = 12;  // chunk sizes tried: block_size * 2^i
constexpr int kMaxLens = 9;      // places of max_lens, the last three unused

enum { kMostNew, kMostPrefill, kMostCached, kLongest, kMostDecodeCached, kLongestWithCache, kMaxima };

struct Shared {
  int64_t totals[kWarps][kCandidates];
  int maxima[kWarps][kMaxima];
  int chunk;
  WarpSums<kThreads, 1> sums;
};

// Keys of a decode row, 0 of any other.
__device__ __forceinline__ int decode_keys(int encoder, int decoder, int this_time) {
  if (encoder == 0 && this_time > 0) {
    return decoder + this_time;
  }
  return 0;
}

// a / b rounded up; a + b - 1 would pass 2^31 for the longest rows.
__device__ __forceinline__ int tiles_of(int keys, int chunk) {
  int tiles = keys / chunk;
  if (keys % chunk > 0) {
    ++tiles;
  }
  return tiles;
}

// Grid: (1,). Everything but the list.
__global__ void __launch_bounds__(kThreads)
    plan(const int* seq_lens_encoder, const int* seq_lens_decoder, const int* seq_lens_this_time,
         int* max_lens, int* decoder_num_tiles, int* decoder_chunk_size, int* tile_starts, int64_t num_slots,
         int block_size, int multiprocessors) {
  auto& shared = shared_memory<Shared>();
  const int lane = lane_id(), warp = threadIdx.x / 32;

  // 1. Every thread's maxima over its slots, and their tiles under every candidate. int64: with blocks of one
  // token the tiles of a large step pass 2^31.
  int maxima[kMaxima] = {0, 0, 0, 0, 0, 0};
  int64_t totals[kCandidates] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  for (int64_t slot = threadIdx.x; slot < num_slots; slot += kThreads) {
    const int encoder = seq_lens_encoder[slot], decoder = seq_lens_decoder[slot];
    const int this_time = seq_lens_this_time[slot];
    maxima[kMostNew] = max(maxima[kMostNew], this_time);
    maxima[kMostPrefill] = max(maxima[kMostPrefill], encoder);
    maxima[kMostCached] = max(maxima[kMostCached], decoder);
    if (this_time > 0) {
      maxima[kLongest] = max(maxima[kLongest], decoder + this_time);
      if (encoder == 0) {
        maxima[kMostDecodeCached] = max(maxima[kMostDecodeCached], decoder);
      }
      if (decoder > 0) {
        maxima[kLongestWithCache] = max(maxima[kLongestWithCache], decoder + this_time);
      }
    }
    // A candidate is 2^i blocks: one division serves all.
    const int64_t num_blocks = tiles_of(decode_keys(encoder, decoder, this_time), block_size);
#pragma unroll
    for (int i = 0; i < kCandidates; ++i) {
      totals[i] += (num_blocks + (1 << i) - 1) >> i;
    }
  }

  // 2. Those of each warp.
#pragma unroll
  for (int i = 0; i < kMaxima; ++i) {
    const int most = combine_lanes(maxima[i], [](int a, int b) { return max(a, b); });
    if (lane == 0) {
      shared.maxima[warp][i] = most;
    }
  }
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    const int64_t total = combine_lanes(totals[i], [](int64_t a, int64_t b) { return a + b; });
    if (lane == 0) {
      shared.totals[warp][i] = total;
    }
  }
  __syncthreads();

  // 3. Those of the step, and 0 in the places behind them.
  if (threadIdx.x < kMaxLens) {
    int most = 0;
    if (threadIdx.x < kMaxima) {
      for (int other = 0; other < kWarps; ++other) {
        most = max(most, shared.maxima[other][threadIdx.x]);
      }
    }
    max_lens[threadIdx.x] = most;
  }

  // 4. The chunk: the fullest last wave, of equal ones the larger candidate.
  if (threadIdx.x == 0) {
    int chunk = kLoneChunk;
    if (num_slots != 1) {
      int64_t fullest = 0;
      for (int i = 0; i < kCandidates; ++i) {
        int64_t total = 0;
        for (int other = 0; other < kWarps; ++other) {
          total += shared.totals[other][i];
        }
        if (total % multiprocessors >= fullest) {
          fullest = total % multiprocessors;
          chunk = block_size << i;
        }
      }
    }
    shared.chunk = chunk;
    decoder_chunk_size[0] = chunk;
    tile_starts[0] = 0;
  }
  __syncthreads();

  // 5. Where each row's tiles begin in the list.
  const int chunk = shared.chunk;
  int before = 0;
  for (int64_t first = 0; first < num_slots; first += kThreads) {
    const int64_t slot = first + threadIdx.x;
    int tiles[1] = {0};
    if (slot < num_slots) {
      tiles[0] = tiles_of(
          decode_keys(seq_lens_encoder[slot], seq_lens_decoder[slot], seq_lens_this_time[slot]), chunk);
    }
    int total[1];
    prefix_sums(tiles, total, shared.sums);
    if (slot < num_slots) {
      tile_starts[slot + 1] = before + tiles[0];
    }
    before += total[0];
  }
  if (threadIdx.x == 0) {
    decoder_num_tiles[0] = before;
  }
}

// Grid: (ceil(plan_tiles / kThreads),). One entry of the list a thread.
__global__ void __launch_bounds__(kThreads)
    list_tiles(const int* tile_starts, int* decoder_batch_ids, int* decoder_tile_ids, int num_slots,
               int64_t plan_tiles) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (entry >= plan_tiles) {
    return;
  }
  // Entries from the last row's end on are unused.
  int slot = -1, tile = -1;
  if (entry < tile_starts[num_slots]) {
    slot = slot_of(tile_starts, num_slots, entry);
    tile = static_cast<int>(entry) - tile_starts[slot];
  }
  decoder_batch_ids[entry] = slot;
  decoder_tile_ids[entry] = tile;
}

void plan_step(TensorView seq_lens_encoder, TensorView seq_lens_decoder, TensorView seq_lens_this_time,
               TensorView max_lens, TensorView decoder_batch_ids, TensorView decoder_tile_ids,
               TensorView decoder_num_tiles, TensorView decoder_chunk_size, TensorView tile_starts,
               int64_t block_size, int64_t multiprocessors) {
  const int64_t num_slots = seq_lens_this_time.numel(), plan_tiles = decoder_batch_ids.numel();
  MLA_CHECK(seq_lens_encoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_this_time, {num_slots}, kInt32);
  MLA_CHECK(max_lens, {kMaxLens}, kInt32);
  MLA_CHECK(decoder_batch_ids, {plan_tiles}, kInt32);
  MLA_CHECK(decoder_tile_ids, {plan_tiles}, kInt32);
  MLA_CHECK(decoder_num_tiles, {1}, kInt32);
  MLA_CHECK(decoder_chunk_size, {1}, kInt32);
  MLA_CHECK(tile_starts, {num_slots + 1}, kInt32);
  constexpr int64_t kLargestBlock = 0x7fffffff >> (kCandidates - 1);
  if (block_size < 1 || block_size > kLargestBlock) {
    TVM_FFI_THROW(ValueError) << "block_size must be 1 to " << kLargestBlock << ", so that 2^"
                              << kCandidates - 1 << " blocks have an int32 of tokens, got " << block_size;
  }
  if (multiprocessors < 1 || multiprocessors > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "multiprocessors must be 1 to 2147483647, got " << multiprocessors;
  }
  launch(max_lens, plan, 1, kThreads, sizeof(Shared), data<int>(seq_lens_encoder),
         data<int>(seq_lens_decoder), data<int>(seq_lens_this_time), data<int>(max_lens),
         data<int>(decoder_num_tiles), data<int>(decoder_chunk_size), data<int>(tile_starts), num_slots,
         block_size, multiprocessors);
  if (plan_tiles == 0) {
    return;
  }
  launch(decoder_batch_ids, list_tiles, blocks(ceil_div<int64_t>(plan_tiles, kThreads), "blocks of tiles"),
         kThreads, 0, data<int>(tile_starts), data<int>(decoder_batch_ids), data<int>(decoder_tile_ids),
         num_slots, plan_tiles);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan_step, plan_step)
