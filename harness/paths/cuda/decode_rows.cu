// Packs decode rows' queries, and puts their outputs among prefill's. The contract is decode_rows.py's.

#include <algorithm>

#include "mla/copy.h"
#include "mla/heads.h"
#include "mla/reduce.h"

namespace {

using namespace mla;

constexpr int kSlots = 1024;  // threads of the block that sums; engines rarely have more slots: one turn
constexpr int kTokens = 256;
constexpr int kHeads = 64;  // a block: 64 heads of 16 words of 16 bytes are 4 loads of every thread

using Sums = WarpSums<kSlots, 1>;

// Grid: (1,). Prefix sum of decode rows' tokens, and their lengths, kSlots slots at a time.
__global__ void __launch_bounds__(kSlots)
    count_tokens(const int* seq_lens_encoder, const int* seq_lens_decoder, const int* seq_lens_this_time,
                 int* cu_seqlens_q_decode, int* cache_seqlens, int64_t num_slots) {
  auto& shared = shared_memory<Sums>();

  // 1. Entry 0: all there is to write where no slot is.
  if (threadIdx.x == 0) {
    cu_seqlens_q_decode[0] = 0;
  }

  int before = 0;
  for (int64_t first = 0; first < num_slots; first += kSlots) {
    // 2. Chunks have cached tokens too, and paused slots cached ones but nothing to decode.
    const int64_t slot = first + threadIdx.x;
    int decoded[1] = {0};
    if (slot < num_slots) {
      const int decoder = seq_lens_decoder[slot], this_time = seq_lens_this_time[slot];
      int keys = 0;
      if (seq_lens_encoder[slot] == 0 && decoder > 0 && this_time > 0) {
        decoded[0] = this_time;
        keys = decoder + this_time;
      }
      cache_seqlens[slot] = keys;
    }

    // 3. The sum up to and with each slot is the entry behind it.
    int total[1];
    prefix_sums(decoded, total, shared);
    if (slot < num_slots) {
      cu_seqlens_q_decode[slot + 1] = before + decoded[0];
    }
    before += total[0];
  }
}

// Where the packed tokens of a slot begin, and how many it has: none unless it is a decode row.
struct Packed {
  int64_t first;
  int count;
};

__device__ __forceinline__ Packed packed_tokens(const int* cu_seqlens_q_decode, int slot) {
  const int first = cu_seqlens_q_decode[slot];
  return {first, cu_seqlens_q_decode[slot + 1] - first};
}

// Grid: (ceil(max(tokens, packed tokens) / kTokens),). One token, and one place behind the last, a thread.
__global__ void __launch_bounds__(kTokens)
    list_tokens(const int* batch_id_per_token, const int* cu_seqlens_q, const int* cu_seqlens_q_decode,
                int* batch_id_per_decode_token, int64_t num_tokens, int64_t num_slots,
                int64_t num_decode_tokens) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.x;

  // 1. A decode token says its slot at its place, if there is room for it.
  if (index < num_tokens) {
    const int slot = batch_id_per_token[index];
    if (slot >= 0) {
      const Packed packed = packed_tokens(cu_seqlens_q_decode, slot);
      const int64_t place = packed.first + index - cu_seqlens_q[slot];
      if (packed.count > 0 && place < num_decode_tokens) {
        batch_id_per_decode_token[place] = slot;
      }
    }
  }

  // 2. Places behind the last decode token are nobody's.
  if (index < num_decode_tokens && index >= cu_seqlens_q_decode[num_slots]) {
    batch_id_per_decode_token[index] = -1;
  }
}

