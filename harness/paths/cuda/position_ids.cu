// Absolute positions of a step's tokens. The contract is position_ids.py's.

#include "mla/launch.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;

// Grid: (ceil(num_tokens / kThreads),). One token a thread.
__global__ void place_tokens(const int* seq_lens_decoder, const int* cu_seqlens_q, const int* batch_id_per_token,
                             int* position_ids, int64_t num_tokens) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (token >= num_tokens) {
    return;
  }
  // Padding has no slot: nothing is read for it.
  const int slot = batch_id_per_token[token];
  int position = -1;
  if (slot >= 0) {
    position = seq_lens_decoder[slot] + static_cast<int>(token) - cu_seqlens_q[slot];
  }
  position_ids[token] = position;
}

void launch_place_tokens(TensorView seq_lens_decoder, TensorView cu_seqlens_q, TensorView batch_id_per_token,
                         TensorView position_ids) {
  const int64_t num_slots = seq_lens_decoder.numel(), num_tokens = batch_id_per_token.numel();
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {num_slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  MLA_CHECK(position_ids, {num_tokens}, kInt32);
  if (num_tokens == 0) {
    return;
  }
  launch(position_ids, place_tokens, blocks(ceil_div<int64_t>(num_tokens, kThreads), "blocks of tokens"), kThreads, 0,
         data<int>(seq_lens_decoder), data<int>(cu_seqlens_q), data<int>(batch_id_per_token), data<int>(position_ids),
         num_tokens);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(place_tokens, launch_place_tokens)
