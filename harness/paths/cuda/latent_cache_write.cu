// Writes new latents and rotated keys into the paged latent cache. The contract is latent_cache_write.py's.

#include "mla/words.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;
constexpr int kTokens = 16;  // a block: 16 rows of 72 words of 16 bytes keep every thread's loads in flight

// Grid: (ceil(num_tokens / kTokens),). Sizes and strides are in words.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    write_rows(const Word* compressed_kv, int64_t compressed_kv_stride, const Word* k_pe, int64_t k_pe_stride,
               Word* latent_cache, const int64_t* slot_mapping, int64_t num_tokens, int64_t num_slots, int rank_words,
               int rope_words) {
  const int width = rank_words + rope_words;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int tokens = static_cast<int>(min(num_tokens - first, int64_t{kTokens}));
  for (int i = threadIdx.x; i < tokens * width; i += kThreads) {
    // 1. The word's token, and where the token goes. Compare before any division: -1 / block_size is 0.
    const int64_t token = first + i / width;
    const int word = i % width;
    const int64_t slot = slot_mapping[token];
    if (slot < 0 || slot >= num_slots) {
      continue;
    }
    // 2. The latent part, and the rotated key part behind it.
    const Word* source = compressed_kv + token * compressed_kv_stride + word;
    if (word >= rank_words) {
      source = k_pe + token * k_pe_stride + (word - rank_words);
    }
    latent_cache[slot * width + word] = *source;
  }
}

void latent_cache_write(TensorView compressed_kv, TensorView k_pe, TensorView latent_cache, TensorView slot_mapping) {
  const int64_t num_tokens = compressed_kv.size(0), rank = compressed_kv.size(1), rope = k_pe.size(1);
  const DLDataType dtype = latent_cache.dtype();
  MLA_CHECK(compressed_kv, {num_tokens, -1}, dtype);
  MLA_CHECK(k_pe, {num_tokens, -1}, dtype);
  MLA_CHECK(latent_cache, {-1, 1, -1, rank + rope}, dtype, true);
  MLA_CHECK(slot_mapping, {num_tokens}, kInt64);
  if (num_tokens == 0) {
    return;
  }
  const int64_t bytes = Alignment::element_bytes(latent_cache);
  Alignment alignment;
  alignment.with(compressed_kv).with(k_pe).with(latent_cache).with(rank * bytes).with(rope * bytes);
  with_word(alignment, [&](auto word) {
    using Word = decltype(word);
    const int64_t elements = sizeof(Word) / bytes;
    launch(latent_cache, write_rows<Word>, blocks(ceil_div<int64_t>(num_tokens, kTokens), "blocks of tokens"), kThreads,
           0, data<Word>(compressed_kv), compressed_kv.stride(0) / elements, data<Word>(k_pe),
           k_pe.stride(0) / elements, data<Word>(latent_cache), data<int64_t>(slot_mapping), num_tokens,
           latent_cache.size(0) * latent_cache.size(2), rank / elements, rope / elements);
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(latent_cache_write, latent_cache_write)
