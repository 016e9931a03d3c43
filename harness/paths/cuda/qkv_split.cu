// Cuts one rank's projection of queries, keys, values and gates out of a checkpoint's. The contract is
// qkv_split.py's.

#include "mla/words.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;
constexpr int kWordsInFlight = 4;  // that a thread has under way before it stores the first
constexpr int kBlockWords = kThreads * kWordsInFlight;

enum { kQueries, kKeys, kValues, kGates, kParts };

// Features of one kind: the first in the checkpoint, the first in the rank's projection, and how many.
struct Part {
  int source, target, size;
};
struct Parts {
  Part of[kParts];

  // The checkpoint's feature of the projection's: parts follow one another in both.
  __device__ __forceinline__ int source_of(int feature) const {
    int shift = of[kQueries].source - of[kQueries].target;
#pragma unroll
    for (int i = kKeys; i < kParts; ++i) {
      if (feature >= of[i].target) {
        shift = of[i].source - of[i].target;
      }
    }
    return feature + shift;
  }
};

// The slices themselves, by the first block of a launch.
__device__ __forceinline__ void store_offsets(const Parts& parts, int* offsets) {
  if (blockIdx.x == 0 && threadIdx.x < kParts) {
    const Part& part = parts.of[threadIdx.x];
    offsets[3 * threadIdx.x] = part.source;
    offsets[3 * threadIdx.x + 1] = part.target;
    offsets[3 * threadIdx.x + 2] = part.size;
  }
}

// Input features first in both. Grid: (ceil(num_inputs * row_words / kBlockWords),). Strides are in words, of
// `elements` features each; parts begin with a word.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    copy_features(const Word* weight, int64_t weight_stride, Word* projection, int64_t projection_stride,
                  const Parts parts, int* offsets, int64_t num_inputs, int row_words, int elements) {
  store_offsets(parts, offsets);
  // 1. One division of 64 bits a block.
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockWords;
  const int64_t first_input = first / row_words;
  const int first_word = static_cast<int>(first % row_words);

  // 2. All loads before any store: the compiler moves none across, for all it knows they overlap.
  Word words[kWordsInFlight];
#pragma unroll
  for (int i = 0; i < kWordsInFlight; ++i) {
    const int place = first_word + i * kThreads + static_cast<int>(threadIdx.x);
    const int64_t input = first_input + place / row_words;
    if (input < num_inputs) {
      const int source = parts.source_of(place % row_words * elements) / elements;
      words[i] = weight[input * weight_stride + source];
    }
  }
#pragma unroll
  for (int i = 0; i < kWordsInFlight; ++i) {
    const int place = first_word + i * kThreads + static_cast<int>(threadIdx.x);
    const int64_t input = first_input + place / row_words;
    if (input < num_inputs) {
      projection[input * projection_stride + place % row_words] = words[i];
    }
  }
}

// A tile of kFeatures features of kWordInputs words of inputs each: as many words one way as the other.
template <class Element, class Word>
struct TransposedTile {
  static constexpr int kElements = sizeof(Word) / sizeof(Element);
  static constexpr int kFeatures = 64, kFeatureWords = kFeatures / kElements;
  static constexpr int kInputWords = kBlockWords / kFeatures, kInputs = kInputWords * kElements;
  // An odd number of banks from one feature to the next.
  static constexpr int kStride = kInputs + 4 / sizeof(Element);

  struct Shared {
    Element of[kFeatures * kStride];
  };
  union Pack {
    Word word;
    Element element[kElements];
  };
};

