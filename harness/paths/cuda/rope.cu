// Rotates the query's and the key's rope parts. The contract is rope.py's.

#include "mla/heads.h"
#include "mla/rotation.h"

namespace {

using namespace mla;

constexpr int kThreads = 256;

// Grid: (ceil(num_tokens * (num_heads + 1) * (num_pairs / kPairs) / kThreads),). kPairs pairs a thread, a
// divisor of num_pairs; the key is the head behind the query's last. Without a table cos_sin_cache is null.
template <class T, class Angle, int kPairs, bool kIsNeox>
__global__ void __launch_bounds__(kThreads)
    rotate_heads(Heads<T> q_pe_raw, Heads<T> k_pe_raw, const int* position_ids, const int* batch_id_per_token,
                 const Angle* cos_sin_cache, int64_t table_stride, Heads<T> q_pe, Heads<T> k_pe,
                 int64_t num_tokens, int64_t num_heads, int num_pairs, bool rounds_products) {
  // 1. Whose pairs these are.
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int packs = num_pairs / kPairs;
  const int64_t token = thread / packs / (num_heads + 1), head = thread / packs % (num_heads + 1);
  const int pair = static_cast<int>(thread % packs) * kPairs;
  if (token >= num_tokens) {
    return;
  }
  const T* raw;
  T* out;
  if (head < num_heads) {
    raw = q_pe_raw.at(token, head);
    out = q_pe.at(token, head);
  } else {
    raw = k_pe_raw.at(token, 0);
    out = k_pe.at(token, 0);
  }

  // 2. Their two packs: half a row apart, or, interleaved, one behind the other.
  int low_pack = pair, high_pack = pair + num_pairs;
  if constexpr (!kIsNeox) {
    low_pack = 2 * pair;
    high_pack = low_pack + kPairs;
  }
  using Values = Pack<T, kPairs>;
  Values values[2] = {};  // of padding nothing is read, and 0 is written

  // 3. Padding's position may lie anywhere.
  if (batch_id_per_token[token] >= 0) {
    values[0] = *reinterpret_cast<const Values*>(raw + low_pack);
    values[1] = *reinterpret_cast<const Values*>(raw + high_pack);
    if (cos_sin_cache != nullptr) {
      using Angles = Pack<Angle, kPairs>;
      const Angle* row = cos_sin_cache + position_ids[token] * table_stride + pair;
      const Angles cosines = *reinterpret_cast<const Angles*>(row);
      const Angles sines = *reinterpret_cast<const Angles*>(row + num_pairs);
      rotate_packs<kIsNeox>(values, cosines, sines, rounds_products);
    }
  }
  *reinterpret_cast<Values*>(out + low_pack) = values[0];
  *reinterpret_cast<Values*>(out + high_pack) = values[1];
}

void rotate(TensorView q_pe_raw, TensorView k_pe_raw, TensorView position_ids, TensorView batch_id_per_token,
            Optional<TensorView> cos_sin_cache, TensorView q_pe, TensorView k_pe, bool is_neox,
            bool rounds_products) {
  const DLDataType dtype = q_pe.dtype();
  MLA_CHECK(q_pe, {-1, -1, -1}, dtype);
  const int64_t num_tokens = q_pe.size(0), num_heads = q_pe.size(1), width = q_pe.size(2);
  MLA_CHECK(q_pe_raw, {num_tokens, num_heads, width}, dtype);
  MLA_CHECK(k_pe, {num_tokens, width}, dtype);
  MLA_CHECK(k_pe_raw, {num_tokens, width}, dtype);
  MLA_CHECK(position_ids, {num_tokens}, kInt32);
  MLA_CHECK(batch_id_per_token, {num_tokens}, kInt32);
  if (width % 2 != 0 || width > 0x7fffffff) {
    TVM_FFI_THROW(ValueError) << "q_pe must have an even number of columns, at most 2147483646, got "
                              << width;
  }
  const int64_t num_pairs = width / 2, bytes = Alignment::element_bytes(q_pe);
  Alignment alignment;
  alignment.with(q_pe).with(k_pe).with(q_pe_raw).with(k_pe_raw).with(num_pairs * bytes);
  int64_t table_stride = 0;
  check_table(cos_sin_cache, width, dtype);
  if (cos_sin_cache.has_value()) {
    const TensorView table = *cos_sin_cache;
    alignment.with(table);
    table_stride = table.stride(0);
  }
  if (num_tokens == 0 || num_pairs == 0) {
    return;
  }
  with_model_dtype(q_pe, "q_pe", [&](auto value) {
    using T = decltype(value);
    with_angle<T>(cos_sin_cache, dtype, [&](auto angle) {
      using Angle = decltype(angle);
      const Angle* table = nullptr;
      if (cos_sin_cache.has_value()) {
        table = data<Angle>(*cos_sin_cache);
      }
      const auto go = [&](auto kernel, int64_t pairs) {
        const int64_t threads = num_tokens * (num_heads + 1) * (num_pairs / pairs);
        launch(q_pe, kernel, blocks(ceil_div<int64_t>(threads, kThreads), "blocks of pairs"), kThreads, 0,
               heads_of<T>(q_pe_raw), heads_of<T>(k_pe_raw), data<int>(position_ids),
               data<int>(batch_id_per_token), table, table_stride, heads_of<T>(q_pe), heads_of<T>(k_pe),
               num_tokens, num_heads, num_pairs, rounds_products);
      };
      constexpr int kMany = kPackBytes / sizeof(T);
      const bool is_aligned = alignment.bits % kPackBytes == 0;
      if (is_aligned && is_neox) {
        go(rotate_heads<T, Angle, kMany, true>, kMany);
      } else if (is_aligned) {
        go(rotate_heads<T, Angle, kMany, false>, kMany);
      } else if (is_neox) {
        go(rotate_heads<T, Angle, 1, true>, 1);
      } else {
        go(rotate_heads<T, Angle, 1, false>, 1);
      }
    });
  });
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rotate, rotate)
