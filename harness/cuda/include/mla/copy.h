// Copies of rows that lie anywhere, by the threads of a block, in words (words.h).
#pragma once

#include <cstdint>

#include "mla/launch.h"

namespace mla {

constexpr int kCopyThreads = 256;
constexpr int kCopiesInFlight = 4;  // words that a thread has under way before it stores the first

// The rows that a block copies, in shared memory.
template <class Word, int kRows>
struct CopiedRows {
  const Word* source[kRows];  // null: the row becomes 0
  Word* target[kRows];        // null: the row is not written
};

// Copies the first `count` rows, of `width` words each. The block, of kCopyThreads threads, has met since
// they were named.
template <class Word, int kRows>
__device__ __forceinline__ void copy_rows(const CopiedRows<Word, kRows>& rows, int count, int width) {
  const int num_words = count * width;
  for (int first = threadIdx.x; first < num_words; first += kCopyThreads * kCopiesInFlight) {
    Word words[kCopiesInFlight];
    Word* targets[kCopiesInFlight];

    // 1. All loads before any store: the compiler moves none across, for all it knows they overlap.
#pragma unroll
    for (int i = 0; i < kCopiesInFlight; ++i) {
      words[i] = Word{};
      targets[i] = nullptr;
      const int word = first + i * kCopyThreads;
      if (word < num_words) {
        const int row = word / width, column = word % width;
        if (rows.source[row] != nullptr) {
          words[i] = rows.source[row][column];
        }
        if (rows.target[row] != nullptr) {
          targets[i] = rows.target[row] + column;
        }
      }
    }

    // 2. The stores.
#pragma unroll
    for (int i = 0; i < kCopiesInFlight; ++i) {
      if (targets[i] != nullptr) {
        *targets[i] = words[i];
      }
    }
  }
}

// The words of a row of which a block copies at most kRows, or ValueError where it could not count them.
template <int kRows>
int copied_words(int64_t width) {
  constexpr int64_t kMost = 0x7fffffff / kRows - kCopyThreads * kCopiesInFlight;
  if (width > kMost) {
    TVM_FFI_THROW(ValueError) << "a copied row has at most " << kMost << " words, got " << width;
  }
  return static_cast<int>(width);
}

}  // namespace mla