// Output features first in the checkpoint. Grid: (tiles of inputs * tiles of features,), inputs fastest.
// Strides are in elements.
template <class Element, class Word>
__global__ void __launch_bounds__(kThreads)
    transpose_features(const Element* weight, int64_t weight_stride, Element* projection,
                       int64_t projection_stride, const Parts parts, int* offsets, int num_inputs,
                       int num_features) {
  using Tile = TransposedTile<Element, Word>;
  using Pack = typename Tile::Pack;
  auto& tile = shared_memory<typename Tile::Shared>();
  store_offsets(parts, offsets);
  const int input_tiles = ceil_div(num_inputs, Tile::kInputs);
  const int first_input = static_cast<int>(blockIdx.x % input_tiles) * Tile::kInputs;
  const int first_feature = static_cast<int>(blockIdx.x / input_tiles) * Tile::kFeatures;

  // 1. Read along the checkpoint's dense axis.
  Pack packs[kWordsInFlight];
#pragma unroll
  for (int i = 0; i < kWordsInFlight; ++i) {
    const int number = i * kThreads + static_cast<int>(threadIdx.x);
    const int feature = first_feature + number / Tile::kInputWords;
    const int input = first_input + number % Tile::kInputWords * Tile::kElements;
    if (feature < num_features && input < num_inputs) {
      const Element* row = weight + int64_t{parts.source_of(feature)} * weight_stride;
      packs[i].word = *reinterpret_cast<const Word*>(row + input);
    }
  }
#pragma unroll
  for (int i = 0; i < kWordsInFlight; ++i) {
    const int number = i * kThreads + static_cast<int>(threadIdx.x);
    const int feature = number / Tile::kInputWords;
    const int input = number % Tile::kInputWords * Tile::kElements;
#pragma unroll
    for (int e = 0; e < Tile::kElements; ++e) {
      tile.of[feature * Tile::kStride + input + e] = packs[i].element[e];
    }
  }
  __syncthreads();

  // 2. Write along the projection's.
#pragma unroll
  for (int i = 0; i < kWordsInFlight; ++i) {
    const int number = i * kThreads + static_cast<int>(threadIdx.x);
    const int input = number / Tile::kFeatureWords;
    const int feature = number % Tile::kFeatureWords * Tile::kElements;
    Pack pack;
#pragma unroll
    for (int e = 0; e < Tile::kElements; ++e) {
      pack.element[e] = tile.of[(feature + e) * Tile::kStride + input];
    }
    if (first_input + input < num_inputs && first_feature + feature < num_features) {
      Element* row = projection + (int64_t{first_input} + input) * projection_stride;
      *reinterpret_cast<Word*>(row + first_feature + feature) = pack.word;
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------------

// What one rank takes of a layer: `heads` query heads, and its share of all ranks' KV heads or, with more
// ranks than KV heads, the one that its neighbours have too.
Parts parts_of(int64_t rank, int64_t ranks, int64_t heads, int64_t total_kv_heads, int64_t head_dim,
               int64_t v_head_dim) {
  const int64_t kv_heads = max(total_kv_heads / ranks, int64_t{1});
  const int64_t first_kv = rank * total_kv_heads / ranks;
  const int64_t key_begin = heads * ranks * head_dim;
  const int64_t value_begin = key_begin + total_kv_heads * head_dim;
  const int64_t gate_begin = value_begin + total_kv_heads * v_head_dim;
  const int64_t sources[kParts] = {rank * heads * head_dim, key_begin + first_kv * head_dim,
                                   value_begin + first_kv * v_head_dim,
                                   gate_begin + rank * heads * v_head_dim};
  const int64_t sizes[kParts] = {heads * head_dim, kv_heads * head_dim, kv_heads * v_head_dim,
                                 heads * v_head_dim};
  Parts parts;
  int64_t target = 0;
  for (int i = 0; i < kParts; ++i) {
    parts.of[i] = {static_cast<int>(sources[i]), static_cast<int>(target), static_cast<int>(sizes[i])};
    target += sizes[i];
  }
  return parts;
}

void split_inputs_first(const TensorView& weight, const TensorView& projection, const Parts& parts,
                        int* offsets, Alignment alignment) {
  const int64_t bytes = Alignment::element_bytes(weight);
  for (const Part& part : parts.of) {
    alignment.with(part.source * bytes).with(part.target * bytes);
  }
  with_word(alignment, [&](auto word) {
    using Word = decltype(word);
    const int64_t elements = sizeof(Word) / bytes, row_words = projection.size(1) / elements;
    const unsigned grid =
        blocks(ceil_div<int64_t>(projection.size(0) * row_words, kBlockWords), "blocks of words");
    launch(weight, copy_features<Word>, grid, kThreads, 0, data<Word>(weight), weight.stride(0) / elements,
           data<Word>(projection), projection.stride(0) / elements, parts, offsets, projection.size(0),
           row_words, elements);
  });
}

template <class Element>
void split_outputs_first(const TensorView& weight, const TensorView& projection, const Parts& parts,
                         int* offsets, Alignment alignment) {
  const int64_t num_inputs = projection.size(0), num_features = projection.size(1);
  alignment.with(num_inputs * static_cast<int64_t>(sizeof(Element)));
  with_word(alignment, [&](auto word) {
    using Word = decltype(word);
    if constexpr (sizeof(Word) >= sizeof(Element)) {
      using Tile = TransposedTile<Element, Word>;
      const int64_t tiles =
          ceil_div<int64_t>(num_inputs, Tile::kInputs) * ceil_div<int64_t>(num_features, Tile::kFeatures);
      launch(weight, transpose_features<Element, Word>, blocks(tiles, "tiles"), kThreads,
             sizeof(typename Tile::Shared), data<Element>(weight), weight.stride(0),
             data<Element>(projection), projection.stride(0), parts, offsets, num_inputs, num_features);
    }
  });
}

void split_qkv_proj(TensorView weight, TensorView projection, TensorView offsets, bool inputs_first,
                    int64_t rank, int64_t ranks, int64_t num_heads, int64_t total_num_key_value_heads,
                    int64_t head_dim, int64_t v_head_dim) {
  const int64_t num_inputs = projection.size(0), num_features = projection.size(1);
  const DLDataType dtype = model_dtype(weight, "weight");
  const int64_t width = (num_heads * ranks + total_num_key_value_heads) * (head_dim + v_head_dim);
  if (rank < 0 || rank >= ranks || num_heads < 1 || total_num_key_value_heads < 1) {
    TVM_FFI_THROW(ValueError) << "rank must be 0 to ranks - 1 and have heads, got rank " << rank << " of "
                              << ranks << ", " << num_heads << " query heads and "
                              << total_num_key_value_heads << " KV heads";
  }
  if (width > 0x7fffffff || num_inputs > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "weight must have at most 2147483647 features of a kind, got " << num_inputs
                              << " and " << width;
  }
  if (inputs_first) {
    MLA_CHECK(weight, {num_inputs, width}, dtype);
  } else {
    MLA_CHECK(weight, {width, num_inputs}, dtype);
  }
  const Parts parts = parts_of(rank, ranks, num_heads, total_num_key_value_heads, head_dim, v_head_dim);
  const Part& gates = parts.of[kGates];
  if (num_features != gates.target && num_features != gates.target + gates.size) {
    TVM_FFI_THROW(ValueError) << "projection must have " << gates.target << " features, or "
                              << gates.target + gates.size << " with gates, got " << num_features;
  }
  MLA_CHECK(projection, {-1, -1}, dtype);
  MLA_CHECK(offsets, {kParts, 3}, kInt32, true);
  if (num_inputs == 0) {
    return;
  }
  Alignment alignment;
  alignment.with(weight).with(projection).with(num_features * Alignment::element_bytes(weight));
  if (inputs_first) {
    split_inputs_first(weight, projection, parts, data<int>(offsets), alignment);
  } else if (same(dtype, kFloat32)) {
    split_outputs_first<uint32_t>(weight, projection, parts, data<int>(offsets), alignment);
  } else {
    split_outputs_first<uint16_t>(weight, projection, parts, data<int>(offsets), alignment);
  }
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(split_qkv_proj, split_qkv_proj)