// Grid: (ceil(packed tokens * num_heads / kHeads),).
template <class Word>
__global__ void __launch_bounds__(kCopyThreads)
    gather_tokens(Heads<Word> query, const int* cu_seqlens_q, const int* cu_seqlens_q_decode,
                  const int* batch_id_per_decode_token, Heads<Word> packed_query, int64_t num_decode_tokens,
                  int64_t num_heads, int width) {
  auto& rows = shared_memory<CopiedRows<Word, kHeads>>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kHeads;
  const int num_here = static_cast<int>(min(num_decode_tokens * num_heads - first, int64_t{kHeads}));

  // 1. Where the step has each head's token; nowhere behind the last decode token.
  const int here = threadIdx.x;
  if (here < num_here) {
    const int64_t place = (first + here) / num_heads, head = (first + here) % num_heads;
    const int slot = batch_id_per_decode_token[place];
    rows.source[here] = nullptr;
    if (slot >= 0) {
      rows.source[here] = query.at(cu_seqlens_q[slot] + place - cu_seqlens_q_decode[slot], head);
    }
    rows.target[here] = packed_query.at(place, head);
  }
  __syncthreads();

  // 2. The copies.
  copy_rows(rows, num_here, width);
}

// Grid: (ceil(num_tokens * num_heads / kHeads),). In place, prefill_out has no data.
template <class Word>
__global__ void __launch_bounds__(kCopyThreads)
    merge_tokens(Heads<Word> prefill_out, Heads<Word> decode_out, const int* cu_seqlens_q,
                 const int* cu_seqlens_q_decode, const int* batch_id_per_token, Heads<Word> merged,
                 int64_t num_tokens, int64_t num_decode_tokens, int64_t num_heads, int width) {
  auto& rows = shared_memory<CopiedRows<Word, kHeads>>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kHeads;
  const int num_here = static_cast<int>(min(num_tokens * num_heads - first, int64_t{kHeads}));

  // 1. The branch that computed each head's token. The other is not read, whatever it holds; padding has
  // none.
  const int here = threadIdx.x;
  if (here < num_here) {
    const int64_t token = (first + here) / num_heads, head = (first + here) % num_heads;
    const bool in_place = prefill_out.data == nullptr;
    const int slot = batch_id_per_token[token];
    rows.source[here] = nullptr;
    if (slot >= 0) {
      const Packed packed = packed_tokens(cu_seqlens_q_decode, slot);
      const int64_t place = packed.first + token - cu_seqlens_q[slot];
      if (packed.count > 0 && place < num_decode_tokens) {
        rows.source[here] = decode_out.at(place, head);
      } else if (packed.count == 0 && !in_place) {
        rows.source[here] = prefill_out.at(token, head);
      }
    }
    rows.target[here] = merged.at(token, head);
    if (in_place && rows.source[here] == nullptr) {
      rows.target[here] = nullptr;
    }
  }
  __syncthreads();

  // 2. The copies.
  copy_rows(rows, num_here, width);
}

