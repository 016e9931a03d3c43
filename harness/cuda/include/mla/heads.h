// Tensors of heads, as kernels take them.
#pragma once

#include <cstdint>

#include "mla/words.h"

namespace mla {

// A [tokens, heads, columns] tensor, dense in its columns; strides are in T, an element or a word of several.
template <class T>
struct Heads {
  T* data;
  int64_t stride_token, stride_head;

  __device__ __forceinline__ T* at(int64_t token, int64_t head) const {
    return data + token * stride_token + head * stride_head;
  }
};

// Of a tensor of tokens and columns alone, the one head it has.
template <class T>
Heads<T> heads_of(const TensorView& tensor) {
  const int64_t elements = sizeof(T) / Alignment::element_bytes(tensor);
  const int64_t stride_head = tensor.ndim() == 3 ? tensor.stride(1) / elements : 0;
  return {data<T>(tensor), tensor.stride(0) / elements, stride_head};
}

}  // namespace mla
