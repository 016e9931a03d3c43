// Physical cache rows of the keys seen through a sliding window. The contract is swa_indices.py's.

#include "mla/launch.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;
constexpr int kTokens = kThreads / 32;  // a block: a warp each
constexpr int kInFlight = 4;            // indices a lane, 32 apart: their table entries are loaded together
constexpr int kIndices = 32 * kInFlight;

// Grid: (ceil(num_tokens / kTokens) * index_tiles,), tiles of kIndices successive indices fastest.
__global__ void __launch_bounds__(kThreads)
    list_keys(const int* block_tables, int64_t block_tables_stride, const int* cu_seqlens_q,
              const int* seq_lens_decoder, const int* batch_id_per_token, int* swa_indices,
              int64_t swa_indices_stride, int max_blocks, int block_size, int window, int64_t num_tokens,
              int num_indices, int index_tiles) {
  // 1. The token's position, and the oldest key that it sees; padding sees none.
  const int64_t token = blockIdx.x / index_tiles * int64_t{kTokens} + threadIdx.x / 32;
  const int first = static_cast<int>(blockIdx.x % index_tiles) * kIndices + lane_id();
  if (token >= num_tokens) {
    return;
  }
  const int slot = batch_id_per_token[token];
  int position = -1, oldest = 0;
  const int* table = block_tables;
  if (slot >= 0) {
    position = seq_lens_decoder[slot] + static_cast<int>(token) - cu_seqlens_q[slot];
    table += slot * block_tables_stride;
    if (window > 0) {
      oldest = max(position - window + 1, 0);
    }
  }

  // 2. The table's entries of the visible keys.
  int entries[kInFlight], offsets[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int key = oldest + first + i * 32;
    const int block = key / block_size;
    entries[i] = -1;
    offsets[i] = key - block * block_size;
    if (key <= position && block < max_blocks) {
      entries[i] = table[block];
    }
  }

  // 3. Their rows.
  int* target = swa_indices + token * swa_indices_stride;
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int index = first + i * 32;
    int row = -1;
    if (entries[i] >= 0) {
      row = entries[i] * block_size + offsets[i];
    }
    if (index < num_indices) {
      target[index] = row;
    }
  }
}

void swa_indices(TensorView block_tables, TensorView cu_seqlens_q, TensorView seq_lens_decoder,
                 TensorView batch_id_per_token, TensorView swa_indices, int64_t block_size, int64_t window) {
  const int64_t num_slots = seq_lens_decoder.numel(), num_tokens = batch_id_per_token.numel();
  MLA_CHECK(block_tables, {num_slots, -1}, kInt32);
  MLA_CHECK(cu_seqlens_q, {num_slots + 1}, kInt32);
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  MLA_CHECK(swa_indices, {num_tokens, 1, -1}, kInt32);
  const int64_t num_indices = swa_indices.size(2);
  constexpr int64_t kMost = 0x7fffffff, kMostIndices = kMost / 2;
  if (block_size < 1 || block_size > kMost || window < 0 || window > kMost) {
    TVM_FFI_THROW(ValueError) << "block_size must be 1 to " << kMost << " and window 0 to " << kMost << ", got "
                              << block_size << " and " << window;
  }
  if (num_indices > kMostIndices) {
    TVM_FFI_THROW(ValueError) << "swa_indices must have at most " << kMostIndices << " indices a token, got "
                              << num_indices;
  }
  if (num_tokens == 0 || num_indices == 0) {
    return;
  }
  const int64_t index_tiles = ceil_div<int64_t>(num_indices, kIndices);
  launch(swa_indices, list_keys,
         blocks(ceil_div<int64_t>(num_tokens, kTokens) * index_tiles, "blocks of tokens and indices"), kThreads, 0,
         data<int>(block_tables), block_tables.stride(0), data<int>(cu_seqlens_q), data<int>(seq_lens_decoder),
         data<int>(batch_id_per_token), data<int>(swa_indices), swa_indices.stride(0), block_tables.size(1),
         block_size, window, num_tokens, num_indices, index_tiles);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(swa_indices, swa_indices)
