// Physical cache rows of a step's tokens. The contract is slot_mapping.py's.

#include "mla/launch.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;

// Grid: (ceil(num_tokens / kThreads),). One token a thread.
__global__ void __launch_bounds__(kThreads)
    map_tokens(const int* block_tables, int64_t block_tables_stride, const int* batch_id_per_token,
               const int* position_ids, int64_t* slot_mapping, int64_t max_blocks, int block_size,
               int64_t num_tokens) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= num_tokens) {
    return;
  }
  // 1. Slot and position. Padding's position is whatever an earlier step left. Compare before dividing:
  // -1 / block_size is 0.
  const int slot = batch_id_per_token[token], position = position_ids[token];
  int64_t row = -1;
  if (slot >= 0 && position >= 0) {
    // 2. The table's entry, where there is one.
    const int column = position / block_size;
    if (column < max_blocks) {
      const int block = block_tables[slot * block_tables_stride + column];
      // 3. The row; int64, block * block_size passes 2^31 in large caches.
      if (block >= 0) {
        row = static_cast<int64_t>(block) * block_size + position % block_size;
      }
    }
  }
  slot_mapping[token] = row;
}

void launch_map_tokens(TensorView block_tables, TensorView batch_id_per_token, TensorView position_ids,
                       TensorView slot_mapping, int64_t block_size) {
  const int64_t num_tokens = batch_id_per_token.numel();
  MLA_CHECK(block_tables, {-1, -1}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  MLA_CHECK(position_ids, {num_tokens}, kInt32);
  MLA_CHECK(slot_mapping, {num_tokens}, kInt64);
  if (block_size < 1 || block_size > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "block_size must be 1 to 2147483647, got " << block_size;
  }
  if (num_tokens == 0) {
    return;
  }
  launch(slot_mapping, map_tokens, blocks(ceil_div<int64_t>(num_tokens, kThreads), "blocks of tokens"),
         kThreads, 0, data<int>(block_tables), block_tables.stride(0), data<int>(batch_id_per_token),
         data<int>(position_ids), data<int64_t>(slot_mapping), block_tables.size(1), block_size, num_tokens);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(map_tokens, launch_map_tokens)
