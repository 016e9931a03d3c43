// Gathers prefill rows' cached and new latents into dense keys. The contract is read_cache_interleave.py's.

#include "mla/copy.h"
#include "mla/search.h"
#include "mla/words.h"

namespace {

using namespace mla;

constexpr int kKeys = 16;  // a block: 16 latents of 64 words of 16 bytes are 4 loads of every thread

template <class Word>
struct Shared {
  CopiedRows<Word, kKeys> latents, ropes;
};

// Grid: (ceil(num_keys / kKeys),). Strides and widths are in words.
template <class Word>
__global__ void __launch_bounds__(kCopyThreads)
    gather_keys(const Word* latent_cache, const int* block_tables, int64_t table_stride,
                const Word* compressed_kv, int64_t compressed_kv_stride, const Word* k_pe,
                int64_t k_pe_stride, const int* seq_lens_decoder, const int* cu_seqlens_q,
                const int* cu_seqlens_k_prefill, Word* full_compressed_kv, int64_t full_compressed_kv_stride,
                Word* full_k_pe, int64_t full_k_pe_stride, int64_t num_keys, int num_slots, int block_size,
                int rank_words, int rope_words) {
  auto& shared = shared_memory<Shared<Word>>();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kKeys;
  const int num_here = static_cast<int>(min(num_keys - first, int64_t{kKeys}));

  // 1. Where each key lies: in the cache, among the new tokens, or, behind the last key, nowhere.
  const int here = threadIdx.x;
  if (here < num_here) {
    const int64_t key = first + here;
    const Word* latent = nullptr;
    const Word* rope = nullptr;
    if (key < cu_seqlens_k_prefill[num_slots]) {
      const int slot = slot_of(cu_seqlens_k_prefill, num_slots, key);
      const int position = static_cast<int>(key) - cu_seqlens_k_prefill[slot];
      const int cached = seq_lens_decoder[slot];
      if (position < cached) {
        // 64 bits: in large caches a row's offset passes 2^32.
        const int64_t block = block_tables[slot * table_stride + position / block_size];
        latent = latent_cache + (block * block_size + position % block_size) * (rank_words + rope_words);
        rope = latent + rank_words;
      } else {
        const int64_t token = cu_seqlens_q[slot] + position - cached;
        latent = compressed_kv + token * compressed_kv_stride;
        rope = k_pe + token * k_pe_stride;
      }
    }
    shared.latents.source[here] = latent;
    shared.latents.target[here] = full_compressed_kv + key * full_compressed_kv_stride;
    shared.ropes.source[here] = rope;
    shared.ropes.target[here] = full_k_pe + key * full_k_pe_stride;
  }
  __syncthreads();

  // 2. The copies.
  copy_rows(shared.latents, num_here, rank_words);
  copy_rows(shared.ropes, num_here, rope_words);
}

void read_cache_interleave(TensorView latent_cache, Optional<TensorView> block_tables,
                           TensorView compressed_kv, TensorView k_pe, TensorView seq_lens_decoder,
                           TensorView cu_seqlens_q, TensorView cu_seqlens_k_prefill,
                           TensorView full_compressed_kv, TensorView full_k_pe) {
  const int64_t num_slots = seq_lens_decoder.numel();
  MLA_CHECK(full_compressed_kv, {-1, -1}, latent_cache.dtype());
  const int64_t num_keys = full_compressed_kv.size(0), rank = full_compressed_kv.size(1);
  MLA_CHECK(full_k_pe, {num_keys, -1}, latent_cache.dtype());
  const int64_t rope = full_k_pe.size(1);
  MLA_CHECK(latent_cache, {-1, 1, -1, rank + rope}, latent_cache.dtype(), true);
  MLA_CHECK(compressed_kv, {-1, rank}, latent_cache.dtype());
  MLA_CHECK(k_pe, {compressed_kv.size(0), rope}, latent_cache.dtype());
  MLA_CHECK(seq_lens_decoder, {num_slots}, kInt32);
  MLA_CHECK(cu_seqlens_q, {num_slots + 1}, kInt32);
  MLA_CHECK(cu_seqlens_k_prefill, {num_slots + 1}, kInt32);
  // Without a table no key is cached, and nothing is read through it.
  const int* tables = nullptr;
  int64_t table_stride = 0;
  if (block_tables.has_value()) {
    const TensorView given = *block_tables;
    Argument{given, "block_tables"}.check({num_slots, -1}, kInt32);
    tables = data<int>(given);
    table_stride = given.stride(0);
  }
  if (num_keys == 0) {
    return;
  }
  const int64_t bytes = Alignment::element_bytes(latent_cache);
  Alignment alignment;
  alignment.with(latent_cache).with(compressed_kv).with(k_pe).with(full_compressed_kv).with(full_k_pe);
  with_word(alignment.with(rank * bytes).with(rope * bytes), [&](auto word) {
    using Word = decltype(word);
    const int64_t elements = sizeof(Word) / bytes;
    launch(full_compressed_kv, gather_keys<Word>,
           blocks(ceil_div<int64_t>(num_keys, kKeys), "blocks of keys"), kCopyThreads, sizeof(Shared<Word>),
           data<Word>(latent_cache), tables, table_stride, data<Word>(compressed_kv),
           compressed_kv.stride(0) / elements, data<Word>(k_pe), k_pe.stride(0) / elements,
           data<int>(seq_lens_decoder), data<int>(cu_seqlens_q), data<int>(cu_seqlens_k_prefill),
           data<Word>(full_compressed_kv), full_compressed_kv.stride(0) / elements, data<Word>(full_k_pe),
           full_k_pe.stride(0) / elements, num_keys, num_slots, latent_cache.size(2),
           copied_words<kKeys>(rank / elements), copied_words<kKeys>(rope / elements));
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(read_cache_interleave, read_cache_interleave)
