// Merges two attention states over disjoint keys into one. The contract is merge_states.py's.

#include <cmath>
#include <type_traits>

#include "mla/heads.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;
constexpr int kRows = 64;     // (token, head) a block: of 16 words of 16 bytes each, 4 words of every thread
constexpr int kInFlight = 4;  // words of both states that a thread has under way before it stores the first

// Neighbouring elements that are loaded and stored at once.
template <class T, class Word>
struct alignas(sizeof(Word)) Elements {
  static constexpr int kCount = sizeof(Word) / sizeof(T);
  T of[kCount];
};

// The rows that a block merges.
template <class Vector>
struct MergedRows {
  const Vector* prefix[kRows];  // null: the state is empty
  const Vector* suffix[kRows];
  Vector* out[kRows];
  float prefix_share[kRows], suffix_share[kRows];
};

// [tokens, heads] of LSEs.
struct Lses {
  float* data;
  int64_t stride_token;

  __device__ __forceinline__ float* at(int64_t token, int64_t head) const {
    return data + token * stride_token + head;
  }
};

// e^x for x <= 0.
__device__ __forceinline__ float worth(float x) { return exp2_fast(x * kLog2e); }

// Grid: (ceil(num_rows / kRows),). The sizes of all arrays are of words.
template <class T, class Vector>
__global__ void __launch_bounds__(kThreads)
    merge_rows(Heads<Vector> prefix_out, Lses prefix_lse, Heads<Vector> suffix_out, Lses suffix_lse,
               Heads<Vector> out, Lses lse, int64_t num_rows, int64_t num_heads, int64_t width) {
  auto& rows = shared_memory<MergedRows<Vector>>();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t num_here = min(num_rows - first_row, int64_t{kRows});

  // 1. What each state is worth beside the larger one, which is worth 1. An infinite LSE, of either sign, is
  // of no key; of two, nothing is subtracted: -inf less -inf is NaN.
  const int here = threadIdx.x;
  if (here < num_here) {
    const int64_t token = (first_row + here) / num_heads, head = (first_row + here) % num_heads;
    const float prefix = *prefix_lse.at(token, head), suffix = *suffix_lse.at(token, head);
    const bool has_prefix = fabsf(prefix) != INFINITY, has_suffix = fabsf(suffix) != INFINITY;
    float merged = -INFINITY, prefix_share = 0.0f, suffix_share = 0.0f;
    rows.prefix[here] = nullptr;
    rows.suffix[here] = nullptr;
    if (has_prefix && has_suffix) {
      const float largest = max(prefix, suffix);
      const float prefix_worth = worth(prefix - largest), suffix_worth = worth(suffix - largest);
      const float total = prefix_worth + suffix_worth;
      merged = largest + logf(total);
      prefix_share = prefix_worth / total;
      suffix_share = suffix_worth / total;
    } else if (has_prefix) {
      merged = prefix;
      prefix_share = 1.0f;
    } else if (has_suffix) {
      merged = suffix;
      suffix_share = 1.0f;
    }
    if (has_prefix) {
      rows.prefix[here] = prefix_out.at(token, head);
    }
    if (has_suffix) {
      rows.suffix[here] = suffix_out.at(token, head);
    }
    rows.out[here] = out.at(token, head);
    rows.prefix_share[here] = prefix_share;
    rows.suffix_share[here] = suffix_share;
    *lse.at(token, head) = merged;
  }
  __syncthreads();

  // 2. The outputs. Of an empty state nothing is read: 0 x NaN is NaN.
  const int64_t num_words = num_here * width;
  for (int64_t first = threadIdx.x; first < num_words; first += kThreads * kInFlight) {
    // All loads before any store: the compiler moves none across, for all it knows they overlap.
    Vector prefix[kInFlight], suffix[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      prefix[i] = Vector{};
      suffix[i] = Vector{};
      const int64_t word = first + i * kThreads;
      if (word < num_words) {
        const int row = static_cast<int>(word / width);
        const int64_t column = word % width;
        if (rows.prefix[row] != nullptr) {
          prefix[i] = rows.prefix[row][column];
        }
        if (rows.suffix[row] != nullptr) {
          suffix[i] = rows.suffix[row][column];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t word = first + i * kThreads;
      if (word < num_words) {
        const int row = static_cast<int>(word / width);
        Vector merged;
#pragma unroll
        for (int j = 0; j < Vector::kCount; ++j) {
          const float from_prefix = rows.prefix_share[row] * to_float(prefix[i].of[j]);
          merged.of[j] = from_float<T>(from_prefix + rows.suffix_share[row] * to_float(suffix[i].of[j]));
        }
        rows.out[row][word % width] = merged;
      }
    }
  }
}

Lses lses_of(const TensorView& tensor) { return {data<float>(tensor), tensor.stride(0)}; }

void merge_states(TensorView prefix_out, TensorView prefix_lse, TensorView suffix_out, TensorView suffix_lse,
                  TensorView out, TensorView lse) {
  MLA_CHECK(out, {-1, -1, -1}, model_dtype(out, "out"));
  const int64_t num_tokens = out.size(0), num_heads = out.size(1), width = out.size(2);
  MLA_CHECK(prefix_out, {num_tokens, num_heads, width}, out.dtype());
  MLA_CHECK(suffix_out, {num_tokens, num_heads, width}, out.dtype());
  MLA_CHECK(prefix_lse, {num_tokens, num_heads}, kFloat32);
  MLA_CHECK(suffix_lse, {num_tokens, num_heads}, kFloat32);
  MLA_CHECK(lse, {num_tokens, num_heads}, kFloat32);
  const int64_t num_rows = num_tokens * num_heads;
  if (num_rows == 0) {
    return;
  }
  const int64_t bytes = Alignment::element_bytes(out);
  const Alignment alignment = Alignment{}.with(prefix_out).with(suffix_out).with(out).with(width * bytes);
  with_model_dtype(out, "out", [&](auto element) {
    using T = decltype(element);
    with_word(alignment, [&](auto word) {
      // No word is narrower than an element, which the compiler does not know.
      using Word = std::conditional_t<(sizeof(word) < sizeof(T)), T, decltype(word)>;
      using Vector = Elements<T, Word>;
      launch(out, merge_rows<T, Vector>, blocks(ceil_div<int64_t>(num_rows, kRows), "blocks of heads"),
             kThreads, sizeof(MergedRows<Vector>), heads_of<Vector>(prefix_out), lses_of(prefix_lse),
             heads_of<Vector>(suffix_out), lses_of(suffix_lse), heads_of<Vector>(out), lses_of(lse), num_rows,
             num_heads, width / Vector::kCount);
    });
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(merge_states, merge_states)