void select_decode_rows(TensorView seq_lens_encoder, TensorView seq_lens_decoder,
                        TensorView seq_lens_this_time, TensorView cu_seqlens_q, TensorView batch_id_per_token,
                        TensorView cu_seqlens_q_decode, TensorView batch_id_per_decode_token,
                        TensorView cache_seqlens) {
  const int64_t num_slots = cache_seqlens.numel(), num_tokens = batch_id_per_token.numel();
  const int64_t num_decode_tokens = batch_id_per_decode_token.numel();
  MLA_CHECK(seq_lens_encoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(seq_lens_this_time, {num_slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {num_slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  MLA_CHECK(cu_seqlens_q_decode, {num_slots + 1}, kInt32);
  MLA_CHECK(batch_id_per_decode_token, {num_decode_tokens}, kInt32);
  MLA_CHECK(cache_seqlens, {num_slots}, kInt32);
  launch(cache_seqlens, count_tokens, 1, kSlots, sizeof(Sums), data<int>(seq_lens_encoder),
         data<int>(seq_lens_decoder), data<int>(seq_lens_this_time), data<int>(cu_seqlens_q_decode),
         data<int>(cache_seqlens), num_slots);
  if (num_decode_tokens == 0) {
    return;
  }
  launch(batch_id_per_decode_token, list_tokens,
         blocks(ceil_div(std::max(num_tokens, num_decode_tokens), int64_t{kTokens}), "blocks of tokens"),
         kTokens, 0, data<int>(batch_id_per_token), data<int>(cu_seqlens_q), data<int>(cu_seqlens_q_decode),
         data<int>(batch_id_per_decode_token), num_tokens, num_slots, num_decode_tokens);
}

void gather_decode_rows(TensorView query, TensorView cu_seqlens_q, TensorView cu_seqlens_q_decode,
                        TensorView batch_id_per_decode_token, TensorView packed_query) {
  MLA_CHECK(packed_query, {-1, -1, -1}, query.dtype());
  const int64_t num_decode_tokens = packed_query.size(0), num_heads = packed_query.size(1);
  const int64_t width = packed_query.size(2);
  MLA_CHECK(query, {-1, num_heads, width}, query.dtype());
  MLA_CHECK(cu_seqlens_q, {-1}, kInt32);
  MLA_CHECK(cu_seqlens_q_decode, {cu_seqlens_q.size(0)}, kInt32);
  MLA_CHECK(batch_id_per_decode_token, {num_decode_tokens}, kInt32);
  if (packed_query.numel() == 0) {
    return;
  }
  const int64_t bytes = Alignment::element_bytes(query);
  with_word(Alignment{}.with(query).with(packed_query).with(width * bytes), [&](auto word) {
    using Word = decltype(word);
    launch(packed_query, gather_tokens<Word>,
           blocks(ceil_div<int64_t>(num_decode_tokens * num_heads, kHeads), "blocks of heads"), kCopyThreads,
           sizeof(CopiedRows<Word, kHeads>), heads_of<Word>(query), data<int>(cu_seqlens_q),
           data<int>(cu_seqlens_q_decode), data<int>(batch_id_per_decode_token), heads_of<Word>(packed_query),
           num_decode_tokens, num_heads, copied_words<kHeads>(width * bytes / sizeof(Word)));
  });
}

void merge_decode_rows(Optional<TensorView> prefill_out, TensorView decode_out, TensorView cu_seqlens_q,
                       TensorView cu_seqlens_q_decode, TensorView batch_id_per_token, TensorView merged) {
  MLA_CHECK(merged, {-1, -1, -1}, merged.dtype());
  const int64_t num_tokens = merged.size(0), num_heads = merged.size(1), width = merged.size(2);
  MLA_CHECK(decode_out, {-1, num_heads, width}, merged.dtype());
  MLA_CHECK(cu_seqlens_q, {-1}, kInt32);
  MLA_CHECK(cu_seqlens_q_decode, {cu_seqlens_q.size(0)}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  const int64_t bytes = Alignment::element_bytes(merged);
  Alignment alignment;
  alignment.with(decode_out).with(merged).with(width * bytes);
  if (prefill_out.has_value()) {
    const TensorView prefilled = *prefill_out;
    Argument{prefilled, "prefill_out"}.check({num_tokens, num_heads, width}, merged.dtype());
    alignment.with(prefilled);
  }
  if (merged.numel() == 0) {
    return;
  }
  with_word(alignment, [&](auto word) {
    using Word = decltype(word);
    Heads<Word> prefilled{};
    if (prefill_out.has_value()) {
      prefilled = heads_of<Word>(*prefill_out);
    }
    launch(merged, merge_tokens<Word>,
           blocks(ceil_div<int64_t>(num_tokens * num_heads, kHeads), "blocks of heads"), kCopyThreads,
           sizeof(CopiedRows<Word, kHeads>), prefilled, heads_of<Word>(decode_out), data<int>(cu_seqlens_q),
           data<int>(cu_seqlens_q_decode), data<int>(batch_id_per_token), heads_of<Word>(merged), num_tokens,
           decode_out.size(0), num_heads, copied_words<kHeads>(width * bytes / sizeof(Word)));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(select_decode_rows, select_decode_rows)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather_decode_rows, gather_decode_rows)
TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_decode_rows, merge_decode_rows)
