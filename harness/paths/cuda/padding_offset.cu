// Prefix sums of a step's lengths, and the slot of every token. The contract is padding_offset.py's.

#include "mla/launch.h"
#include "mla/reduce.h"
#include "mla/search.h"

namespace {

using namespace mla;

constexpr int kSlots = 1024;  // threads of the block that sums; engines rarely have more slots: one turn
constexpr int kTokens = 256;

enum { kQueries, kKeys, kPrefillKeys, kSums };

using Shared = WarpSums<kSlots, kSums>;

// Grid: (1,). The three prefix sums, kSlots slots at a time.
__global__ void __launch_bounds__(kSlots)
    sum_lengths(const int* seq_lens_encoder, const int* seq_lens_decoder, const int* seq_lens_this_time,
                int* cu_seqlens_q, int* cu_seqlens_k, int* cu_seqlens_k_prefill, int64_t num_slots) {
  auto& shared = shared_memory<Shared>();

  // 1. Entry 0 of each: all there is to write where no slot is.
  if (threadIdx.x == 0) {
    cu_seqlens_q[0] = 0;
    cu_seqlens_k[0] = 0;
    cu_seqlens_k_prefill[0] = 0;
  }

  int before[kSums] = {0, 0, 0};
  for (int64_t first = 0; first < num_slots; first += kSlots) {
    // 2. Lengths of the next slots, 0 behind the last. Cached tokens count in every slot, with and without
    // new ones.
    const int64_t slot = first + threadIdx.x;
    int sums[kSums] = {0, 0, 0};
    if (slot < num_slots) {
      sums[kQueries] = seq_lens_this_time[slot];
      sums[kKeys] = seq_lens_this_time[slot] + seq_lens_decoder[slot];
      if (seq_lens_encoder[slot] > 0) {
        sums[kPrefillKeys] = sums[kKeys];
      }
    }

    // 3. Sums up to and with each slot are the entries behind it.
    int totals[kSums];
    prefix_sums(sums, totals, shared);
    if (slot < num_slots) {
      cu_seqlens_q[slot + 1] = before[kQueries] + sums[kQueries];
      cu_seqlens_k[slot + 1] = before[kKeys] + sums[kKeys];
      cu_seqlens_k_prefill[slot + 1] = before[kPrefillKeys] + sums[kPrefillKeys];
    }

    // 4. What the next slots begin with.
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      before[i] += totals[i];
    }
  }
}

// Grid: (ceil(num_tokens / kTokens),). One token a thread.
__global__ void __launch_bounds__(kTokens)
    find_slots(const int* cu_seqlens_q, int* batch_id_per_token, int num_slots, int64_t num_tokens) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x;
  if (token >= num_tokens) {
    return;
  }
  // Tokens from the last sum on are padding.
  int slot = -1;
  if (token < cu_seqlens_q[num_slots]) {
    slot = slot_of(cu_seqlens_q, num_slots, token);
  }
  batch_id_per_token[token] = slot;
}

void padding_offset(TensorView seq_lens_encoder, TensorView seq_lens_decoder, TensorView seq_lens_this_time,
                    TensorView cu_seqlens_q, TensorView cu_seqlens_k, TensorView cu_seqlens_k_prefill,
                    TensorView batch_id_per_token) {
  const int64_t num_slots = seq_lens_this_time.numel(), num_tokens = batch_id_per_token.numel();
  MLA_CHECK(seq_lens_encoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_this_time, {num_slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {num_slots + 1}, kInt32);
  MLA_CHECK(cu_seqlens_k, {num_slots + 1}, kInt32);
  MLA_CHECK(cu_seqlens_k_prefill, {num_slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  launch(cu_seqlens_q, sum_lengths, 1, kSlots, sizeof(Shared), data<int>(seq_lens_encoder),
         data<int>(seq_lens_decoder), data<int>(seq_lens_this_time), data<int>(cu_seqlens_q),
         data<int>(cu_seqlens_k), data<int>(cu_seqlens_k_prefill), num_slots);
  if (num_tokens == 0) {
    return;
  }
  launch(batch_id_per_token, find_slots, blocks(ceil_div<int64_t>(num_tokens, kTokens), "blocks of tokens"),
         kTokens, 0, data<int>(cu_seqlens_q), data<int>(batch_id_per_token), num_slots, num_tokens);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(padding_offset, padding_offset)
